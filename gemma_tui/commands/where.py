"""``gemma-tui memorization RUN --where``: which parts of a model hold what it has memorised."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from engines import open_engine
from gemma_tui.commands.figures import targets_of, write
from gemma_tui.commands.following import counted, follow
from gemma_tui.commands.memorization import show
from gemma_tui.commands.plans import plan_from
from gemma_tui.output import Output
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.events import PASSING, Control, Event
from gemma_tui.studies.memorization.held import where_figure
from gemma_tui.studies.memorization.where import WherePlan, record_where, resume_where
from gemma_tui.studies.recording import Recorded


def where(args: argparse.Namespace, output: Output) -> int:
    """Take parts of a measured model away, one after the other."""
    plan = plan_from(WherePlan, args, {"model": args.model}, "memorization")
    targets = targets_of(args)
    engine, control = open_engine(args.engine), Control()
    with closing(RunStore()) as store:
        return _follow(record_where(engine, plan, control, store), control, output, store, targets)


def resume(run_name: str, output: Output) -> int:
    """Go on with a study of parts, or print it again."""
    with closing(RunStore()) as store:
        run, control = store.run(run_name), Control()
        return _follow(resume_where(open_engine(run.engine), run, control, store), control, output, store)


def _follow(recorded: Recorded, control: Control, output: Output, store: RunStore, targets: Sequence[Path] = ()) -> int:
    run = recorded.run
    place = counted(run, "parts")

    def shown(stopped: bool) -> dict[str, Any]:
        if not stopped:
            figure = where_figure(store, run)
            show(figure, output, f"with `gemma-tui runs resume {run.run_id} --json`")
            write(figure, output, targets)
        return {}

    return follow(recorded, control, output, "scoring", place, lambda event: _tell(event, output), shown)


def _tell(event: Event, output: Output) -> None:
    if event.kind in (*PASSING, "end", "part"):  # parts are rows of the figure
        return
    row, values = event.row(), event.values
    output.row(row.pop("kind"), **row)
    if event.kind == "start":
        counts = values["sequences"]
        output.say(
            f"{values['parts']:,} parts, each taken away once: {values['passes']:,} passes of {values['target']} over "
            f"{counts['train']:,} memorised and {counts['held_out']:,} held-out sequences"
        )
    elif event.kind == "warning":
        output.say(f"warning: {values['text']}")
