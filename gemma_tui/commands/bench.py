"""``gemma-tui bench``."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

from gemma_tui.commands.figures import targets_of, tell
from gemma_tui.commands.following import counted, follow
from gemma_tui.commands.plans import plan_from
from gemma_tui.output import Output, bytes_text
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.bench.measuring import record_bench
from gemma_tui.studies.bench.plan import BenchPlan
from gemma_tui.studies.bench.results import read_bench
from gemma_tui.studies.events import PASSING, Control, Event


def bench(args: argparse.Namespace, output: Output) -> int:
    """Measure both engines on this machine, as a run."""
    targets, control = targets_of(args), Control()
    plan = plan_from(BenchPlan, args, {}, "bench")
    with closing(RunStore()) as store:
        recorded = record_bench(plan, control, store)
        run = recorded.run

        def shown(stopped: bool) -> dict[str, Any]:
            if not stopped or store.run(run.run_id).step:
                tell(read_bench(store, run), output, targets)
            return {}

        return follow(
            recorded,
            control,
            output,
            "bench",
            counted(run, "cells"),
            lambda event: _say(event, output),
            shown,
            run.command,
        )


def show(run_name: str, output: Output, targets: list[Path]) -> None:
    """Print what a benchmark found."""
    with closing(RunStore()) as store:
        tell(read_bench(store, store.run(run_name)), output, targets)


def _say(event: Event, output: Output) -> None:
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
    speeds = [f"{name} {v[name]:,.0f} tokens/s" for name in ("prefill", "decode", "training") if v.get(name)]
    output.say(f"{where}: {', '.join(speeds)}, {bytes_text(v['memory'])}")
