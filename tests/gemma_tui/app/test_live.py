"""Nothing holds up the screen: keys are answered while an engine computes."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engines.torch.engine import TorchEngine
from gemma_tui.app import SWITCH_INTERVAL
from gemma_tui.screens.training import WATCH_SECONDS
from gemma_tui.widgets.chart import Chart

from .conftest import Open

LONG = 1_000_000
GAP = 0.05
"""Seconds of computing on the event loop; what takes longer is felt."""


@dataclass
class Gaps:
    """How long the event loop was away between two ticks, sorted: by the clock, and computing itself.

    The clock also counts what other processes of this machine take, so only its median and its worst say much.
    """

    clock: list[float]
    computing: list[float]

    @property
    def p95(self) -> float:
        return self.computing[int(0.95 * len(self.computing))]


async def gaps(seconds: float) -> Gaps:
    tick, clock, computing, end = 0.005, [], [], time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        computed = time.thread_time()
        await asyncio.sleep(tick)
        clock.append(time.monotonic() - began - tick)
        computing.append(time.thread_time() - computed)
    return Gaps(sorted(clock), sorted(computing))


@pytest.fixture
def quick_switches() -> Any:
    """As the program itself sets it, and without what other tests left: collecting that would hold up the loop."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("quick_switches")
async def test_the_event_loop_goes_on_while_a_run_trains(
    opened: Open, tiny: str, corpus: Path, engine_name: str
) -> None:
    async with opened((120, 40), engine=engine_name) as it:
        await it.started(tiny, corpus, steps=LONG)
        found = await gaps(2.0)
        print(f"p95 {found.p95:.3f} s, longest {found.computing[-1]:.3f} s, by the clock {found.clock[-1]:.3f} s")
        assert found.p95 < GAP
        assert found.clock[len(found.clock) // 2] < GAP
        assert found.clock[-1] < 10 * GAP
        assert it.app.session.jobs, "it was training all the time"


@pytest.mark.usefixtures("quick_switches")
async def test_a_job_that_only_computes_in_python_does_not_hold_up_keys(opened: Open) -> None:
    ended = threading.Event()

    def hog(engine: object) -> None:
        while not ended.is_set():
            sum(range(1000))

    async with opened() as it:
        it.app.session.place.thread.submit(hog)
        try:
            found = await gaps(1.0)
            assert found.clock[len(found.clock) // 2] < GAP
            began = time.monotonic()
            await it.mode("3", "capacity")
            assert time.monotonic() - began < 2
        finally:
            ended.set()


async def test_the_charts_are_drawn_one_at_a_time(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened() as it:
        await it.started(tiny, corpus, steps=LONG)
        shown = [chart for chart in it.app.screen.query(Chart) if chart.display]
        await it.until(lambda: all(chart.series for chart in shown), "points in all charts")
        drawn: list[str] = []
        for chart in shown:
            redraw = chart.redraw

            def counted(chart: Chart = chart, redraw: Any = redraw) -> None:
                drawn.append(str(chart.id))
                redraw()

            chart.redraw = counted  # type: ignore[method-assign]
        began = time.monotonic()
        await it.until(lambda: len(set(drawn)) == len(shown), "a turn for each chart")
        assert len(drawn) <= (time.monotonic() - began) / WATCH_SECONDS + 2


async def test_a_job_that_never_looks_at_its_stop_sign_does_not_keep_the_app(
    opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(TorchEngine, "load", lambda *a: release.wait(30))
    async with opened() as it:
        it.app.load(tiny)
        await it.until(lambda: it.app.session.jobs, "the job")
        try:
            began = time.monotonic()
            await it.press("q")
            while not it.app._exit:
                assert time.monotonic() - began < 10
                await asyncio.sleep(0.01)
            assert time.monotonic() - began < 2.1
        finally:
            release.set()


STUBBORN = """
import sys, time
from gemma_tui import app
from gemma_tui.session import Job
make, mount = app.GemmaTui.__init__, app.GemmaTui.on_mount
def work(engine, job):
    while True:
        time.sleep(0.01)
def on_mount(self):
    mount(self)
    self.set_timer(0.1, lambda: self.session._start(Job("load", "never ending", "torch"), work))
app.GemmaTui.__init__ = lambda self: make(self, model="", engine="torch")
app.GemmaTui.on_mount = on_mount
sys.exit(app.run())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_the_program_leaves_within_two_seconds_whatever_its_engine_does() -> None:
    from .terminal import Terminal

    it = Terminal(program=STUBBORN)
    try:
        it.until("never ending")
        began = time.monotonic()
        it.press("q")
        assert it.ended(10) == 0
        assert time.monotonic() - began < 4, "2 s, and what a busy machine needs to end a program"
    finally:
        it.close()


def test_without_a_terminal_it_says_so_and_does_not_hang() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gemma_tui"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert "needs a terminal" in done.stderr
