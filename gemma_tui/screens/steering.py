"""Pausing and stopping a run, of this app by its job's control, of another process through the run store; going on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_tui.errors import UsageError
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.screens.run_list import what_else

if TYPE_CHECKING:
    from gemma_tui.app import GemmaTui
    from gemma_tui.session import Job


SAVING = ("train", "study", "sweep", "measure", "where")
"""Jobs that finish the step in hand and keep it; the others leave what they are at."""

FOLLOWED = {"heads": "attention", "capacity": "capacity", "memorization": "capacity", "where": "capacity"}
"""The screen that follows runs of a study, which are not of training."""


def pause(bench: GemmaTui, job: Job | None, run: Run | None, store: RunStore | None) -> None:
    """Pause a run, or let it go on.

    Args:
        job: its job, or what is starting, if that is of this app.
        run: None while it is starting.
    """
    if job is not None and not job.future.done():
        held = job.control.pause
        held.clear() if held.is_set() else held.set()
    elif run is not None and run.active and store is not None:
        paused = run.request == "pause" or (run.state == "paused" and run.request != "resume")
        _ask(bench, store, run, "resume" if paused else "pause")
    else:
        bench.tell("no run that goes on is shown", "warning")


def stop(bench: GemmaTui, job: Job | None, run: Run | None, store: RunStore | None) -> None:
    """End a run after its step; it saves. The arguments are those of ``pause``."""
    if job is not None and not job.future.done():
        job.control.stop.set()
        bench.tell(f"{job.label} ends after this step and saves" if job.kind in SAVING else f"{job.label} ends")
    elif run is not None and run.active and store is not None:
        _ask(bench, store, run, "stop")
    else:
        bench.tell("no run that goes on is shown", "warning")


def go_on_elsewhere(bench: GemmaTui, run: Run) -> None:
    """Go on with a run that is no training run, on the screen that shows such runs.

    Raises:
        UnsupportedError: the engine is busy.
        UsageError: no screen shows it.
    """
    if run.study not in FOLLOWED:
        raise UsageError(what_else(run))
    bench.session.resume(run.study, run.run_id)
    bench.call_later(bench.action_switch_mode, FOLLOWED[run.study])


def _ask(bench: GemmaTui, store: RunStore, run: Run, what: str) -> None:
    def ask() -> None:
        store.request(run.run_id, what)
        bench.tell(f"{run.run_id} was asked to {what}")

    bench.attempt(ask)
