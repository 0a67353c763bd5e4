"""A study on the command line that makes a run: progress while it goes on, what it found, and the exit code."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

from gemma_tui.commands.train import INTERRUPTED, stop_on_signal
from gemma_tui.output import Output
from gemma_tui.runs.store import Run
from gemma_tui.studies.events import Control, Event, passing
from gemma_tui.studies.recording import Recorded


def counted(run: Run, unit: str) -> Callable[[Event], tuple[float, str]]:
    """The place in a run whose steps are of some ``unit``, for ``follow``."""
    return lambda event: (event.step / max(1, run.steps), passing(event) or f"{event.step:,}/{run.steps:,} {unit}")


def follow(
    recorded: Recorded,
    control: Control,
    output: Output,
    title: str,
    place: Callable[[Event], tuple[float, str]],
    tell: Callable[[Event], None],
    show: Callable[[bool], dict[str, Any]],
) -> int:
    """Let a study take its course and tell what it found; returns the exit code.

    Args:
        title: of the progress.
        place: the share that is done at an event, and a few words of where that is.
        tell: called with each event.
        show: shows what was found, given whether the study was stopped; returns what the last row tells beside.
    """
    run = recorded.run
    with stop_on_signal(control) as came, closing(recorded.events) as events, output.progress(title) as progress:
        for event in events:
            progress(*place(event))
            tell(event)
    stopped = control.stop.is_set()
    found = show(stopped)
    output.say(f"kept as {run.run_id}" + (f": `gemma-tui runs resume {run.run_id}` goes on" if stopped else ""))
    output.row("end", status="stopped" if stopped else "done", run=run.run_id, **found)
    if came:
        return 128 + came[0]
    return INTERRUPTED if stopped else 0
