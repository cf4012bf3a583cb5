"""A model bound to a scan: everything that answers."""
