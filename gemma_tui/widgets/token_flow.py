"""Where the tokens of a text stand in lines of a width; only what changed is laid out again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from gemma_tui.pair_grid import fit
from gemma_tui.pair_grid import token as drawable
from gemma_tui.studies.replay import Cell

NEWLINE = "↵"
MASK = "‹{}›"
"""What a place not decided looks like, around the token that it would get."""


def visible(written: str) -> str:
    """A token of the vocabulary, its spaces and line ends visible; harmless."""
    return drawable(written.replace("▁", "·").replace(" ", "·").replace("<0x0A>", "\n")) or "∅"


@dataclass(frozen=True)
class Box:
    """A token on its line.

    Attributes:
        x: of the column before it, which belongs to it.
        text: what is drawn after that column.
        width: of both.
    """

    cell: Cell
    x: int
    text: str
    width: int


class TokenFlow:
    """Boxes on lines; a box never goes over the end of one.

    Args:
        label: the text of a token, of which only the visible is drawn.
    """

    def __init__(self, label: Callable[[int], str], width: int = 80) -> None:
        self.label = label
        self.width = max(4, width)
        self.lines: list[list[Box]] = [[]]
        self._starts = [0]
        """The first place of each line."""

    @property
    def count(self) -> int:
        """How many places there are."""
        return self._starts[-1] + len(self.lines[-1])

    def restart(self, place: int) -> int:
        """Take back what comes from a place on; returns the first place that is to be put again."""
        line = self.line_of(place)
        del self.lines[line + 1 :], self._starts[line + 1 :]
        self.lines[line] = []
        return self._starts[line]

    def put(self, cells: Sequence[Cell]) -> None:
        """Add the places that follow."""
        for cell in cells:
            text = visible(self.label(cell.token))
            shown = fit(text if cell.decided else MASK.format(text), self.width - 1)
            self._add(cell, shown, 1 + cell_len(shown))
            if cell.decided and text == NEWLINE:
                self._starts.append(self.count)
                self.lines.append([])

    def line_of(self, place: int) -> int:
        """The line that a place is on, or would be."""
        return bisect_right(self._starts, max(0, place)) - 1

    def box(self, place: int) -> Box | None:
        """A place's box, if there is one."""
        line = self.line_of(place)
        at = place - self._starts[line]
        return self.lines[line][at] if 0 <= at < len(self.lines[line]) else None

    def beside(self, place: int, by: int) -> int:
        """The place on another line that is nearest to a place's column; the ends where there is no such line."""
        box, line = self.box(place), self.line_of(place) + by
        if box is None or not 0 <= line < len(self.lines):
            return 0 if by < 0 else max(0, self.count - 1)
        column = box.x + box.width // 2
        found = min(self.lines[line], key=lambda other: abs(other.x + other.width // 2 - column), default=None)
        return found.cell.place if found else max(0, self._starts[line] - 1)

    def _add(self, cell: Cell, shown: str, width: int) -> None:
        line = self.lines[-1]
        x = line[-1].x + line[-1].width if line else 0
        if x + width > self.width and line:
            self._starts.append(self.count)
            self.lines.append([])
            x = 0
        self.lines[-1].append(Box(cell, x, shown, width))
