"""Putting files on the disk itself."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

if sys.platform == "darwin":
    import fcntl


def sync(descriptor: int) -> None:
    """Flush a file or folder to the disk itself; on macOS plain fsync stops at the drive's cache.

    Raises:
        OSError: the disk did not take it.
    """
    if sys.platform == "darwin":
        with suppress(OSError):  # network file systems do not know it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)
