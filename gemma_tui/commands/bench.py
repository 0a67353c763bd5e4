"""``gemma-tui bench``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from gemma_tui.commands.figures import targets_of, tell
from gemma_tui.commands.following import counted, follow
from gemma_tui.commands.plans import plan_from
from gemma_tui.output import Output, bytes_text
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.bench.measuring import record_bench, resume_bench
from gemma_tui.studies.bench.plan import BenchPlan
from gemma_tui.studies.bench.results import SPEEDS, read_bench, speed_of
from gemma_tui.studies.events import PASSING, Control, Event
from gemma_tui.studies.recording import Recorded


def bench(args: argparse.Namespace, output: Output) -> int:
    """Measure both engines on this machine, as a run."""
    targets, control = targets_of(args), Control()
    plan = plan_from(BenchPlan, args, {}, "bench")
    with closing(RunStore()) as store:
        return _follow(record_bench(plan, control, store), control, output, store, targets)


def resume(run_name: str, output: Output) -> int:
    """Go on with a benchmark, or print it again."""
    with closing(RunStore()) as store:
        run, control = store.run(run_name), Control()
        return _follow(resume_bench(run, control, store), control, output, store)


def _follow(recorded: Recorded, control: Control, output: Output, store: RunStore, targets: Sequence[Path] = ()) -> int:
    run = recorded.run

    def shown(stopped: bool) -> dict[str, Any]:
        if not stopped or store.run(run.run_id).step:
            tell(read_bench(store, run), output, list(targets))
        return {}

    place = counted(run, "cells")
    return follow(recorded, control, output, "measuring", place, lambda event: _tell(event, output), shown)


def _tell(event: Event, output: Output) -> None:
    if event.kind in (*PASSING, "end"):
        return
    row = event.row()
    output.row(row.pop("kind"), **row)
    v = event.values
    if event.kind != "cell":
        return
    where = f"{v['task']}, {v['engine']} {v['dtype']}, batch {v['batch']}"
    if v.get("error"):
        output.say(f"{where}: {v['error']}")
        return
    speeds = [f"{name} {speed.text}" for name in SPEEDS if (speed := speed_of(v, name))]
    output.say(f"{where}: {', '.join(speeds)}, {bytes_text(v['memory'])}")
