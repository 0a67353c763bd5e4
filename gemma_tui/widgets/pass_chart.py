"""Lines over tokens or passes: a chart or, where there are few lines of room, a row of blocks for each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich.text import Text
from textual.widget import Widget

from gemma_tui.heat import RAMP
from gemma_tui.plots import Series, draw, number_text

LOWEST_CHART = 7
"""Lines below which a chart shows nothing."""


class PassChart(Widget):
    """The measure of one or two texts, drawn when it is told to."""

    DEFAULT_CSS = "PassChart { height: 3; width: 1fr; padding: 0 1; }"

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self.x_label = ""
        self.series: Sequence[Series] = ()

    def show(self, title: str, x_label: str, series: Sequence[Series]) -> None:
        """Draw other lines."""
        self.title, self.x_label, self.series = title, x_label, series
        self.refresh()

    def render(self) -> Text:
        """The lines in characters."""
        width, height = self.content_size
        if width < 12 or height < 1:
            return Text()
        if height >= LOWEST_CHART:
            drawn = draw(self.series, width, height, self.title, x_label=self.x_label, colour=not self.app.no_color)
            return Text.from_ansi(drawn, no_wrap=True)
        highest = max((y for line in self.series for y in line.y if y is not None and math.isfinite(y)), default=0.0)
        rows = [f"{line.label:<10} {blocks(line, width - 11, highest)}" for line in self.series]
        scale = f"{self.title}, by {self.x_label}; {RAMP[-1]} is {number_text(highest)}"
        return Text("\n".join([scale, *rows]), no_wrap=True, overflow="ellipsis")


def blocks(line: Series, width: int, highest: float) -> str:
    """A block for each value, or the highest of as many as stand in a column; nothing for NaN."""
    values = np.array(line.y, np.float64)
    if not values.size:
        return ""
    edges = np.linspace(0, values.size, min(width, values.size) + 1).astype(int)[:-1]
    levels = np.fmax.reduceat(values, edges) / (highest or 1.0)
    return "".join(" " if math.isnan(v) else RAMP[min(len(RAMP) - 1, int(v * len(RAMP)))] for v in levels)
