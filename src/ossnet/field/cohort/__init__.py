"""Many scans: each finished file final, several processes sharing the work."""
