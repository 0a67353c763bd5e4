"""What training does to each matrix: its gradient, and how far it has moved from where it began."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from engines.adapters import target_modules
from engines.base import Engine
from engines.gemma3 import Gemma3Config
from engines.training import LINEARS, Batch, GradientFacts, StepResult

SHARE = 0.02
"""Of the time since the diagnosis before: what spectra may take. They go round the matrices, some at each diagnosis."""


def singular_values(matrix: np.ndarray) -> np.ndarray:
    """Descending, float64, of a float32 matrix; from its smaller Gram matrix, so that values under 1e-4 of the largest
    are not exact."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    exact = wide.astype(np.float64)
    gram = exact @ exact.T  # numpy makes but half of a product with one's own transpose
    return np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None))


def effective_rank(values: np.ndarray) -> float:
    """``exp(H(σ / Σσ))``, H in nats (Roy & Vetterli, 2007); 0 for a matrix of zeros."""
    total = float(values.sum())
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return math.exp(-float((shares * np.log(shares)).sum()))


def stable_rank(values: np.ndarray) -> float:
    """``‖A‖_F² / σ₁²``; 0 for a matrix of zeros."""
    return float((values**2).sum() / values[0] ** 2) if values[0] > 0 else 0.0


@dataclass(frozen=True)
class UpdateFacts:
    """The accumulated update ΔW = W - W_0 of one matrix.

    Attributes:
        relative: ‖ΔW‖ / ‖W_0‖.
        spectrum: the largest singular values of ΔW, at most 16.
    """

    norm: float
    relative: float
    effective_rank: float
    stable_rank: float
    spectrum: tuple[float, ...]


def update_facts(delta: np.ndarray, start_norm: float) -> UpdateFacts:
    """Norms and ranks of an update ``[out, in]`` of a matrix whose norm was ``start_norm``."""
    values, norm = singular_values(delta), float(np.linalg.norm(delta))
    relative = norm / start_norm if start_norm else math.inf
    spectrum = tuple(float(v) for v in values[:16])
    return UpdateFacts(norm, relative, effective_rank(values), stable_rank(values), spectrum)


@dataclass
class Diagnoses:
    """The diagnoses of one run, which take turns with the matrices' spectra.

    Attributes:
        turn: the place of the matrix that is next.
        updates: the newest facts of each matrix.
    """

    matrices: list[str]
    turn: int = 0
    updates: dict[str, UpdateFacts] = field(default_factory=dict)
    _ended: float = field(default_factory=time.monotonic)

    def look(self, engine: Engine) -> dict[str, UpdateFacts]:
        """Spectra of as many matrices as there is time for, at least one; those that were new."""
        allowed = SHARE * (time.monotonic() - self._ended)
        began, fresh = time.monotonic(), dict[str, UpdateFacts]()
        while len(fresh) < len(self.matrices) and (not fresh or time.monotonic() - began < allowed):
            fresh |= self.one(engine)
        self._ended = time.monotonic()
        return fresh

    def one(self, engine: Engine) -> dict[str, UpdateFacts]:
        """The spectrum of the matrix whose turn it is."""
        name = self.matrices[self.turn]
        self.turn = (self.turn + 1) % len(self.matrices)
        fresh = {found: update_facts(delta, norm) for found, delta, norm in engine.updates([name])}
        self.updates |= fresh
        return fresh


def matrices_of(config: Gemma3Config) -> list[str]:
    """The layers' linears, in an order that spreads over all layers soon."""
    names = list(target_modules(config, LINEARS))
    return [name for first in range(len(LINEARS)) for name in names[first :: len(LINEARS)]]


def gradient_row(gradients: Mapping[str, GradientFacts]) -> dict[str, float | None]:
    """Means over the matrices: energy that rank 1 captures, stable rank, drift of the leading direction."""
    seen = [g for g in gradients.values() if g.sigma > 0]
    if not seen:
        return {}
    drifts = [g.drift_v for g in seen if g.drift_v is not None]
    return {
        "rank1_energy": _mean([g.sigma**2 / g.norm**2 for g in seen]),
        "gradient_stable_rank": _mean([g.norm**2 / g.sigma**2 for g in seen]),
        "drift": _mean(drifts) if drifts else None,
    }


def update_row(updates: Mapping[str, UpdateFacts]) -> dict[str, float]:
    """Means over the matrices that were measured so far."""
    facts = list(updates.values())
    return {
        "effective_rank": _mean([f.effective_rank for f in facts]),
        "update_stable_rank": _mean([f.stable_rank for f in facts]),
        "relative_update": _mean([f.relative for f in facts]),
    }


def measured_decrease(engine: Engine, batches: Sequence[Batch], result: StepResult) -> float:
    """How much lower the objective on a step's own batches is after it, nats per supervised token."""
    masked = sum(batch.masked for batch in batches)
    before, after = 0.0, 0.0
    for batch in batches:
        text, copy = (1.0, 0.0) if batch.noise is None else (batch.noise.next_token_weight, batch.noise.masked_weight)
        before += text * result.loss * batch.supervised + copy * (result.masked_loss or 0.0) * batch.masked
        after += text * engine.loss(batch) + (copy * engine.masked_loss(batch) if masked and copy else 0.0)
    return (before - after) / result.tokens


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
