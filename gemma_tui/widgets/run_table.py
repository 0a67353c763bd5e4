"""The runs, and above them the plans that wait for theirs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.text import Text
from textual.binding import Binding
from textual.widgets import DataTable

from gemma_tui.output import age
from gemma_tui.runs.queue import Item
from gemma_tui.runs.store import Run
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.text import one_line

COLUMNS = ("run", "state", "engine", "step", "method", "age", "group")
MARK = "● "
QUEUED = "queue:"
"""What the key of a row begins with that is a plan of the queue; no run's name has a colon."""


class RunTable(DataTable[Text]):
    """A row for each queued plan and each run; enter opens one."""

    BINDINGS = [Binding("enter", "select_cursor", "Open", id="runs.open")]

    def __init__(self, id: str) -> None:
        super().__init__(id=id, cursor_type="row", classes="pane")
        self._shown: list[tuple[str, ...]] = []

    @property
    def chosen(self) -> str:
        """The key of the row under the cursor: a run's name, or ``QUEUED`` and a number; nothing in an empty table."""
        return str(self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value) if self.row_count else ""

    def go_to(self, key: str) -> None:
        """Put the cursor on a row, if it is there."""
        if key in self.rows:
            self.move_cursor(row=self.get_row_index(key))

    def show(self, items: Sequence[Item], runs: Sequence[Run], marked: Collection[str] = ()) -> None:
        """Draw what has changed; the cursor stays on what it is on, while that is there."""
        if not self.columns:
            self.add_columns(*COLUMNS)
        rows = [_waiting(item) for item in items] + [
            _run(run, run.run_id in marked) for run in runs if not run.run_id.startswith(QUEUED)
        ]
        if rows == self._shown:
            return
        cursor, chosen = self.cursor_row, self.chosen
        self._shown = rows
        self.clear()
        for key, *cells in rows:
            self.add_row(*(Text(one_line(cell, 30)) for cell in cells), key=key)
        keys = [row[0] for row in rows]
        self.move_cursor(row=keys.index(chosen) if chosen in keys else min(cursor, len(rows) - 1))


def _run(run: Run, marked: bool) -> tuple[str, ...]:
    """The key and the cells of a run."""
    step, method = f"{run.step}/{run.steps}", str(run.plan.get("method", run.study))
    return run.run_id, MARK * marked + run.run_id, run.state, run.engine, step, method, age(run.created), run.group


def _waiting(item: Item) -> tuple[str, ...]:
    """The key and the cells of a plan that has no run as yet."""
    default = TrainingPlan()
    method = str(item.plan.get("method", default.method))
    name, step = str(item.plan.get("name", method)), f"0/{item.plan.get('steps', default.steps)}"
    state = "queued" if item.state == "queued" else "starting"
    return (
        f"{QUEUED}{item.id}", f"plan {item.id} {name}", state, item.engine, step, method, age(item.created), item.group
    )  # fmt: skip
