"""A line chart, drawn when it is told to."""

from __future__ import annotations

import time

from rich.text import Text
from textual.widget import Widget

from gemma_tui.plots import Series, draw, legend


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
        """Whether the x axis is logarithmic; points that are not at a positive place are left out then."""
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

    def _names(self, title: str, width: int, height: int, colour: bool) -> list[str]:
        """Lines with the names of the series, where they do not fit beside the title and there is room for lines."""
        beside = len(title) + sum(len(line.label) + 4 for line in self.series)
        if not self.named or len(self.series) < 2 or beside <= width:
            return []
        names = legend(self.series, width, colour)
        return names if height - len(names) >= 6 else []

    def render(self) -> Text:
        """The chart in characters."""
        width, height = self.size
        if width < 12 or height < 4:
            return Text()
        title = f"{self.title} (log)" if self.log_axis else self.title
        if not any(len(line.x) for line in self.series):
            return Text(f"{title}\n\n  nothing yet", no_wrap=True)
        colour = not self.app.no_color
        names = self._names(title, width, height, colour)
        named = self.named and not names
        drawn = draw(
            self.series, width, height - len(names), title, self.log_axis, colour, self.x_label, named, self.log_x
        )
        drawn = drawn.replace("\n", "\n" + "".join(f"{row}\n" for row in names), 1)
        return Text.from_ansi(drawn, no_wrap=True)
