"""Names of new models and adapters: which may be given, and which mean something already."""

from __future__ import annotations

import re

from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.hub.models import NANO, REAL

NEW_NAME = re.compile(r"\w[\w.\-]{0,95}")


def name_from(text: str) -> str:
    """A name for a model, of one from elsewhere; of a text without a letter or digit nothing is left."""
    return re.sub(r"[^\w.\-]+", "-", text, flags=re.ASCII).strip("-.")


def free_name(name: str) -> str:
    """The name itself, if a new model or adapter may have it.

    Raises:
        EngineError: it is not valid, or means something already.
    """
    if not NEW_NAME.fullmatch(name):
        raise UsageError(f"{name[:60]!r} is no name for an adapter or model: use letters, digits, dots and dashes")
    if name in (NANO, REAL):
        raise GemmaTuiError(f"{name} is a built-in model: choose another name")
    for place in (paths.models(), paths.adapters(), paths.runs()):
        if (place / name).exists():
            raise GemmaTuiError(f"{place / name} is there already: choose another name, or remove it first")
    return name
