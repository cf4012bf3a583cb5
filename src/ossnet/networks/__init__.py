"""Modules and their declarations: no files, no loops."""
