"""The tokens of a text in lines, coloured by when they were decided or how sure the model was, with a cursor."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding
from textual.events import Click
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from gemma_tui.heat import RAMP, VIRIDIS, ink
from gemma_tui.studies.replay import HIGHEST_ENTROPY, LOWEST_ENTROPY, Cell, Replay, entropy_level, turn_level
from gemma_tui.widgets.token_flow import Box, TokenFlow

BY_PASS, BY_ENTROPY = "pass", "entropy"
SHADES = (BY_PASS, BY_ENTROPY)
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
MORE = "+"
"""A pass for which there is no digit."""

DIFFERENT = "≠"
FAR = 10**9


class TokenStrip(ScrollView, can_focus=True):
    """A text after some of its passes; the arrow keys move a cursor over its tokens."""

    DEFAULT_CSS = """
    TokenStrip { height: 1fr; min-height: 1; scrollbar-size: 1 1; scrollbar-gutter: stable; overflow-x: hidden; }
    """
    BINDINGS = [
        Binding("left", "move(-1)", "Token before", id="tokens.left", show=False),
        Binding("right", "move(1)", "Next token", id="tokens.right", show=False),
        Binding("up", "line(-1)", "Line before", id="tokens.up", show=False),
        Binding("down", "line(1)", "Next line", id="tokens.down", show=False),
        Binding("home", f"move(-{FAR})", "First token", id="tokens.first", show=False),
        Binding("end", f"move({FAR})", "Last token", id="tokens.last", show=False),
        Binding("pageup", "page(-1)", "A page up", id="tokens.page_up", show=False),
        Binding("pagedown", "page(1)", "A page down", id="tokens.page_down", show=False),
    ]

    class Moved(Message):
        """The cursor is on another place."""

        def __init__(self, place: int) -> None:
            super().__init__()
            self.place = place

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.replay = Replay()
        self.step = 0
        self.cursor = 0
        self.shade = BY_PASS
        self.difference: int | None = None
        """The first place in which the text differs from another."""
        self._end: int | None = None
        self._flow = TokenFlow(str)

    def begin(self, replay: Replay, label: Callable[[int], str]) -> None:
        """Show another text, none of it decided."""
        self.replay, self.step, self.cursor, self.difference, self._end = replay, 0, 0, None, None
        self._flow = TokenFlow(label, self._room.width)
        self._measure()

    def go(self, step: int) -> None:
        """Show the text after another number of passes, with the place of the last one in view."""
        if step == self.step and self.replay.end == self._end:
            return
        changed = self.replay.changed(self.step, step)
        self.step, self._end = step, self.replay.end
        start = self._flow.restart(changed)
        self._flow.put(self.replay.cells(step, start))
        self._measure()
        self._reveal(self._flow.line_of(changed))
        self._reveal(len(self._flow.lines) - 1)

    def point(self, place: int) -> None:
        """Put the cursor on a place, and bring it into view."""
        self.cursor = max(0, min(place, self._flow.count - 1))
        self._reveal(self._flow.line_of(self.cursor))
        self.refresh()

    @property
    def cell(self) -> Cell | None:
        """What is under the cursor."""
        box = self._flow.box(self.cursor)
        return box.cell if box else None

    def action_move(self, by: int) -> None:
        """Move the cursor by tokens."""
        self._moved(self.cursor + by)

    def action_line(self, by: int) -> None:
        """Move the cursor to the nearest token of another line."""
        self._moved(self._flow.beside(self.cursor, by))

    def action_page(self, by: int) -> None:
        """Move the cursor by as many lines as are seen."""
        self.action_line(by * max(1, self._room.height - 1))

    def on_click(self, event: Click) -> None:
        """Put the cursor where the mouse is."""
        line = event.y + self.scroll_offset.y
        boxes = self._flow.lines[line] if line < len(self._flow.lines) else []
        for box in boxes:
            if box.x <= event.x < box.x + box.width:
                self._moved(box.cell.place)

    def on_resize(self) -> None:
        """Another width gives other lines."""
        if self._room.width != self._flow.width:
            self._flow = TokenFlow(self._flow.label, self._room.width)
            self._flow.put(self.replay.cells(self.step))
        self._measure()
        self._reveal(self._flow.line_of(self.cursor))

    def render_line(self, y: int) -> Strip:
        """One line of what is seen."""
        line = y + self.scroll_offset.y
        boxes = self._flow.lines[line] if line < len(self._flow.lines) else []
        segments = [segment for box in boxes for segment in self._segments(box)]
        return Strip(segments).adjust_cell_length(self._room.width).apply_style(self.rich_style)

    def _segments(self, box: Box) -> list[Segment]:
        cell, colour = box.cell, not self.app.no_color
        level = self._level(cell)
        before = " " if colour else self._sign(cell, level)
        if cell.decided and cell.place == self.difference:
            before = DIFFERENT
        tint = VIRIDIS[_step(level, len(VIRIDIS))] if colour else None
        under = self.has_focus and cell.place == self.cursor
        new = cell.decided and cell.step == self.step
        return [Segment(before, _plain(before == DIFFERENT)), Segment(box.text, _style(tint, under, new))]

    def _level(self, cell: Cell) -> float:
        """By entropy where nothing is decided, whatever the rest goes by."""
        by_entropy = self.shade == BY_ENTROPY or not cell.decided
        return entropy_level(cell) if by_entropy else turn_level(cell, self.replay.block)

    def _sign(self, cell: Cell, level: float) -> str:
        """What stands for the colour where there is none."""
        if self.shade == BY_PASS and cell.decided:
            return DIGITS[cell.turn] if cell.turn < len(DIGITS) else MORE
        return RAMP[_step(level, len(RAMP))]

    @property
    def _room(self) -> Size:
        return self.scrollable_content_region.size

    def _moved(self, place: int) -> None:
        self.point(place)
        self.post_message(self.Moved(self.cursor))

    def _measure(self) -> None:
        self.cursor = max(0, min(self.cursor, self._flow.count - 1))
        self.virtual_size = Size(self._room.width, len(self._flow.lines))
        self.refresh()

    def _reveal(self, line: int) -> None:
        top, rows = self.scroll_offset.y, max(1, self._room.height)
        to = max(min(top, line), line - rows + 1)
        if to != top:
            self.scroll_to(y=to, animate=False, immediate=True)


def legend(shade: str, block: int, colour: bool) -> list[Segment]:
    """What the colours mean, or the signs before the tokens."""
    if shade == BY_ENTROPY:
        ramp = [Segment(" ", _style(tint, False, False)) for tint in VIRIDIS] if colour else [Segment(RAMP)]
        low, high = f"≤{LOWEST_ENTROPY:g}", f"≥{HIGHEST_ENTROPY:g} nats"
        return [Segment(f"entropy when decided {low} "), *ramp, Segment(f" {high}")]
    if not colour:
        return [Segment("the sign before a token: which pass of its block decided it, 1 to 9, a to z")]
    steps = [turn for turn in (1, 2, 3, 4, 6, 8, 12, 16) if turn <= block] or [1]
    cells = [Cell(0, 0, turn, turn, 0.0, 0.0) for turn in steps]
    tints = [VIRIDIS[_step(turn_level(cell, block), len(VIRIDIS))] for cell in cells]
    boxes = [Segment(f" {turn} ", _style(tint, False, False)) for turn, tint in zip(steps, tints, strict=True)]
    return [Segment("decided in pass "), *boxes, Segment(" of its block")]


def _step(level: float, count: int) -> int:
    return min(count - 1, int(level * count))


def _plain(strong: bool) -> Style:
    return Style(bold=strong)


@lru_cache(maxsize=8 * len(VIRIDIS))
def _style(tint: tuple[int, int, int] | None, under: bool, new: bool) -> Style:
    """The background with a text on it that can be read; the cursor is reversed, what is new underlined."""
    if tint is None:
        return Style(bold=under or new, reverse=under, underline=new)
    red, green, blue = tint
    return Style(color=ink(tint), bgcolor=f"rgb({red},{green},{blue})", bold=under or new, reverse=under, underline=new)
