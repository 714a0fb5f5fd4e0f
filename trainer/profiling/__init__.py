"""Records steps of a running trainer with torch's profiler, for `areal-like profile`."""
