"""The logit lens: what the model would say if it stopped before each layer (nostalgebraist, 2020)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import fields

import numpy as np

from engines.edits import Span
from engines.inspection import LensRows
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.heat import Heat
from gemma_tui.plots import Series
from gemma_tui.studies.attention.reading import Reading, View, label

CHUNK = 64
"""Positions whose logits an engine holds at a time."""

SHOWN = 64
"""Positions of a view that is not told which."""

MEANING = {
    "probability": "of the most probable token of p_l = softmax(W_U · norm(h_l)), the norm's scale being that of h_l",
    "rank": "tokens that p_l gives more than the target",
    "kl": "KL(p_final ‖ p_l), nats",
    "entropy": "of p_l, nats",
    "log_prob": "ln p_l(target), nats",
}

Lens = dict[str, np.ndarray]
"""Each field of ``LensRows`` as ``[layers + 1, positions]``."""


def lens_view(reading: Reading, positions: Span | None = None, target: int | None = None) -> View:
    """Layer × position: the top token, its probability, the rank of the target; and the means by layer.

    Args:
        positions: the first, and the one after the last; None for the last 64.
        target: one token to be looked for everywhere; None for the token that follows each position.

    Raises:
        UsageError: positions that are not there, or a token outside the vocabulary.
    """
    span = positions or (max(0, reading.length - SHOWN), reading.length)
    check_positions(reading, span)
    check_token(reading, target)
    targets = reading.targets() if target is None else np.full(reading.length, target, np.int32)
    lens = yield from lens_rows(reading, span, targets)
    return Figure(
        f"logit lens, positions {span[0]} to {span[1] - 1}",
        notes=_notes(reading, span, positions is None, target),
        heats=[
            _heat(reading, span, "probability of the top token", lens["probability"]),
            _heat(reading, span, "rank of the target, from 1", lens["rank"] + 1.0, log=True),
        ],
        charts=_charts(lens),
        tables=[_table(reading, span, lens)],
        arrays={**lens, "positions": np.arange(*span), "targets": targets[slice(*span)]},
        facts={
            **reading.facts,
            "positions": list(span),
            "target": None if target is None else int(target),
            "definitions": MEANING,
        },
    )


def lens_rows(reading: Reading, span: Span, targets: np.ndarray) -> Generator[float, None, Lens]:
    """The lens at every layer, chunk by chunk.

    Args:
        targets: int32 ``[T]``, of the whole text.
    """
    starts = range(*span, CHUNK)
    layers = reading.inspection.config.num_hidden_layers + 1
    parts = []
    for index, start in enumerate(starts):
        chunk = start, min(start + CHUNK, span[1])
        rows: list[LensRows] = []
        for found in reading.inspection.lens(chunk, targets[slice(*chunk)]):
            rows.append(found)
            yield (index + len(rows) / layers) / len(starts)
        parts.append(rows)
    return {
        column.name: np.concatenate([np.stack([getattr(row, column.name) for row in rows]) for rows in parts], 1)
        for column in fields(LensRows)
    }


def check_positions(reading: Reading, span: Span) -> None:
    """Refuse positions that are not there, and none at all."""
    if not 0 <= span[0] < span[1] <= reading.length:
        raise UsageError(
            f"positions {span[0]} to {span[1] - 1} are not there: the text has positions 0 to {reading.length - 1}"
        )


def check_token(reading: Reading, token: int | None) -> None:
    """Refuse an id outside the vocabulary."""
    size = reading.inspection.config.vocab_size
    if token is not None and not 0 <= token < size:
        raise UsageError(f"token {token} is not there: the vocabulary has ids 0 to {size - 1}")


def columns(reading: Reading, positions: Sequence[int]) -> list[str]:
    """Positions as the columns of a map: the token, then where it is."""
    return [f"{reading.labels[position]} {position}" for position in positions]


def _notes(reading: Reading, span: Span, unasked: bool, target: int | None) -> list[str]:
    notes = ["row L0 is the embedding, L1 the stream after one layer, out the model's own prediction"]
    if unasked and span[0] > 0:
        notes.append(f"the last {SHOWN} of {reading.length:,} positions; name others to see them")
    if target is not None:
        notes.append(f"the target is {label(reading.tokenizer, target)} at every position")
    elif span[1] == reading.length:
        notes.append("the target is the token that follows; after the last, what the model finds most probable")
    else:
        notes.append("the target is the token that follows")
    return notes


def _names(count: int) -> list[str]:
    return [*(f"L{layer}" for layer in range(count - 1)), "out"]


def _heat(reading: Reading, span: Span, title: str, values: np.ndarray, log: bool = False) -> Heat:
    config = reading.inspection.config
    marks = ["·" if config.is_local(layer) else "G" for layer in range(config.num_hidden_layers)]
    meaning = "before a layer that is global G, local ·"
    names = columns(reading, range(*span))
    return Heat(title, _names(len(values)), names, values, "", [*marks, " "], meaning, log)


def _charts(lens: Lens) -> list[LineChart]:
    layers = np.arange(len(lens["kl"]), dtype=float)
    means = {name: lens[name].mean(1, dtype=np.float64) for name in ("kl", "entropy", "log_prob", "rank")}
    nats = [
        Series("KL(final ‖ layer)", layers, means["kl"]),
        Series("entropy", layers, means["entropy"]),
        Series("-ln p(target)", layers, -means["log_prob"]),
    ]
    rank = Series("mean rank of the target, from 1", layers, means["rank"] + 1)
    where = "layers before"
    return [LineChart("lens by layer, nats", nats, where), LineChart("rank of the target", [rank], where, log=True)]


def _table(reading: Reading, span: Span, lens: Lens) -> Table:
    names = _names(len(lens["top"]))
    shown = {int(token): label(reading.tokenizer, int(token)) for token in np.unique(lens["top"])}
    rows = [
        (
            name, position, reading.labels[position], shown[int(lens["top"][layer, at])],
            float(lens["probability"][layer, at]), int(lens["rank"][layer, at]), float(lens["kl"][layer, at]),
        )
        for layer, name in enumerate(names)
        for at, position in enumerate(range(*span))
    ]  # fmt: skip
    return Table("lens", ("layer", "position", "token", "top", "probability", "rank", "kl"), rows)
