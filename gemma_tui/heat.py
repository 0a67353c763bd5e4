"""Heat maps in characters: which colour or glyph a value has, and a whole map as text for the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gemma_tui.text import clean

VIRIDIS = (
    (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140),
    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip
"""Nine steps of viridis (Smith & van der Walt, 2015): each has a nearest colour of its own among a terminal's 256."""

RAMP = "▁▂▃▄▅▆▇█"
"""Without colour a value is a height."""

ABSENT, INFINITE, NO_LOGARITHM = "·", "∞", "<"
NARROWEST, WIDEST = 3, 12
GAP = 1


@dataclass(frozen=True, eq=False)
class Heat:
    """A matrix to be shown, and how.

    Attributes:
        values: float ``[rows, columns]``; NaN is missing.
        unit: what follows a value that is read out.
        marks: for each row one character that tells its kind, or none at all.
        meaning: what the marks mean, for the legend.
        log: colours go by the logarithm; what is not positive has none.

    Raises:
        ValueError: names, marks and values do not go together.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray
    unit: str = ""
    marks: Sequence[str] = ()
    meaning: str = ""
    log: bool = False

    def __post_init__(self) -> None:
        """Check the shape."""
        if self.values.shape != (len(self.rows), len(self.columns)) or len(self.marks) not in (0, len(self.rows)):
            raise ValueError(f"{len(self.rows)} rows and {len(self.columns)} columns of values {self.values.shape}")

    @cached_property
    def levels(self) -> np.ndarray:
        """Where each value lies between the lowest and the highest, 0 to 1; NaN for what is not on the scale."""
        scaled, low, high = self._scaled, *self._bounds
        if not high > low:
            return np.where(np.isfinite(scaled), 0.5, math.nan)
        # Halves, because the distance between two large floats may be none.
        return np.clip((scaled / 2 - low / 2) / (high / 2 - low / 2), 0, 1)

    @property
    def extremes(self) -> tuple[float, float] | None:
        """The lowest and the highest value on the scale; None if there is none."""
        on_scale = np.asarray(self.values, np.float64)[np.isfinite(self._scaled)]
        return (float(on_scale.min()), float(on_scale.max())) if on_scale.size else None

    def glyph(self, row: int, column: int) -> str:
        """The character of a value without colour, or of one that is not on the scale."""
        level, value = self.levels[row, column], self.values[row, column]
        if math.isnan(value):
            return ABSENT
        if math.isinf(value):
            return INFINITE
        return NO_LOGARITHM if math.isnan(level) else RAMP[_step(level, len(RAMP))]

    def tint(self, row: int, column: int) -> tuple[int, int, int] | None:
        """The colour of a value; None for one that is not on the scale."""
        level = self.levels[row, column]
        return None if math.isnan(level) else VIRIDIS[_step(level, len(VIRIDIS))]

    def reading(self, row: int, column: int) -> str:
        """One value exactly, with where it is and its unit."""
        value = float(self.values[row, column])
        mark = f" {self.marks[row]}" if self.marks else ""
        number = "missing" if math.isnan(value) else f"{value:.6g}"
        unit = f" {self.unit}" if self.unit and not math.isnan(value) else ""
        return clean(f"{self.rows[row]}{mark} {self.columns[column]}: {number}{unit}")

    @cached_property
    def _scaled(self) -> np.ndarray:
        """float64, logarithms if wanted; NaN for what is not on the scale."""
        values = np.asarray(self.values, np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = np.log10(values) if self.log else values
        return np.where(np.isfinite(scaled), scaled, math.nan)

    @cached_property
    def _bounds(self) -> tuple[float, float]:
        finite = self._scaled[np.isfinite(self._scaled)]
        return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


@dataclass(frozen=True)
class Layout:
    """How wide the parts of a map are, in characters; a cell includes the gap after it."""

    label: int
    cell: int


def layout(heat: Heat, width: int) -> Layout:
    """The parts of a map in a width; cells never get narrower than can be seen, so a map may be wider than that."""
    longest = max((len(row) for row in heat.rows), default=0)
    label = min(longest, max(4, width // 3)) + (2 if heat.marks else 0) + GAP
    room = (width - label) // max(1, len(heat.columns))
    return Layout(label, max(NARROWEST, min(room, WIDEST)))


def row_label(heat: Heat, row: int, label: int) -> str:
    """The name of a row and its mark, ``label`` characters wide."""
    mark = f" {heat.marks[row]}" if heat.marks else ""
    room = label - GAP - len(mark)
    return clean(f"{heat.rows[row][:room]:>{room}}{mark}" + " " * GAP)


def column_names(heat: Heat, cell: int) -> list[str]:
    """The names of the columns as they fit over cells; an ending that all share goes first."""
    names = [clean(name) for name in heat.columns]
    if len(names) > 1 and max(map(len, names)) > cell - GAP:
        shared = _shared_ending(names)
        names = [name.removesuffix(shared) or name for name in names]
    return [f"{name[: cell - GAP]:<{cell}}" for name in names]


def legend(heat: Heat) -> tuple[str, str, str]:
    """The lowest value, the highest, and what else there is to know."""
    bounds = heat.extremes
    scale = "log scale" if heat.log else ""
    notes = "  ".join(clean(note) for note in (heat.unit, scale, heat.meaning) if note)
    return (f"{bounds[0]:.4g}", f"{bounds[1]:.4g}", notes) if bounds else ("no values", "", notes)


def heatmap_text(heat: Heat, width: int = 80, colour: bool = True) -> str:
    """The whole map as lines of text for a terminal: title, names of the columns, a line per row, legend.

    Columns that do not fit come below, under their names.

    Args:
        colour: ANSI colours; without them a value is a glyph, and no escape sequence is written.
    """
    sizes = layout(heat, width)
    names, fit = column_names(heat, sizes.cell), max(1, (width - sizes.label) // sizes.cell)
    lines = [clean(heat.title)[:width]]
    for start in range(0, max(1, len(names)), fit):
        columns = range(len(names))[start : start + fit]
        lines.append((" " * sizes.label + "".join(names[start : start + fit])).rstrip())
        for row in range(len(heat.rows)):
            cells = (_cell(heat, row, column, sizes.cell, colour) for column in columns)
            lines.append((row_label(heat, row, sizes.label) + "".join(cells)).rstrip())
    low, high, notes = legend(heat)
    ramp = "".join(_painted(" ", tint) for tint in VIRIDIS) if colour else RAMP
    scale = f"{low} {ramp} {high}" if high else low
    return "\n".join([*lines, f"{scale}  {notes}".rstrip()])


def _shared_ending(names: Sequence[str]) -> str:
    shortest = min(names, key=len)
    endings = (shortest[start:] for start in range(len(shortest) + 1))
    return next(ending for ending in endings if all(name.endswith(ending) for name in names))


def _cell(heat: Heat, row: int, column: int, cell: int, colour: bool) -> str:
    tint = heat.tint(row, column) if colour else None
    if tint is None:
        return heat.glyph(row, column) * (cell - GAP) + " " * GAP
    return _painted(" " * (cell - GAP), tint) + " " * GAP


def ink(tint: tuple[int, int, int]) -> str:
    """The colour of a text that can be read on another colour, as Rich writes it."""
    red, green, blue = tint
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 128
    return "rgb(0,0,0)" if bright else "rgb(255,255,255)"


def _painted(text: str, tint: tuple[int, int, int]) -> str:
    return "\x1b[48;2;{};{};{}m{}\x1b[0m".format(*tint, text)


def _step(level: float, count: int) -> int:
    return min(count - 1, int(level * count))
