"""How much room the engines make for keys and values, and how many tokens they read at a time."""

from __future__ import annotations

PREFILL = 512
"""Prompt tokens per forward pass, so that a long prompt needs no long square of scores."""

GROWTH = 256
"""Tokens that a buffer of a global layer has room for beyond what it must hold, so that it is copied rarely."""


def room(kept: int, new: int, window: int | None) -> int:
    """Rows of a buffer that is made for ``new`` tokens after those that are kept; a local layer has a window."""
    return kept + new + (GROWTH if window is None else window)


def most_rows(length: int, window: int | None) -> int:
    """The most rows that a layer's buffer has while ``length`` tokens are read, ``PREFILL`` at a time."""
    made = end = most = 0
    for start in range(0, length, PREFILL):
        new, kept = min(PREFILL, length - start), start if window is None else min(start, window - 1)
        if end + new > made:
            made, end = room(kept, new, window), kept
        end, most = end + new, max(most, made)
    return most
