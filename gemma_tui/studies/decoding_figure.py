"""What was written token by token and in blocks as a figure: entropies, passes, and every token of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.studies.generation import AR, SBD
from gemma_tui.studies.replay import Cell, Replay
from gemma_tui.studies.side_by_side import Side, SideBySide
from gemma_tui.studies.writing import agreement

ENTROPY, DECIDED = "entropy", "decided"
MEASURES = {ENTROPY: "entropy of each token when decided, nats", DECIDED: "tokens decided per pass"}
X_LABELS = {ENTROPY: "token", DECIDED: "pass"}
NAMES = {AR: "next token", SBD: "blocks"}


def line_of(measure: str, name: str, replay: Replay, step: int, last: int | None = None) -> Series:
    """A measure of a text after some of its passes.

    Args:
        measure: one of ``MEASURES``: entropies are over the places, NaN where nothing is decided as yet; decided tokens
            are over the passes.
        last: how many places, or passes, at most; the last ones.
    """
    if measure == DECIDED:
        counts = replay.counts[:step]
        start = max(0, len(counts) - last) if last else 0
        return Series(name, [float(i + 1) for i in range(start, len(counts))], list(map(float, counts[start:])))
    cells = replay.cells(step, max(0, replay.extent(step) - last) if last else 0)
    entropies = [cell.entropy if cell.decided else math.nan for cell in cells]
    return Series(name, [float(cell.place) for cell in cells], entropies)


def decoding_figure(texts: SideBySide) -> Figure:
    """What both texts took, and which pass decided each token."""
    replays = {NAMES[side.plan.decoder]: Replay(list(side.generation.passes), side.plan.block) for side in texts.sides}
    for side, replay in zip(texts.sides, replays.values(), strict=True):
        replay.end = len(side.generation.tokens)
    charts = [
        LineChart(title, [line_of(measure, name, r, r.steps) for name, r in replays.items()], X_LABELS[measure])
        for measure, title in MEASURES.items()
    ]
    notes = [f"{texts.model} on {texts.engine}, prompt: {texts.sides[0].plan.prompt}"]
    if len(texts.sides) > 1:
        found = agreement(*(side.generation.tokens for side in texts.sides))
        first = "" if found.first is None else f"; the first other one is token {found.first}"
        notes.append(f"{100 * found.share:.1f} % of {found.compared:,} tokens agree{first}")
    notes += [text for side in texts.sides for text in side.generation.warnings]
    tokens = _tokens(replays, texts.label)
    return Figure("generation", notes, charts=charts, tables=[_numbers(texts.sides), tokens], facts=_facts(texts))


def _numbers(sides: tuple[Side, ...]) -> Table:
    columns = ("decoder", "tokens", "passes", "tokens per pass", "tokens/s", "ended")
    rows = [
        (
            NAMES[side.plan.decoder], len(told.tokens), len(told.passes), told.tokens_per_pass,
            told.tokens_per_second, told.ended,
        )
        for side in sides for told in (side.generation,)
    ]  # fmt: skip
    return Table("text", columns, rows)


def _tokens(replays: dict[str, Replay], label: Callable[[int], str]) -> Table:
    """A row for each place; what one text has no token for is left open."""
    columns = ["place"]
    for name in replays:
        columns += [name, f"{name}, pass", f"{name}, nats", f"{name}, p"]
    places = zip_longest(*(replay.decisions() for replay in replays.values()))
    return Table("token", columns, [[n, *(v for c in cells for v in _row(c, label))] for n, cells in enumerate(places)])


def _row(cell: Cell | None, label: Callable[[int], str]) -> tuple[Any, ...]:
    return (label(cell.token), cell.step, cell.entropy, cell.probability) if cell else ("", None, None, None)


def _facts(texts: SideBySide) -> dict[str, Any]:
    return {"model": texts.model, "engine": texts.engine} | {
        NAMES[side.plan.decoder]: {
            "tokens": list(side.generation.tokens), "text": side.generation.text, "block": side.plan.block,
            "gamma": side.plan.gamma, "order": side.plan.order, "prompt_tokens": side.generation.prompt_tokens,
        }
        for side in texts.sides
    }  # fmt: skip
