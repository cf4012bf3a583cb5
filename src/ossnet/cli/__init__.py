"""One thin file a command: arguments in, one call."""
