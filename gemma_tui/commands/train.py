"""``gemma-tui train``."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from engines import open_engine
from engines.base import Engine
from gemma_tui import paths
from gemma_tui.commands.plans import plan_from
from gemma_tui.errors import GemmaTuiError
from gemma_tui.output import Output, bytes_text
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.events import Control, Event
from gemma_tui.studies.plan import read_toml
from gemma_tui.studies.recording import record_training
from gemma_tui.studies.training import TrainingPlan, settings

DETACH_SECONDS = 60.0


def train_command(args: argparse.Namespace, output: Output) -> int:
    """Train as the plan file and the options say; the options win."""
    plan = _plan(args)
    if args.detach:
        return _detach(output)
    with closing(RunStore()) as store:
        return _train(open_engine(args.engine), plan, store, output)


def _train(engine: Engine, plan: TrainingPlan, store: RunStore, output: Output) -> int:
    control = Control()
    recorded = record_training(engine, plan, control, store)
    with stop_on_signal(control), closing(recorded.events) as events:
        for event in events:
            row = event.row()
            if event.kind == "end":
                row["interrupted"] = control.stop.is_set()
            if event.kind != "waiting":
                output.row(row.pop("kind"), **row)
                _say(output, event, plan)
    if not output.as_json:
        from gemma_tui.commands.runs import show_chart

        show_chart(recorded.run.run_id)
        output.say(f"`gemma-tui generate {recorded.run.run_id} --prompt ...` lets the result write")
    return 130 if control.stop.is_set() else 0


def _plan(args: argparse.Namespace) -> TrainingPlan:
    values = read_toml(Path(args.plan)) if args.plan else {}
    plan = plan_from(TrainingPlan, args, values, args.plan or "train")
    settings(plan)
    return plan


@contextmanager
def stop_on_signal(control: Control) -> Iterator[None]:
    """The first interrupt ends the run after its step and saves; a second one ends the program."""

    def stop(number: int, frame: object) -> None:
        if control.stop.is_set():
            raise KeyboardInterrupt
        control.stop.set()

    kept = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _say(output: Output, event: Event, plan: TrainingPlan) -> None:
    v = event.values
    match event.kind:
        case "run":
            output.say(f"run {v['run']}")
        case "start":
            share = v["trainable"] / v["parameters"]
            output.say(
                f"{v['model']} on {v['engine']} {v['device']} {v['dtype']}, {v['train_tokens']:,} training tokens"
            )
            output.say(f"training {v['trainable']:,} parameters, {share:.2%} of the model's number")
        case "step":
            left = (plan.steps - event.step) * v["seconds"] / event.step
            output.say(
                f"step {event.step:>6}/{plan.steps}  loss {v['loss']:.4f}  lr {v['learning_rate']:.2e}  "
                f"|g| {v['grad_norm']:.3f}  {v['tokens_per_second']:,.0f} tok/s  {bytes_text(v['memory'])}  "
                f"{left:.0f} s left"
            )
        case "evaluation":
            output.say(f"       validation loss {v['valid_loss']:.4f}  perplexity {v['perplexity']:.2f}")
        case "checkpoint":
            output.say(f"saved {v['path']}")
        case "warning":
            output.say(f"warning: {v['text']}")
        case "end":
            output.say(f"{v['status']} after step {event.step}")


def _detach(output: Output) -> int:
    """Start the same command in its own session, and wait until its run is registered."""
    paths.runs().mkdir(parents=True, exist_ok=True)
    log = paths.runs() / f"detached-{time.time_ns()}.log"
    arguments = [a for a in sys.argv[1:] if a not in ("--detach", "--json")]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "gemma_tui", *arguments, "--json"],
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + DETACH_SECONDS
    while time.monotonic() < deadline:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        # A library's warning may stand before it.
        if (first := next((line for line in lines if line.startswith('{"kind": "run"')), None)) is not None:
            run = json.loads(first)["run"]
            output.say(f"run {run} goes on by itself: `gemma-tui runs show {run}`, `gemma-tui runs stop {run}`")
            output.row("end", status="detached", run=run, pid=process.pid, log=str(log))
            return 0
        if process.poll() is not None:
            said = next((line for line in lines if line.startswith("gemma-tui: ")), "")
            raise GemmaTuiError(said.removeprefix("gemma-tui: ") or f"the run ended at once: see {log}")
        time.sleep(0.05)
    raise GemmaTuiError(f"the run did not start within {DETACH_SECONDS:.0f} s: see {log}")
