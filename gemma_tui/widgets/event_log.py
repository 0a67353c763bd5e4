"""A run in words: where it stands, and what happened."""

from __future__ import annotations

from collections.abc import Iterable

from textual.containers import VerticalScroll
from textual.widget import Widget
from textual.widgets import Static

from gemma_tui.output import duration
from gemma_tui.runs.store import Row
from gemma_tui.runs.view import RunView
from gemma_tui.text import one_line
from gemma_tui.widgets.status import bar

LOG_LINES = 300


class EventLog(VerticalScroll):
    """What happened, line by line, the newest in sight."""

    def __init__(self, id: str) -> None:
        super().__init__(id=id)
        self.lines: list[str] = []

    def compose(self) -> Iterable[Widget]:
        """The lines."""
        yield Static("", markup=False)

    def clear(self) -> None:
        """Forget all lines."""
        self.lines = []
        self.add([])

    def add(self, lines: list[str]) -> None:
        """Add lines; the oldest go when there are many."""
        self.lines = [*self.lines, *lines][-LOG_LINES:]
        self.query_one(Static).update("\n".join(self.lines))
        self.scroll_end(animate=False)


def headline(view: RunView, passing: str = "") -> str:
    """Where a run stands, on one line.

    Args:
        passing: what it is at between two steps, if that is known.
    """
    run, last = view.run, view.last
    parts = [run.run_id, run.state, f"{bar(run.step / max(1, run.steps), 8)} {run.step:,}/{run.steps:,}"]
    if last.get("loss") is not None:
        parts.append(f"loss {last['loss']:.3f}")
    if last.get("valid_loss") is not None:
        parts.append(f"valid {last['valid_loss']:.3f}")
    if run.state == "running" and passing:
        parts.append(passing)
    elif run.state == "running" and run.step and last.get("seconds"):
        parts.append(f"{duration((run.steps - run.step) * last['seconds'] / run.step)} left")
    if run.error:
        parts.append(run.error)
    return "  ".join(one_line(part, 300) for part in parts)


def event_line(event: Row) -> str:
    """An event in words; nothing for one that is not told."""
    v = event.values
    text = {
        "load": lambda: f"loading {v['model']}",
        "start": lambda: (
            f"{v['model']} on {v['engine']} {v['device']} {v['dtype']}: {v['trainable']:,} of {v['parameters']:,} "
            f"trained, {v['train_tokens']:,} tokens"
        ),
        "checkpoint": lambda: f"saved {v['path']}",
        "warning": lambda: f"warning: {v['text']}",
        "resumed": lambda: f"goes on from {v['path']}",
        "merge": lambda: ", ".join(f"{name} {value:.3g}" for name, value in v.items()),
        "best": lambda: f"the best so far is kept in {v['path']}",
        "early_stop": lambda: f"no better evaluation for a while; the best was {v['best']:.4f}",
        "pause": lambda: "paused",
        "resume": lambda: "goes on",
    }.get(event.kind)
    try:
        return f"{event.step:>6}  {one_line(text(), 200)}" if text else ""
    except (KeyError, TypeError, ValueError):  # another version wrote it
        return f"{event.step:>6}  {one_line(event.kind)}"
