"""What answers at locations: a network bound to one scan, family by family."""
