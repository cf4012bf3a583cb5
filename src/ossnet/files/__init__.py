"""Bytes on disk ↔ volumes; the only place that opens images."""
