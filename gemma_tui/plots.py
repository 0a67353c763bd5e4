"""Charts in characters: the only file that knows plotext. It serves the screens and the commands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import plotext

OKABE_ITO = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
"""Series colours that people with colour-blindness tell apart (Okabe & Ito, 2008)."""

MARKERS = ("braille", "sd", "dot", "x", "o", "+", "*")
"""Without colour a series is told by its marker."""


@dataclass
class Series:
    """A named line; a y that is None or not finite is a gap."""

    label: str
    x: list[float] = field(default_factory=list)
    y: list[float | None] = field(default_factory=list)

    def add(self, x: float, y: float | None) -> None:
        """Append a point."""
        self.x.append(x)
        self.y.append(y)


def draw(series: Sequence[Series], width: int, height: int, title: str, log: bool = False, colour: bool = True) -> str:
    """A line chart of ``width`` by ``height`` characters, with ANSI colours if ``colour``.

    Args:
        log: logarithmic y axis; values that are not positive are left out.
    """
    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.plotsize(width, height)
    plotext.theme("clear")
    # The title names the lines, since plotext's own legend covers them.
    plotext.title(_with_legend(title, series))
    drawn = 0
    for index, line in enumerate(series):
        x, y = reduce(line, max(8, width - 8), log)
        if not x:
            continue
        drawn += len(x)
        marker = MARKERS[0] if colour else MARKERS[index % len(MARKERS)]
        plotext.plot(x, y, marker=marker, color=OKABE_ITO[index % len(OKABE_ITO)] if colour else None)
    if not drawn:
        # plotext fails on an axis without points.
        plotext.scatter([0.0, 1.0], [0.0, 1.0], marker=" ")
        plotext.xticks([])
        plotext.yticks([])
    elif log:
        _log_ticks(series)
    text = plotext.build()
    return text if colour else plotext.uncolorize(text)


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
        ends = zip(edges[:-1], edges[1:], strict=True)
        kept = sorted({a + int(pick(y[a:b])) for a, b in ends for pick in (np.argmin, np.argmax)})
        x, y = x[kept], y[kept]
    return x.tolist(), y.tolist()


def _log_ticks(series: Sequence[Series]) -> None:
    values = [v for line in series for v in line.y if v is not None and 0 < v < math.inf]
    low, high = math.log10(min(values)), math.log10(max(values))
    ticks = np.linspace(low, high, 5) if high > low else np.array([low])
    plotext.yticks(ticks.tolist(), [f"{10**tick:.3g}" for tick in ticks])


def _with_legend(title: str, series: Sequence[Series]) -> str:
    if len(series) < 2:
        return title
    return f"{title}: " + ", ".join(line.label for line in series)
