"""The small charts below the loss: the pace of a run, what its diagnoses tell, or what it has memorised."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from textual.containers import Horizontal
from textual.widget import Widget

from gemma_tui.plots import Series
from gemma_tui.runs.view import DIAGNOSED, MEMORIZED, RunView
from gemma_tui.studies.memorization.history import marks
from gemma_tui.widgets.chart import Chart

SETS: tuple[Mapping[str, str], ...] = (
    {"learning_rate": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens/s"},
    {"rank1_energy": "rank-1 energy, ∇W", "effective_rank": "effective rank, ΔW", "drift": "drift of ∇W, |cos|"},
    {"gradient_stable_rank": "stable rank, ∇W", "relative_update": "‖ΔW‖ / ‖W‖", "predicted": "loss decrease"},
    {"memorized_bits": "memorised bits", "held_out_loss": "held-out loss", "generalisation": "held-out gain, nats"},
    {"tokens_per_pass": "tokens a pass, γ = 0.1", "masked_loss": "masked loss", "masked_valid_loss": "held-out masked"},
)
"""For each set its measures and the charts' titles; ∇W is the gradient of a matrix, ΔW what became of it so far, and
all of these but the decrease are means over the matrices. Short, since three stand side by side."""

NEEDED = ((), DIAGNOSED, DIAGNOSED, MEMORIZED, ("masked_loss",))
"""For each set the measures of which a run has one where the set is shown."""

BESIDE = {"predicted": "measured", "memorized_bits": "held_out_bits", "held_out_loss": "memorized_loss"}
"""What is drawn in the chart of another measure."""

NAMES = {
    "memorized_bits": "trained on", "memorized_loss": "trained on", "held_out_bits": "held out",
    "held_out_loss": "held out",
}  # fmt: skip
"""What lines are called that do not go by their own names."""


class SmallCharts(Horizontal):
    """Three charts at a time."""

    def __init__(self, id: str) -> None:
        super().__init__(id=id)
        self._set = 0
        self._there = {0}

    def compose(self) -> Iterable[Widget]:
        """The charts of all sets; those of one are seen."""
        for number, charts in enumerate(SETS):
            for measure, title in charts.items():
                chart = Chart(title, id=measure)
                chart.display = number == self._set
                yield chart

    def begin(self) -> None:
        """Another run: it is not known yet what it has."""
        self._there = {0}
        self._choose(0)

    def show(self, view: RunView) -> None:
        """Take in what a run has so far."""
        self._there = {n for n, needed in enumerate(NEEDED) if not needed or not view.lines.keys().isdisjoint(needed)}
        marked = _marks(view)
        for measure in (measure for charts in SETS for measure in charts):
            lines = [m for m in (measure, BESIDE.get(measure)) if m in view.lines]
            if lines:
                series = [Series(NAMES.get(str(m), str(m)), *view.lines[str(m)]) for m in lines]
                self.query_one(f"#{measure}", Chart).show([*series, *marked.get(measure, ())])

    def turn(self) -> bool:
        """Show the next set; false where the run has neither diagnoses nor bits, so that there is only one."""
        after = sorted(self._there, key=lambda number: (number <= self._set, number))
        self._choose(after[0])
        return len(after) > 1

    def _choose(self, number: int) -> None:
        self._set = number
        for place, charts in enumerate(SETS):
            for measure in charts:
                self.query_one(f"#{measure}").display = place == number


def _marks(view: RunView) -> dict[str, list[Series]]:
    """Upright lines where memorising is over and where the held-out loss is lowest, as far as it is known."""
    if "memorized_bits" not in view.lines:
        return {}
    steps, bits = view.lines["memorized_bits"]
    held_out = view.lines.get("held_out_loss", (steps, ()))[1]
    end, low = marks([int(step) for step in steps], bits, held_out)
    found = {"memorized_bits": ("over at", end, bits), "held_out_loss": ("lowest at", low, held_out)}
    return {
        measure: [Series(f"{words} {step}", [float(step)] * 2, _ends(values))]
        for measure, (words, step, values) in found.items() if step is not None
    }  # fmt: skip


def _ends(values: Sequence[float]) -> list[float]:
    finite = [value for value in values if math.isfinite(value)]
    return [min(finite), max(finite)]
