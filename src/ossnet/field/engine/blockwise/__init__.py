"""The default network bound to a scan: coarse maps of all of it, fine ones in blocks where locations are asked."""
