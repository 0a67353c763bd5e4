"""A figure as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np
from rich.cells import cell_len, set_cell_size

from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.heat import heatmap_text
from gemma_tui.plots import draw, legend, number_text
from gemma_tui.text import one_line

HEIGHT = 16
"""Lines of a chart."""

CELL = 32
"""The widest a column of a table gets, in characters."""

GAP = "  "


def figure_text(figure: Figure, width: int = 80, colour: bool = False, rows: int = 20) -> str:
    """Title, notes, maps, charts and tables as lines.

    Args:
        colour: ANSI colours; without them no escape sequence is written.
        rows: how many rows of each table are shown.
    """
    parts = ["\n".join(one_line(line, 1000) for line in (figure.title, *figure.notes))]
    parts += [heatmap_text(heat, width, colour) for heat in figure.heats]
    parts += [_chart(chart, width, colour) for chart in figure.charts]
    parts += ["\n".join(table_lines(table, width, rows)) for table in figure.tables]
    return "\n\n".join(parts) + "\n"


def is_number(value: Any) -> bool:
    """Whether it is shown as a number; True and False are words."""
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def cell_text(value: Any) -> str:
    """A cell: whole numbers in full, others with four digits as ``number_text``, nothing for None and NaN; text."""
    if value is None or (is_number(value) and value != value):
        return ""
    if is_number(value):
        return str(value) if isinstance(value, int | np.integer) else number_text(float(value))
    return one_line(str(value))


def table_lines(table: Table, width: int = 80, rows: int = 20) -> Iterator[str]:
    """A table; columns that do not fit come below, after the first column once more."""
    shown = [[cell_text(cell) for cell in row] for row in table.rows[:rows]]
    names = [one_line(name) for name in table.columns]
    sizes = [min(CELL, max(cell_len(line[j]) for line in (names, *shown))) for j in range(len(names))]
    right = [bool(shown) and any(is_number(row[j]) for row in table.rows[:rows]) for j in range(len(names))]
    for number, columns in enumerate(_blocks(sizes, width)):
        if number:
            yield ""
        for line in (names, *shown):
            yield GAP.join(_fitted(line[j], sizes[j], right[j]) for j in columns).rstrip()
    if len(table.rows) > rows:
        yield f"… {len(table.rows) - rows:,} rows more"


def _chart(chart: LineChart, width: int, colour: bool) -> str:
    """The names of the lines come below, where they do not fit beside the title."""
    shown = chart.cleaned()
    text = draw(
        shown.series, width, HEIGHT, shown.title, shown.log, colour, shown.x_label, named=False, log_x=shown.log_x
    )
    return "\n".join([text.rstrip("\n"), *legend(shown.series, width, colour)])


def _blocks(sizes: Sequence[int], width: int) -> Iterator[list[int]]:
    """Which columns go side by side; the first is in every block."""
    block, used = [0] if sizes else [], sizes[0] if sizes else 0
    for j in range(1, len(sizes)):
        if used + len(GAP) + sizes[j] > width and len(block) > 1:
            yield block
            block, used = [0], sizes[0]
        block.append(j)
        used += len(GAP) + sizes[j]
    if block:
        yield block


def _fitted(text: str, size: int, right: bool) -> str:
    """A cell in its width; what is longer is cut."""
    if cell_len(text) > size:
        return set_cell_size(text, size - 1) + "…"
    pad = " " * (size - cell_len(text))
    return pad + text if right else text + pad
