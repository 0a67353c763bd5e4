"""Speed and memory of both engines on this machine."""
