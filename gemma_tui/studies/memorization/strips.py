"""Which tokens the bits of a sequence are of: the most memorised sequences token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.base import TokenScores
from gemma_tui.figure import LineChart, Table
from gemma_tui.heat import Heat
from gemma_tui.plots import Series
from gemma_tui.studies.attention.reading import label
from gemma_tui.studies.memorization.bits import token_bits, uniform
from gemma_tui.studies.memorization.sequences import TRAIN, Sequences
from gemma_tui.tokenizer import Tokenizer

STRIPS = 12
"""Sequences that are shown token by token."""

COLUMNS = 64
"""Tokens of a sequence that the map shows."""

TOKENS, BEFORE = 20, 5
"""Tokens of the most memorised sequence that are listed, and how many before each are shown with it."""

BINS = 20
"""Of a distribution at most; fewer sequences have 2·n^⅓ of them (Rice's rule)."""


def strip_rows(
    sequences: Sequences,
    target: Sequence[TokenScores],
    reference: Sequence[TokenScores] | None,
    vocabulary: int,
    tokenizer: Tokenizer,
) -> list[dict[str, Any]]:
    """The training sequences with the most signed bits, the most first, ready for JSON.

    Returns:
        For each its ``row``, its ``tokens`` without ``<bos>`` as they are shown, and the ``bits`` of
        each: against the uniform code where there is no reference, None where the loss does not count the token.
    """
    found = {}
    for i in sequences.sets[TRAIN]:
        known = target[i].log_probs
        other = uniform(np.ones(len(known)), vocabulary) if reference is None else reference[i].log_probs
        found[i] = token_bits(known, other)
    counted = [window.supervised[1:] for window in sequences.windows]
    most = sorted(found, key=lambda i: -float(found[i][counted[i]].sum()))[:STRIPS]
    return [
        {
            "row": int(sequences.rows[i]),
            "bits": [float(bits) if counts else None for bits, counts in zip(found[i], counted[i], strict=True)],
            "tokens": [label(tokenizer, int(token)) for token in sequences.windows[i].ids[1:]],
        }
        for i in most
    ]


def strip_heat(rows: Sequence[dict[str, Any]], against: str) -> Heat:
    """Bits of every token: a row for each sequence, a column for each place, missing beyond the end.

    Args:
        against: what the bits are saved over.
    """
    every = strip_values(rows)
    values = every[:, :COLUMNS]
    places = [str(place + 1) for place in range(values.shape[1])]
    cut = f", their first {COLUMNS} tokens" if every.shape[1] > COLUMNS else ""
    title = f"Δ bits per token of the most memorised sequences {against}{cut}"
    return Heat(title, [f"row {row['row']}" for row in rows], places, values, "bits")


def strip_values(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """float64 ``[sequences, tokens of the longest]``; NaN beyond the end and where a token is not counted."""
    values = np.full((len(rows), max(len(row["bits"]) for row in rows)), np.nan)
    for place, row in enumerate(rows):
        values[place, : len(row["bits"])] = np.array(row["bits"], np.float64)
    return values


def strip_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The tokens of the most memorised sequence that most bits are of, the most first, each after those before it."""
    most = rows[0]
    bits, tokens = strip_values(rows[:1])[0], most["tokens"]
    order = [int(i) for i in np.argsort(-bits, kind="stable") if not np.isnan(bits[i])][:TOKENS]
    cells = [(most["row"], i + 1, "".join(tokens[max(0, i - BEFORE) : i]), tokens[i], float(bits[i])) for i in order]
    return Table("strip", ("row", "place", "after", "token", "bits"), cells)


def distribution(sets: dict[str, np.ndarray], measure: str) -> LineChart:
    """How the bits of sequences are spread: the share of each set's sequences in bins that all sets share.

    Args:
        sets: bits of each sequence by set, none empty.
        measure: what the bits are called.
    """
    bins = min(BINS, math.ceil(2 * min(map(len, sets.values())) ** (1 / 3)))
    edges = np.histogram_bin_edges(np.concatenate(list(sets.values())), bins)
    middles = (edges[:-1] + edges[1:]) / 2
    lines = [Series(name, middles, np.histogram(bits, edges)[0] / len(bits)) for name, bits in sets.items()]
    return LineChart("share of the sequences", lines, f"{measure} of a sequence")
