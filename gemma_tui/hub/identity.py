"""Which weights a number came from: a digest of a model's files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError

FILE = "digests.json"
PATTERNS = ("*.safetensors", "config.json")


def model_digest(folder: Path, adapter: Path | None = None) -> str:
    """SHA-256 of the names and contents of a model's weights and config, and of its adapter's; hexadecimal.

    Reading gigabytes takes seconds, so digests are remembered as long as no file changes.

    Raises:
        GemmaTuiError: a file cannot be read.
    """
    files = [
        path for place in (folder, adapter) if place for pattern in PATTERNS for path in sorted(place.glob(pattern))
    ]
    try:
        stamp = " ".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)
        known = _known()
        if stamp not in known:
            known[stamp] = _digest(files)
            _remember(known)
    except OSError as error:
        raise GemmaTuiError(f"{error.filename} cannot be read ({error.strerror}): check the model's files") from None
    return known[stamp]


def _digest(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _known() -> dict[str, str]:
    try:
        found = json.loads((paths.home() / FILE).read_text())
        return {str(stamp): str(digest) for stamp, digest in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}  # nothing remembered, or a file that says nothing


def _remember(known: dict[str, str]) -> None:
    path = paths.home() / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(known, indent=1))
    part.replace(path)
