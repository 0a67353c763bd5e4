"""The most memory that a study takes, beyond what was there before its model."""

from __future__ import annotations

from dataclasses import dataclass

from engines.base import Engine


@dataclass(frozen=True)
class PeakMemory:
    """What an engine has taken since counting began.

    On a CPU the first study of a process takes, beside its own, what a framework makes once (torch some 100 MB).

    Attributes:
        before: bytes in use before the model was loaded.
        known: the peak when counting began; where a system cannot forget an earlier one, it says nothing of the study
            until it grows.
    """

    engine: Engine
    before: int
    known: int

    @property
    def nbytes(self) -> int:
        """The most bytes in use at once beyond those before; 0 where that is not known."""
        peak = self.engine.peak_memory()
        return max(0, peak - self.before) if peak > self.known else 0


def count_from_here(engine: Engine, before: int) -> PeakMemory:
    """Count what is in use from now on."""
    engine.peak_memory(reset=True)
    return PeakMemory(engine, before, engine.peak_memory())
