"""The attention of one head as a grid of query x key, pooled to cells where a text is long, and how a cell is told."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from rich.cells import cell_len, set_cell_size

from gemma_tui.heat import RAMP, VIRIDIS
from gemma_tui.text import clean

LATER, BEYOND, LEFT_OUT = 0, 1, 2
"""Why a cell has no weight: its keys come after its queries, lie out of the window, or somebody took them out."""

LONGEST = 64
"""Characters of a token that are ever shown; the rest is an ellipsis."""

MARKS = 2
"""Combining marks on one character that are ever shown."""


@dataclass(frozen=True, eq=False)
class PairGrid:
    """The weights of one head: a row is a query or a range of queries, a column a key or a range of keys.

    Attributes:
        weights: float32 ``[rows, columns]``, not negative; NaN where no query of a cell sees a key of it.
        row_edges: int ``[rows + 1]``, ascending: row ``i`` is the queries ``row_edges[i]`` to ``row_edges[i + 1] - 1``.
        column_edges: int ``[columns + 1]``, the same for the keys.
        row_labels: the tokens of the whole text, by position; not only of the rows.
        column_labels: the same for the keys.
        window: a local head's query sees keys less than this many positions back; None for a global head.
        pooling: what a cell of several pairs tells of them: "max" or "mean".
        shades: float32 like ``weights``: what colours go by where that is not the weight itself (rows normalised,
            gamma, without the sink); NaN is left out. The weight is read out all the same.
        shading: says what ``shades`` are, for the legend.

    Raises:
        ValueError: shapes do not go together.
    """

    weights: np.ndarray
    row_edges: np.ndarray
    column_edges: np.ndarray
    row_labels: Sequence[str]
    column_labels: Sequence[str]
    window: int | None
    pooling: str
    shades: np.ndarray | None = None
    shading: str = ""

    def __post_init__(self) -> None:
        """Check the shapes."""
        cells = (len(self.row_edges) - 1, len(self.column_edges) - 1)
        if self.weights.shape != cells or (self.shades is not None and self.shades.shape != cells):
            raise ValueError(f"weights {self.weights.shape} for {cells[0]} rows and {cells[1]} columns")
        for edges, labels in ((self.row_edges, self.row_labels), (self.column_edges, self.column_labels)):
            if edges[0] < 0 or edges[-1] > len(labels) or not np.all(np.diff(edges) > 0):
                raise ValueError(f"edges must ascend from 0 or more to {len(labels)} tokens or less")

    @property
    def rows(self) -> int:
        """How many rows."""
        return len(self.row_edges) - 1

    @property
    def columns(self) -> int:
        """How many columns."""
        return len(self.column_edges) - 1

    @cached_property
    def pooled(self) -> bool:
        """Whether any cell stands for several pairs."""
        return bool((np.diff(self.row_edges) > 1).any() or (np.diff(self.column_edges) > 1).any())

    @cached_property
    def left_out(self) -> bool:
        """Whether a cell has no weight though its keys come before its queries and lie in the window."""
        return bool((self.tints == len(VIRIDIS) + LEFT_OUT).any())

    @cached_property
    def highest(self) -> float:
        """The end of the scale, which begins at zero; zero if there is nothing on it."""
        shades = self._shades
        finite = shades[np.isfinite(shades)]
        return max(0.0, float(finite.max())) if finite.size else 0.0

    @cached_property
    def tints(self) -> np.ndarray:
        """uint8 ``[rows, columns]``: which colour of VIRIDIS, or ``len(VIRIDIS)`` + why there is none."""
        return self._steps(len(VIRIDIS))

    @cached_property
    def heights(self) -> np.ndarray:
        """uint8 ``[rows, columns]``: which glyph of RAMP, or ``len(RAMP)`` + why there is none."""
        return self._steps(len(RAMP))

    def cell_of(self, query: int, key: int) -> tuple[int, int]:
        """The row and column that hold a query and a key, or the nearest ones."""
        row = int(np.searchsorted(self.row_edges, query, side="right")) - 1
        column = int(np.searchsorted(self.column_edges, key, side="right")) - 1
        return max(0, min(row, self.rows - 1)), max(0, min(column, self.columns - 1))

    def rank(self, row: int, column: int) -> tuple[int, int]:
        """The place of a cell's weight in its row, 1 for the highest (equals share it), and how many cells it has."""
        weights = self.weights[row]
        return 1 + int((weights > weights[column]).sum()), int((~np.isnan(weights)).sum())

    def row_name(self, row: int, width: int) -> str:
        """The position of a row, aligned with the others, and its token; or its range; in at most ``width`` cells."""
        name = _range(self.row_edges, row)
        if "-" in name:
            return fit(name, width)
        label = token(self.row_labels[int(self.row_edges[row])].lstrip(" ▁"))
        return fit(f"{name:>{len(str(int(self.row_edges[-1]) - 1))}} {label}", width)

    def column_name(self, column: int, width: int) -> str:
        """The position and the token of a column, or its range and its tokens, in at most ``width`` cells."""
        return _name(self.column_edges, self.column_labels, column, width)

    def reading(self, row: int, column: int, width: int = 80) -> str:
        """The two tokens (or ranges), the weight and its rank; the tokens are shortened first."""
        told = self._weight(row, column)
        room = width - len(f"q  -> k   {told}")
        query = _name(self.row_edges, self.row_labels, row, room // 2)
        key = self.column_name(column, room - cell_len(query))
        return fit(f"q {query} -> k {key}  {told}", width)

    def _weight(self, row: int, column: int) -> str:
        weight = float(self.weights[row, column])
        if np.isnan(weight):
            why = self._hidden[row, column]
            return ("not seen: after the query", f"not seen: beyond the window of {self.window}", "left out")[why]
        several = self._length(self.row_edges, row) * self._length(self.column_edges, column) > 1
        place, count = self.rank(row, column)
        number = f"{weight:.4f}" if weight == 0 or weight >= 1e-3 else f"{weight:.2e}"
        return f"{f'{self.pooling} ' if several else ''}{number}  rank {place} of {count} in its row"

    @staticmethod
    def _length(edges: np.ndarray, index: int) -> int:
        return int(edges[index + 1] - edges[index])

    @property
    def _shades(self) -> np.ndarray:
        return self.weights if self.shades is None else np.where(np.isnan(self.weights), np.nan, self.shades)

    @cached_property
    def _hidden(self) -> np.ndarray:
        """uint8 ``[rows, columns]``: why a cell would have no weight, by its place alone."""
        first_query, last_query = self.row_edges[:-1, None], self.row_edges[1:, None] - 1
        first_key, last_key = self.column_edges[None, :-1], self.column_edges[None, 1:] - 1
        reasons = np.full(self.weights.shape, LEFT_OUT, np.uint8)
        if self.window is not None:
            reasons[first_query - last_key >= self.window] = BEYOND
        reasons[np.broadcast_to(first_key > last_query, reasons.shape)] = LATER
        return reasons

    def _steps(self, count: int) -> np.ndarray:
        shades = self._shades
        with np.errstate(invalid="ignore", over="ignore"):
            levels = np.clip(shades / np.float32(self.highest or 1.0), 0, 1) * count
            steps = np.minimum(np.nan_to_num(levels), count - 1).astype(np.uint8)
        return np.where(np.isnan(shades), count + self._hidden, steps).astype(np.uint8)


def zoomed(span: tuple[int, int], around: int, factor: float, length: int) -> tuple[int, int]:
    """``factor`` times the positions of a span, ``around`` in the middle as far as there are as many on both sides.

    They lie in the span where they are fewer than its own, else in a text of ``length`` tokens.
    """
    first, end = span if factor < 1 else (0, length)
    size = max(1, min(length, math.ceil((span[1] - span[0]) * factor)))
    begin = max(first, min(around - size // 2, end - size))
    return begin, begin + size


@lru_cache(maxsize=4096)
def token(label: str) -> str:
    """A token as it can be drawn: no controls, line ends visible, every character with a width of its own."""
    cut = label if len(label) <= LONGEST else label[: LONGEST - 1] + "…"
    shown = clean(cut.replace("\n", "↵").replace("\t", "⇥"))
    drawn, marks = "", 0
    for character in shown:
        kind = unicodedata.category(character)
        if kind == "Cf":  # joiners and the like have no width, and terminals disagree on what they join
            character = "\ufffd"
        marks = marks + 1 if kind.startswith("M") else 0
        selects = "\ufe00" <= character <= "\ufe0f"  # would change the width of what is before it
        if marks > MARKS or selects:
            continue
        drawn += character if drawn or not marks else f"◌{character}"
    return drawn


def fit(text: str, width: int) -> str:
    """At most ``width`` terminal cells of a clean text; what is cut ends in an ellipsis."""
    if cell_len(text) <= width:
        return text
    return f"{set_cell_size(text, width - 1)}…" if width > 0 else ""


def _range(edges: np.ndarray, index: int) -> str:
    first, last = int(edges[index]), int(edges[index + 1]) - 1
    return f"{first}" if first == last else f"{first}-{last}"


def _name(edges: np.ndarray, labels: Sequence[str], index: int, width: int) -> str:
    """A position or a range, and as much of its tokens, in quotes, as there is room for."""
    name = _range(edges, index)
    room = width - len(name) - 3
    if room < 1:
        return fit(name, width)
    first, last = int(edges[index]), int(edges[index + 1])
    text = "".join(token(label) for label in labels[first : min(last, first + room)])
    return f'{name} "{fit(text, room)}"'
