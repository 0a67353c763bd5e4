"""A figure as a file: JSON, npz, SVG, or one HTML page that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from engines.checkpoints import replacing
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.exports.data import write_json, write_npz
from gemma_tui.exports.page import write_html
from gemma_tui.exports.svg import write_svg
from gemma_tui.figure import Figure

FORMATS: dict[str, Callable[[Figure, BinaryIO], None]] = {
    ".json": write_json,
    ".npz": write_npz,
    ".svg": write_svg,
    ".html": write_html,
}
"""What writes a figure, by the ending of the file."""


def export(figure: Figure, path: Path) -> None:
    """Write a figure; the file is whole, or is what it was before.

    Raises:
        UsageError: the ending is not that of a format, or the folder is not there.
        EngineError: the file cannot be written.
    """
    write = FORMATS.get(path.suffix.lower())
    if write is None:
        raise UsageError(f"{path.name} has no ending that tells its format: take {', '.join(FORMATS)}")
    check_target(path)
    try:
        with replacing(path) as file:
            write(figure, file)
    except OSError as error:  # a name that is too long fails in the cleaning up, too
        raise GemmaTuiError(f"{path} cannot be written ({error.strerror}): take another name or folder") from None


def check_target(path: Path) -> None:
    """Refuse a path that no file can be written to, before anything is computed for it."""
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"folder {folder} is not there: make it, or take another")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"folder {folder} is not writable: take another")
