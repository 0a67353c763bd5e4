"""A figure on the screen: its maps, charts and tables one at a time, on wide terminals beside the first table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.coordinate import Coordinate
from textual.widgets import DataTable, Static

from gemma_tui.figure import Figure, Table
from gemma_tui.figure_text import cell_text, is_number
from gemma_tui.heat import Heat
from gemma_tui.pair_grid import PairGrid
from gemma_tui.text import one_line
from gemma_tui.widgets.chart import Chart
from gemma_tui.widgets.heatmap import HeatMap
from gemma_tui.widgets.pair_map import PairMap

NOTHING = Heat("", [], [], np.zeros((0, 0)))
NO_PAIRS = PairGrid(np.zeros((1, 1), np.float32), np.arange(2), np.arange(2), [""], [""], None, "max")
MOST_ROWS = 500
MOST_LINES = 16
"""Of a chart, each of which takes some milliseconds to draw."""

WIDE = 110


class FigureView(Vertical):
    """Notes above the parts; ``turn`` shows the next part.

    Args:
        grabs: whether the part that is seen takes the keys by itself, also from widgets beside.
        notes_key: of the screen, which shows all notes where there is no room for them.
    """

    DEFAULT_CSS = """
    FigureView { height: 1fr; }
    FigureView #notes { height: auto; max-height: 4; padding: 0 1; color: $text-muted; }
    FigureView #parts { height: 1fr; }
    FigureView DataTable { width: 1fr; }
    """

    def __init__(self, id: str | None = None, grabs: bool = True, notes_key: str = "") -> None:
        super().__init__(id=id)
        self.grabs = grabs
        self.notes_key = notes_key
        self.figure = Figure("")
        self.part = 0
        self._pairs: PairGrid | None = None
        self._notes = ""
        self._other_axis = False
        """Whether charts have a linear x axis where theirs is logarithmic, and the other way round."""
        self._rows: list[Sequence[object]] = []
        """Of the table, as they are drawn."""

    def compose(self) -> ComposeResult:
        """Every kind of part; those that are not seen are not displayed."""
        yield Static("", id="notes", markup=False)
        with Horizontal(id="parts"):
            yield HeatMap(NOTHING, id="heat")
            yield PairMap(NO_PAIRS, id="pairs")
            yield Chart("", id="line")
            yield DataTable(id="rows", cursor_type="row", cell_padding=1)

    def on_mount(self) -> None:
        """Nothing is seen yet."""
        self._arrange()

    def show(self, figure: Figure, pairs: PairGrid | None = None) -> None:
        """Show another figure; the part stays where it is the same kind of view.

        Args:
            pairs: the map of a head, shown in place of the figure's first map.
        """
        same = figure.title == self.figure.title or (pairs is not None and self._pairs is not None)
        self.figure, self._pairs = figure, pairs
        self.part = self.part % self.count if same and self.count else 0
        self._other_axis = self._other_axis and same
        hint = f"{self.notes_key}: all {len(figure.notes)} notes · " if self.notes_key and figure.notes else ""
        notes = hint + "\n".join(one_line(note, 240) for note in figure.notes)
        if notes != self._notes:  # an update lays out the whole screen
            self._notes = notes
            self.query_one("#notes", Static).update(notes)
        self._fill()

    @property
    def count(self) -> int:
        """How many parts there are."""
        return len(self._names())

    @property
    def place(self) -> str:
        """Which part is seen, of how many."""
        names = self._names()
        return f"{names[self.part]} {self.part + 1}/{len(names)}" if names else ""

    def turn(self) -> None:
        """Show the next part."""
        if self.count:
            self.part = (self.part + 1) % self.count
            self._fill()

    def switch_axis(self) -> None:
        """Draw charts over a linear x axis instead of a logarithmic one, or the other way round."""
        self._other_axis = not self._other_axis
        self._fill()

    def turn_to(self, name: str) -> None:
        """Show the part of a name, as ``place`` tells it, if there is one."""
        if name in self._names():
            self.part = self._names().index(name)
            self._fill()

    def relayout(self) -> None:
        """Another width shows more or less side by side."""
        self._arrange()
        self._beside()

    def focus_part(self) -> None:
        """Give the keys to the part that is seen."""
        kind = self._kind()
        target = {"heat": "#heat", "pairs": "#pairs", "table": "#rows"}.get(kind)
        if target is not None and not (widget := self.query_one(target)).has_focus:
            widget.focus()  # draws it anew

    def _names(self) -> list[str]:
        figure = self.figure
        maps = ["pairs"] if self._pairs is not None else ["map"] * len(figure.heats)
        return [*maps, *["chart"] * len(figure.charts), *[f"table {table.kind}" for table in figure.tables]]

    def _kind(self) -> str:
        names = self._names()
        if not names:
            return ""
        name = names[self.part]
        return {"map": "heat", "chart": "line"}.get(name, "table" if name.startswith("table") else name)

    def _fill(self) -> None:
        figure, maps = self.figure, 1 if self._pairs is not None else len(self.figure.heats)
        kind, at = self._kind(), self.part
        if kind == "heat":
            self.query_one(HeatMap).show(figure.heats[at])
        elif kind == "pairs" and self._pairs is not None:
            self.query_one(PairMap).show(self._pairs)
        elif kind == "line":
            chart, line = self.query_one(Chart), figure.charts[at - maps].cleaned()
            chart.title, chart.x_label, chart.log_axis = line.title, line.x_label, line.log
            chart.log_x = line.log_x != self._other_axis
            series, every = list(line.series), len(line.series)
            if every > MOST_LINES:
                series = [series[i * (every - 1) // (MOST_LINES - 1)] for i in range(MOST_LINES)]
                chart.title += f" ({MOST_LINES} of {every} lines)"
            chart.show(series)
            chart.redraw()
        elif kind == "table":
            self._table(figure.tables[at - maps - len(figure.charts)])
        self._arrange()
        if kind != "table":
            self.call_after_refresh(self._beside)  # a table costs more than a map, which is drawn first

    def _beside(self) -> None:
        """The first table, where there is room for it beside another part."""
        if self.figure.tables and self._wide and self._kind() != "table":
            self._table(self.figure.tables[0])

    @property
    def _wide(self) -> bool:
        return self.app.size.width >= WIDE

    def _arrange(self) -> None:
        kind = self._kind()
        shown = {"heat": "#heat", "pairs": "#pairs", "line": "#line", "table": "#rows"}
        for name, selector in shown.items():
            beside = name == "table" and self._wide and bool(self.figure.tables)
            self.query_one(selector).display = name == kind or (beside and kind != "")
        if self.is_mounted and self.screen.is_current and (self.grabs or self.has_focus_within):
            self.focus_part()

    def _table(self, table: Table) -> None:
        """Draw what has changed; the cursor stays where rows and columns do."""
        widget = self.query_one(DataTable)
        columns = [Text(one_line(name, 24), justify=_side(table.rows, i)) for i, name in enumerate(table.columns)]
        before, self._rows = self._rows, [tuple(row) for row in table.rows[:MOST_ROWS]]
        if [column.label for column in widget.ordered_columns] != columns or len(before) != len(self._rows):
            widget.clear(columns=True)
            widget.add_columns(*columns)
            widget.add_rows([_text(cell) for cell in row] for row in self._rows)
            return
        for row, (old, new) in enumerate(zip(before, self._rows, strict=True)):
            for column in (i for i in range(len(new)) if old[i] != new[i]):
                widget.update_cell_at(Coordinate(row, column), _text(new[column]), update_width=True)


def _text(cell: object) -> Text:
    return Text(one_line(cell_text(cell), 60), justify="right" if is_number(cell) else "left")


def _side(rows: Sequence[Sequence[object]], column: int) -> Literal["left", "right"]:
    return "right" if rows and is_number(rows[0][column]) else "left"
