"""Runs side by side: one measure as a chart, where each run stands, and what differs in their plans."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from rich.style import Style
from rich.text import Text
from textual.binding import Binding
from textual.containers import Vertical
from textual.widget import Widget
from textual.widgets import DataTable, Static

from gemma_tui.errors import GemmaTuiError
from gemma_tui.plots import Series, look
from gemma_tui.runs.comparison import (
    AXES,
    COLUMNS,
    SMOOTHED,
    Compared,
    Comparison,
    cells,
    differences,
    option_text,
    title,
)
from gemma_tui.runs.store import RunStore
from gemma_tui.screens.workbench import Workbench
from gemma_tui.text import one_line
from gemma_tui.widgets.chart import Chart

WATCH_SECONDS = 0.4
WINDOWS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)
NAME = 24
HIDDEN = "·"


class ResultTable(DataTable[Text]):
    """A row for each run: its sign in the chart, its name, and its result."""

    BINDINGS = [
        Binding(
            "space", "screen.hide", "Hide", id="comparison.hide", tooltip="Leave the run out of the chart, and back"
        )
    ]


class ComparisonScreen(Workbench):
    """Some runs over each other; those that go on grow.

    Args:
        comparison: the runs; what was read of them stays there when the screen closes.
    """

    MODE = "training"
    BINDINGS = [
        Binding("escape", "close", "Back", id="comparison.back"),
        Binding("m", "measure", "Metric", id="comparison.measure", tooltip="Draw the next measure"),
        Binding("x", "axis", "Axis", id="comparison.axis",
                tooltip="Against step, tokens, seconds of computing, or a number that differs"),
        Binding("y", "log_axis", "Log", id="comparison.log", tooltip="Logarithmic or linear measure"),
        Binding("plus,equals_sign", "smooth(1)", "Mean", id="comparison.smooth", key_display="+/-",
                tooltip="Mean over more points, or over fewer"),
        Binding("minus", "smooth(-1)", "Shorter mean", id="comparison.rough", show=False, key_display="-",
                tooltip="Mean over fewer points"),
    ]  # fmt: skip

    def __init__(self, comparison: Comparison, store: RunStore) -> None:
        super().__init__()
        self.comparison = comparison
        self.measure = "loss"
        self.axis = "step"
        self.window = SMOOTHED
        self._store: RunStore | None = store
        self._written: dict[tuple[str, str], str] = {}

    def body(self) -> Iterable[Widget]:
        """The chart above the tables."""
        found = differences([compared.run for compared in self.comparison.runs])
        plans: Widget = DataTable[Text](id="plans", cursor_type="row")
        if not found:
            plans = Static("the plans do not differ", id="same")
        chart = Chart(title(self.measure, False, self.window), id="compared", named=False)
        yield Vertical(chart, ResultTable(id="results", cursor_type="row", fixed_columns=2), plans, classes="pane")

    def on_mount(self) -> None:
        """Fill the tables, and look at the store from now on."""
        self._fill_results()
        self._fill_plans()
        self.query_one(ResultTable).focus()
        self.set_interval(WATCH_SECONDS, self._watch)
        self._watch()

    def command(self) -> str:
        """The command that prints this comparison."""
        names = [compared.run.run_id for compared in self.comparison.runs]
        chosen = ["--measure", self.measure, "--x", self.axis, "--smooth", str(self.window)]
        log = ["--log"] if self.query_one(Chart).log_axis else []
        return shlex.join(["gemma-tui", "runs", "compare", *names, *chosen, *log])

    def action_close(self) -> None:
        """Go back to the runs."""
        self.dismiss(None)

    def action_measure(self) -> None:
        """Draw the next of the measures that any run has."""
        self.measure = _after(self.measure, self.comparison.measures())
        self._draw()

    def action_axis(self) -> None:
        """Draw against the next of step, tokens, seconds and the numbers that differ in the plans."""
        self.axis = _after(self.axis, list(self.comparison.axes()))
        self._draw()

    def action_log_axis(self) -> None:
        """Switch between a linear and a logarithmic axis of the measure."""
        self.query_one(Chart).toggle_log()

    def action_smooth(self, by: int) -> None:
        """Take the mean over more points, or over fewer."""
        place = WINDOWS.index(self.window) + by
        self.window = WINDOWS[max(0, min(place, len(WINDOWS) - 1))]
        for compared in self.comparison.runs:
            self._write(compared)
        self._draw()

    def action_hide(self) -> None:
        """Leave the run under the cursor out of the chart, or take it in again."""
        table = self.query_one(ResultTable)
        if not table.row_count:
            return
        compared = self.comparison.runs[table.cursor_row]
        compared.hidden = not compared.hidden
        self._write(compared)
        self._draw()

    def _watch(self) -> None:
        """Read what is new of each run, and draw if there is anything."""
        if self._store is None or not self.is_current:
            return
        try:
            changed = self.comparison.read(self._store)
        except GemmaTuiError as error:
            self._store = None
            self.bench.tell(str(error), "error")
            return
        for compared in changed:
            self._write(compared)
        if changed:
            self._draw()

    def _draw(self) -> None:
        shown = list(self.comparison.shown(self.measure))
        chart = self.query_one(Chart)
        chart.title = title(self.measure, any(curve.evaluated for _, curve in shown), self.window)
        chart.x_label = self.comparison.axes()[self.axis]
        chart.named = self.axis not in AXES
        chart.log_x = self.comparison.log_x(self.axis)
        lines = self.comparison.lines(self.measure, self.axis, self.window)
        chart.show([Series(one_line(name, NAME), x, y, number) for name, x, y, number in lines])
        chart.redraw()

    def _fill_results(self) -> None:
        table = self.query_one(ResultTable)
        table.add_column("", key="sign", width=1)
        table.add_column("run", key="run")
        for name, (heading, _) in COLUMNS.items():
            table.add_column(heading, key=name)
        for compared in self.comparison.runs:
            name = compared.run.run_id
            table.add_row(Text(), Text(one_line(name, NAME)), *(Text() for _ in COLUMNS), key=name)
            self._write(compared)

    def _fill_plans(self) -> None:
        runs = [compared.run for compared in self.comparison.runs]
        for table in self.query("#plans").results(DataTable):
            table.add_columns("differs", *(Text(one_line(run.run_id, NAME)) for run in runs))
            for option, values in differences(runs).items():
                written = (one_line(option_text(values, run.run_id), NAME) for run in runs)
                table.add_row(Text(one_line(option, NAME)), *map(Text, written))

    def _write(self, compared: Compared) -> None:
        """Bring the cells of a run up to date; only those that changed cost anything."""
        table, name = self.query_one(ResultTable), compared.run.run_id
        shown = look(compared.look, not self.app.no_color)
        sign = HIDDEN if compared.hidden else shown.sign
        written = dict(zip(COLUMNS, cells(compared.result(self.window)), strict=True)) | {"sign": sign}
        for column, text in written.items():
            if self._written.get((name, column)) == text:
                continue
            self._written[name, column] = text
            tint = shown.tint if column == "sign" and not compared.hidden else None
            style = Style(color="rgb({},{},{})".format(*tint)) if tint else Style()
            table.update_cell(name, column, Text(one_line(text, NAME), style), update_width=column != "sign")


def _after(current: str, choices: list[str]) -> str:
    """The choice that follows, the first if the current one is none."""
    return choices[(choices.index(current) + 1) % len(choices)] if current in choices else (choices or [current])[0]
