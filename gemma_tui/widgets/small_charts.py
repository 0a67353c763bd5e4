"""The small charts below the loss: the pace of a run, or what its diagnoses tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from textual.containers import Horizontal
from textual.widget import Widget

from gemma_tui.plots import Series
from gemma_tui.runs.view import DIAGNOSED, RunView
from gemma_tui.widgets.chart import Chart

SETS: tuple[Mapping[str, str], ...] = (
    {"learning_rate": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens/s"},
    {"rank1_energy": "rank-1 energy, ∇W", "effective_rank": "effective rank, ΔW", "drift": "drift of ∇W, |cos|"},
    {"gradient_stable_rank": "stable rank, ∇W", "relative_update": "‖ΔW‖ / ‖W‖", "predicted": "loss decrease"},
)
"""For each set its measures and the charts' titles; ∇W is the gradient of a matrix, ΔW what became of it so far, and
all but the decrease are means over the matrices. Short, since three stand side by side."""

BESIDE = {"predicted": "measured"}
"""What is drawn in the chart of another measure."""


class SmallCharts(Horizontal):
    """Three charts at a time."""

    def __init__(self, id: str) -> None:
        super().__init__(id=id)
        self._set = 0
        self._diagnosed = False

    def compose(self) -> Iterable[Widget]:
        """The charts of all sets; those of one are seen."""
        for number, charts in enumerate(SETS):
            for measure, title in charts.items():
                chart = Chart(title, id=measure)
                chart.display = number == self._set
                yield chart

    def begin(self) -> None:
        """Another run: it is not known yet whether it has diagnoses."""
        self._diagnosed = False
        self._choose(0)

    def show(self, view: RunView) -> None:
        """Take in what a run has so far."""
        self._diagnosed = any(measure in view.lines for measure in DIAGNOSED)
        for measure in (measure for charts in SETS for measure in charts):
            lines = [m for m in (measure, BESIDE.get(measure)) if m in view.lines]
            if lines:
                self.query_one(f"#{measure}", Chart).show([Series(str(m), *view.lines[str(m)]) for m in lines])

    def turn(self) -> bool:
        """Show the next set; false where the run has no diagnoses, so that there is only one."""
        if self._diagnosed:
            self._choose((self._set + 1) % len(SETS))
        return self._diagnosed

    def _choose(self, number: int) -> None:
        self._set = number
        for place, charts in enumerate(SETS):
            for measure in charts:
                self.query_one(f"#{measure}").display = place == number
