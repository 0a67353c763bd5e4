"""What tests of runs look at and move to."""

from __future__ import annotations

from typing import Any

from textual.widgets import DataTable

from gemma_tui.widgets.chart import Chart
from gemma_tui.widgets.event_log import EventLog
from gemma_tui.widgets.plan_form import PlanForm

from .conftest import Opened

LONG = 100_000


def headline(it: Opened) -> str:
    return it.static("#headline")


def log(it: Opened) -> str:
    return "\n".join(it.app.screen.query_one(EventLog).lines)


def points(it: Opened, chart: str) -> int:
    return sum(len(s.x) for s in it.app.screen.query_one(f"#{chart}", Chart).series)


async def on_row(it: Opened, form: PlanForm[Any], name: str) -> None:
    form.focus()
    form.move_cursor(row=form.get_row_index(name))
    await it.pilot.pause()


async def listed(it: Opened, *names: str) -> DataTable[Any]:
    """The pane with the runs, once they are in it."""
    await it.press("l")
    table = it.app.screen.query_one("#runs", DataTable)
    await it.until(lambda: {str(k.value) for k in table.rows} >= set(names), f"{names} in the list")
    return table
