"""A figure as a file: JSON, npz, CSV, SVG, PNG, or one HTML page that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from engines.checkpoints import replacing
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.exports.data import write_csv, write_json, write_npz
from gemma_tui.exports.page import write_html
from gemma_tui.exports.png import check_fonts, write_png
from gemma_tui.exports.svg import write_svg
from gemma_tui.figure import Figure

FORMATS: dict[str, Callable[[Figure, BinaryIO], None]] = {
    ".json": write_json,
    ".npz": write_npz,
    ".csv": write_csv,
    ".svg": write_svg,
    ".png": write_png,
    ".html": write_html,
}
"""What writes a figure, by the ending of the file."""


def export(figure: Figure, path: Path) -> None:
    """Write a figure; the file is whole, or is what it was before.

    Raises:
        UsageError: the ending is not that of a format, or the folder is not there.
        EngineError: the file cannot be written, or the figure has nothing for it.
    """
    check_target(path)
    try:
        with replacing(path) as file:
            FORMATS[path.suffix.lower()](figure, file)
    except OSError as error:  # a name that is too long fails in the cleaning up, too
        raise GemmaTuiError(f"{path} cannot be written ({error.strerror}): take another name or folder") from None


def check_target(path: Path) -> None:
    """Refuse a path that no figure can be written to, before anything is computed for it."""
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise UsageError(f"{path.name} has no ending that tells its format: take {', '.join(FORMATS)}")
    check_writable(path)
    if ending == ".png":
        check_fonts()


def check_writable(path: Path) -> None:
    """Refuse a path that no file can be written to."""
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"folder {folder} is not there: make it, or take another")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"folder {folder} is not writable: take another")
