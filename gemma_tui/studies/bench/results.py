"""What a benchmark found: a table, charts over the batch, and which engine is the fastest."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.runs.store import Row, Run, RunStore
from gemma_tui.studies.bench.machine import in_words
from gemma_tui.studies.bench.measuring import plan_of
from gemma_tui.studies.bench.plan import NO_TRAINING

SPEEDS = {"prefill": "reading a prompt", "decode": "decoding", "training": "training"}

Cell = Mapping[str, Any]
"""What a cell told."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second of several repeats."""

    median: float
    lowest: float
    highest: float

    @property
    def text(self) -> str:
        """In words, the spread beside the median."""
        return f"{self.median:,.0f} tokens/s ({self.lowest:,.0f} to {self.highest:,.0f})"


def speed_of(cell: Cell, name: str) -> Speed | None:
    """One of ``SPEEDS`` as a cell measured it; None where it did not."""
    repeats = cell.get(name)
    return Speed(statistics.median(repeats), min(repeats), max(repeats)) if repeats else None


def read_bench(store: RunStore, run: Run) -> Figure:
    """What a run has found so far."""
    return bench_figure(run, store.events(run.run_id))


def bench_figure(run: Run, events: Sequence[Row]) -> Figure:
    """A run's cells side by side."""
    machines = [e.values["machine"] for e in events if e.kind == "start"]
    cells = [e.values for e in events if e.kind == "cell"]
    plan = plan_of(run)
    asked = f"prompts of {plan.prompt:,} tokens, {plan.new_tokens:,} decoded"
    if plan.method != NO_TRAINING:
        asked += f"; {plan.method} on windows of {plan.sequence_length:,}"
    asked += f"; medians of {plan.repeats:,} repeats, in brackets the slowest and the fastest"
    best = [sentence for name in SPEEDS if (sentence := _best(name, cells))]
    notes = [*best, asked, *dict.fromkeys(map(in_words, machines))]
    failed = [(c["engine"], c["dtype"], c["batch"], c["task"], c["error"]) for c in cells if c.get("error")]
    tables = [table for name in SPEEDS if (table := _table(name, cells)).rows]
    if failed:
        tables.append(Table("failure", ("engine", "dtype", "batch", "task", "why"), failed))
    charts = [chart for name, what in SPEEDS.items() if (chart := _chart(name, what, cells)) is not None]
    facts = {"run": run.run_id, "machines": machines, "plan": dict(run.plan), "cells": [dict(cell) for cell in cells]}
    return Figure(f"{run.run_id}: {plan.model} on this machine", notes, charts=charts, tables=tables, facts=facts)


def _told(name: str, cells: Sequence[Cell]) -> list[tuple[Cell, Speed]]:
    """The cells that measured one of ``SPEEDS``, by engine, dtype and batch."""
    ordered = sorted(cells, key=lambda cell: (cell["engine"], cell["dtype"], cell["batch"]))
    return [(cell, speed) for cell in ordered if (speed := speed_of(cell, name))]


def _table(name: str, cells: Sequence[Cell]) -> Table:
    rows = [
        (c["engine"], c["dtype"], c["batch"], speed.median, speed.lowest, speed.highest, c["memory"] / 1e6)
        for c, speed in _told(name, cells)
    ]
    return Table(name, ("engine", "dtype", "batch", f"{name} tok/s", "lowest", "highest", "MB"), rows)


def _best(name: str, cells: Sequence[Cell]) -> str:
    """The fastest cell of a kind, and how it compares with the other engine's fastest."""
    told = sorted(_told(name, cells), key=lambda each: -each[1].median)
    if not told:
        return ""
    best, speed = told[0]
    other = next((each for each in told if each[0]["engine"] != best["engine"]), None)
    beside = ""
    if other is not None:
        times = speed.median / other[1].median
        beside = f", {times:.2g} times {other[0]['engine']} at its best ({_place(other[0])})"
    return f"{SPEEDS[name]} is fastest with {_place(best)}: {speed.text}{beside}"


def _place(cell: Cell) -> str:
    return f"{cell['engine']} {cell['dtype']}, batch {cell['batch']}"


def _chart(name: str, what: str, cells: Sequence[Cell]) -> LineChart | None:
    """Tokens a second over the batch, a line for each engine and dtype; None where one batch makes no line."""
    lines: dict[str, Series] = {}
    for cell, speed in _told(name, cells):
        label = f"{cell['engine']} {cell['dtype']}"
        lines.setdefault(label, Series(label)).add(cell["batch"], speed.median)
    if not any(len(line.x) > 1 for line in lines.values()):
        return None
    return LineChart(f"{what}, tokens/s", list(lines.values()), "batch")
