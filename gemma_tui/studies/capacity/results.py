"""What a capacity sweep has found so far, as a figure: once for the screen, the command line and every export."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemma_tui.errors import GemmaTuiError
from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.runs.store import Row, Run, RunStore
from gemma_tui.studies.capacity.measures import (
    REFERENCE_LINES,
    Plateau,
    data_bits,
    expected_bits,
    plateau,
    summary,
)
from gemma_tui.studies.capacity.plan import CapacityPlan, Cell, cells_of
from gemma_tui.studies.capacity.sweep import TRACE, sweep_plan

CURVE = 60
"""Points of a curve that has a formula."""

DECADE = 10
"""Largest over smallest, from which on an axis is logarithmic."""

CELL_COLUMNS = (
    "cell", "state", "left, s", "data bits", "bits", "bits (paper)", "bits/param", "bits/param (paper)", "loss",
    "held-out", "steps", "strings", "ended by", "seconds",
)  # fmt: skip
MODEL_COLUMNS = (
    "model", "parameters", "N", "capacity ≥", "± 95 %", "bits/param", "bits/param (paper)", "without embeddings",
    "seeds",
)  # fmt: skip


@dataclass
class Sweep:
    """A sweep's events, gathered.

    Attributes:
        active: whether it is computed now.
        cells: what is kept of each finished cell, by name.
        traces: for each cell the strings seen, the bits held, and the loss at each evaluation.
        left: the seconds that a cell still took at most at its last evaluation.
    """

    plan: CapacityPlan
    active: bool = False
    device: str = ""
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    traces: dict[str, tuple[list[float], list[float], list[float]]] = field(default_factory=dict)
    left: dict[str, float | None] = field(default_factory=dict)

    def add(self, rows: Sequence[Row]) -> None:
        """Take in further events."""
        for row in rows:
            values = row.values
            if row.kind == "start":
                self.device = str(values["device"])
            elif row.kind == "cell":
                self.cells[str(values["name"])] = dict(values)
            elif row.kind == TRACE:
                for name, (bits, loss, _, *left) in values["cells"].items():
                    self._trace(name, float(values["strings"]), bits, loss)
                    self.left[name] = left[0] if left else None

    def _trace(self, name: str, strings: float, bits: float, loss: float) -> None:
        """One point; those that were computed again after an interruption take the place of the first ones."""
        lines = self.traces.setdefault(name, ([], [], []))
        while lines[0] and lines[0][-1] >= strings:
            for line in lines:
                line.pop()
        for line, value in zip(lines, (strings, bits, loss), strict=True):
            line.append(value)


def read_sweep(store: RunStore, run: Run) -> Sweep:
    """What a sweep has found so far.

    Raises:
        UsageError: the run is another study.
        GemmaTuiError: nothing yet.
    """
    found = Sweep(sweep_plan(run), store.run(run.run_id).active)
    found.add(store.events(run.run_id, limit=10_000_000))
    if not found.traces:
        raise GemmaTuiError(f"{run.run_id} has no bits yet: `gemma-tui runs resume {run.run_id}` goes on with it")
    return found


def sweep_figure(sweep: Sweep) -> Figure:
    """Bits against data with the plateau, bits against budget, loss, double descent; tables of models and cells."""
    plan, every = sweep.plan, cells_of(sweep.plan)
    models = {cell.model: [c for c in every if c.model == cell.model] for cell in every}
    tables = [_models(sweep, models), _cells(sweep, every)]
    published = " and ".join(f"{bits} ({dtype})" for dtype, bits in REFERENCE_LINES.items())
    notes = [
        "capacity: the most bits that any data set left in a network, so a lower bound for this budget of "
        f"{plan.steps:,} steps of {plan.batch_size:,} strings with Adam",
        "± 95 %: Student's t over the seeds of the data set that left most; not in it is that this is "
        "the largest of several means, which noise raises",
        "bits: N (S - 1) log2 V less the code length of the tokens that follow another; paper: N S (log2 V - mean), as "
        f"arXiv:2505.24832 counts, which found {published} for GPT-2 shapes in 1,000,000 steps of 2,048",
        f"{plan.arch}, V {plan.vocab}, S {plan.length}, {plan.dtype}, on {sweep.device or 'no device yet'}",
    ]
    arrays = {f"{name}:{what}": np.array(line) for name, lines in sweep.traces.items()
              for what, line in zip(("strings", "bits", "loss"), lines, strict=True)}  # fmt: skip
    title = f"capacity: {len(sweep.cells)} of {len(every)} cells"
    facts = {"plan": dict(vars(plan)), "device": sweep.device}
    return Figure(title, notes, charts=_charts(sweep, models), tables=tables, arrays=arrays, facts=facts)


def plateau_of(sweep: Sweep, cells: Sequence[Cell]) -> Plateau | None:
    """The most strict bits that the finished cells of one shape hold; None before the first is done."""
    done = [sweep.cells[cell.name] for cell in cells if cell.name in sweep.cells]
    return plateau([d["sequences"] for d in done], [d["bits"] for d in done]) if done else None


def _charts(sweep: Sweep, models: dict[str, list[Cell]]) -> list[LineChart]:
    plan = sweep.plan
    held, budgets, losses, descent = _data_lines(sweep, models), [], [], []
    every = [cell for cells in models.values() for cell in cells]
    for model, cells in models.items():
        shape, done = cells[0].shape, [sweep.cells[c.name] for c in cells if c.name in sweep.cells]
        parameters = shape.parameter_count()
        for cell in cells:
            if cell.name in sweep.traces:
                strings, bits, loss = sweep.traces[cell.name]
                budgets.append(Series(cell.name, strings, [b / parameters for b in bits]))
                losses.append(Series(cell.name, strings, loss))
        by_data: dict[float, list[float]] = {}
        for d in sorted(done, key=lambda d: float(d["data_bits"])):
            ratio = d["data_bits"] / (plan.alpha * parameters)
            by_data.setdefault(ratio, []).append(d["held_out_loss"] / math.log(2))
        if by_data:
            descent.append(Series(model, list(by_data), [float(np.mean(found)) for found in by_data.values()]))
    if descent:
        lows = [y for line in descent for y in line.y if y is not None]
        descent.append(Series("data = capacity", [1.0, 1.0], [min(lows), max(lows)]))
    wide, long = _wide_data(every), plan.steps >= DECADE * plan.evaluate_every
    ratio = f"data bits / ({plan.alpha:g} bits x parameters)"
    return [
        LineChart("memorised bits (strict) against data bits", held, "data bits, N S log2 V", log_x=wide),
        LineChart("bits per parameter against budget", budgets, "strings seen", log_x=long),
        LineChart("training loss, nats per token", losses, "strings seen", log_x=long),
        LineChart("held-out loss, bits per token", descent, ratio, log_x=wide),
    ]


def _wide_data(cells: Sequence[Cell]) -> bool:
    """Whether the sizes of the data sets span so much that a logarithmic axis shows them better."""
    sizes = [cell.sequences for cell in cells]
    return max(sizes) >= DECADE * min(sizes)


def _data_lines(sweep: Sweep, models: dict[str, list[Cell]]) -> list[Series]:
    """Means over seeds with their band, also of cells that still train, their plateau, and what is expected."""
    plan, lines = sweep.plan, []
    every = [cell for cells in models.values() for cell in cells]
    least, largest = (pick(cell.sequences for cell in every) for pick in (min, max))
    spread = np.geomspace(least, largest, CURVE) if _wide_data(every) else np.linspace(0, largest, CURVE)
    sizes = sorted({round(n) for n in spread})
    bits = [data_bits(n, plan.length, plan.vocab) for n in sizes]
    for model, cells in models.items():
        rows = sorted({cell.sequences for cell in cells})
        now = {n: [_held(sweep, cell) for cell in cells if cell.sequences == n] for n in rows}
        known = [(n, [b for b in found if b is not None]) for n, found in now.items()]
        known = [(n, found) for n, found in known if found]
        summaries = [summary(n, found) for n, found in known]
        x = [data_bits(s.sequences, plan.length, plan.vocab) for s in summaries]
        lines.append(Series(model, x, [s.bits for s in summaries]))
        best, done = plateau_of(sweep, cells), {cell.sequences for cell in cells if cell.name in sweep.cells}
        if best is not None and len(done) > 1:
            ends = [data_bits(n, plan.length, plan.vocab) for n in (rows[0], rows[-1])]
            lines.append(Series(f"{model} plateau", ends, [best.bits, best.bits]))
        if any(s.half for s in summaries):
            for side, name in ((-1, "- 95 %"), (1, "+ 95 %")):
                lines.append(Series(f"{model} {name}", x, [s.bits + side * (s.half or 0.0) for s in summaries]))
        count = cells[0].shape.parameter_count()
        expected = [expected_bits(n, plan.length, plan.vocab, count, plan.alpha) for n in sizes]
        lines.append(Series(f"{model} min({plan.alpha:g} P, data)", bits, expected))
    return lines


def _held(sweep: Sweep, cell: Cell) -> float | None:
    """The bits of a cell: at its end, or where it is now."""
    if cell.name in sweep.cells:
        return float(sweep.cells[cell.name]["bits"])
    return sweep.traces[cell.name][1][-1] if cell.name in sweep.traces else None


def _models(sweep: Sweep, models: dict[str, list[Cell]]) -> Table:
    rows: list[tuple[Any, ...]] = []
    for model, cells in models.items():
        shape, best = cells[0].shape, plateau_of(sweep, cells)
        count, bare = shape.parameter_count(), shape.parameter_count(embeddings=False)
        if best is None:
            rows.append((model, count, *[None] * 7))
            continue
        paper = best.bits * shape.length / (shape.length - 1) / count
        seeds = sum(c.sequences == best.sequences and c.name in sweep.cells for c in cells)
        rows.append(
            (model, count, best.sequences, best.bits, best.half, best.bits / count, paper, best.bits / bare, seeds)
        )
    return Table("model", MODEL_COLUMNS, rows)


def _cells(sweep: Sweep, cells: Sequence[Cell]) -> Table:
    rows: list[tuple[Any, ...]] = []
    for cell in cells:
        bits = data_bits(cell.sequences, cell.shape.length, cell.shape.vocabulary)
        if cell.name in sweep.cells:
            d = sweep.cells[cell.name]
            rows.append((
                cell.name, "done", None, bits, d["bits"], d["bits_paper"], d["bits_per_parameter"],
                d["bits_per_parameter_paper"], d["loss"], d["held_out_loss"], d["steps"], d["strings"], d["why"],
                d["seconds"],
            ))  # fmt: skip
        elif cell.name in sweep.traces:
            strings, held, loss = (line[-1] for line in sweep.traces[cell.name])
            count, longer = cell.shape.parameter_count(), cell.shape.length / (cell.shape.length - 1)
            rows.append((
                cell.name, *_now(sweep, cell), bits, held, held * longer, held / count, held * longer / count, loss,
                None, None, int(strings), "", None,
            ))  # fmt: skip
        else:
            rows.append((cell.name, "waiting" if sweep.active else "not begun", None, bits, *[None] * 10))
    return Table("cell", CELL_COLUMNS, rows)


def _now(sweep: Sweep, cell: Cell) -> tuple[str, float | None]:
    """The state of a cell that has begun, and the seconds it still takes."""
    return ("training", sweep.left[cell.name]) if sweep.active else ("stopped", None)
