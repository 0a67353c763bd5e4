"""What all screens share: the status line on top and the keys at the bottom."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from textual.app import ComposeResult
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Footer

from gemma_tui.widgets.status import ModeLine, StatusLine

if TYPE_CHECKING:
    from gemma_tui.app import GemmaTui


AFTER_FIRST_FRAME = 0.2
"""Seconds that threads wait at the start: importing takes turns with drawing, and the frame comes first."""


class Workbench(Screen[None]):
    """A mode of the app: its name, its body, and the command that does the same."""

    MODE = ""

    @property
    def bench(self) -> GemmaTui:
        """The app, by its own type."""
        return cast("GemmaTui", self.app)

    def compose(self) -> ComposeResult:
        """Screens, status, body, keys."""
        yield ModeLine(list(self.app.MODES), self.MODE)
        yield StatusLine()
        yield from self.body()
        yield Footer(show_command_palette=False, compact=True)

    def body(self) -> Iterable[Widget]:
        """The widgets between."""
        return ()

    def job_ended(self) -> None:
        """Something ended on an engine, which may have changed what the screen shows."""

    def command(self) -> str:
        """The command that does what this screen is set to do."""
        return "gemma-tui"
