"""The attention screen: every key, what is typed, and what goes wrong."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from textual.widgets import DataTable, Static

import gemma_tui.studies.attention.looking as looking
from engines import available_engines
from engines.errors import UnsupportedError
from gemma_tui.cli import _parser
from gemma_tui.commands.attention import plan_of
from gemma_tui.figure import Figure
from gemma_tui.screens.attention import KEYS, AttentionScreen
from gemma_tui.studies.attention import parity
from gemma_tui.studies.attention.looking import Board
from gemma_tui.studies.attention.plan import AttentionPlan
from gemma_tui.studies.plan import honoured
from gemma_tui.widgets.dialogs import Reading
from gemma_tui.widgets.figure_view import FigureView
from gemma_tui.widgets.heatmap import HeatMap
from gemma_tui.widgets.pair_map import PairMap
from gemma_tui.widgets.plan_form import Field, PlanForm

from .conftest import Open, Opened, Size
from .test_hostile import TEXTS, nothing_foreign
from .test_screens import _footer_faults, _layout_faults

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


async def test_it_opens_on_the_loaded_model_and_shows_all_heads(opened: Open, tiny: str, size: Size) -> None:
    async with opened(size, model=tiny) as it:
        await looked(it, tiny)
        assert it.sees("heads by entropy", "weights not checked", "H0 a H1 a", "L0 ·", "L1 G", "q Quit", "? Help")
        assert board(it).local == [True, False]
        assert screen(it).query_one("#rows").display is (size[0] == 120)
        await it.until(lambda: not _footer_faults(it), f"a whole footer, not {_footer_faults(it)}")
        assert not _layout_faults(it)


async def test_it_waits_for_a_model_that_is_loading(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await it.mode("4", "attention")
        await shown(it, "heads")


async def test_every_key_does_what_it_says(opened: Open, tiny: str, size: Size) -> None:
    async with opened(size, model=tiny) as it:
        await looked(it, tiny)
        for key, view in (
            ("l", "local-global"), ("k", "sinks"), ("n", "lens"), ("a", "attribution"), ("t", "types"), ("s", "scan"),
            ("g", "heads"),
        ):  # fmt: skip
            await it.press(key)
            await shown(it, view)
            assert part(it).split()[-1] == f"1/{screen(it).query_one(FigureView).count}"
            assert not _layout_faults(it)
        await it.press("down", "right", "h")
        await shown(it, "head", layer=1, head=1)
        assert it.sees("L1.H1, global")
        await it.press("right_square_bracket")
        await shown(it, "head", layer=0, head=0)
        await it.press("left_square_bracket")
        await shown(it, "head", layer=1, head=1)
        await it.press("right_curly_bracket")
        await shown(it, "head", layer=0, head=1)
        await it.press("left_curly_bracket")
        await shown(it, "head", layer=1, head=1)
        await it.press("b")
        await shown(it, "ablation", ablate="L1.H1")
        await it.press("m")
        await shown(it, "heads", metric="entropy")
        await it.press("m")
        await shown(it, "heads", metric="entropy_normalised")
        before = part(it)
        await it.press("v")
        assert part(it) != before
        await typed(it, "f", "global and sink >= 0")
        await shown(it, "heads", where="global and sink >= 0")
        assert np.isnan(board(it).figure.heats[0].values[0]).all()  # type: ignore[union-attr]
        await typed(it, "i", SHORT)
        await shown(it, "heads", text=SHORT)
        assert it.sees(f"{len(board(it).labels)} tokens", SHORT)


async def test_enter_opens_the_head_of_a_cell_and_of_a_row(opened: Open, tiny: str) -> None:
    async with opened((120, 40), model=tiny) as it:
        await looked(it, tiny)
        assert isinstance(it.app.focused, HeatMap)
        await it.press("down", "enter")
        await shown(it, "head", layer=1, head=0)
        assert isinstance(it.app.focused, PairMap)
        await it.press("g")
        await shown(it, "heads")
        rows = board(it).figure.tables[0].rows  # type: ignore[union-attr]
        await it.press("v", "down", "enter")
        layer, head = int(rows[1][0][1]), int(rows[1][0][4])
        await shown(it, "head", layer=layer, head=head)


async def test_views_of_two_texts_ask_for_the_second(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        await typed(it, "i", SHORT)
        await shown(it, "heads", text=SHORT)
        await typed(it, "w", "The cats sleep on.")
        await told(it, "tokens")  # the other text has another number of them
        await it.press("i")
        await it.press("escape")
        screen(it).query_one(PlanForm).set("other_text", "The dogs on sleep.")
        await it.press("w")
        await shown(it, "patching", other_text="The dogs on sleep.")
        await it.press("d")
        await shown(it, "differences")
        assert it.sees("other text")
        screen(it).query_one(PlanForm).set("other_text", "")
        await typed(it, "d", "The dogs on sleep.")
        await shown(it, "differences", other_text="The dogs on sleep.")


async def test_a_second_dtype_leaves_the_model_as_it_was(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        before = board(it).figure.arrays["entropy"]  # type: ignore[union-attr]
        screen(it).query_one(PlanForm).set("other_dtype", "bfloat16")
        await it.press("d")
        await shown(it, "differences", other_dtype="bfloat16")
        await it.press("g")
        await shown(it, "heads")
        assert np.array_equal(before, board(it).figure.arrays["entropy"])  # type: ignore[union-attr]


async def test_c_shows_the_command_of_the_view(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        await typed(it, "i", SHORT)
        await it.press("b")
        await shown(it, "ablation", text=SHORT)
        await it.press("right_square_bracket")
        await shown(it, "head", head=1)
        screen(it).query_one(PlanForm).set("gamma", 0.5)
        screen(it).query_one(PlanForm).set("other_text", "The dogs on sleep.")
        for key, view in (
            ("h", "head"),
            ("g", "heads"),
            ("n", "lens"),
            ("b", "ablation"),
            ("s", "scan"),
            ("d", "differences"),
        ):
            await it.press(key)
            await shown(it, view)
            await it.press("c")
            assert isinstance(it.app.screen, Reading)
            first, *words = shlex.split(it.app.clipboard)
            assert first == "gemma-tui"
            args = _parser(words).parse_args(words)
            assert (args.model, args.engine) == (tiny, "torch")
            assert plan_of(args) == board(it).plan
            await it.press("escape")


async def test_slash_jumps(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        await typed(it, "slash", "L1.H1")
        await shown(it, "head", layer=1, head=1)
        await typed(it, "slash", "l0")
        await shown(it, "head", layer=0, head=1)
        pairs = screen(it).query_one(PairMap)
        await typed(it, "slash", "12")
        await it.until(lambda: pairs.row == 12, "the position")
        wanted = next(i for i in range(13, len(board(it).labels)) if "o" in board(it).labels[i].casefold())
        await typed(it, "slash", "O")
        await it.until(lambda: pairs.row == wanted, "the next token with it")
        await it.press("g")
        await shown(it, "heads")
        await typed(it, "slash", "5")
        await shown(it, "head")
        await it.until(lambda: pairs.row == 5, "the position in the head")
        await it.press("n")
        await shown(it, "lens")
        await typed(it, "slash", "7")
        await shown(it, "lens", position="7")


async def test_a_jump_to_what_is_not_there_is_told_and_changes_nothing(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        for text, words in (
            ("L2.H0", "L2.H0 is not there: the heads are L0.H0 to L1.H1"),
            ("L0.H9", "L0.H9 is not there"),
            ("L77", "L77.H0 is not there"),
            ("zebra\x1b[2J", "'zebra␛[2J' is not in the text"),
            ("9" * 5000, "'999"),
            ("1234", "'1234' is not in the text"),
        ):
            await typed(it, "slash", text)
            await told(it, words)
        await typed(it, "slash", "  ")
        await it.press("h")
        await shown(it, "head", layer=0, head=0)


async def test_what_is_typed_wrongly_is_told_and_can_be_mended(opened: Open, tiny: str, tmp_path: Path) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        for key, text, words in (
            ("f", "sink >", "filter 'sink >' cannot be read"),
            ("f", "__import__('os')", "filter \"__import__('os')\" cannot be read"),
            ("f", "", ""),
            ("i", "", "the text is empty"),
            ("i", "long text " * 400, "256"),
        ):
            await typed(it, key, text)
            if words:
                await told(it, words)
            assert it.sees("heads by entropy")
        await typed(it, "i", SHORT)
        await shown(it, "heads", text=SHORT)
        file = tmp_path / "a.txt"
        file.write_text("Dogs.")
        form = screen(it).query_one(PlanForm)
        form.set("text_file", str(file))
        await it.press("g")
        await told(it, "not both")
        form.set("text", form.options["text"].default)
        await it.press("g")
        await shown(it, "heads", text_file=str(file))
        assert "a.txt" in it.static("#looked")
        await typed(it, "i", SHORT)
        await shown(it, "heads", text=SHORT, text_file="")


async def test_the_plan_opens_and_closes_with_one_key_and_wrong_values_are_told(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        await it.press("h")
        await shown(it, "head")
        await it.press("p")
        form = screen(it).query_one(PlanForm)
        assert form.display
        assert not screen(it).query_one(FigureView).display
        assert form.has_focus
        assert "gamma" in form.rows
        assert "epsilon" not in form.rows
        form.move_cursor(row=form.get_row_index("gamma"))
        await it.pilot.pause()
        assert "less than 1 lifts" in it.static("#explained")
        assert not _layout_faults(it)
        await it.until(lambda: not _footer_faults(it), f"a whole footer, not {_footer_faults(it)}")
        assert it.sees("q Quit", "? Help")
        await typed(it, "enter", "-3")
        assert isinstance(it.app.screen, Field)
        assert "a number (0.05 to 10) is needed" in str(it.app.screen.query_one("#problem", Static).content)
        await it.press("escape")
        form.set("gamma", 0.5)
        await it.press("p")
        await shown(it, "head", gamma=0.5)
        assert not form.display
        await it.press("p", "g")
        await shown(it, "heads")
        assert not form.display, "a view that was asked for is seen"
        form.set("metric", "nonsense")
        await it.press("g")
        await told(it, "metric 'nonsense' is not there")


async def test_control_bytes_and_half_characters_are_drawn_harmlessly(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await looked(it, tiny)
        form = screen(it).query_one(PlanForm)
        for text in (TEXTS[0], TEXTS[7] + TEXTS[1], f"<0xE2><0x1B>[2J\x07 漢{TEXTS[10]}"):
            form.set("text", text.encode("utf-8", "replace").decode()[:40])
            for key, view in (("n", "lens"), ("h", "head")):
                await it.press(key)
                await shown(it, view, text=form.values["text"])
                nothing_foreign(it)
                await it.press("v")
        await it.press("c")
        nothing_foreign(it)


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


@pytest.mark.skipif(len(available_engines()) < 2, reason="one engine")
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


@pytest.mark.skipif(len(available_engines()) < 2, reason="one engine")
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


@pytest.mark.skipif(len(available_engines()) < 2, reason="one engine")
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


@pytest.mark.skipif(len(available_engines()) < 2, reason="one engine")
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
