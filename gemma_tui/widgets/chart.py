"""A line chart, drawn when it is told to."""

from __future__ import annotations

import time

from rich.text import Text
from textual.widget import Widget

from gemma_tui.plots import Series, draw


class Chart(Widget):
    """Lines over the step.

    Args:
        title: what is drawn, with its unit.
        log: whether it starts with a logarithmic y axis.
        named: whether the names of the lines follow the title.
    """

    DEFAULT_CSS = "Chart { height: 1fr; width: 1fr; }"

    def __init__(self, title: str, log: bool = False, id: str | None = None, named: bool = True) -> None:
        super().__init__(id=id)
        self.title = title
        self.log_axis = log
        self.named = named
        self.log_x = False
        """Whether the x axis is logarithmic; it has positive numbers only then."""
        self.x_label = ""
        """What the x axis counts, where that is not the step."""
        self.series: list[Series] = []
        self.drawn = 0.0
        """When it was drawn last, on the monotonic clock."""
        self.stale = False
        """Whether there is something new to draw."""

    def show(self, series: list[Series]) -> None:
        """Draw other lines, or the same ones after they grew."""
        self.series = series
        self.stale = True

    def redraw(self) -> None:
        """Draw what is new. A chart takes some 20 ms, so whoever has several draws one at a time."""
        self.stale = False
        self.drawn = time.monotonic()
        self.refresh()

    def toggle_log(self) -> None:
        """Switch between a linear and a logarithmic y axis."""
        self.log_axis = not self.log_axis
        self.refresh()

    def render(self) -> Text:
        """The chart in characters."""
        width, height = self.size
        if width < 12 or height < 4:
            return Text()
        title = f"{self.title} (log)" if self.log_axis else self.title
        if not any(len(line.x) for line in self.series):
            return Text(f"{title}\n\n  nothing yet", no_wrap=True)
        colour = not self.app.no_color
        drawn = draw(self.series, width, height, title, self.log_axis, colour, self.x_label, self.named, self.log_x)
        return Text.from_ansi(drawn, no_wrap=True)
