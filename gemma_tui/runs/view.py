"""A run as it grows: reads what is new in the store and keeps it as lines for charts."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gemma_tui.runs.store import Row, Run, RunStore

if TYPE_CHECKING:
    from collections.abc import Mapping

ROWS_PER_READ = 2000
"""Few enough that reading never holds up a frame; a long run is caught up with over several reads."""

MEASURES = ("loss", "masked_loss", "learning_rate", "grad_norm", "tokens_per_second")
DIAGNOSED = (
    "rank1_energy", "gradient_stable_rank", "drift", "effective_rank", "relative_update", "predicted", "measured",
)  # fmt: skip
"""Of a diagnosis; the one at the end of a run has only some."""
MEMORIZED = ("memorized_bits", "held_out_bits", "memorized_loss", "held_out_loss", "generalisation")
"""Of a measurement of memorised bits; there is nothing held out in some runs."""

BLOCKWISE = ("masked_valid_loss", "tokens_per_pass")
"""Of the evaluations of a run that trains on masked copies."""


@dataclass
class RunView:
    """What is known of one run so far.

    Attributes:
        lines: for each measure its steps and values; a value that was not finite is NaN.
        last: the newest metrics, whatever their kind.
        fresh: events since the last ``take``.
    """

    run: Run
    lines: dict[str, tuple[array[float], array[float]]] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    fresh: list[Row] = field(default_factory=list)
    _metric: int = 0
    _event: int = 0

    def read(self, store: RunStore) -> bool:
        """Read what is new; returns whether there was anything."""
        self.run = store.run(self.run.run_id)
        metrics = store.metrics(self.run.run_id, self._metric, ROWS_PER_READ)
        events = store.events(self.run.run_id, self._event, ROWS_PER_READ)
        for row in metrics:
            self._metric = row.cursor
            self._add(row.step, row.values, row.kind)
        if events:
            self._event = events[-1].cursor
            self.fresh += events
        return bool(metrics or events)

    def take(self) -> list[Row]:
        """The events that nobody has taken yet."""
        taken, self.fresh = self.fresh, []
        return taken

    def _add(self, step: int, values: Mapping[str, Any], kind: str) -> None:
        if kind in ("diagnosis", "memorized"):
            for measure in DIAGNOSED if kind == "diagnosis" else MEMORIZED:
                if measure in values:
                    self._point(measure, step, values[measure])
            return
        if kind == "evaluation":
            # Its seconds are those of the evaluation; the estimate of what is left goes by the steps'.
            self.last["valid_loss"] = values.get("valid_loss")
            self._point("valid_loss", step, values.get("valid_loss"))
            for measure in BLOCKWISE:
                if measure in values:
                    self._point(measure, step, values[measure])
            return
        self.last |= values
        for measure in MEASURES:
            if measure in values or measure != "masked_loss":
                self._point(measure, step, values.get(measure))

    def _point(self, measure: str, step: int, value: Any) -> None:
        steps, points = self.lines.setdefault(measure, (array("d"), array("d")))
        steps.append(step)
        points.append(value if isinstance(value, int | float) else math.nan)  # another program may have written it
