"""Capacity: not built yet; the screen says in one line what it will do."""

from __future__ import annotations

from collections.abc import Iterable

from textual.widget import Widget
from textual.widgets import Static

from gemma_tui.screens.workbench import Workbench


class CapacityScreen(Workbench):
    """One line."""

    MODE = "capacity"

    def body(self) -> Iterable[Widget]:
        """What will be here."""
        yield Static(
            "Capacity will show how many bits a model memorises, and when memorising turns into generalising.",
            classes="pane",
            markup=False,
        )
