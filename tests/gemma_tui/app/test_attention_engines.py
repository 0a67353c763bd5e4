"""The attention screen beside other things: stops, the other engine, other models, sizes, colours and files."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from textual.widgets import DataTable

import gemma_tui.studies.attention.looking as looking
from engines.errors import UnsupportedError
from gemma_tui.figure import Figure
from gemma_tui.screens.attention import KEYS, AttentionScreen
from gemma_tui.studies.attention import parity
from gemma_tui.studies.attention.plan import AttentionPlan
from gemma_tui.studies.plan import honoured
from gemma_tui.widgets.dialogs import Reading
from gemma_tui.widgets.heatmap import HeatMap
from gemma_tui.widgets.plan_form import PlanForm

from .conftest import Open, needs_both
from .inside_views import board, looked, screen, shown, told, typed
from .test_screens import _layout_faults


async def test_x_breaks_off_and_the_later_of_two_views_wins(
    opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        await it.press("x")
        await told(it, "nothing is computed here")
        began, go_on = threading.Event(), threading.Event()

        def slow(*_: Any) -> Generator[float, None, Figure]:
            while True:
                yield 0.1
                began.set()
                go_on.wait(20)

        monkeypatch.setattr(looking, "ablation_scan", slow)
        await it.press("s")
        await it.until(began.is_set, "the scan")
        await it.press("x")
        go_on.set()
        await it.until(lambda: not it.app.session.jobs, "the end")
        assert board(it).plan.view == "heads"
        began.clear()
        go_on.clear()
        await it.press("s")
        await it.until(began.is_set, "the scan")
        await it.press("k", "l")
        go_on.set()
        await shown(it, "local-global")


async def test_quitting_during_a_scan(opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        began = threading.Event()

        def endless(*_: Any) -> Generator[float, None, Figure]:
            while True:
                began.set()
                yield 0.1
                threading.Event().wait(0.01)

        monkeypatch.setattr(looking, "ablation_scan", endless)
        await it.press("s")
        await it.until(began.is_set, "the scan")
        await it.press("q")
        await it.until(lambda: it.app._exit, "the end")
        assert not it.app.session.jobs


@needs_both
async def test_the_other_engine_looks_again_and_shows_the_same_numbers(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        first = board(it)
        await it.press("e")
        await it.until(lambda: board(it).engine == "mlx", "the other engine")
        await shown(it, "heads")
        assert "OF tiny ON" not in it.static("#looked")
        for name, values in first.figure.arrays.items():  # type: ignore[union-attr]
            assert np.allclose(values, board(it).figure.arrays[name], atol=1e-4, equal_nan=True), name  # type: ignore[union-attr]
        assert board(it).figure.facts["engine"] == "mlx"  # type: ignore[union-attr]


@needs_both
async def test_the_other_engine_is_the_other_side_of_differences(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        screen(it).query_one(PlanForm).set("other_engine", "mlx")
        for _ in range(2):
            await it.press("d")
            await shown(it, "differences", other_engine="mlx")
            figure = board(it).figure
            assert figure is not None
            assert figure.heats[0].values.max() < 2e-3
            await it.press("g")
            await shown(it, "heads")


@needs_both
async def test_until_then_it_says_whose_numbers_are_seen(
    opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        monkeypatch.setattr(it.app.session, "load", lambda name: None)
        await it.press("e")
        await it.until(lambda: "OF tiny ON torch" in it.static("#looked"), "whose it is")
        await it.press("k")
        await told(it, "no model is loaded")


@needs_both
async def test_a_switch_during_a_scan_takes_the_model_along(
    opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        began = threading.Event()

        def endless(*_: Any) -> Generator[float, None, Figure]:
            while True:
                began.set()
                yield 0.1

        with monkeypatch.context() as patched:
            patched.setattr(looking, "ablation_scan", endless)
            await it.press("s")
            await it.until(began.is_set, "the scan")
            await it.press("g")
            await shown(it, "heads")
            began.clear()
            await it.press("s")
            await it.until(began.is_set, "the scan")
        await it.press("e")
        await it.until(lambda: board(it).engine == "mlx", "the other engine")
        await shown(it, "scan")


async def test_another_model_is_looked_at_when_the_screen_comes_back(opened: Open, tiny: str, home: Path) -> None:
    (home / "models" / "other").symlink_to(home / "models" / tiny)
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        await it.mode("1", "models")
        it.app.load("other")
        await it.loaded("other")
        await it.mode("4", "attention")
        await it.until(lambda: board(it).model == "other", "the other model")


async def test_no_model_is_told_in_a_line(opened: Open) -> None:
    async with opened() as it:
        await it.mode("4", "attention")
        await it.until(lambda: it.sees("no model is loaded"), "what to do")
        for key, *_ in KEYS:
            await it.press(key)
            if not isinstance(it.app.screen, AttentionScreen):
                await it.press("escape")
            it.app.clear_notifications()
        await it.press("g", "slash", "5", "enter", "o")
        await told(it, "no model is loaded: press 1")
        await told(it, "nothing is shown yet")
        assert not _layout_faults(it)


async def test_resizing(opened: Open, tiny: str) -> None:
    async with opened((120, 40), model=tiny) as it:
        await looked(it, tiny)
        rows = screen(it).query_one("#rows", DataTable)
        for size in ((80, 24), (40, 12), (1, 1), (80, 24)):
            await it.pilot.resize_terminal(*size)
            await it.until(lambda size=size: it.app.screen.size == size, "the size")
            it.rows()
        await it.until(lambda: not rows.display, "the map alone")
        await it.press("k")
        await shown(it, "sinks")
        await it.pilot.resize_terminal(120, 40)
        await it.until(lambda: rows.display and rows.row_count == len(board(it).figure.tables[0].rows), "the table")  # type: ignore[union-attr]
        columns = [str(column.label) for column in rows.columns.values()]
        assert columns == list(board(it).figure.tables[0].columns)  # type: ignore[union-attr]
        assert not _layout_faults(it)


async def test_the_view_is_written_to_a_file(opened: Open, tiny: str, tmp_path: Path) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        for name, words in (
            ("page.html", "written"), ("a.json", "written"), ("none/a.html", "is not there"), ("a.txt", "no ending"),
            (".", ""),
        ):  # fmt: skip
            await typed(it, "o", str(tmp_path / name))
            await told(it, words)
        assert "<html" in (tmp_path / "page.html").read_text()
        assert json.loads((tmp_path / "a.json").read_text())


async def test_without_colour_nothing_but_text_tells_the_values(
    opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("1", ""):
        monkeypatch.setenv("NO_COLOR", value) if value else monkeypatch.delenv("NO_COLOR")
        async with opened(model=tiny) as it:
            await looked(it, tiny)
            map_ = screen(it).query_one(HeatMap)
            tints = set()
            for strip in map_.render_lines(map_.size.region):
                tints |= {
                    s.style.bgcolor.triplet for s in strip if s.style and s.style.bgcolor and s.style.bgcolor.triplet
                }
            assert any(len(set(tint)) > 1 for tint in tints) is not it.app.no_color
            ramp = any(sign in "".join(it.rows()[6:9]) for sign in "▁▂▃▄▅▆▇█")
            assert ramp is it.app.no_color


async def test_the_check_is_a_key_and_its_result_stays(
    opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        expected = [np.zeros((2, 168, 168), np.float32)] * 2
        monkeypatch.setattr(parity, "eager_attention", lambda folder, tokens: (e[:, :16, :16] for e in expected))
        monkeypatch.setattr(parity, "BEYOND", 8)
        await it.press("u")
        await shown(it, "check")
        assert it.sees("weights checked against", "max |Δ| 1.0e+00 on T = 16")
        await it.press("k")
        await shown(it, "sinks")
        assert it.sees("weights checked against")

        def missing(*_: Any) -> Any:
            raise UnsupportedError("the check needs transformers")

        monkeypatch.setattr(parity, "eager_attention", missing)
        await it.press("u")
        await told(it, "the check needs transformers")


async def test_help_says_what_every_key_does(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        await it.press("question_mark")
        assert isinstance(it.app.screen, Reading)
        for _, _, _, _, meaning in KEYS:
            assert meaning in it.app.screen.text


def test_a_plan_has_only_what_its_view_takes() -> None:
    plan = AttentionPlan(view="heads", ablate="L0.H1", layer=1, where="local")
    assert honoured(plan) == AttentionPlan(where="local")
