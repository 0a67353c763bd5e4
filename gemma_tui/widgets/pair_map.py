"""The attention of one head as a map of query x key with a cursor, drawn line by line: only what is seen costs."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding
from textual.events import Click
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from gemma_tui.heat import RAMP, VIRIDIS
from gemma_tui.pair_grid import LATER, PairGrid, fit
from gemma_tui.text import clean

TOP, BOTTOM = 1, 2
"""Lines that stay: the key under the cursor; the legend and the reading."""

FAR = 10
"""Cells that a long step goes."""

UPPER, LOWER, NEITHER = "▀", "▄", "·"
CURSOR = "+"
"""The cell under the cursor where there is no colour."""

NAME_WIDTH = 8
"""Cells of a query's token beside the map."""

STATES = len(VIRIDIS) + 3
"""A half of a line is one of the colours, or has none for one of three reasons."""

BARE = len(VIRIDIS) + LATER


class PairMap(ScrollView, can_focus=True):
    """A head's weights: with colour two queries to a line, without it one query to a line and weights as heights.

    Args:
        grid: what is shown; ``show`` changes it.
    """

    DEFAULT_CSS = "PairMap { height: 1fr; width: 1fr; scrollbar-size: 1 1; }"
    BINDINGS = [
        Binding("up", "move(-1, 0)", "Query before", id="pairs.up", show=False),
        Binding("down", "move(1, 0)", "Next query", id="pairs.down", show=False),
        Binding("left", "move(0, -1)", "Key before", id="pairs.left", show=False),
        Binding("right", "move(0, 1)", "Next key", id="pairs.right", show=False),
        Binding("shift+up", f"move(-{FAR}, 0)", "Up by ten", id="pairs.far_up", show=False),
        Binding("shift+down", f"move({FAR}, 0)", "Down by ten", id="pairs.far_down", show=False),
        Binding("shift+left", f"move(0, -{FAR})", "Left by ten", id="pairs.far_left", show=False),
        Binding("shift+right", f"move(0, {FAR})", "Right by ten", id="pairs.far_right", show=False),
        Binding("pageup", "page(-1)", "A page up", id="pairs.page_up", show=False),
        Binding("pagedown", "page(1)", "A page down", id="pairs.page_down", show=False),
        Binding("home", "edge(0)", "First key the query sees", id="pairs.first_key", show=False),
        Binding("end", "edge(-1)", "Last key the query sees", id="pairs.last_key", show=False),
        Binding("ctrl+home", "move(-1000000, 0)", "First query", id="pairs.first_query", show=False),
        Binding("ctrl+end", "move(1000000, 0)", "Last query", id="pairs.last_query", show=False),
        Binding("enter", "read", "Read", id="pairs.read", show=False,
                tooltip="What the cursor's query reads, and who reads its key"),
    ]  # fmt: skip

    class Moved(Message):
        """The cursor is on another cell."""

        def __init__(self, row: int, column: int) -> None:
            super().__init__()
            self.row = row
            self.column = column

        def can_replace(self, message: Message) -> bool:
            """Only the last of several moves matters."""
            return isinstance(message, PairMap.Moved) and message._sender is self._sender

    class Chosen(Message):
        """A query and a key, by their positions, are to be read."""

        def __init__(self, query: int, key: int) -> None:
            super().__init__()
            self.query = query
            self.key = key

    def __init__(self, grid: PairGrid, id: str | None = None) -> None:
        super().__init__(id=id)
        self.grid = grid
        self.row = 0
        self.column = 0
        self.pair = 0, 0
        """The query and the key that the cursor keeps to, whichever cells they are in; of a cell the first ones."""

    @property
    def room(self) -> Size:
        """What there is beside the scrollbars."""
        return self.scrollable_content_region.size

    @property
    def reading(self) -> str:
        """The cell under the cursor, as the last line tells it."""
        if not self.grid.weights.size:
            return "no weights"
        return self.grid.reading(self.row, self.column, self.room.width)

    @property
    def rows_per_line(self) -> int:
        """Two with colour; a glyph tells only one height."""
        return 1 if self.app.no_color else 2

    @property
    def gutter_width(self) -> int:
        """Cells left of the map: the query's name and a mark."""
        digits = len(str(max(0, int(self.grid.row_edges[-1]) - 1)))
        pooled = self.grid.row_edges[-1] - self.grid.row_edges[0] > self.grid.rows
        wanted = 2 * digits + 1 if pooled else digits + 1 + NAME_WIDTH
        return min(wanted, max(digits, self.room.width // 5)) + 1

    def show(self, grid: PairGrid) -> None:
        """Show another grid; the cursor stays on its query and key as far as they are in it."""
        self.grid = grid
        self._put(*grid.cell_of(*self.pair))
        self._measure()

    def go(self, row: int, column: int) -> None:
        """Move the cursor to a cell, or to the nearest one there is; only the lines that change are drawn."""
        before = self.row
        self._put(row, column)
        self._follow_cursor()
        lines = {self._line(before), self._line(self.row), 0, self.room.height - 1}
        self.refresh(*(Region(0, line, self.room.width, 1) for line in lines))

    def action_move(self, rows: int, columns: int) -> None:
        """Move the cursor by cells."""
        self.go(self.row + rows, self.column + columns)

    def action_page(self, pages: int) -> None:
        """Move the cursor by what is seen at once."""
        self.go(self.row + pages * self._lines_seen * self.rows_per_line, self.column)

    def action_edge(self, end: int) -> None:
        """Move the cursor to the first (0) or the last (-1) cell of its row that has a weight."""
        if not self.grid.weights.size:
            return
        seen = np.flatnonzero(~np.isnan(self.grid.weights[self.row]))
        if seen.size:
            self.go(self.row, int(seen[end]))

    def action_read(self) -> None:
        """Ask for what the query under the cursor reads, and for who reads the key."""
        if self.grid.weights.size:
            self.post_message(self.Chosen(*self.pair))

    def on_click(self, event: Click) -> None:
        """Put the cursor where the mouse is; a click where it is already takes the other half of the line."""
        if not TOP <= event.y < self.room.height - BOTTOM or event.x < self.gutter_width:
            return
        row = (event.y - TOP + self.scroll_offset.y) * self.rows_per_line
        column = event.x - self.gutter_width + self.scroll_offset.x
        lower = row + self.rows_per_line - 1
        if (row, column) == (self.row, self.column) and lower < self.grid.rows:
            row = lower
        if row < self.grid.rows and column < self.grid.columns:
            self.go(row, column)

    def on_resize(self) -> None:
        """Another size shows another part."""
        self._measure()

    def render_line(self, y: int) -> Strip:
        """One line of what is seen."""
        last = self.room.height - 1
        if y == last:
            return self._strip([Segment(self.reading)])
        if y == last - 1:
            return self._strip(self._legend())
        if y == 0:
            return self._strip([Segment(self._key_name())])
        line = y - TOP + self.scroll_offset.y
        first = line * self.rows_per_line
        if first >= self.grid.rows:
            return Strip.blank(self.room.width, self.rich_style)
        return self._strip([*self._gutter(first), *self._cells(first)])

    def _key_name(self) -> str:
        """The key under the cursor, above its column, on the side where there is more room."""
        if not self.grid.weights.size:
            return ""
        first, last = self.gutter_width, max(self.gutter_width, self.room.width - 1)
        at = first + self.column - self.scroll_offset.x
        mark = "◄" if at < first else "►" if at > last else "▼"
        at = max(first, min(at, last))
        if last - at > at:
            return f"{'':{at}}{mark} {self.grid.column_name(self.column, last - at - 1)}"
        name = self.grid.column_name(self.column, at - 1)
        return f"{'':{at - 1 - cell_len(name)}}{name} {mark}"

    def _gutter(self, first: int) -> list[Segment]:
        """The name of a line's query, the one under the cursor if it is here, and a mark for its half."""
        here = 0 <= self.row - first < self.rows_per_line
        row, width = self.row if here else first, self.gutter_width - 1
        mark = " " if not here else "►" if self.rows_per_line == 1 else LOWER if row > first else UPPER
        name = set_cell_size(self.grid.row_name(row, width), width)
        return [Segment(name, Style(bold=here, dim=not here)), Segment(mark, Style(bold=True))]

    def _cells(self, first: int) -> list[Segment]:
        """The part of a line that is scrolled to; cells that look alike are one segment."""
        left = self.scroll_offset.x
        right = left + max(0, self.room.width - self.gutter_width)
        looks = self._looks(first)[left:right]
        at = self.column - left
        if 0 <= self.row - first < self.rows_per_line and 0 <= at < len(looks):
            looks[at] = -1 - (self.row - first)
        if not looks.size:
            return []
        starts = np.flatnonzero(np.diff(looks, prepend=looks[0] - 1))
        lengths = np.diff(starts, append=len(looks))
        look = _height if self.rows_per_line == 1 else _halves
        found = ((look(code), length) for code, length in zip(looks[starts].tolist(), lengths.tolist(), strict=True))
        return [Segment(glyph * length, style) for (glyph, style), length in found]

    def _looks(self, first: int) -> np.ndarray:
        """int ``[columns]``: what stands in each cell of a line, as ``_height`` or ``_halves`` draw it; a copy."""
        if self.rows_per_line == 1:
            return self.grid.heights[first].astype(np.int16)
        upper = self.grid.tints[first].astype(np.int16)
        lower = self.grid.tints[first + 1] if first + 1 < self.grid.rows else np.int16(BARE)
        return upper * STATES + lower

    def _legend(self) -> list[Segment]:
        """The scale, and what the marks mean."""
        grid = self.grid
        if grid.highest:
            tints = [Segment(" ", Style(bgcolor=_rgb(tint))) for tint in range(len(VIRIDIS))]
            scale = [Segment("0 "), *([Segment(RAMP)] if self.app.no_color else tints), Segment(f" {grid.highest:.4g}")]
        else:
            scale = [Segment("all zero" if np.isfinite(grid.weights).any() else "no weights")]
        pooling = f"{grid.pooling} of each cell" if grid.pooled else ""
        dots = [f"beyond window {grid.window}"] if grid.window is not None else []
        dots += ["left out"] if grid.left_out else []
        dotted = f"{NEITHER} {' or '.join(dots)}" if dots else ""
        lines = "" if self.rows_per_line == 1 else "2 queries a line"
        notes = "  ".join(note for note in (clean(grid.shading), pooling, dotted, "blank: later keys", lines) if note)
        used = sum(segment.cell_length for segment in scale) + 2
        return [*scale, Segment(f"  {fit(notes, self.room.width - used)}")]

    def _strip(self, segments: list[Segment]) -> Strip:
        return Strip(segments).adjust_cell_length(self.room.width).apply_style(self.rich_style)

    def _put(self, row: int, column: int) -> None:
        before = self.row, self.column
        self.row = max(0, min(row, self.grid.rows - 1))
        self.column = max(0, min(column, self.grid.columns - 1))
        query, key = self.pair
        self.pair = _kept(self.grid.row_edges, self.row, query), _kept(self.grid.column_edges, self.column, key)
        if (self.row, self.column) != before:
            self.post_message(self.Moved(self.row, self.column))

    def _measure(self) -> None:
        lines = -(-self.grid.rows // self.rows_per_line)
        self.virtual_size = Size(self.gutter_width + self.grid.columns, lines + TOP + BOTTOM)
        self._follow_cursor()
        self.refresh()
        self.call_after_refresh(self._follow_cursor)  # scrollbars that come now take room

    @property
    def _lines_seen(self) -> int:
        return max(1, self.room.height - TOP - BOTTOM)

    def _follow_cursor(self) -> None:
        """Scroll if the cell under the cursor is not seen, to its middle: a walk then seldom draws the whole map."""
        x, y = self.scroll_offset
        line, room = self.row // self.rows_per_line, max(1, self.room.width - self.gutter_width)
        if not y <= line < y + self._lines_seen:
            y = line - self._lines_seen // 2
        if not x <= self.column < x + room:
            x = self.column - room // 2
        if (x, y) != self.scroll_offset:
            self.scroll_to(x, y, animate=False, force=True, immediate=True)  # though there is no scrollbar yet

    def _line(self, row: int) -> int:
        return TOP + row // self.rows_per_line - self.scroll_offset.y


def _kept(edges: np.ndarray, index: int, position: int) -> int:
    """A position that is in a cell, or the cell's first."""
    first = int(edges[index])
    return position if first <= position < edges[min(index + 1, len(edges) - 1)] else first


@lru_cache(maxsize=STATES * STATES + 2)
def _halves(look: int) -> tuple[str, Style]:
    """Two rows in one character: ``upper * STATES + lower``; -1 and -2 are the cursor on the upper and the lower."""
    if look < 0:  # white beside black differs from every colour of the map, and from its bright and its dark parts
        return UPPER if look == -1 else LOWER, Style(color="rgb(255,255,255)", bgcolor="rgb(0,0,0)")
    upper, lower = divmod(look, STATES)
    if max(upper, lower) < len(VIRIDIS):
        return UPPER, Style(color=_rgb(upper), bgcolor=_rgb(lower))
    if upper < len(VIRIDIS):
        return UPPER, Style(color=_rgb(upper))
    if lower < len(VIRIDIS):
        return LOWER, Style(color=_rgb(lower))
    return " " if upper == lower == BARE else NEITHER, Style(dim=True)


@lru_cache(maxsize=len(RAMP) + 4)
def _height(look: int) -> tuple[str, Style]:
    """One row in a character: a height, or why there is none; -1 is the cursor."""
    if look < 0:
        return CURSOR, Style(bold=True, reverse=True)
    if look < len(RAMP):
        return RAMP[look], Style()
    return " " if look == len(RAMP) + LATER else NEITHER, Style()


def _rgb(tint: int) -> str:
    return "rgb({},{},{})".format(*VIRIDIS[tint])
