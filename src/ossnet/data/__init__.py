"""Cases, locations and patches: from a folder of files to what a network is fed."""
