"""Whether a model fits this machine."""

from __future__ import annotations

import psutil

from gemma_tui.hub.demo import packaged
from gemma_tui.hub.models import Summary

TIGHT, FULL = 0.70, 0.85
"""Shares of the memory from which on a model is called tight, and from which on it does not fit."""


def band(needed: int, available: int) -> str:
    """``fits``, ``tight`` or ``too large``."""
    share = needed / max(1, available)
    return "fits" if share < TIGHT else "tight" if share < FULL else "too large"


def state(item: Summary) -> str:
    """What one can do with a model here, in a few words."""
    if item.problem:
        return "no weights" if item.parameters else "broken"
    if not item.installed:
        return "import with enter" if packaged() else "needs the extra `demo`"
    return here(item.nbytes if item.packed else 4 * item.parameters)


def here(needed: int) -> str:
    """``fits``, ``tight`` or ``too large`` on this machine."""
    return band(needed, psutil.virtual_memory().total)
