"""``gemma-tui generate M --data``: the speed-quality curve of block decoding."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from engines import open_engine
from gemma_tui.commands.figures import targets_of, tell
from gemma_tui.commands.following import counted, follow
from gemma_tui.commands.plans import plan_from
from gemma_tui.output import Output
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.curve.measure import STUDY, record_curve, resume_curve
from gemma_tui.studies.curve.plan import CurvePlan
from gemma_tui.studies.curve.results import curve_figure, read_curve
from gemma_tui.studies.events import PASSING, Control, Event
from gemma_tui.studies.recording import Recorded


def curve(args: argparse.Namespace, output: Output) -> int:
    """Decode rows in several ways, and tell what each costs and saves."""
    plan = plan_from(CurvePlan, args, {}, "generate")
    targets, control = targets_of(args), Control()
    with closing(RunStore()) as store:
        return _follow(record_curve(open_engine(args.engine), plan, control, store), control, output, store, targets)


def resume(run_name: str, output: Output) -> int:
    """Go on with a curve, or print it again."""
    with closing(RunStore()) as store:
        run, control = store.run(run_name), Control()
        return _follow(resume_curve(open_engine(run.engine), run, control, store), control, output, store)


def show(store: RunStore, run: Run, output: Output, targets: Sequence[Path] = ()) -> None:
    """Print what a curve has found so far, and write it; nothing before its first rows."""
    if any(event.kind == STUDY for event in store.events(run.run_id)):
        tell(curve_figure(read_curve(store, run)), output, list(targets))


def _follow(recorded: Recorded, control: Control, output: Output, store: RunStore, targets: Sequence[Path] = ()) -> int:
    run = recorded.run
    place = counted(run, "rows")

    def shown(stopped: bool) -> dict[str, Any]:
        show(store, run, output, targets)
        return {}

    return follow(recorded, control, output, "decoding", place, lambda event: _tell(event, output), shown)


def _tell(event: Event, output: Output) -> None:
    if event.kind in (*PASSING, "end"):
        return
    row = event.row()
    output.row(row.pop("kind"), **row)
    if event.kind == "warning":
        output.say(f"warning: {event.values['text']}")
