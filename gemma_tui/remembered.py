"""Small facts that were costly to find out, kept as JSON in the data folder; losing them costs time and no more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError


def recall(file: str) -> dict[str, Any]:
    """What a file of the data folder holds; nothing where it is missing, broken or no object."""
    try:
        found = json.loads((paths.home() / file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def remember(file: str, what: str, facts: Mapping[str, Any]) -> None:
    """Put facts beside those that a file of the data folder holds; the file is whole, or is what it was before.

    Args:
        what: what they are, for the error.

    Raises:
        GemmaTuiError: it cannot be written.
    """
    path = paths.home() / file
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(recall(file) | dict(facts), indent=1), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise GemmaTuiError(f"{path} cannot be written ({error.strerror}): {what} is not kept") from None
