"""Which weights a number came from: a digest of a model's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gemma_tui.errors import GemmaTuiError
from gemma_tui.remembered import recall, remember

FILE = "digests.json"
PATTERNS = ("*.safetensors", "config.json")


def model_digest(folder: Path, adapter: Path | None = None) -> str:
    """SHA-256 of the names and contents of a model's weights and config, and of its adapter's; hexadecimal.

    Reading gigabytes takes seconds, so digests are remembered as long as no file changes.

    Raises:
        GemmaTuiError: a file cannot be read, or the digest not be kept.
    """
    files = [
        path for place in (folder, adapter) if place for pattern in PATTERNS for path in sorted(place.glob(pattern))
    ]
    try:
        stamp = " ".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)
        known = recall(FILE).get(stamp)
        digest = known if isinstance(known, str) else _digest(files)
    except OSError as error:
        raise GemmaTuiError(f"{error.filename} cannot be read ({error.strerror}): check the model's files") from None
    if digest != known:
        remember(FILE, "the digest", {stamp: digest})
    return digest


def _digest(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
