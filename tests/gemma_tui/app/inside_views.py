"""What tests of the attention screen do with it."""

from __future__ import annotations

from typing import Any

from gemma_tui.screens.attention import AttentionScreen
from gemma_tui.studies.attention.looking import Board
from gemma_tui.widgets.figure_view import FigureView
from gemma_tui.widgets.plan_form import Field, PlanForm

from .conftest import Opened

SHORT = "The dogs sleep on."


def screen(it: Opened) -> AttentionScreen:
    return next(s for s in it.app.screen_stack if isinstance(s, AttentionScreen))


def board(it: Opened) -> Board:
    return screen(it).board


def values(it: Opened) -> dict[str, Any]:
    return screen(it).query_one(PlanForm).values


def part(it: Opened) -> str:
    return screen(it).query_one(FigureView).place


async def shown(it: Opened, view: str, **plan: Any) -> None:
    """Wait until a view is on the screen and nothing runs."""

    def there() -> bool:
        now = board(it)
        same = all(getattr(now.plan, name) == value for name, value in plan.items())
        drawn = screen(it).query_one(FigureView).figure is now.figure
        return now.figure is not None and now.plan.view == view and same and drawn and not it.app.session.jobs

    await it.until(there, f"{view} {plan}, not {board(it).plan} ({it.told()})")
    await it.pilot.pause()


async def looked(it: Opened, tiny: str) -> None:
    """Open the screen on the tiny model."""
    await it.loaded(tiny)
    await it.mode("4", "attention")
    await shown(it, "heads")


async def typed(it: Opened, key: str, text: str) -> None:
    """Press a key that opens a field, and fill it in."""
    await it.press(key)
    await it.until(lambda: isinstance(it.app.screen, Field), "the field")
    it.app.screen.query_one("Line").value = text  # type: ignore[attr-defined]
    await it.press("enter")


async def told(it: Opened, words: str) -> None:
    """Wait for a message; each is one line."""
    await it.until(lambda: words in it.told(), f"{words!r} in {it.told()!r}")
    assert all("\n" not in notice.message for notice in it.app._notifications)
    assert "please report" not in it.told()
