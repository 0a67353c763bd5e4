"""Where the program keeps its files. ``GEMMA_TUI_HOME`` moves all of them."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

PACKAGE = Path(__file__).resolve().parent


def home() -> Path:
    """The data folder: models, runs and their database. Not created here."""
    moved = os.environ.get("GEMMA_TUI_HOME")
    return Path(moved).expanduser() if moved else Path(platformdirs.user_data_dir("gemma-tui", appauthor=False))


def models() -> Path:
    """Imported and converted models, one folder each."""
    return home() / "models"


def adapters() -> Path:
    """Imported and blended adapters, one folder each."""
    return home() / "adapters"


def runs() -> Path:
    """The run database, and one folder per run for checkpoints and adapters."""
    return home() / "runs"


def assets() -> Path:
    """What ships with the program: in the checkout beside the packages, in an installation inside this one."""
    installed = PACKAGE / "assets"
    return installed if installed.is_dir() else PACKAGE.parent / "assets"
