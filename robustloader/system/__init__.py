"""Doors to what is not ours: torch's private names, and the operating system."""
