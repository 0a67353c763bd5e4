"""A study with its run: every event goes to the run store before anyone else sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from engines.base import Engine
from gemma_tui.errors import UsageError
from gemma_tui.runs import checkpoints
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.estimate import remembered
from gemma_tui.studies.events import PASSING, Control, Event
from gemma_tui.studies.plan import build, command
from gemma_tui.studies.training import train
from gemma_tui.studies.training_plan import TrainingPlan, plan_of
from gemma_tui.text import one_line

P = TypeVar("P")

REQUEST_SECONDS = 1.0
LOOKED_BACK = 100
MEMORY_KEYS = (
    "model", "method", "mode", "batch_size", "accumulate", "sequence_length", "rank", "rest", "error_feedback",
    "update_momentum", "optimizer", "dtype", "checkpoint_activations",
    "masked_weight", "window", "global_every",
)  # fmt: skip
"""What the memory of a run goes by; runs that agree in it are alike."""

STATES = {"pause": "paused", "resume": "running"}


@dataclass(frozen=True)
class Recorded:
    """A registered run, and its events once someone iterates over them."""

    run: Run
    events: Generator[Event, None, None]


def record_training(engine: Engine, plan: TrainingPlan, control: Control, store: RunStore) -> Recorded:
    """Register a training run and make its recorded events; nothing is computed before they are asked for."""
    verb = ("train", "--engine", engine.name)
    words, name = command(verb, plan), plan.name or plan.method
    run = store.create(name, "training", engine.name, asdict(plan), words, plan.steps, plan.group)
    return _training(engine, plan, run, control, store)


def resume_training(engine: Engine, run: Run, control: Control, store: RunStore) -> Recorded:
    """Take over a run and make its events from its newest whole checkpoint on.

    Raises:
        UsageError: there is nothing left to do, or its plan is another version's.
        GemmaTuiError: another process computes it.
    """
    plan = plan_of(run.plan)
    if run.step >= plan.steps and run.state == "done":
        raise UsageError(f"{run.run_id} has taken all of its {plan.steps} steps: train on it with --model {run.run_id}")
    check_engine(run, engine)
    run = store.adopt(run.run_id)
    return _training(engine, plan, run, control, store)


def _training(engine: Engine, plan: TrainingPlan, run: Run, control: Control, store: RunStore) -> Recorded:
    ratio = remembered(experience(store, plan, run.engine, run.run_id))

    def study(folder: Path) -> Iterator[Event]:
        return train(engine, plan, folder, control, ratio)

    return Recorded(run, recorded(store, run, study, control))


def experience(store: RunStore, plan: TrainingPlan, engine: str, but: str = "") -> Iterator[tuple[float, float]]:
    """Estimated and measured bytes of runs of an engine that asked for as much memory, leaving out the run ``but``."""
    for other in store.runs(LOOKED_BACK):
        alike = all(other.plan.get(key) == getattr(plan, key) for key in MEMORY_KEYS)
        if other.run_id == but or other.engine != engine or not alike:
            continue
        told = [e.values.get("estimate") for e in store.events(other.run_id, limit=5) if e.kind == "start"]
        if told and isinstance(told[0], int | float):
            yield told[0], store.peak_memory(other.run_id)


def check_engine(run: Run, engine: Engine) -> None:
    """Whether a run can go on with an engine.

    Raises:
        UsageError: another one began it, whose numbers are not the same to the last bit.
    """
    if run.engine != engine.name:
        raise UsageError(f"{run.run_id} was computed with {run.engine}: resume it with --engine {run.engine}")


def kept_plan(plan: type[P], run: Run, study: str, what: str) -> P:
    """The plan that a run of a study was started with.

    Args:
        what: the study in words, after "no".

    Raises:
        UsageError: the run is another study, or its plan is another version's.
    """
    if run.study != study:
        raise UsageError(f"{run.run_id} is no {what}: `gemma-tui runs list` tells what it is")
    return build(plan, {key: value for key, value in run.plan.items() if value is not None}, run.run_id)


def recorded(
    store: RunStore, run: Run, study: Callable[[Path], Iterator[Event]], control: Control
) -> Generator[Event, None, None]:
    """The events of a study, kept as they come; the run's state follows, also when the study fails.

    Once a second the run's requests are read, also while it is paused, so that another process can steer it.
    """
    looked, last, known = time.monotonic(), Event("run"), store.last_steps(run.run_id)
    yield Event("run", values={"run": run.run_id})
    try:
        for event in study(run.folder):
            last = event
            # A run that goes on takes again the steps after its checkpoint, with the same results.
            again = event.step <= known.get(event.kind, -1)
            if event.kind not in PASSING and not again:
                store.record(run.run_id, event.kind, event.step, event.values)
            if event.kind in STATES:
                store.set_state(run.run_id, STATES[event.kind])
            yield event
            if time.monotonic() - looked > REQUEST_SECONDS:
                looked = time.monotonic()
                heed(store.take_request(run.run_id), control)
    except BaseException as error:
        broken_off = isinstance(error, KeyboardInterrupt | GeneratorExit)
        checkpoints.release_ballast(run.folder / "checkpoints")  # so that the end can be written on a full disk
        said = "broken off" if broken_off else one_line(str(error) or type(error).__name__)
        store.set_state(run.run_id, "failed", said)
        raise
    state = "stopped" if control.stop.is_set() else "done"
    store.set_state(run.run_id, state)
    yield Event("end", last.step, {"status": state, "run": run.run_id})


def heed(request: str, control: Control) -> None:
    """Do what another process asked for."""
    match request:
        case "stop":
            control.stop.set()
        case "pause":
            control.pause.set()
        case "resume":
            control.pause.clear()
