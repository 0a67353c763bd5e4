"""The commands of ``gemma-tui``, one file per group. Each takes parsed arguments and an output, and returns a code."""
