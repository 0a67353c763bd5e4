"""``gemma-tui runs``."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
from contextlib import closing

from engines.errors import EngineError
from gemma_tui.commands.figures import figure_shown, targets_of, tell
from gemma_tui.errors import UsageError
from gemma_tui.output import Output, age
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.registry import figure_of

STUDIES = {
    "heads": "attention",
    "memorization": "memorization",
    "capacity": "capacity",
    "where": "where",
    "curve": "curve",
    "bench": "bench",
}
"""The modules beside this one whose ``resume`` goes on with a run that is no training, by its study."""


def list_runs(args: argparse.Namespace, output: Output) -> int:
    """All runs, the newest first."""
    with closing(RunStore()) as store:
        runs = store.runs()
        for run in runs:
            output.row("run", **_facts(run))
        rows = [
            (r.run_id, r.state, r.study, r.engine, f"{r.step}/{r.steps}", age(r.created), str(r.plan.get("model", "")))
            for r in runs
        ]
        if rows:
            output.table(("run", "state", "study", "engine", "step", "age", "model"), rows)
        else:
            output.say("no runs yet: `gemma-tui train --model nano --data FILE` makes one")
        output.row("end", status="done", runs=len(runs))
        return 0


def show(args: argparse.Namespace, output: Output) -> int:
    """One run: its plan, chart, events, and what it has found so far, which files can be had of."""
    targets = targets_of(args)
    with closing(RunStore()) as store:
        run = store.run(args.run_name)
        output.row("run", **_facts(run), plan=dict(run.plan))
        output.say(f"{run.run_id}: {run.state}, step {run.step} of {run.steps}, {run.engine}, {age(run.created)} old")
        output.say(run.command)
        if run.error:
            output.say(f"error: {run.error}")
        if not output.as_json:
            show_chart(run.run_id)
        for event in store.events(run.run_id):
            output.row("event", event=event.kind, step=event.step, time=event.time, values=dict(event.values))
            if event.kind in ("checkpoint", "warning"):
                output.say(f"step {event.step}: {event.values.get('path') or event.values.get('text')}")
        for metric in store.metrics(run.run_id):
            output.row(metric.kind, step=metric.step, **metric.values)
        if not output.as_json:
            show_memorized(run.run_id, output)
        if targets:
            tell(figure_shown(run, store), output, targets)
        else:
            _tell_found(run, store, output)
        output.row("end", status="done")
        return 0


def stop(args: argparse.Namespace, output: Output) -> int:
    """Ask a run, of whatever process, to save and end."""
    with closing(RunStore()) as store:
        run = store.run(args.run_name)
        if run.active:
            _ask(store, run, "stop", "it saves after the step in hand", output)
        else:
            _already(run, output)
        return 0


def pause(args: argparse.Namespace, output: Output) -> int:
    """Ask a run, of whatever process, to wait after its step."""
    with closing(RunStore()) as store:
        run = store.run(args.run_name)
        if run.state == "running" or run.request == "resume":
            _ask(store, run, "pause", f"`gemma-tui runs resume {run.run_id}` lets it go on", output)
        else:
            _already(run, output)
        return 0


def resume(args: argparse.Namespace, output: Output) -> int:
    """Let a paused run go on; a run whose process is gone goes on in this one."""
    with closing(RunStore()) as store:
        run = store.run(args.run_name)
        if not run.active:
            return resume_run(run, output)
        if run.state == "paused" or run.request == "pause":
            _ask(store, run, "resume", "it goes on", output)
        else:
            _already(run, output)
        return 0


def resume_run(run: Run, output: Output) -> int:
    """Go on with a run that ended before its last step.

    Raises:
        UsageError: it cannot be done.
    """
    from engines import open_engine
    from gemma_tui.commands.train import follow
    from gemma_tui.studies.events import Control
    from gemma_tui.studies.recording import resume_training
    from gemma_tui.studies.training_plan import plan_of

    if run.study in STUDIES:
        code: int = importlib.import_module(f"gemma_tui.commands.{STUDIES[run.study]}").resume(run.run_id, output)
        return code
    if run.study != "training":
        raise UsageError(f"{run.run_id} is no training run: start it again with `{run.command}`")
    control = Control()
    with closing(RunStore()) as store:
        recorded = resume_training(open_engine(run.engine), run, control, store)
        return follow(recorded, control, plan_of(run.plan), output, quiet=False)


def _ask(store: RunStore, run: Run, what: str, then: str, output: Output) -> None:
    store.request(run.run_id, what)
    output.say(f"{run.run_id} was asked to {what}; {then}")
    output.row("end", status="done", run=run.run_id, asked=True)


def _already(run: Run, output: Output) -> None:
    output.say(f"{run.run_id} is {run.state} already")
    output.row("end", status="done", run=run.run_id, asked=False)


def _tell_found(run: Run, store: RunStore, output: Output) -> None:
    """Print what a run has found so far, or why there is nothing to see yet."""
    try:
        figure = figure_of(run, store)
    except EngineError as error:
        output.row("warning", text=str(error))
        output.say(f"warning: {error}")
        return
    if figure is not None:
        tell(figure, output, [])


def show_chart(run_id: str) -> None:
    """Print the loss of a run as a chart."""
    from gemma_tui.plots import Series, draw

    train, valid = Series("train"), Series("validation")
    with closing(RunStore()) as store:
        rows = store.metrics(run_id)
    for row in rows:
        if row.kind == "step":
            train.add(row.step, row.values.get("loss"))
        else:
            valid.add(row.step, row.values.get("valid_loss"))
    if len(train.x) < 2:
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    size = shutil.get_terminal_size((80, 24))
    print(draw([train, valid], min(size.columns, 100), 16, "loss, nats per token", colour=colour))


def show_memorized(run_id: str, output: Output) -> None:
    """Print what a run has memorised at each measurement, and what that tells; nothing where none was made.

    Bits are clipped (also per trained parameter) and signed; the loss is that of the held-out sequences.
    """
    from gemma_tui.studies.memorization.history import told

    with closing(RunStore()) as store:
        rows = [row for row in store.metrics(run_id) if row.kind == "memorized"]
    if not rows:
        return
    measures = {m: heading for m, heading in _MEMORIZED.items() if m in rows[0].values}
    output.say("\nmemorised bits of sequences that are trained on, and the loss of held-out ones")
    output.table(
        ("step", *measures.values()),
        [(str(row.step), *(_number(row.values.get(m)) for m in measures)) for row in rows],
    )
    known = [row for row in rows if all(row.values.get(m) is not None for m in measures)]
    steps, bits = [row.step for row in known], [row.values["memorized_bits"] for row in known]
    held_out = [row.values["held_out_loss"] for row in known] if "held_out_loss" in measures else None
    for sentence in told(steps, bits, held_out, "measurement") if len(known) > 1 else ():
        output.say(sentence)


_MEMORIZED = {
    "memorized_bits": "bits",
    "memorized_signed_bits": "signed",
    "memorized_bits_per_parameter": "per trained",
    "held_out_bits": "held-out bits",
    "held_out_loss": "loss",
    "generalisation": "decrease",
}


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"


def _facts(run: Run) -> dict[str, object]:
    return {
        "run": run.run_id, "state": run.state, "study": run.study, "engine": run.engine, "created": run.created,
        "updated": run.updated, "step": run.step, "steps": run.steps, "command": run.command, "error": run.error,
        "folder": str(run.folder), "group": run.group,
    }  # fmt: skip
