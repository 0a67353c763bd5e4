"""Attention: not built yet; the screen says in one line what it will do."""

from __future__ import annotations

from collections.abc import Iterable

from textual.widget import Widget
from textual.widgets import Static

from gemma_tui.screens.workbench import Workbench


class AttentionScreen(Workbench):
    """One line."""

    MODE = "attention"

    def body(self) -> Iterable[Widget]:
        """What will be here."""
        yield Static(
            "Attention will show what local and global layers attend to, head by head.", classes="pane", markup=False
        )
