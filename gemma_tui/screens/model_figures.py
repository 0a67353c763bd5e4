"""A model looked into from the list of models: its tree, its weights in numbers, and what it needs here."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from textual.binding import Binding
from textual.widget import Widget
from textual.widgets import Static

from engines.errors import EngineError
from gemma_tui.figure import Figure
from gemma_tui.screens.exporting import ask_and_export
from gemma_tui.screens.workbench import Workbench
from gemma_tui.text import one_line
from gemma_tui.widgets.figure_view import FigureView

if TYPE_CHECKING:
    from engines.base import Progress


class LeftError(Exception):
    """The screen was left while its figure was made."""


class ModelFigure(Workbench):
    """A figure of one model; tab shows its next part.

    Args:
        make: makes the figure in a thread of its own.
        words: the command that shows the same.
    """

    MODE = "models"
    BINDINGS = [
        Binding("escape", "close", "Back", id="figure.back"),
        Binding(
            "tab", "turn", "Next part", id="figure.turn", tooltip="Show the next map, chart or table", priority=True
        ),
        Binding("s", "export", "Export", id="figure.export", tooltip="Write what is shown to a file"),
    ]

    def __init__(self, title: str, make: Callable[[Progress], Figure], words: str) -> None:
        super().__init__()
        self._model, self._make, self._words = title, make, words
        self._left = threading.Event()

    def body(self) -> Iterable[Widget]:
        """What is being done, above the figure."""
        yield Static("", id="doing", markup=False)
        yield FigureView(id="figure")

    def on_mount(self) -> None:
        """Begin; no worker, because leaving would wait for one."""
        self.say("reading…")
        threading.Thread(target=self._run, daemon=True).start()

    def on_unmount(self) -> None:
        """Nobody waits for the figure any more."""
        self._left.set()

    def command(self) -> str:
        """The command that shows the same."""
        return self._words

    def say(self, text: str) -> None:
        """Tell what is being done."""
        self.query_one("#doing", Static).update(one_line(text, 200))

    def show(self, figure: Figure) -> None:
        """Show a figure."""
        view = self.query_one(FigureView)
        view.show(figure)
        self.say(f"{figure.title} · {view.place}")

    def action_close(self) -> None:
        """Go back to the list."""
        self.dismiss(None)

    def action_turn(self) -> None:
        """Show the next part."""
        view = self.query_one(FigureView)
        view.turn()
        self.say(f"{view.figure.title} · {view.place}")

    def action_export(self) -> None:
        """Write the figure to a file."""
        figure = self.query_one(FigureView).figure
        if figure.title:
            ask_and_export(self.bench, lambda: figure, f"{self._model.replace('/', '-')}.html")

    def _run(self) -> None:
        def progress(share: float, text: str) -> None:
            if self._left.is_set():
                raise LeftError
            self._call(lambda: self.say(f"{share:.0%} {text}"))

        try:
            figure = self._make(progress)
        except LeftError:
            return
        except EngineError as error:
            said = str(error)
            self._call(lambda: self.say(said))
            return
        except Exception as error:
            said = one_line(f"{type(error).__name__}: {error}")
            self._call(lambda: self.say(said))
            raise
        self._call(lambda: self.show(figure))

    def _call(self, what: Callable[[], None]) -> None:
        def act() -> None:
            if self.is_attached:
                what()

        with suppress(RuntimeError):  # the app has ended
            self.app.call_from_thread(act)


def tree_screen(model: str) -> ModelFigure:
    """The architecture of a model."""
    from gemma_tui.studies.architecture import tree_figure
    from gemma_tui.studies.fitting import config_named

    words = shlex.join(["gemma-tui", "models", "tree", model])
    return ModelFigure(model, lambda progress: tree_figure(model, config_named(model)), words)


def weights_screen(model: str) -> ModelFigure:
    """The matrices of a model in numbers; an adapter's differ from its base's."""
    from gemma_tui.hub.models import resolve
    from gemma_tui.studies.weights import base_of, measure, weights_figure

    def make(progress: Progress) -> Figure:
        found = resolve(model, progress)
        against = base_of(found, progress)
        return weights_figure(found, against, measure(found, against, progress))

    return ModelFigure(model, make, shlex.join(["gemma-tui", "models", "weights", model]))


def fit_screen(model: str) -> ModelFigure:
    """What a model needs on this machine."""
    from gemma_tui.studies.fitting import config_named, devices, needs_figure

    words = shlex.join(["gemma-tui", "models", "fit", model])
    return ModelFigure(model, lambda progress: needs_figure(model, config_named(model), devices()), words)
