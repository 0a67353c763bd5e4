"""The app under a pilot: opened on a tiny model, waited for by conditions, never by fixed sleeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import textual.app
import textual.pilot
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from engines import ENGINES, available_engines
from gemma_tui.app import GemmaTui
from gemma_tui.screens.models import ModelTable
from gemma_tui.widgets.plan_form import PlanForm

SECONDS = 30.0
"""Longer than anything here takes, even on a machine that is busy with something else."""

SIZES = ((80, 24), (120, 40))
SMALL_PLAN = {
    "batch_size": 2,
    "sequence_length": 16,
    "rank": 2,
    "evaluate_every": 2,
    "evaluate_batches": 1,
    "learning_rate": 1e-2,
    "warmup": 0,
}

Size = tuple[int, int]

needs_both = pytest.mark.skipif(len(available_engines()) < 2, reason="MLX is not to be had on this platform")


class Opened:
    """A running app and what a test does with it."""

    def __init__(self, app: GemmaTui, pilot: Pilot[None]) -> None:
        self.app = app
        self.pilot = pilot

    async def until(self, condition: Callable[[], object], what: str = "") -> None:
        """Wait for a condition, as long as the app lives and for a bounded time."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            if (fault := self.app._exception) is not None:
                raise fault
            assert time.monotonic() < deadline, f"{what or 'it'} never happened; the screen:\n{self.text()}"
            await self.pilot.pause(0.02)

    async def press(self, *keys: str) -> None:
        """Press keys and let the app take them."""
        await self.pilot.press(*keys)
        await self.pilot.pause(0.02)

    async def mode(self, key: str, name: str) -> None:
        """Go to a screen."""
        await self.press(key)
        await self.until(lambda: self.app.current_mode == name and self.app.screen.is_current, name)
        await self.pilot.pause()

    def rows(self) -> list[str]:
        """The lines on the screen as they are seen."""
        return [strip.text for strip in self.app.screen._compositor.render_strips()]

    def text(self) -> str:
        """The whole screen."""
        return "\n".join(self.rows())

    def sees(self, *words: str) -> bool:
        """Whether all of these stand on the screen, wherever lines break."""
        shown = " ".join(self.text().split())
        return all(word in shown for word in words)

    def told(self) -> str:
        """What the messages said."""
        return "\n".join(notice.message for notice in self.app._notifications)

    def static(self, selector: str) -> str:
        """The content of a static widget."""
        return str(self.app.screen.query_one(selector, Static).content)

    async def loaded(self, name: str) -> None:
        """Wait until a model is loaded and nothing runs."""
        session = self.app.session
        await self.until(lambda: session.place.model == name and not session.jobs, f"{name} loaded")

    async def table(self) -> DataTable[Any]:
        """The list of models, once it is filled."""
        await self.until(lambda: self.app.screen.query_one(ModelTable).row_count, "the list of models")
        return self.app.screen.query_one(ModelTable)

    async def plan(self, model: str, data: Path | str, **values: Any) -> PlanForm[Any]:
        """Go to the training screen and fill in its form."""
        await self.mode("2", "training")
        form = self.app.screen.query_one(PlanForm)
        await self.until(lambda: form.row_count, "the form")
        for name, value in {**SMALL_PLAN, "model": model, "data": str(data), **values}.items():
            form.set(name, value)
        await self.pilot.pause()
        return form

    async def started(self, model: str, data: Path | str, **values: Any) -> str:
        """Start a run; returns its name once it takes steps."""
        await self.plan(model, data, **values)
        await self.press("s")
        jobs = self.app.session.jobs
        assert jobs, self.told()
        await self.until(lambda: jobs[0].run and jobs[0].share > 0, "the first step")
        return jobs[0].run


Open = Callable[..., AbstractAsyncContextManager[Opened]]


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def size(request: pytest.FixtureRequest) -> Size:
    """A small and a large terminal in turn."""
    return request.param


@pytest.fixture(params=ENGINES)
def engine_name(request: pytest.FixtureRequest) -> str:
    """Each engine in turn."""
    if request.param not in available_engines():
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture(params=list(zip(SIZES, ENGINES, strict=True)), ids=lambda pair: f"{pair[1]}-{pair[0][0]}x{pair[0][1]}")
def size_and_engine(request: pytest.FixtureRequest) -> tuple[Size, str]:
    """Each size and each engine once, where all pairs would take long."""
    if request.param[1] not in available_engines():
        pytest.skip(f"{request.param[1]} is not installed")
    return request.param


@pytest.fixture
def opened() -> Iterator[Open]:
    """``async with opened(size=, model=, engine=) as it``: the app, closed with all its threads."""
    apps: list[GemmaTui] = []

    @asynccontextmanager
    async def start(size: Size = (80, 24), model: str = "", engine: str = "torch") -> AsyncIterator[Opened]:
        app = GemmaTui(model=model, engine=engine)
        apps.append(app)
        async with app.run_test(size=size, notifications=True) as pilot:
            it = Opened(app, pilot)
            await it.until(lambda: app.screen.is_current and app.current_mode == "models", "the first frame")
            await pilot.pause()
            yield it

    yield start
    for app in apps:
        app.session.stop()
        for place in app.session._places.values():
            place.thread.close()
            # A thread left inside torch aborts the interpreter at its end.
            place.thread._thread.join(SECONDS)


@pytest.fixture(autouse=True)
def no_wait_for_an_idle_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pilot waits until the process is idle, up to a second per key; with a thread that trains it never is."""

    async def briefly(min_sleep: float = 0.0, max_sleep: float = 1.0) -> None:
        await asyncio.sleep(0.01)

    monkeypatch.setattr(textual.pilot, "wait_for_idle", briefly)
    monkeypatch.setattr(textual.app, "wait_for_idle", briefly)
