"""Charts in characters: the only file that knows plotext. It serves the screens and the commands."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from string import ascii_uppercase
from typing import Any

import numpy as np
import plotext

OKABE_ITO = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
"""Series colours that people with colour-blindness tell apart (Okabe & Ito, 2008)."""

MARKERS = ("braille", "x", "o", "+", "*", "#", "@")
SIGNS = ("⠒", "x", "o", "+", "*", "#", "@")
"""Without colour a series is told by its marker."""


@dataclass
class Series:
    """A named line; a y that is None or not finite is left out.

    Attributes:
        x, y: lists, or what numpy reads without looking at each number: an ``array.array`` or a numpy array.
        look: which of the colours and markers it has; None for that of its place among the others.
    """

    label: str
    x: list[float] | array[float] | np.ndarray = field(default_factory=list)
    y: list[float | None] | list[float] | array[float] | np.ndarray = field(default_factory=list)
    look: int | None = None

    def add(self, x: float, y: float | None) -> None:
        """Append a point to a line that can grow."""
        if isinstance(self.x, np.ndarray) or isinstance(self.y, np.ndarray):
            raise TypeError(f"{self.label}: a numpy array does not grow")
        self.x.append(x)
        self.y.append(math.nan if y is None else y)


@dataclass(frozen=True)
class Look:
    """How a line is drawn, and the sign that stands for it beside its name."""

    marker: str
    sign: str
    tint: tuple[int, int, int] | None

    def coloured(self) -> str:
        """The sign with the escape sequence of its colour, if it has one."""
        return self.sign if self.tint is None else "\x1b[38;2;{};{};{}m{}\x1b[0m".format(*self.tint, self.sign)


def look(number: int, colour: bool) -> Look:
    """The look of the line with this number, the first being 0.

    With colour the markers change once all colours are used. Without it letters follow the markers, and come again
    from the 34th line on.
    """
    turn, place = divmod(number, len(OKABE_ITO))
    if not colour:
        letter = ascii_uppercase[(number - len(MARKERS)) % len(ascii_uppercase)]
        return Look(letter, letter, None) if turn else Look(MARKERS[place], SIGNS[place], None)
    marker = MARKERS[turn % len(MARKERS)]
    return Look(marker, marker if turn % len(MARKERS) else "━", OKABE_ITO[place])


def draw(
    series: Sequence[Series],
    width: int,
    height: int,
    title: str,
    log: bool = False,
    colour: bool = True,
    x_label: str = "",
    named: bool = True,
    log_x: bool = False,
) -> str:
    """A line chart of ``width`` by ``height`` characters, its first line the title and the names of the lines.

    Args:
        log: logarithmic y axis; values that are not positive are left out.
        colour: ANSI colours; without them the lines differ by their markers.
        x_label: what the x axis counts; takes a line.
        named: whether the names of the lines follow the title, where there is room.
        log_x: logarithmic x axis; points that are not at a positive place are left out.
    """
    looks = _looks(series, colour)
    lines = [reduce(line, max(8, width - 8), log, log_x) for line in series]
    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.plotsize(width, height - 1)
    plotext.theme("clear")
    for (x, y), shown in zip(lines, looks, strict=True):
        if x:
            plotext.plot(x, y, marker=shown.marker, color=shown.tint)
    drawn = [points for points in lines if points[0]]
    if drawn:
        xs, ys = ([v for points in drawn for v in points[axis]] for axis in (0, 1))
        _set_ticks(plotext.xticks, (log_ticks if log_x else ticks)(min(xs), max(xs), max(2, width // 9)), log_x)
        _set_ticks(plotext.yticks, (log_ticks if log else ticks)(min(ys), max(ys), height // 2), log)
    else:
        # plotext fails on an axis without points.
        plotext.scatter([0.0, 1.0], [0.0, 1.0], marker=" ")
        plotext.xticks([])
        plotext.yticks([])
    if x_label:
        plotext.xlabel(x_label)
    text = plotext.build()
    heading = _heading(title, series if named else (), width, colour)
    return heading + "\n" + (text if colour else plotext.uncolorize(text))


def legend(series: Sequence[Series], width: int, colour: bool) -> list[str]:
    """The names of all lines with their signs, on as many lines of ``width`` characters as that takes."""
    rows: list[list[str]] = []
    used = width
    for line, shown in zip(series, _looks(series, colour), strict=True):
        name = line.label[: max(1, width - 2)]
        if used + len(name) + 4 > width:
            rows.append([])
            used = -2
        rows[-1].append(f"{shown.coloured()} {name}")
        used += len(name) + 4
    return ["  ".join(row) for row in rows]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten) from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers between 10**``low`` and 10**``high``; returns their logarithms."""
    if high - low < 1:
        inside = ticks(10.0**low, 10.0 ** min(high, _HIGHEST), count)
        return [math.log10(v) for v in inside if v > 0] or [low]
    decades = range(math.floor(low), math.ceil(high) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        places = [n + math.log10(d) for n in decades for d in digits]
        inside = [place for place in places if low - 1e-9 <= place <= high + 1e-9]
        if len(inside) <= count:
            return inside
    return ticks(low, high, count)


def reduce(line: Series, columns: int, log: bool = False, log_x: bool = False) -> tuple[list[float], list[float]]:
    """The lowest and the highest point of each column, in order, so that no spike is lost.

    Args:
        log, log_x: give log10 of y, of x.
    """
    x, y = _numbers(line.x), _numbers(line.y)
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = np.log10(x) if log_x else x, np.log10(y) if log else y
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if x.size > 2 * columns:
        edges = np.linspace(0, x.size, columns + 1).astype(int)
        ends = pairwise(edges)
        kept = sorted({a + int(pick(y[a:b])) for a, b in ends for pick in (np.argmin, np.argmax)})
        x, y = x[kept], y[kept]
    return x.tolist(), y.tolist()


_HIGHEST = 308.25
"""The exponent of ten of the largest float."""


def _numbers(values: Any) -> np.ndarray:
    """As float64, None as NaN."""
    return np.array(values, np.float64)


def _set_ticks(axis: Callable[..., None], places: list[float], log: bool) -> None:
    axis(places, [number_text(10.0 ** min(place, _HIGHEST) if log else place) for place in places])


def number_text(value: float) -> str:
    """A number in few characters: 20k rather than 2e+04."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if max(size, 1e4) <= abs(value) < 1e15:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _looks(series: Sequence[Series], colour: bool) -> list[Look]:
    return [look(i if line.look is None else line.look, colour) for i, line in enumerate(series)]


def _heading(title: str, series: Sequence[Series], width: int, colour: bool) -> str:
    pairs = zip(series, _looks(series, colour), strict=True) if len(series) > 1 else ()
    names = [(line.label, shown.coloured()) for line, shown in pairs]
    if len(title) + sum(len(name) + 4 for name, _ in names) > width:
        return title[:width]
    return title + "".join(f"  {sign} {name}" for name, sign in names)
