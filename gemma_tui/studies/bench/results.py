"""What a benchmark found: a table, charts over the batch, and which engine is the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.runs.store import Row, Run, RunStore
from gemma_tui.studies.bench.cell import INFERENCE, TRAINING
from gemma_tui.studies.bench.machine import in_words

SPEEDS = {"prefill": "reading a prompt", "decode": "decoding", "training": "training"}
COLUMNS = (
    "engine", "dtype", "batch", "prefill tok/s", "decode tok/s", "training tok/s", "inference MB", "training MB",
)  # fmt: skip

Place = tuple[str, str, int]
"""Engine, dtype, batch."""


def read_bench(store: RunStore, run: Run) -> Figure:
    """What a run has found so far."""
    return bench_figure(run, store.events(run.run_id))


def bench_figure(run: Run, events: Sequence[Row]) -> Figure:
    """A run's cells side by side."""
    start = next((e.values for e in events if e.kind == "start"), {})
    cells = [e.values for e in events if e.kind == "cell"]
    whole = [cell for cell in cells if not cell.get("error")]
    found: dict[Place, dict[str, Any]] = {}
    for cell in cells:
        place = (cell["engine"], cell["dtype"], cell["batch"])
        merged = found.setdefault(place, {})
        merged |= {name: cell[name] for name in SPEEDS if cell.get(name) is not None}
        if cell.get("memory") is not None:
            merged[f"{cell['task']} memory"] = cell["memory"] / 1e6
    plan, about = run.plan, in_words(start["machine"]) if start.get("machine") else ""
    rows = [
        (*place, *(facts.get(name) for name in SPEEDS), *(facts.get(f"{t} memory") for t in (INFERENCE, TRAINING)))
        for place, facts in sorted(found.items())
    ]
    failed = [(c["engine"], c["dtype"], c["batch"], c["task"], c["error"]) for c in cells if c.get("error")]
    tables = [Table("speed", COLUMNS, rows)]
    if failed:
        tables.append(Table("failure", ("engine", "dtype", "batch", "task", "why"), failed))
    asked = f"prompts of {plan['prompt']} tokens, {plan['new_tokens']} decoded"
    if plan["training"]:
        asked += f"; {plan['method']} on windows of {plan['sequence_length']}"
    best = [sentence for name in SPEEDS if (sentence := _best(name, whole))]
    notes = [*best, asked, *([about] if about else [])]
    charts = [chart for name, what in SPEEDS.items() if (chart := _chart(name, what, whole)) is not None]
    facts = {"run": run.run_id, "machine": start.get("machine", {}), "plan": dict(plan)}
    return Figure(f"{run.run_id}: {plan['model']} on this machine", notes, charts=charts, tables=tables, facts=facts)


def _best(name: str, cells: Sequence[dict[str, Any] | Any]) -> str:
    """The fastest cell of a kind, and how it compares with the other engine's fastest."""
    told = [cell for cell in cells if cell.get(name)]
    if not told:
        return ""
    best = max(told, key=lambda cell: cell[name])
    others = [cell for cell in told if cell["engine"] != best["engine"]]
    beside = ""
    if others:
        other = max(others, key=lambda cell: cell[name])
        beside = f", {best[name] / other[name]:.2g} times {other['engine']} at its best ({_place(other)})"
    return f"{SPEEDS[name]} is fastest with {_place(best)}: {best[name]:,.0f} tokens/s{beside}"


def _place(cell: dict[str, Any] | Any) -> str:
    return f"{cell['engine']} {cell['dtype']}, batch {cell['batch']}"


def _chart(name: str, what: str, cells: Sequence[dict[str, Any] | Any]) -> LineChart | None:
    """Tokens a second over the batch, a line for each engine and dtype; None where one batch makes no line."""
    lines: dict[str, Series] = {}
    for cell in sorted(cells, key=lambda cell: cell["batch"]):
        if cell.get(name):
            label = f"{cell['engine']} {cell['dtype']}"
            lines.setdefault(label, Series(label)).add(cell["batch"], cell[name])
    if not any(len(line.x) > 1 for line in lines.values()):
        return None
    return LineChart(f"{what}, tokens/s", list(lines.values()), "batch")
