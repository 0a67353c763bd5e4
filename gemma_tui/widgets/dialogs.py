"""Small windows: a question, and a text to read or copy."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Label, Static

from gemma_tui.text import clean


class Question(ModalScreen[str]):
    """A question answered by one key.

    Args:
        answers: for each key what it does; escape answers with nothing.
    """

    DEFAULT_CSS = """
    Question { align: center middle; }
    Question > Vertical {
        width: 64; max-width: 96%; height: auto;
        border: round $accent; padding: 0 1; background: $surface;
    }
    Question Label { width: 1fr; }
    """
    BINDINGS = [Binding("escape", "answer('')", "Back", id="question.back")]

    def __init__(self, text: str, answers: dict[str, str]) -> None:
        super().__init__()
        self.text = text
        self.answers = answers

    def compose(self) -> ComposeResult:
        """The question and its keys."""
        with Vertical():
            yield Label(clean(self.text), markup=False)
            for key, meaning in self.answers.items():
                yield Label(f"  {key}  {meaning}", markup=False)
            yield Label("  escape  back", markup=False)

    def on_mount(self) -> None:
        """Bind the answers' keys."""
        for key, meaning in self.answers.items():
            self._bindings.bind(key, f"answer('{key}')", meaning)

    def action_answer(self, key: str) -> None:
        """Close with an answer."""
        self.dismiss(key)


class Reading(ModalScreen[None]):
    """A title and a text to scroll; any of escape, enter and q closes it."""

    DEFAULT_CSS = """
    Reading { align: center middle; }
    Reading > VerticalScroll {
        width: 90%; height: auto; max-height: 90%;
        border: round $accent; padding: 0 1; background: $surface;
    }
    """
    BINDINGS = [Binding("escape,enter,q", "close", "Close", id="reading.close")]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self.heading = title
        self.text = text

    def compose(self) -> ComposeResult:
        """The text in a frame."""
        with VerticalScroll() as frame:
            frame.border_title = clean(self.heading).replace("[", r"\[")
            yield Static(clean(self.text), markup=False)

    def action_close(self) -> None:
        """Close."""
        self.dismiss(None)
