"""The task over rows of files."""
