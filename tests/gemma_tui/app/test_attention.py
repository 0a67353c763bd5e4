"""The attention screen: every key, what is typed, and what goes wrong."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
from textual.widgets import Static

from gemma_tui.cli import _parser
from gemma_tui.commands.attention import plan_of
from gemma_tui.widgets.dialogs import Reading
from gemma_tui.widgets.figure_view import FigureView
from gemma_tui.widgets.heatmap import HeatMap
from gemma_tui.widgets.pair_map import PairMap
from gemma_tui.widgets.plan_form import Field, PlanForm

from .conftest import Open, Size
from .inside_views import SHORT, board, looked, part, screen, shown, told, typed
from .test_hostile import TEXTS, nothing_foreign
from .test_screens import _footer_faults, _layout_faults


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
            ("E", "neurons"), ("C", "circuits"), ("r", "rollout"), ("g", "heads"),
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
            ("E", "neurons"),
            ("C", "circuits"),
            ("r", "rollout"),
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
