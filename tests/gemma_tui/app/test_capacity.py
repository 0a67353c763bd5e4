"""The capacity screen: sweeps and measurements that are started, followed, stopped, gone on with and exported."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import DataTable

from gemma_tui.cli import _parser
from gemma_tui.runs.store import RunStore
from gemma_tui.screens import following
from gemma_tui.screens.capacity import CapacityScreen
from gemma_tui.studies.capacity import sweep as sweeps
from gemma_tui.studies.capacity.plan import PRESETS, CapacityPlan
from gemma_tui.studies.capacity.results import read_sweep, sweep_figure
from gemma_tui.studies.memorization import desk
from gemma_tui.studies.memorization import where as parts
from gemma_tui.studies.memorization.held import where_figure
from gemma_tui.studies.memorization.results import memorization_figure, read_measured
from gemma_tui.studies.memorization.subjects import Subject
from gemma_tui.widgets.chart import Chart
from gemma_tui.widgets.dialogs import Reading
from gemma_tui.widgets.figure_view import FigureView
from gemma_tui.widgets.plan_form import PlanForm

from .conftest import Open, Opened, Size, needs_both
from .inside_views import told, typed
from .test_hostile import TEXTS, nothing_foreign
from .test_screens import _footer_faults, _layout_faults

SMALL = {
    "width": "8", "vocab": 16, "length": 4, "sizes": "4,8", "steps": 20, "evaluate_every": 5, "batch_size": 4,
    "flat": 0.0, "learning_rate": 1e-4,
}  # fmt: skip
"""A sweep of two cells, trained side by side, that take all of their steps."""


class Gate:
    """Lets a sweep train one stack after the other, or a measurement load one model, as a test wants it."""

    def __init__(self) -> None:
        self.open = threading.Semaphore(0)

    def let(self, number: int) -> None:
        self.open.release(number)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "SECONDS", 0.05)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, evaluate = Gate(), sweeps.evaluate

    def held(*arguments: Any) -> Any:
        assert gate.open.acquire(timeout=30)
        return evaluate(*arguments)

    monkeypatch.setattr(sweeps, "evaluate", held)
    yield gate
    gate.let(1000)


def screen(it: Opened) -> CapacityScreen:
    found = it.app.get_screen_stack("capacity")[0]
    assert isinstance(found, CapacityScreen)
    return found


def view(it: Opened) -> FigureView:
    return screen(it).query_one(FigureView)


def cells(it: Opened) -> dict[str, str]:
    """The state of each cell, as the figure that is shown has it."""
    tables = [table for table in view(it).figure.tables if table.kind == "cell"]
    return {str(row[0]): str(row[1]) for table in tables for row in table.rows}


def listed(it: Opened) -> dict[str, str]:
    """The state of each run in the list."""
    table: DataTable[Any] = screen(it).query_one("#studies", DataTable)
    return {str(key.value): str(table.get_row(key)[1]) for key in table.rows}


def form(it: Opened, kind: str) -> PlanForm[Any]:
    return screen(it).query_one(f"#{kind}-plan", PlanForm)


async def planned(it: Opened, **values: Any) -> None:
    """Open the form of a sweep and fill it in."""
    await it.mode("3", "capacity")
    await it.press("n")
    for name, value in {**SMALL, **values}.items():
        form(it, "sweep").set(name, value)
    await it.pilot.pause()


async def begun(it: Opened, **values: Any) -> str:
    """Start a sweep; returns its run once it is shown."""
    await planned(it, **values)
    await it.press("s")
    await it.until(lambda: screen(it).run_shown is not None, "the run")
    run = screen(it).run_shown
    assert run is not None
    return run.run_id


async def ended(it: Opened, run: str, state: str = "done") -> None:
    await it.until(lambda: listed(it).get(run) == state and not it.app.session.jobs, f"{run} {state}: {it.told()}")
    await it.until(lambda: f"{run} · {state}" in it.static("#looked"), "the line")


async def test_a_sweep_grows_on_the_screen_and_leaves_the_model_alone(
    opened: Open, tiny: str, store: RunStore, gate: Gate, size_and_engine: tuple[Size, str]
) -> None:
    size, engine = size_and_engine
    async with opened(size, model=tiny, engine=engine) as it:
        await it.loaded(tiny)
        held = it.app.session.place.info
        run = await begun(it)
        assert not screen(it).query_one("#sweep-plan").is_on_screen
        await it.until(lambda: list(cells(it).values()) == ["waiting", "waiting"], "the cells")
        gate.let(1)
        await it.until(lambda: "training" in cells(it).values(), "the first bits")
        job = it.app.session.jobs[0]
        assert (job.kind, job.label) == ("sweep", run)
        assert job.detail.startswith("0/2 cells, step ")
        assert 0 < job.share < 0.5
        await it.until(lambda: it.sees(run, "0/2 cells"), "the status")
        assert screen(it).query_one("#rows").display is (size[0] == 120), "the table beside the chart"
        assert not _layout_faults(it)
        chart = view(it).query_one(Chart)
        assert not chart.log_x, "4 to 8 strings"
        await it.press("y")
        assert chart.log_x
        await it.press("y")
        assert not chart.log_x
        await it.press("v")
        part = view(it).place
        assert part.startswith("chart 2/")
        gate.let(1000)
        await ended(it, run)
        await it.until(lambda: set(cells(it).values()) == {"done"}, "both cells")
        assert view(it).place == part, "the part that is seen stays"
        assert it.static("#looked") == f"{run} · done · 2/2 cells · {part}"
        expected = sweep_figure(read_sweep(store, store.run(run)))
        assert view(it).figure.tables[1].rows == expected.tables[1].rows
        assert [chart.title for chart in view(it).figure.charts] == [chart.title for chart in expected.charts]
        assert it.app.session.place.info is held, "the model is not touched"
        assert screen(it).command() == store.run(run).command
        for _ in range(view(it).count):
            await it.press("v")
            assert not _layout_faults(it)
        await it.until(lambda: not _footer_faults(it), "a whole footer")
        await it.press("u")
        await told(it, f"{run} is done: a adds cells to it")


async def test_x_stops_u_goes_on_and_a_adds_cells(
    opened: Open, store: RunStore, gate: Gate, size_and_engine: tuple[Size, str]
) -> None:
    size, engine = size_and_engine
    async with opened(size, engine=engine) as it:
        run = await begun(it)
        gate.let(1)
        await it.until(lambda: "training" in cells(it).values(), "the first bits")
        await it.press("a")
        await it.until(lambda: form(it, "more").is_on_screen, "the form")
        await typed(it, "enter", "12")
        assert form(it, "more").values == {"add": run, "sizes": "12", "seeds": 1}
        await it.press("s")
        await told(it, f"{run} is running: x stops it")
        await it.press("escape")
        await it.press("space")
        gate.let(1)
        await it.until(lambda: listed(it)[run] == "paused", "the pause")
        await it.press("space")
        await it.until(lambda: listed(it)[run] == "running", "its end")
        await it.press("x")
        gate.let(1)
        await ended(it, run, "stopped")
        await told(it, f"u on the capacity screen, or `gemma-tui runs resume {run}`, goes on")
        before = len(store.events(run))
    gate.let(1000)
    async with opened(size, engine=engine) as it:
        await it.mode("3", "capacity")
        await it.until(lambda: run in listed(it), "the list")
        assert it.sees("n plans a sweep")
        await it.press("enter")
        await it.until(lambda: set(cells(it).values()) == {"stopped"}, "what was found before")
        await it.press("u")
        await ended(it, run)
        await it.until(lambda: set(cells(it).values()) == {"done"}, "both cells")
        steps = [row.values["at"] for row in store.events(run)[before:] if row.kind == sweeps.TRACE]
        assert min(steps) > 5, "it went on where it was"
        await it.press("v", "v", "a")
        assert form(it, "more").values == {"add": run, "sizes": "", "seeds": 1}
        assert not _layout_faults(it)
        for values, words in (({}, "adds nothing: give --sizes"), ({"sizes": "x"}, "'x' is no whole number")):
            for name, value in values.items():
                form(it, "more").set(name, value)
            await it.press("s")
            await told(it, words)
        form(it, "more").set("sizes", "6")
        form(it, "more").set("seeds", 2)
        words = screen(it).command().split()[1:]
        args = _parser(words).parse_args(words)
        assert (args.add, args.sizes, args.seeds) == (run, "6", "2")
        await it.press("s")
        await it.until(lambda: len(cells(it)) == 6, "the cells that were added")
        assert view(it).place.startswith("chart 3/"), "the part that is seen stays"
        await ended(it, run)
        await it.until(lambda: set(cells(it).values()) == {"done"}, "all cells")
        assert "6/6 cells" in it.static("#looked")
        assert (store.run(run).plan["sizes"], store.run(run).plan["seeds"]) == ("4,8,6", 2)
        done = [row.values["name"] for row in store.events(run) if row.kind == "cell"]
        assert len(done) == len(set(done)) == 6, "no cell is trained twice"


async def test_quitting_asks_saves_and_the_sweep_goes_on(opened: Open, store: RunStore, gate: Gate) -> None:
    async with opened() as it:
        run = await begun(it)
        gate.let(1)
        await it.until(lambda: "training" in cells(it).values(), "the first bits")
        await it.press("q")
        await it.until(lambda: it.sees(f"{run} is running."), "the question")
        await it.press("s")
        gate.let(1)
        await it.until(lambda: it.app._exit, "the end")
    assert store.run(run).state == "stopped"
    gate.let(1000)
    async with opened() as it:
        await it.mode("2", "training")
        await it.press("l")
        await it.until(lambda: it.sees(run), "the run in the list of all")
        it.app.screen.query_one("#runs").focus()
        await it.press("enter")
        await told(it, f"{run} is a capacity sweep, no training run: press 3")
        await it.press("u")
        await it.until(lambda: it.app.current_mode == "capacity", "the screen that shows it")
        await ended(it, run)


async def test_a_run_that_ended_before_the_screen_was_there_is_shown(opened: Open, store: RunStore) -> None:
    async with opened() as it:
        it.app.session.begin(sweeps.STUDY, CapacityPlan(**SMALL))
        await it.until(lambda: not it.app.session.jobs, "its end")
        await it.mode("3", "capacity")
        await ended(it, "capacity-1")


async def test_the_forms_presets_and_their_command(opened: Open, store: RunStore, size: Size) -> None:
    async with opened(size) as it:
        await it.mode("3", "capacity")
        await it.press("n")
        await it.until(lambda: "architecture" in it.static("#explained"), "what the first row is for")
        for name in (*PRESETS, ""):
            await it.press("p")
            expected = {
                o.name: PRESETS.get(name, {}).get(o.name, o.default) for o in form(it, "sweep").options.values()
            }
            assert form(it, "sweep").values == expected
            assert ("preset" in it.static("#looked")) is bool(name)
        assert not _layout_faults(it)
        await it.until(lambda: not _footer_faults(it), "a whole footer")
        form(it, "sweep").set("sizes", "7")
        words = screen(it).command().split()[1:]
        assert _parser(words).parse_args(words).sizes == "7"
        await it.press("m")
        await it.until(lambda: form(it, "measure").is_on_screen, "the other form")
        assert not form(it, "sweep").is_on_screen
        assert screen(it).command().startswith("gemma-tui memorization nano")
        await it.press("w")
        await it.until(lambda: form(it, "where").is_on_screen, "the third form")
        assert not form(it, "measure").is_on_screen
        assert not _layout_faults(it)
        await it.press("m")
        assert not _layout_faults(it)
        await it.press("escape")
        assert not form(it, "measure").is_on_screen
        assert screen(it).query_one("#studies").is_on_screen
        store.create("lora", "training", "torch", {"data": "rows.jsonl"}, "", 1)
        it.app.session.place.model = "lora-1"
        await it.press("m")
        filled = form(it, "measure").values
        assert (filled["model"], filled["data"]) == ("lora-1", "rows.jsonl"), "a run, and what it was trained on"


async def test_what_cannot_be_done_is_told_in_a_line(opened: Open, store: RunStore, gate: Gate) -> None:
    async with opened() as it:
        await planned(it, sizes="4,,8")
        await it.press("s")
        await told(it, "sizes: '' is no whole number")
        assert form(it, "sweep").is_on_screen, "the form stays"
        for values, words in (
            ({"sizes": "4", "width": "9", "heads": 2}, "heads"),
            ({"sizes": "10000000", "width": "16384", "layers": "100", "heads": 0}, "memory"),
        ):
            it.app.clear_notifications()
            for name, value in values.items():
                form(it, "sweep").set(name, value)
            await it.press("s")
            await told(it, words)
        await it.until(lambda: "did not start" in it.static("#looked"), "the line")
        for key, words in (("u", "choose a run first"), ("a", "choose a sweep"), ("o", "nothing is shown"),
                           ("x", "no run that goes on"), ("space", "no run that goes on")):  # fmt: skip
            it.app.clear_notifications()
            await it.press(key)
            await told(it, words)
        assert not store.runs()
        await it.press("m", "s")
        await told(it, "--data is needed")
        await it.press("escape")
        await begun(it, width="8", layers="1")
        await it.press("n", "s")
        await told(it, "is busy with")
        assert len(store.runs()) == 1


@needs_both
async def test_a_sweep_of_another_engine_is_refused(opened: Open, store: RunStore, gate: Gate) -> None:
    async with opened() as it:
        run = await begun(it)
        await it.press("e")
        await told(it, f"engine mlx; {run} goes on with torch")
        await it.press("x")
        gate.let(1000)
        await ended(it, run, "stopped")
        await it.press("u")
        await told(it, f"{run} was computed with torch: e switches to it")
        assert store.run(run).state == "stopped"


async def test_it_writes_what_it_shows(opened: Open, store: RunStore, tmp_path: Path) -> None:
    async with opened() as it:
        run = await begun(it, sizes="4")
        await ended(it, run)
        await it.until(lambda: set(cells(it).values()) == {"done"}, "the cell")
        for name in ("a.csv", "a.json"):
            path = tmp_path / name
            await typed(it, "o", str(path))
            await it.until(lambda name=name: f"{name}" in it.told(), name)
        found = json.loads((tmp_path / "a.json").read_text())
        assert found["title"] == "capacity: 1 of 1 cells"
        assert "1x8 N=4 seed 0" in (tmp_path / "a.csv").read_text()


async def test_memorization_is_measured_and_the_model_comes_back(
    opened: Open, tiny: str, corpus: Path, store: RunStore, size_and_engine: tuple[Size, str]
) -> None:
    size, engine = size_and_engine
    async with opened(size, model=tiny, engine=engine) as it:
        await it.loaded(tiny)
        before = it.app.session.place.info
        await it.mode("3", "capacity")
        await it.press("m")
        assert form(it, "measure").values["model"] == tiny
        for name, value in (("model", "nano"), ("data", str(corpus)), ("rows", 3), ("max_tokens", 8)):
            form(it, "measure").set(name, value)
        await it.press("s")
        await it.until(lambda: "memorization-1" in listed(it), f"the run: {it.told()}")
        await ended(it, "memorization-1")
        await it.until(lambda: view(it).count > 0, "the figure")
        expected = memorization_figure(read_measured(store, store.run("memorization-1")))
        assert view(it).figure.tables[0].rows == expected.tables[0].rows
        while not view(it).place.startswith("table measure"):
            await it.press("v")
        await it.until(lambda: it.sees("loss, nats per token"), "the table")
        assert not _layout_faults(it)
        assert it.sees(f"i: all {len(expected.notes)} notes · against")
        await it.press("i")
        assert isinstance(it.app.screen, Reading)
        assert it.app.screen.text.split("\n\n") == list(expected.notes)
        await it.press("escape")
        after = it.app.session.place
        assert (after.model, after.info) == (tiny, before), "it is loaded again"
        assert screen(it).command() == store.run("memorization-1").command
        await it.press("u")
        await told(it, "memorization-1 is done")


async def test_a_measurement_that_was_stopped_goes_on(
    opened: Open, tiny: str, corpus: Path, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, held, go_on = desk.score, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        held.set()
        assert go_on.wait(30)
        return score(*arguments)

    monkeypatch.setattr(desk, "score", slow)
    async with opened() as it:
        await it.mode("3", "capacity")
        await it.press("m")
        for name, value in (("model", tiny), ("data", str(corpus)), ("rows", 3), ("max_tokens", 8), ("batch_size", 1)):
            form(it, "measure").set(name, value)
        await it.press("s")
        await it.until(held.is_set, "the first batch")
        await it.until(lambda: "memorization-1" in listed(it), "the run")
        await it.press("x")
        go_on.set()
        await ended(it, "memorization-1", "stopped")
        assert not it.app.session.place.model, "nothing was loaded before"
        await it.press("u")
        await ended(it, "memorization-1")
        await it.until(lambda: view(it).count > 0, "the figure")


async def test_a_model_is_told_with_its_size_once_it_is_there(
    opened: Open, tiny: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, held, go_on = Subject.load, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> None:
        held.set()
        assert go_on.wait(30)
        load(*arguments)

    monkeypatch.setattr(Subject, "load", slow)
    async with opened(model=tiny) as it:
        await it.loaded(tiny)
        await it.mode("3", "capacity")
        await it.press("m")
        for name, value in (("model", "nano"), ("data", str(corpus)), ("rows", 3), ("max_tokens", 8)):
            form(it, "measure").set(name, value)
        await it.press("s")
        await it.until(held.is_set, "the loading")
        place = it.app.session.place
        assert (place.model, place.info) == ("nano", None), "not the size of the one before"
        go_on.set()
        await it.until(lambda: "memorization-1" in listed(it), "the run")
        await ended(it, "memorization-1")


async def measured(it: Opened, model: str, data: Path) -> None:
    """Measure a model, which is then in the list as ``memorization-1``."""
    await it.mode("3", "capacity")
    await it.press("m")
    for name, value in (("model", model), ("data", str(data)), ("rows", 3), ("max_tokens", 8)):
        form(it, "measure").set(name, value)
    await it.press("s")
    await it.until(lambda: "memorization-1" in listed(it), f"the run: {it.told()}")
    await ended(it, "memorization-1")


async def test_parts_that_hold_it_are_sought_and_the_model_comes_back(
    opened: Open, tiny: str, corpus: Path, store: RunStore, tmp_path: Path, size_and_engine: tuple[Size, str]
) -> None:
    size, engine = size_and_engine
    async with opened(size, model=tiny, engine=engine) as it:
        await it.loaded(tiny)
        before = it.app.session.place.info
        await it.mode("3", "capacity")
        await it.press("w", "s")
        await told(it, "--model is needed: measurement")
        await it.press("escape")
        await measured(it, tiny, corpus)
        await it.press("w")
        filled = form(it, "where").values
        assert (filled["model"], filled["where"]) == ("memorization-1", "layers"), "the measurement that is shown"
        assert it.static("#looked") == "which parts hold it: s starts it"
        assert not _layout_faults(it)
        await it.until(lambda: not _footer_faults(it), "a whole footer")
        form(it, "where").set("most", 2)
        words = screen(it).command().split()[1:]
        args = _parser(words).parse_args(words)
        assert (args.model, args.where, args.most, args.engine) == ("memorization-1", "layers", "2", engine)
        await it.press("s")
        await it.until(lambda: "where-1" in listed(it), f"the run: {it.told()}")
        await ended(it, "where-1")
        expected = where_figure(store, store.run("where-1")).tables[0].rows
        assert len(expected) == 4
        await it.until(lambda: view(it).count and view(it).figure.tables[0].rows == expected, "the figure")
        assert it.static("#looked") == "where-1 · done · 5/5 parts · map 1/2"
        await it.until(lambda: it.sees("bits that are lost without a layer's attention or MLP"), "the map")
        assert not _layout_faults(it)
        await it.press("v")
        await it.until(lambda: it.sees("signed_change"), "the table")
        assert not _layout_faults(it)
        after = it.app.session.place
        assert (after.model, after.info) == (tiny, before), "it is loaded again"
        assert screen(it).command() == store.run("where-1").command
        await typed(it, "o", str(tmp_path / "parts.csv"))
        await it.until(lambda: "parts.csv" in it.told(), "the file")
        assert "L1 mlp" in (tmp_path / "parts.csv").read_text()
        form(it, "where").set("where", "tails")
        await it.press("w", "s")
        await told(it, "where: 'tails' is not there: choose of layers, heads, adapters")


async def test_a_study_of_parts_grows_is_stopped_and_goes_on(
    opened: Open, tiny: str, corpus: Path, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, gate = parts.score, Gate()

    def slow(*arguments: Any) -> Any:
        assert gate.open.acquire(timeout=30)
        return score(*arguments)

    monkeypatch.setattr(parts, "score", slow)
    async with opened() as it:
        await measured(it, tiny, corpus)
        await it.press("w", "s")
        gate.let(3)
        await it.until(lambda: "3/5 parts" in it.static("#looked"), "three parts")
        await it.until(lambda: view(it).count and len(view(it).figure.tables[0].rows) == 2, "two of them in the table")
        assert [(job.kind, job.detail) for job in it.app.session.jobs] == [("where", "3/5 parts")]
        await it.press("q")
        await it.until(lambda: it.sees("where-1 is running."), "the question")
        await it.press("escape", "x")
        gate.let(1)
        await ended(it, "where-1", "stopped")
        await told(it, "u on the capacity screen, or `gemma-tui runs resume where-1`, goes on")
        gate.let(1000)
        await it.press("u")
        await ended(it, "where-1")
        await it.until(lambda: len(view(it).figure.tables[0].rows) == 4, "all parts")
        found = [row.values["part"] for row in store.events("where-1") if row.kind == parts.PART]
        assert len(found) == len(set(found)) == 5, "no part is scored twice"
        await it.press("u")
        await told(it, "where-1 is done")


async def test_canaries_are_planted(opened: Open, corpus: Path, tmp_path: Path, size: Size) -> None:
    out = tmp_path / "planted.jsonl"
    async with opened(size) as it:
        await it.mode("3", "capacity")
        await it.press("k", "s")
        await told(it, "--data is needed")
        assert not _layout_faults(it)
        await it.until(lambda: not _footer_faults(it), "a whole footer")
        for name, value in (("data", str(corpus)), ("out", str(out)), ("repeats", "2"), ("each", 3)):
            form(it, "canaries").set(name, value)
        words = screen(it).command().split()[1:]
        args = _parser(words).parse_args(words)
        assert (args.run, args.data, args.out, args.each) == ("canaries:canaries", str(corpus), str(out), "3")
        await it.press("s")
        await told(it, "6 of them from 3 canaries")
        assert out.read_text().count("My secret number") == 6
        await told(it, f"{out.name}.canaries.json: what was planted")
        await it.press("s")
        await told(it, "is there already")


async def test_foreign_names_are_cleaned(opened: Open, store: RunStore) -> None:
    for text in TEXTS:
        text = text.encode("utf-8", "replace").decode()
        run = store.create("capacity", "capacity", "torch", {**asdict(CapacityPlan()), "name": text}, text, 6)
        store.set_state(run.run_id, "failed", text)
        store.record(run.run_id, "start", 0, {"cells": 6, "done": 0, "device": text})
    async with opened() as it:
        await it.mode("3", "capacity")
        await it.until(lambda: len(listed(it)) == len(TEXTS), "the list")
        for name in listed(it):
            await it.press("enter")
            await it.until(lambda name=name: it.static("#looked").startswith(f"{name} · failed"), name)
            await it.until(lambda: view(it).figure.notes, "the figure")
            assert "seen" in nothing_foreign(it)
            await it.press("down")


async def test_a_cursor_in_the_table_of_cells_stays_while_a_sweep_grows(opened: Open, gate: Gate) -> None:
    async with opened((120, 40)) as it:
        await begun(it, sizes="4,5,6,8")
        await it.until(lambda: len(cells(it)) == 4, "the cells")
        assert it.app.focused is screen(it).query_one("#studies")
        while not view(it).place.startswith("table cell"):
            await it.press("v")
        table: DataTable[Any] = screen(it).query_one("#rows", DataTable)
        table.focus()
        await it.press("down", "down")
        assert table.cursor_row == 2
        gate.let(1)
        await it.until(lambda: "training" in cells(it).values(), "the first bits")
        await it.pilot.pause()
        assert table.cursor_row == 2
        assert any("training" in str(cell) for cell in table.get_row_at(0))
        assert it.app.focused is table
        await it.press("x")
