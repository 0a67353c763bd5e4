"""What a run's diagnoses tell of each matrix of each layer, as maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engines.training import LINEARS
from gemma_tui.heat import Heat
from gemma_tui.runs.store import Run, RunStore

MEASURES = {
    "relative": ("‖ΔW‖ / ‖W‖ so far", True),
    "norm": ("‖ΔW‖ so far", True),
    "effective_rank": ("effective rank of ΔW", False),
    "stable_rank": ("stable rank of ΔW", False),
    "rank1_energy": ("share of the gradient that rank 1 captures", False),
    "gradient_norm": ("gradient norm", True),
    "drift_v": ("|cos| of the gradient's direction with the one before", False),
}
"""What can be shown: its title, and whether it is drawn on a logarithmic scale."""


@dataclass
class Matrices:
    """The newest facts of each matrix of a run.

    Attributes:
        layers: how many layers the run's model has, as far as is known.
        global_layers: those with global attention.
        step: of the newest diagnosis.
    """

    run: Run
    facts: dict[tuple[int, str], dict[str, float]] = field(default_factory=dict)
    layers: int = 0
    global_layers: frozenset[int] = frozenset()
    step: int = 0
    _event: int = 0

    def read(self, store: RunStore) -> bool:
        """Read what is new; returns whether there was anything."""
        new = False
        for event in store.events(self.run.run_id, self._event):
            self._event = event.cursor
            if event.kind == "start":
                told = event.values.get("global_layers")
                self.global_layers = frozenset(told) if isinstance(told, list) else frozenset()
            elif event.kind == "matrices":
                self.step, new = event.step, True
                self._take(event.values)
        return new

    def heat(self, measure: str) -> Heat:
        """The map of one of ``MEASURES``: a row for each layer, a column for each linear."""
        title, log = MEASURES[measure]
        values = np.full((self.layers, len(LINEARS)), math.nan)
        for (layer, linear), facts in self.facts.items():
            values[layer, LINEARS.index(linear)] = facts.get(measure, math.nan)
        marks = ["█" if layer in self.global_layers else "▄" for layer in range(self.layers)]
        rows = [str(layer) for layer in range(self.layers)]
        heading = f"{self.run.run_id}, step {self.step:,}: {title}"
        return Heat(heading, rows, LINEARS, values, marks=marks, meaning="█ global ▄ local", log=log)

    def by_kind(self, measure: str) -> dict[str, float]:
        """The mean over the matrices of local and of global layers."""
        found: dict[str, list[float]] = {"local": [], "global": []}
        for (layer, _), facts in self.facts.items():
            if measure in facts:
                found["global" if layer in self.global_layers else "local"].append(facts[measure])
        return {kind: sum(values) / len(values) for kind, values in found.items() if values}

    def _take(self, values: Mapping[str, Any]) -> None:
        for name, gradient in _entries(values.get("gradients")):
            norm, sigma = gradient.get("norm"), gradient.get("sigma")
            found = {"drift_v": gradient.get("drift_v"), "gradient_norm": norm}
            if isinstance(norm, float) and isinstance(sigma, float) and norm:
                found["rank1_energy"] = sigma**2 / norm**2
            self._put(name, found)
        for name, update in _entries(values.get("updates")):
            self._put(name, {key: update.get(key) for key in ("relative", "norm", "effective_rank", "stable_rank")})

    def _put(self, name: str, found: Mapping[str, Any]) -> None:
        parts = name.split(".")
        if len(parts) != 5 or not parts[2].isdecimal() or parts[4] not in LINEARS or int(parts[2]) > 10_000:
            return  # another program wrote it
        place = (int(parts[2]), parts[4])
        self.layers = max(self.layers, place[0] + 1)
        self.facts.setdefault(place, {}).update({k: float(v) for k, v in found.items() if _number(v)})


def _entries(values: Any) -> list[tuple[str, Mapping[str, Any]]]:
    return [(str(k), v) for k, v in values.items() if isinstance(v, Mapping)] if isinstance(values, Mapping) else []


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
