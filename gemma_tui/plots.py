"""Charts in characters: the only file that knows plotext. It serves the screens and the commands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import plotext

OKABE_ITO = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
"""Series colours that people with colour-blindness tell apart (Okabe & Ito, 2008)."""

MARKERS = ("braille", "x", "o", "+", "*", "#", "@")
SIGNS = ("⠒", "x", "o", "+", "*", "#", "@")
"""Without colour a series is told by its marker."""


@dataclass
class Series:
    """A named line; a y that is None or not finite is left out."""

    label: str
    x: list[float] = field(default_factory=list)
    y: list[float | None] = field(default_factory=list)

    def add(self, x: float, y: float | None) -> None:
        """Append a point."""
        self.x.append(x)
        self.y.append(y)


def draw(series: Sequence[Series], width: int, height: int, title: str, log: bool = False, colour: bool = True) -> str:
    """A line chart of ``width`` by ``height`` characters, its first line the title and the names of the lines.

    Args:
        log: logarithmic y axis; values that are not positive are left out.
        colour: ANSI colours; without them the lines differ by their markers.
    """
    lines = [(reduce(line, max(8, width - 8), log), mark) for line, mark in zip(series, _marks(colour), strict=False)]
    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.plotsize(width, height - 1)
    plotext.theme("clear")
    for (x, y), (marker, tint) in lines:
        if x:
            plotext.plot(x, y, marker=marker, color=tint)
    drawn = [points for points, _ in lines if points[0]]
    if drawn:
        xs, ys = ([v for points in drawn for v in points[axis]] for axis in (0, 1))
        _set_ticks(plotext.xticks, ticks(min(xs), max(xs), max(2, width // 9)), False)
        _set_ticks(plotext.yticks, ticks(min(ys), max(ys), height // 2), log)
    else:
        # plotext fails on an axis without points.
        plotext.scatter([0.0, 1.0], [0.0, 1.0], marker=" ")
        plotext.xticks([])
        plotext.yticks([])
    text = plotext.build()
    return _heading(title, series, width, colour) + "\n" + (text if colour else plotext.uncolorize(text))


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten) from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def reduce(line: Series, columns: int, log: bool = False) -> tuple[list[float], list[float]]:
    """The lowest and the highest point of each column, in order, so that no spike is lost; log10 of y if ``log``."""
    x = np.array(line.x, np.float64)
    y = np.array([math.nan if v is None else v for v in line.y], np.float64)
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            y = np.log10(y)
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if x.size > 2 * columns:
        edges = np.linspace(0, x.size, columns + 1).astype(int)
        ends = pairwise(edges)
        kept = sorted({a + int(pick(y[a:b])) for a, b in ends for pick in (np.argmin, np.argmax)})
        x, y = x[kept], y[kept]
    return x.tolist(), y.tolist()


def _set_ticks(axis: Callable[..., None], places: list[float], log: bool) -> None:
    axis(places, [f"{10**place if log else place:.4g}" for place in places])


def _marks(colour: bool) -> list[tuple[str, tuple[int, int, int] | None]]:
    return [("braille", tint) for tint in OKABE_ITO] if colour else [(marker, None) for marker in MARKERS]


def _heading(title: str, series: Sequence[Series], width: int, colour: bool) -> str:
    names = [line.label for line in series] if len(series) > 1 else []
    if len(title) + sum(len(name) + 4 for name in names) > width:
        return title[:width]
    marks = [f"\x1b[38;2;{r};{g};{b}m━\x1b[0m" for r, g, b in OKABE_ITO] if colour else list(SIGNS)
    return title + "".join(f"  {mark} {name}" for mark, name in zip(marks, names, strict=False))
