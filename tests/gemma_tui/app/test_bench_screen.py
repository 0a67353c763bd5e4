"""Benchmarks, from the list of models."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.errors import UnsupportedError
from gemma_tui.cli import _parser
from gemma_tui.commands.plans import plan_from
from gemma_tui.runs.store import RunStore
from gemma_tui.screens.bench import BenchScreen
from gemma_tui.screens.models import ModelsScreen
from gemma_tui.studies.bench import measuring
from gemma_tui.studies.bench.plan import BenchPlan
from gemma_tui.studies.bench.results import read_bench
from gemma_tui.studies.events import Event
from gemma_tui.widgets.figure_view import FigureView
from gemma_tui.widgets.plan_form import PlanForm

from .conftest import Open, Opened, Size
from .test_models import choose
from .test_screens import _footer_faults, _layout_faults

SMALL = {
    "engines": "torch", "dtypes": "float32", "batches": "1,2", "prompt": 8, "new_tokens": 2, "repeats": 2,
    "sequence_length": 64,
}  # fmt: skip


async def entered(it: Opened, model: str) -> BenchScreen:
    await choose(it, model)
    await it.press("b")
    await it.until(lambda: isinstance(it.app.screen, BenchScreen) and it.app.screen.is_current, "the screen")
    await it.pilot.pause()
    screen = it.app.screen
    assert isinstance(screen, BenchScreen)
    return screen


async def started(it: Opened, screen: BenchScreen, **values: Any) -> str:
    """Start a benchmark from its form; returns its name once it is shown."""
    await it.press("n")
    form = screen.query_one(PlanForm)
    await it.until(lambda: it.sees(f"model {form.values['model']}", "engines (all that are here)"), "the form")
    for name, value in {**SMALL, **values}.items():
        form.set(name, value)
    await it.press("s")
    await it.until(lambda: screen.run_shown, f"the run; {it.told()}")
    assert screen.run_shown is not None
    return screen.run_shown.run_id


async def test_a_benchmark_is_planned_by_keys_and_shown_as_it_is_kept(opened: Open, tiny: str, size: Size) -> None:
    async with opened(size) as it:
        screen = await entered(it, tiny)
        assert it.sees("no benchmark of tiny yet: n plans one")
        name = await started(it, screen, method="none")
        await it.until(lambda: f"{name} · done · 2/2 cells" in it.static("#looked"), "its end")
        figure = screen.query_one(FigureView)
        await it.until(lambda: figure.count == 4, "both charts and both tables")
        store = RunStore()
        kept = read_bench(store, store.run(name))
        words = store.run(name).command
        store.close()
        assert [table.rows for table in figure.figure.tables] == [table.rows for table in kept.tables]
        assert [row[:3] for row in kept.tables[0].rows] == [("torch", "float32", 1), ("torch", "float32", 2)]
        for seen in ("chart 2/4", "table prefill", "table decode"):
            await it.press("v")
            await it.until(lambda seen=seen: it.sees(seen), seen)
        assert not _layout_faults(it)
        await it.until(lambda: not _footer_faults(it), "a whole footer")
        assert screen.command() == words
        await it.press("escape")
        await it.until(lambda: isinstance(it.app.screen, ModelsScreen), "the models")
        again = await entered(it, tiny)
        await it.until(lambda: again.query_one(FigureView).count == 4, "the newest benchmark")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Lets a benchmark end one cell after the other, as a test wants it."""
    gate, wait = threading.Semaphore(0), measuring._wait

    def held(*arguments: Any) -> Iterator[Event]:
        yield from wait(*arguments)
        assert gate.acquire(timeout=30)

    monkeypatch.setattr(measuring, "_wait", held)
    yield gate
    gate.release(100)


async def test_what_is_measured_is_kept_when_it_is_stopped_and_not_measured_again(
    opened: Open, tiny: str, gate: threading.Semaphore
) -> None:
    async with opened() as it:
        screen = await entered(it, tiny)
        name = await started(it, screen, batches="1,2,3", method="none")
        job = it.app.session.jobs[0]
        gate.release()
        await it.until(lambda: screen.query_one(FigureView).figure.tables, "the first cell")
        await it.press("x")
        await it.until(job.control.stop.is_set, "the wish to stop")
        gate.release(100)
        await it.until(lambda: f"{name} · stopped" in it.static("#looked"), "that it stopped")
        store = RunStore()
        run, before = store.run(name), store.events(name)
        assert (run.step, run.steps) == (1, 3)
        await it.press("u")
        await it.until(lambda: f"{name} · done · 3/3 cells" in it.static("#looked"), "its end")
        cells = [event for event in store.events(name) if event.kind == "cell"]
        store.close()
        assert [event.step for event in cells] == [1, 2, 3]
        assert cells[:1] == [event for event in before if event.kind == "cell"]
        await it.press("u")
        await it.until(lambda: f"{name} is done" in it.told(), "that nothing is left")


async def test_the_command_of_the_form_says_the_same(opened: Open, tiny: str) -> None:
    async with opened() as it:
        screen = await entered(it, tiny)
        await it.press("n")
        form = screen.query_one(PlanForm)
        for name, value in SMALL.items():
            form.set(name, value)
        words = shlex.split(screen.command())[1:]
        args = _parser(words).parse_args(words)
        assert plan_from(BenchPlan, args, {}, "bench") == form.build()
        form.set("batches", "none")
        await it.press("s")
        await it.until(lambda: "batches is 'none'" in it.told(), "what is wrong")
        assert not it.app.session.jobs


async def test_nothing_is_measured_beside_something_else(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened() as it:
        run = await it.started(tiny, corpus, steps=100_000)
        await it.mode("1", "models")
        await entered(it, tiny)
        await it.press("n", "s")
        await it.until(lambda: f"{run} runs, and a benchmark wants the machine to itself" in it.told(), "the refusal")


async def test_nothing_begins_beside_a_benchmark(opened: Open, tiny: str, gate: threading.Semaphore) -> None:
    async with opened() as it:
        screen = await entered(it, tiny)
        await started(it, screen, batches="1", method="none")
        session = it.app.session
        session.engine = "mlx" if session.engine == "torch" else "torch"
        with pytest.raises(UnsupportedError, match="a benchmark wants the machine to itself"):
            session.load(tiny)
        gate.release(100)
        await it.until(lambda: all(job.future.done() for job in session.jobs), "its end")
        await it.until(session.load(tiny).future.done, "the model on the other engine")
