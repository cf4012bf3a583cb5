"""The demo: train, segment and judge on a real MRI."""
