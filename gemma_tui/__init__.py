"""gemma-tui: a terminal workbench for studying Gemma-3 from the inside."""

VERSION = "0.1.0"
