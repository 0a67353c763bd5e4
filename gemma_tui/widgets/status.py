"""The line that says what is loaded where, and what runs."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from gemma_tui.output import bytes_text, count_text, duration
from gemma_tui.session import Session
from gemma_tui.text import one_line

BAR = 10


class ModeLine(Widget):
    """The five screens, by their keys, the current one reversed."""

    DEFAULT_CSS = """
    ModeLine { height: 1; background: $panel; padding: 0 1; }
    """

    def __init__(self, modes: Sequence[str], current: str) -> None:
        super().__init__()
        self.modes = modes
        self.current = current

    def render(self) -> Content:
        """Number and name of each."""
        parts: list[Content] = []
        for number, mode in enumerate(self.modes, 1):
            parts.append(
                Content.styled(f" {number} {mode.capitalize()} ", "bold reverse" if mode == self.current else "")
            )
        return Content(" ").join(parts)


class StatusLine(Widget):
    """engine · device · dtype · model · memory · what is running."""

    DEFAULT_CSS = """
    StatusLine {
        height: 1; padding: 0 1; background: $boost; color: $foreground;
        text-wrap: nowrap; text-overflow: ellipsis;
    }
    """

    text: reactive[str] = reactive("")

    def render(self) -> Content:
        """The line, cleaned."""
        return Content(self.text)


def describe(session: Session) -> str:
    """The status of a session on one line."""
    place = session.place
    parts = [session.engine]
    if place.device is not None:
        parts.append(place.device.device)
    if place.info is not None:
        parts += [place.info.dtype, f"{place.model} {count_text(place.info.parameters)}"]
    elif place.job is None:
        parts.append("no model")
    if place.memory:
        parts.append(bytes_text(place.memory))
    parts += [_running(session, job.engine) for job in session.jobs]
    return one_line(" · ".join(parts), 400)


def _running(session: Session, engine: str) -> str:
    job = next(job for job in session.jobs if job.engine == engine)
    where = "" if engine == session.engine else f" on {engine}"
    state = " paused" if job.control.pause.is_set() else ""
    if job.passing and not state:
        return f"{job.label}{where} {bar(job.share, BAR)} {job.passing}"
    left = job.seconds_left
    eta = f" {duration(left)} left" if left is not None and not state else ""
    return f"{job.label}{where}{state} {bar(job.share, BAR)} {job.detail}{eta}"


def bar(share: float, width: int) -> str:
    """A bar of block characters."""
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + "░" * (width - full)
