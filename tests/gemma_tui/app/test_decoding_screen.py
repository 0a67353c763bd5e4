"""Speed-quality curves and the roofline, behind the generation screen."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from samples import write_rows
from textual.widgets import DataTable, Input

from gemma_tui.cli import _parser
from gemma_tui.commands.plans import plan_from
from gemma_tui.runs.store import RunStore
from gemma_tui.screens.decoding import DecodingScreen
from gemma_tui.screens.followed_run import CURVE
from gemma_tui.screens.generation import GenerationScreen
from gemma_tui.studies.curve.plan import CurvePlan
from gemma_tui.studies.curve.results import curve_figure, read_curve
from gemma_tui.studies.pass_times import WIDTHS, RooflinePlan
from gemma_tui.widgets.figure_view import FigureView
from gemma_tui.widgets.plan_form import Field

from .conftest import Open, Opened, Size
from .test_screens import _layout_faults

SMALL = {"prefix": 4, "max_tokens": 6, "block": "4", "gamma": "0,7", "limit": 3}


def screen(it: Opened) -> DecodingScreen:
    found = it.app.screen
    assert isinstance(found, DecodingScreen)
    return found


def figure(it: Opened) -> FigureView:
    return screen(it).query_one(FigureView)


async def entered(it: Opened, model: str, key: str = "k") -> None:
    if model:
        await it.loaded(model)
    await it.mode("5", "generation")
    await it.press(key)
    await it.until(lambda: isinstance(it.app.screen, DecodingScreen) and it.app.screen.is_current, "the screen")
    await it.pilot.pause()


async def started(it: Opened, corpus: Path, **values: Any) -> str:
    """Start a curve from its form; returns its name once it is shown."""
    await it.press("n")
    form = screen(it)._form(CURVE)
    await it.until(lambda: form.row_count, "the form")
    for name, value in {**SMALL, "data": str(corpus / "valid.jsonl"), **values}.items():
        form.set(name, value)
    await it.press("s")
    await it.until(lambda: screen(it).run_shown, f"the run; {it.told()}")
    run = screen(it).run_shown
    assert run is not None
    return run.run_id


async def test_a_curve_is_started_by_keys_and_shown_as_it_is_kept(
    opened: Open, tiny: str, corpus: Path, size_and_engine: tuple[Size, str]
) -> None:
    size, engine_name = size_and_engine
    async with opened(size, model=tiny, engine=engine_name) as it:
        await entered(it, tiny)
        assert it.sees("no curve yet: n plans one")
        name = await started(it, corpus)
        await it.until(lambda: f"{name} · done · 3/3 rows" in it.static("#looked"), "its end")
        await it.until(lambda: figure(it).count == 4, "both charts and both tables")
        store = RunStore()
        kept = curve_figure(read_curve(store, store.run(name)))
        words = store.run(name).command
        store.close()
        await it.until(lambda: figure(it).figure.tables[0].rows == kept.tables[0].rows, "all rows")
        assert [row[0] for row in kept.tables[0].rows] == ["ar", "sbd-4-0", "sbd-4-7"]
        for title in ("against forward passes saved", "against speed"):
            await it.until(lambda title=title: it.sees(title), title)
            await it.press("v")
        await it.until(lambda: it.sees("table point"), "the points")
        await it.press("v")
        await it.until(lambda: it.sees("Llama-3.1-8B", "table paper"), "the paper's table")
        assert not _layout_faults(it)
        assert screen(it).command() == words
        assert it.app.session.place.model == tiny
        await it.press("escape")
        await it.until(lambda: isinstance(it.app.screen, GenerationScreen), "the texts")
        await it.press("k")
        await it.until(lambda: isinstance(it.app.screen, DecodingScreen) and figure(it).count == 4, "the newest curve")


async def test_a_curve_is_stopped_and_gone_on_with(opened: Open, tiny: str, corpus: Path) -> None:
    """Of so many rows that it is never at its end before it is stopped."""
    rows = write_rows(corpus / "many.jsonl", ["the quick brown fox jumps over the lazy dog"] * 3000)
    async with opened(model=tiny) as it:
        await entered(it, tiny)
        name = await started(it, corpus, data=str(rows), limit=0, max_tokens=60, prefix=2)
        await it.until(lambda: screen(it).run_shown and screen(it).run_shown.step, "the first rows")
        await it.press("x")
        await it.until(lambda: f"{name} · stopped" in it.static("#looked"), "the stop")
        form = screen(it)._form(CURVE)
        assert form.values["model"] == tiny
        await it.press("u")
        await it.until(lambda: screen(it).run_shown.state == "running", "that it goes on")
        await it.press("x")
        await it.until(lambda: f"{name} · stopped" in it.static("#looked"), "the stop")


async def test_what_cannot_begin_is_told(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened(model=tiny) as it:
        await entered(it, tiny)
        await it.press("n")
        form = screen(it)._form(CURVE)
        await it.until(lambda: str(form.get_cell("model", "value")) == tiny, "the loaded model, as it is drawn")
        await it.press("s")
        await it.until(lambda: "--data is needed" in it.told(), "what is missing")
        form.set("data", str(corpus / "valid.jsonl"))
        form.set("gamma", "0,-1")
        await it.press("s")
        await it.until(lambda: "gamma is '-1'" in it.told(), "what is wrong")
        form.set("gamma", "0")
        form.set("data", str(corpus / "none.jsonl"))
        await it.press("s")
        await it.until(lambda: "none.jsonl" in it.told(), "that it is not there")
        await it.until(lambda: "did not start" in it.static("#looked"), "the line")
        await it.press("x", "u", "o")
        assert not it.app.session.jobs


@pytest.mark.parametrize("key", ["c", "escape"])
async def test_the_command_of_a_form_says_the_same(opened: Open, tiny: str, corpus: Path, key: str) -> None:
    async with opened(model=tiny) as it:
        await entered(it, tiny)
        await it.press("n")
        form = screen(it)._form(CURVE)
        for name, value in {**SMALL, "data": str(corpus)}.items():
            form.set(name, value)
        words = shlex.split(screen(it).command())[1:]
        args = _parser(words).parse_args(words)
        assert plan_from(CurvePlan, args, {"model": args.model}, "generate") == form.build()
        await it.press("r")
        screen(it)._form("roofline").set("cached", 16)
        words = shlex.split(screen(it).command())[1:]
        args = _parser(words).parse_args(words)
        assert (args.model, plan_from(RooflinePlan, args, {}, "roofline").cached) == (tiny, 16)
        await it.press(key)
        assert isinstance(it.app.screen, DecodingScreen) is (key == "escape")


async def test_the_roofline_is_measured_and_shown_in_both_forms(
    opened: Open, tiny: str, size: Size, tmp_path: Path
) -> None:
    async with opened(size, model=tiny) as it:
        await entered(it, tiny, "l")
        form = screen(it)._form("roofline")
        await it.until(lambda: form.row_count, "the form")
        form.set("cached", 8)
        form.set("rounds", 1)
        await it.press("s")
        await it.until(lambda: not it.app.session.jobs and figure(it).count, f"the end; {it.told()}")
        await it.until(lambda: screen(it)._timing is None, "the last of it")
        times = screen(it)._times[0]
        assert set(times.fastest) == set(WIDTHS)
        rows = {row[0]: row for row in figure(it).figure.tables[0].rows}
        assert [rows[k][1] for k in WIDTHS] == [1000 * times.fastest[k] for k in WIDTHS]
        await it.until(lambda: it.sees("measured", "corrected", "printed", "roofline of the loaded model"), "the chart")
        assert not _layout_faults(it)
        await it.press("v")
        assert it.app.screen.query_one("#rows", DataTable).row_count == len(WIDTHS)
        await it.press("o")
        await it.until(lambda: isinstance(it.app.screen, Field), "the field")
        assert it.app.screen.query_one(Input).value == "roofline.html"


async def test_the_roofline_without_a_model_is_refused(opened: Open) -> None:
    async with opened() as it:
        await entered(it, "", "l")
        await it.press("s")
        await it.until(lambda: "no model is loaded" in it.told(), "the way to one")
