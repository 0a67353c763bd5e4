"""What a view of a model shows, once for the screen, the command line and every export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gemma_tui.heat import Heat
from gemma_tui.plots import Series
from gemma_tui.text import one_line


@dataclass(frozen=True, eq=False)
class LineChart:
    """Lines over one axis.

    Attributes:
        log, log_x: whether the measure, and what it is drawn against, have logarithmic axes.
    """

    title: str
    series: Sequence[Series]
    x_label: str = ""
    log: bool = False
    log_x: bool = False

    def cleaned(self) -> LineChart:
        """The same with its words on one line and harmless, as a terminal is shown them."""
        series = [replace(line, label=one_line(line.label)) for line in self.series]
        return LineChart(one_line(self.title), series, one_line(self.x_label), self.log, self.log_x)


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of text and numbers; a number is shown with four digits.

    Attributes:
        kind: what a row is, which names it in JSON.
    """

    kind: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Figure:
    """A view: what it says, its maps, charts and tables, and the numbers behind them.

    Attributes:
        notes: sentences for a person: what was measured on what, and warnings. Not cleaned.
        arrays: what an npz holds.
        facts: where the numbers come from: model, engine, dtype, tokens, definitions; for JSON.
    """

    title: str
    notes: Sequence[str] = ()
    heats: Sequence[Heat] = ()
    charts: Sequence[LineChart] = ()
    tables: Sequence[Table] = ()
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
