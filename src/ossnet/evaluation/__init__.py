"""Label maps against label maps."""
