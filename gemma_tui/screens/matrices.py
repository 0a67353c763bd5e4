"""Inside a run: a map of layers and matrices, for each thing that its diagnoses measure."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from textual.binding import Binding
from textual.containers import Vertical
from textual.widget import Widget
from textual.widgets import Static

from gemma_tui.errors import GemmaTuiError
from gemma_tui.runs.matrices import MEASURES, Matrices
from gemma_tui.runs.store import RunStore
from gemma_tui.screens.workbench import Workbench
from gemma_tui.text import one_line
from gemma_tui.widgets.heatmap import HeatMap

WATCH_SECONDS = 1.0
NOTHING = "no diagnosis yet: set diagnose every in the plan, and the run tells of its matrices"


class MatricesScreen(Workbench):
    """The matrices of a run, live; m takes the next measure."""

    MODE = "training"
    BINDINGS = [
        Binding("escape", "close", "Back", id="matrices.back"),
        Binding("m", "measure(1)", "Measure", id="matrices.measure", tooltip="Show the next measure"),
        Binding("n", "measure(-1)", "Before", id="matrices.before", show=False, tooltip="Show the measure before"),
    ]

    def __init__(self, matrices: Matrices, store: RunStore) -> None:
        super().__init__()
        self.matrices = matrices
        self.measure = next(iter(MEASURES))
        self._store: RunStore | None = store

    def body(self) -> Iterable[Widget]:
        """The map above what it says of local and global layers."""
        summary = Static(NOTHING, id="kinds", markup=False)
        yield Vertical(HeatMap(self.matrices.heat(self.measure), id="map"), summary, classes="pane")

    def on_mount(self) -> None:
        """Look at the store from now on."""
        self.query_one(HeatMap).focus()
        self.set_interval(WATCH_SECONDS, self._watch)
        self._watch()

    def command(self) -> str:
        """The command that prints this map."""
        return shlex.join(["gemma-tui", "runs", "matrices", self.matrices.run.run_id, "--measure", self.measure])

    def action_close(self) -> None:
        """Go back to the run."""
        self.dismiss(None)

    def action_measure(self, by: int) -> None:
        """Show another measure."""
        names = list(MEASURES)
        self.measure = names[(names.index(self.measure) + by) % len(names)]
        self._draw()

    def _watch(self) -> None:
        if self._store is None or not self.is_current:
            return
        try:
            new = self.matrices.read(self._store)
        except GemmaTuiError as error:
            self._store = None
            self.bench.tell(str(error), "error")
            return
        if new:
            self._draw()

    def _draw(self) -> None:
        self.query_one(HeatMap).show(self.matrices.heat(self.measure))
        kinds = self.matrices.by_kind(self.measure)
        means = ", ".join(f"{kind} layers {value:.4g}" for kind, value in kinds.items())
        self.query_one("#kinds", Static).update(one_line(f"mean of {means}" if means else NOTHING), layout=False)
