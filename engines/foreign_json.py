"""JSON of strangers: how much of it there may be."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any


def read_json(blob: bytes, most: int, **options: Any) -> Any:
    """The value of a JSON text of at most ``most`` values: three bytes can make an object of a hundred.

    Args:
        options: of ``json.loads``.

    Raises:
        ValueError: it has more, or is no JSON in UTF-8.
        RecursionError: it is nested too deeply.
    """
    if (values := values_in(blob)) > most:
        raise ValueError(f"{values:,} values, more than {most:,}")
    return json.loads(blob.decode("utf-8"), **options)


def values_in(blob: bytes) -> int:
    """How many values a JSON text has at most: signs that stand in texts are counted, too."""
    return 1 + sum(map(blob.count, (b",", b"[", b"{")))


def read_file(path: Path, limit: int) -> bytes:
    """The content of a file of at most ``limit`` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or a pipe or a device, which would be waited for without an end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no regular file")
    if status.st_size > limit:
        raise ValueError(f"{status.st_size:,} bytes, more than {limit:,}")
    return path.read_bytes()
