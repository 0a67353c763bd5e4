"""What of a text was decided after each forward pass: its places, step by step, while passes still come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engines.blocks import DecodingPass


@dataclass(frozen=True)
class Cell:
    """A place of a text after some passes.

    Attributes:
        token: what was decided there, or would have been in the last of these passes.
        step: the pass that decided it, from 1 on; 0 while it is not decided.
        turn: the same counted from the first pass of its block on; of a place not decided, the last of these passes.
        entropy: nats, of the model's own distribution then.
        probability: of the token under it.
    """

    place: int
    token: int
    step: int
    turn: int
    entropy: float
    probability: float

    @property
    def decided(self) -> bool:
        """Whether the token stays."""
        return self.step > 0


class Replay:
    """The places of one text after any number of its passes; reading on costs only what came meanwhile.

    Args:
        passes: of one prompt; may grow, and ``read`` takes in what came.
        block: places that are counted together for ``Cell.turn``.
    """

    def __init__(self, passes: Sequence[DecodingPass] = (), block: int = 1) -> None:
        self.passes = passes
        self.block = block
        self.end: int | None = None
        """Places before the end of the text, once that is known; those after it are nothing."""
        self.counts: list[int] = []
        """Places that each pass decided."""
        self._decided: list[Cell | None] = []
        self._lowest: list[int] = []
        self._extents = [0]
        self._begun: dict[int, int] = {}
        """The first pass of each block."""
        self.read()

    @property
    def steps(self) -> int:
        """Passes that were taken in."""
        return len(self._lowest)

    def read(self) -> int:
        """Take in the passes that came; returns how many there are now."""
        for said in self.passes[self.steps :]:
            self._take(said)
        return self.steps

    def extent(self, step: int) -> int:
        """Places up to the end of the block that the last of some passes was for, or of the text."""
        extent = self._extents[min(step, self.steps)]
        return extent if self.end is None else min(extent, self.end)

    def cells(self, step: int, start: int = 0) -> list[Cell]:
        """The places from ``start`` on, after the first ``step`` passes, up to the end of the text or of its block."""
        step = min(step, self.steps)
        extent = self.extent(step)
        waiting = self._waiting(step) if step else {}
        found: list[Cell] = []
        for place in range(start, extent):
            cell = self._decided[place]
            if cell is None or cell.step > step:
                cell = waiting.get(place)
            if cell is None:  # after a stop token, where nothing is decided any more
                break
            found.append(cell)
        return found

    def changed(self, one: int, other: int) -> int:
        """The first place that may differ between two numbers of passes."""
        first = min(one, other, self.steps)
        return self._lowest[first - 1] if first else 0

    def decisions(self) -> list[Cell]:
        """The places decided without a gap, up to the end of the text."""
        found: list[Cell] = []
        for cell in self._decided[: self.end]:
            if cell is None:
                break
            found.append(cell)
        return found

    def _take(self, said: DecodingPass) -> None:
        step, places = self.steps + 1, said.places
        for block in np.unique(places // self.block).tolist():
            self._begun.setdefault(block, step)
        extent = max(self._extents[-1], int(places.max()) + 1)
        self._decided += [None] * (extent - len(self._decided))
        for i in np.flatnonzero(said.decided).tolist():
            cell = self._cell(said, i, step, step)
            self._decided[cell.place] = cell
        self.counts.append(int(said.decided.sum()))
        self._extents.append(extent)
        self._lowest.append(int(places.min()))

    def _waiting(self, step: int) -> dict[int, Cell]:
        said = self.passes[step - 1]
        cells = (self._cell(said, i, 0, step) for i in np.flatnonzero(~said.decided).tolist())
        return {cell.place: cell for cell in cells}

    def _cell(self, said: DecodingPass, i: int, step: int, last: int) -> Cell:
        place = int(said.places[i])
        turn = last - self._begun[place // self.block] + 1
        return Cell(place, int(said.tokens[i]), step, turn, float(said.entropies[i]), float(said.probabilities[i]))


LOWEST_ENTROPY, HIGHEST_ENTROPY = 0.01, 10.0
"""Nats between which entropies are told apart. The scale is logarithmic and the same for every text."""


def entropy_level(cell: Cell) -> float:
    """Where the entropy of a place lies on the scale, 0 to 1."""
    nats = min(max(cell.entropy, LOWEST_ENTROPY), HIGHEST_ENTROPY)
    return math.log(nats / LOWEST_ENTROPY) / math.log(HIGHEST_ENTROPY / LOWEST_ENTROPY)


def turn_level(cell: Cell, block: int) -> float:
    """Where the pass of a place lies among the most that its block can take, 0 to 1; the first ones lie far apart."""
    return min(1.0, math.log(cell.turn) / math.log(block)) if block > 1 else 0.0
