"""``gemma-tui capacity sweep`` and ``gemma-tui capacity show``."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

from engines import open_engine
from gemma_tui.commands.figures import figure_shown, targets_of, tell
from gemma_tui.commands.following import follow
from gemma_tui.commands.plans import plan_from
from gemma_tui.errors import UsageError
from gemma_tui.output import Output, duration
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.capacity.plan import CapacityPlan, MoreCells, with_preset
from gemma_tui.studies.capacity.results import read_sweep, sweep_figure
from gemma_tui.studies.capacity.sweep import TRACE, record_capacity, resume_capacity
from gemma_tui.studies.events import PASSING, Control, Event
from gemma_tui.studies.plan import options, read_toml
from gemma_tui.studies.recording import Recorded


def sweep(args: argparse.Namespace, output: Output) -> int:
    """Train the cells of a grid, or more of a sweep that there is."""
    targets, control = targets_of(args), Control()
    if args.add:
        more = _more(args)
        with closing(RunStore()) as store:
            run = store.run(args.add)
            recorded = resume_capacity(open_engine(run.engine), run, control, store, more)
            return _follow(recorded, control, output, store, targets)
    values = with_preset(args.preset, read_toml(Path(args.plan)) if args.plan else {})
    plan = plan_from(CapacityPlan, args, values, args.plan or "capacity sweep")
    with closing(RunStore()) as store:
        return _follow(record_capacity(open_engine(args.engine), plan, control, store), control, output, store, targets)


def show(args: argparse.Namespace, output: Output) -> int:
    """Print what a sweep, a measurement of memorization or a study of parts has found so far, and write it."""
    targets = targets_of(args)
    with closing(RunStore()) as store:
        run = store.run(args.run_name)
        tell(figure_shown(run, store), output, targets)
    output.row("end", status="done", run=run.run_id)
    return 0


def resume(run_name: str, output: Output) -> int:
    """Go on with a sweep."""
    with closing(RunStore()) as store:
        run, control = store.run(run_name), Control()
        return _follow(resume_capacity(open_engine(run.engine), run, control, store), control, output, store, [])


def _follow(recorded: Recorded, control: Control, output: Output, store: RunStore, targets: list[Path]) -> int:
    run = recorded.run

    def place(event: Event) -> tuple[float, str]:
        return event.values.get("share", event.step / run.steps), f"{event.step:,}/{run.steps:,} cells"

    def shown(stopped: bool) -> dict[str, Any]:
        if not stopped or any(event.kind == TRACE for event in store.events(run.run_id)):
            tell(sweep_figure(read_sweep(store, run)), output, targets)
        return {}

    return follow(recorded, control, output, "cells", place, lambda event: _say(event, output), shown)


def _more(args: argparse.Namespace) -> MoreCells:
    """The cells that are added."""
    others = {o.name for o in options(CapacityPlan)} - {o.name for o in options(MoreCells)}
    if args.plan or args.preset or not others.isdisjoint(vars(args)):
        raise UsageError("add: --add takes --sizes and --seeds alone, the rest is the sweep's own: leave it out")
    return plan_from(MoreCells, args, {}, "capacity sweep")


def _say(event: Event, output: Output) -> None:
    if event.kind in (*PASSING, "end"):
        return
    row = event.row()
    output.row(row.pop("kind"), **row)
    v = event.values
    if event.kind == "cell":
        output.say(
            f"{v['name']}: {v['bits']:,.0f} of {v['data_bits']:,.0f} bits, {v['bits_per_parameter']:.3f} per parameter "
            f"({v['bits_per_parameter_paper']:.3f} as the paper counts), {v['why']} after {v['steps']:,} steps, "
            f"{duration(v['seconds'])}"
        )
