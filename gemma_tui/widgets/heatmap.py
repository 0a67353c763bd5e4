"""A heat map with a cursor, drawn line by line: only what is seen costs anything."""

from __future__ import annotations

from functools import lru_cache

from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding
from textual.events import Click
from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from gemma_tui.heat import GAP, RAMP, VIRIDIS, Heat, Layout, column_names, ink, layout, legend, row_label
from gemma_tui.text import clean

TOP, BOTTOM = 2, 2
"""Lines that stay: the title and the names of the columns; the legend and the value under the cursor."""

Tint = tuple[int, int, int]


class HeatMap(ScrollView, can_focus=True):
    """A matrix as colours, or as heights without colour; the arrow keys move a cursor whose value is told below.

    Args:
        heat: what is shown; ``show`` changes it.
    """

    DEFAULT_CSS = "HeatMap { height: 1fr; width: 1fr; scrollbar-size: 1 1; }"
    BINDINGS = [
        Binding("up", "move(-1, 0)", "Up", id="heat.up", show=False),
        Binding("down", "move(1, 0)", "Down", id="heat.down", show=False),
        Binding("left", "move(0, -1)", "Left", id="heat.left", show=False),
        Binding("right", "move(0, 1)", "Right", id="heat.right", show=False),
        Binding("pageup", "move(-10, 0)", "Up by ten", id="heat.page_up", show=False),
        Binding("pagedown", "move(10, 0)", "Down by ten", id="heat.page_down", show=False),
        Binding("home", "move(-1000000, 0)", "First row", id="heat.first", show=False),
        Binding("end", "move(1000000, 0)", "Last row", id="heat.last", show=False),
    ]

    def __init__(self, heat: Heat, id: str | None = None) -> None:
        super().__init__(id=id)
        self.heat = heat
        self.row = 0
        self.column = 0

    @property
    def room(self) -> Size:
        """What there is beside the scrollbars."""
        return self.scrollable_content_region.size

    @property
    def sizes(self) -> Layout:
        """How wide label and cells are now."""
        return layout(self.heat, self.room.width)

    @property
    def reading(self) -> str:
        """The value under the cursor, as the last line tells it."""
        if not self.heat.values.size:
            return "no values"
        return self.heat.reading(self.row, self.column)

    def show(self, heat: Heat) -> None:
        """Show another matrix; the cursor stays where it was as far as there is such a cell."""
        self.heat = heat
        self._put(self.row, self.column)
        self._measure()

    def action_move(self, rows: int, columns: int) -> None:
        """Move the cursor, within the matrix."""
        before = self.row
        self._put(self.row + rows, self.column + columns)
        self._follow_cursor()
        for row in {before, self.row}:
            self.refresh(self._line(row))
        self.refresh(Region(0, self.room.height - 1, self.room.width, 1))

    def on_click(self, event: Click) -> None:
        """Put the cursor where the mouse is."""
        sizes = self.sizes
        inside = TOP <= event.y < self.room.height - BOTTOM and event.x >= sizes.label
        if not inside:
            return
        row = event.y - TOP + self.scroll_offset.y
        column = (event.x - sizes.label + self.scroll_offset.x) // sizes.cell
        if row < len(self.heat.rows) and column < len(self.heat.columns):
            self.action_move(row - self.row, column - self.column)

    def on_resize(self) -> None:
        """Another width gives other cells."""
        self._measure()

    def render_line(self, y: int) -> Strip:
        """One line of what is seen."""
        width, last = self.room.width, self.room.height - 1
        if y == last:
            return self._text(self.reading)
        if y == 0:
            return self._text(clean(self.heat.title))
        if y == last - 1:
            return self._legend()
        if y == 1:
            sizes = self.sizes
            return self._scrolled(" " * sizes.label, [Segment(name) for name in column_names(self.heat, sizes.cell)])
        row = y - TOP + self.scroll_offset.y
        return self._row(row) if row < len(self.heat.rows) else Strip.blank(width, self.rich_style)

    def _row(self, row: int) -> Strip:
        sizes = self.sizes
        cells = []
        for column in range(len(self.heat.columns)):
            under = (row, column) == (self.row, self.column)
            cells += self._cell(row, column, sizes.cell - GAP, under)
        return self._scrolled(row_label(self.heat, row, sizes.label), cells)

    def _cell(self, row: int, column: int, width: int, under: bool) -> list[Segment]:
        """A cell and its gap; the cursor is a pair of brackets, which is seen without colour too."""
        tint = None if self.app.no_color else self.heat.tint(row, column)
        fill = " " if tint is not None else self.heat.glyph(row, column)
        text = f"[{fill * (width - 2)}]" if under else fill * width
        return [Segment(text, _style(tint, under)), Segment(" " * GAP)]

    def _legend(self) -> Strip:
        low, high, notes = legend(self.heat)
        if not high:
            return self._text(f"{low}  {notes}")
        ramp = [Segment(RAMP)] if self.app.no_color else [Segment(" ", _style(tint, False)) for tint in VIRIDIS]
        return self._strip([Segment(f"{low} "), *ramp, Segment(f" {high}  {notes}")])

    def _scrolled(self, label: str, cells: list[Segment]) -> Strip:
        """The label, which stays, and the part of the cells that is scrolled to."""
        left, room = self.scroll_offset.x, max(0, self.room.width - len(label))
        return self._strip([Segment(label), *Strip(cells).crop(left, left + room)])

    def _text(self, text: str) -> Strip:
        return self._strip([Segment(text)])

    def _strip(self, segments: list[Segment]) -> Strip:
        return Strip(segments).adjust_cell_length(self.room.width).apply_style(self.rich_style)

    def _put(self, row: int, column: int) -> None:
        self.row = max(0, min(row, len(self.heat.rows) - 1))
        self.column = max(0, min(column, len(self.heat.columns) - 1))

    def _measure(self) -> None:
        sizes = self.sizes
        cells = sizes.cell * len(self.heat.columns)
        self.virtual_size = Size(sizes.label + cells, len(self.heat.rows) + TOP + BOTTOM)
        self._follow_cursor()
        self.refresh()

    def _follow_cursor(self) -> None:
        """Scroll so far that the cell under the cursor is seen."""
        sizes, seen = self.sizes, self.room
        x, y = self.scroll_offset
        rows, room = max(1, seen.height - TOP - BOTTOM), max(1, seen.width - sizes.label)
        first = self.column * sizes.cell
        y = max(min(y, self.row), self.row - rows + 1)
        x = max(min(x, first), first + sizes.cell - room)
        if (x, y) != self.scroll_offset:
            self.scroll_to(x, y, animate=False, immediate=True)

    def _line(self, row: int) -> Region:
        return Region(0, TOP + row - self.scroll_offset.y, self.room.width, 1)


@lru_cache(maxsize=4 * len(VIRIDIS))
def _style(tint: Tint | None, under: bool) -> Style:
    """The background, with brackets on it that can be read."""
    if tint is None:
        return Style(bold=under)
    red, green, blue = tint
    return Style(color=ink(tint), bgcolor=f"rgb({red},{green},{blue})", bold=under)
