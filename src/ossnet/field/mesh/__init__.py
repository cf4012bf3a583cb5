"""Surfaces, from a label map and a function that is asked again where the surface lies."""
