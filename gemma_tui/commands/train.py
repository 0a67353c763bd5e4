"""``gemma-tui train``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from engines import open_engine
from engines.base import Engine
from gemma_tui.commands.plans import plan_from
from gemma_tui.commands.signals import heard
from gemma_tui.output import Output, bytes_text
from gemma_tui.runs.processes import start
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.events import PASSING, Control, Event, passing
from gemma_tui.studies.memorization.watch import in_words
from gemma_tui.studies.plan import read_toml
from gemma_tui.studies.queueing import check, detached
from gemma_tui.studies.recording import Recorded, record_training
from gemma_tui.studies.training_plan import TrainingPlan

DETACH_SECONDS = 60.0
INTERRUPTED = 130
QUIET = ("run", "warning", "end")
"""What is told with ``--quiet``; the run store has the rest."""


def train_command(args: argparse.Namespace, output: Output) -> int:
    """Train as the plan file and the options say; the options win."""
    plan = _plan(args)
    if args.detach:
        return _detach(args.engine, plan, output)
    with closing(RunStore()) as store:
        return _train(open_engine(args.engine), plan, store, output, args.quiet)


def _train(engine: Engine, plan: TrainingPlan, store: RunStore, output: Output, quiet: bool) -> int:
    control = Control()
    return follow(record_training(engine, plan, control, store), control, plan, output, quiet)


def follow(recorded: Recorded, control: Control, plan: TrainingPlan, output: Output, quiet: bool) -> int:
    """Let a run take its course and tell of it; returns the exit code."""
    with stop_on_signal(control) as came, closing(recorded.events) as events:
        for event in events:
            if quiet and event.kind not in QUIET:
                continue
            row = event.row()
            if event.kind == "end":
                row["interrupted"] = control.stop.is_set()
            if event.kind not in PASSING:
                output.row(row.pop("kind"), **row)
                _say(output, event, plan)
            elif doing := passing(event):
                output.passing(f"       {doing}")
    if not output.as_json and not quiet:
        from gemma_tui.commands.runs import show_chart, show_memorized

        show_chart(recorded.run.run_id)
        show_memorized(recorded.run.run_id, output)
        output.say(f"`gemma-tui generate {recorded.run.run_id} --prompt ...` lets the result write")
    if came:
        return 128 + came[0]
    return INTERRUPTED if control.stop.is_set() else 0


def _plan(args: argparse.Namespace) -> TrainingPlan:
    values = read_toml(Path(args.plan)) if args.plan else {}
    plan = plan_from(TrainingPlan, args, values, args.plan or "train")
    check(plan)
    return plan


@contextmanager
def stop_on_signal(control: Control) -> Iterator[list[int]]:
    """The first signal ends the run after its step and saves; a second one ends the program.

    Yields:
        The signals that came.
    """
    came: list[int] = []

    def stop(number: int, frame: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        control.stop.set()

    with heard(stop):
        yield came


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
            output.say(f"memory: {v['estimated']}")
            if "memorization_reference" in v:
                output.say(
                    f"memorised bits of {v['memorization_train']} sequences that are trained on and "
                    f"{v['memorization_held_out']} held-out ones, against the {v['memorization_reference']}"
                )
        case "step":
            left = (plan.steps - event.step) * v["seconds"] / event.step
            output.say(
                f"step {event.step:>6}/{plan.steps}  loss {v['loss']:.4f}  lr {v['learning_rate']:.2e}  "
                f"|g| {v['grad_norm']:.3f}  {v['tokens_per_second']:,.0f} tok/s  {bytes_text(v['memory'])}  "
                f"{left:.0f} s left"
            )
        case "evaluation":
            output.say(f"       validation loss {v['valid_loss']:.4f}  perplexity {v['perplexity']:.2f}")
            if "masked_valid_loss" in v:
                output.say(f"       masked {v['masked_valid_loss']:.4f}  tokens per pass {v['tokens_per_pass']:.2f}")
        case "checkpoint":
            output.say(f"saved {v['path']}")
        case "resumed":
            output.say(f"goes on after step {event.step}")
        case "merge":
            output.say("       " + "  ".join(f"{name} {value:.3g}" for name, value in v.items()))
        case "diagnosis":
            shown = {name: value for name, value in v.items() if isinstance(value, float)}
            output.say("       " + "  ".join(f"{n.replace('_', ' ')} {value:.3g}" for n, value in shown.items()))
        case "memorized":
            output.say(f"       {in_words(v)}")
        case "best":
            output.say(f"       the best so far, kept at {v['path']}")
        case "early_stop":
            output.say(f"no better evaluation for a while: ends; the best was {v['best']:.4f}")
        case "warning":
            output.say(f"warning: {v['text']}")
        case "end":
            output.say(f"{v['status']} after step {event.step}")


def _detach(engine: str, plan: TrainingPlan, output: Output) -> int:
    """Start the plan in a process of its own, and wait until its run is registered."""
    process = start(detached(engine, plan), "run")
    run = str(process.wait(DETACH_SECONDS)["run"])
    with closing(RunStore()) as store:
        process.move_log(store.run(run).folder)
    output.say(f"run {run} goes on by itself: `gemma-tui runs show {run}`, `gemma-tui runs stop {run}`")
    output.row("end", status="detached", run=run, pid=process.process.pid, log=str(process.log))
    return 0
