"""One head on the attention screen: a part of a long text, the tokens under the cursor, and how weights are shown."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from textual.widgets import DataTable

import gemma_tui.studies.attention.looking as looking
from gemma_tui.cli import _parser
from gemma_tui.commands.attention import plan_of
from gemma_tui.widgets.pair_map import PairMap
from gemma_tui.widgets.plan_form import PlanForm

from .conftest import Open, Opened, Size
from .inside_views import SHORT, board, looked, part, screen, shown, told, typed, values
from .test_screens import _layout_faults

MOST = 32
"""Rows and columns of a map here, so that the text that is shown first is a long one."""


@pytest.fixture
def few_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "look", partial(looking.look, cells=(MOST, MOST)))


def pairs(it: Opened) -> PairMap:
    return screen(it).query_one(PairMap)


def weights(it: Opened) -> np.ndarray:
    figure = board(it).figure
    assert figure is not None
    return figure.arrays["weights"]


def spans(it: Opened) -> tuple[list[int], list[int]]:
    """First position and the one after the last, of the queries and the keys that are drawn."""
    grid = pairs(it).grid
    return grid.row_edges[[0, -1]].tolist(), grid.column_edges[[0, -1]].tolist()


async def head(it: Opened, tiny: str) -> None:
    await looked(it, tiny)
    await it.press("down", "h")
    await shown(it, "head", layer=1, head=0)


async def test_z_goes_into_a_long_text_until_cells_are_tokens_and_out_again(
    opened: Open, tiny: str, size_and_engine: tuple[Size, str], few_cells: None
) -> None:
    size, engine = size_and_engine
    async with opened(size, model=tiny, engine=engine) as it:
        await head(it, tiny)
        length = len(board(it).labels)
        assert length > 4 * MOST
        cells = weights(it)
        inspection = it.app.session.place.desk.reading.inspection  # type: ignore[union-attr]
        whole = it.app.session.place.thread.submit(lambda engine: inspection.attention(1, 0, (0, length))).result(20)
        pairs(it).go(20, 10)
        pair = pairs(it).pair
        half, steps = length, 0
        while pairs(it).grid.pooled:
            await it.press("z")
            half, steps = -(-half // 2), steps + 1
            await it.until(lambda half=half: np.diff(spans(it)[0])[0] == half, f"{half} queries")
            await shown(it, "head")
            (first, end), (left, right) = spans(it)
            assert (end - first, right - left) == (half, half)
            assert pairs(it).pair == pair
            assert f"queries {first}-{end - 1}, keys {left}-{right - 1}" in it.static("#looked")
            assert not _layout_faults(it)
        assert steps == 3
        seen = np.tril(np.ones((length, length), bool))[first:end, left:right]
        np.testing.assert_allclose(weights(it)[seen], whole[first:end, left:right][seen], rtol=1e-5, atol=1e-7)
        await it.press("z")
        await told(it, "each cell is one query and one key already")
        await it.press("c")
        words = shlex.split(it.app.clipboard)[1:]
        assert plan_of(_parser(words).parse_args(words)) == board(it).plan
        assert f"--queries {first}:{end} --keys {left}:{right}" in it.app.clipboard
        await it.press("escape")
        for step in range(steps):
            size_now = min(length, half * 2 ** (step + 1))
            await it.press("Z")
            await it.until(lambda n=size_now: np.diff(spans(it)[0])[0] == n, f"{size_now} queries")
            await shown(it, "head")
            assert pairs(it).pair == pair
        assert board(it).plan.queries == board(it).plan.keys == ""
        assert "queries" not in it.static("#looked")
        np.testing.assert_array_equal(weights(it), cells)
        await it.press("Z")
        await told(it, "this is the whole text already")


async def test_a_part_stays_for_other_heads_and_goes_with_the_text(opened: Open, tiny: str, few_cells: None) -> None:
    async with opened(model=tiny) as it:
        await head(it, tiny)
        length = len(board(it).labels)
        pairs(it).go(31, 2)
        await it.press("z")
        await it.until(lambda: spans(it)[0][0] > 0, "the part")
        queries = board(it).plan.queries
        assert queries == f"{length // 2}:{length}"
        await it.press("right_square_bracket")
        await shown(it, "head", layer=1, head=1, queries=queries)
        await typed(it, "slash", "L0.H1")
        await shown(it, "head", layer=0, head=1, queries=queries)
        await typed(it, "slash", str(length - 3))
        await it.until(lambda: pairs(it).grid.cell_of(length - 3, 0)[0] == pairs(it).row, "a position of the part")
        assert board(it).plan.queries == queries
        await typed(it, "slash", "5")
        await shown(it, "head", queries="", keys="")
        await it.until(lambda: pairs(it).grid.cell_of(5, 0)[0] == pairs(it).row, "a position before it")
        await it.press("z")
        await it.until(lambda: spans(it)[0] == [0, length // 2], "the part")
        await typed(it, "i", SHORT)
        await shown(it, "head", text=SHORT, queries="", keys="")
        form = screen(it).query_one(PlanForm)
        for span, words in (
            ("9:3", "queries: 9:3 is not there"),
            ("400:", "queries: 400: is not"),
            ("x", "queries: 'x'"),
        ):
            form.set("queries", span)
            await it.press("right_square_bracket")
            await told(it, words)
        await it.press("h")
        await shown(it, "head", text=SHORT, queries="")


async def test_exports_are_of_the_part_that_is_shown(opened: Open, tiny: str, tmp_path: Path, few_cells: None) -> None:
    async with opened(model=tiny) as it:
        await head(it, tiny)
        pairs(it).go(20, 10)
        await it.press("z")
        await it.until(lambda: spans(it)[0][0] > 0, "the part")
        await shown(it, "head")
        (first, end), (left, right) = spans(it)
        for ending in ("npz", "svg", "html", "json"):
            it.app.clear_notifications()
            await typed(it, "o", str(tmp_path / f"a.{ending}"))
            await told(it, "written")
        with np.load(tmp_path / "a.npz") as kept:
            np.testing.assert_array_equal(kept["weights"], weights(it))
            assert kept["query_edges"][[0, -1]].tolist() == [first, end]
            assert kept["key_edges"][[0, -1]].tolist() == [left, right]
        for ending in ("svg", "html"):
            assert f"queries {first}-{end - 1}, keys {left}-{right - 1}" in (tmp_path / f"a.{ending}").read_text()
        facts = json.loads((tmp_path / "a.json").read_text())["facts"]
        assert (facts["queries"], facts["keys"]) == ([first, end], [left, right])


async def test_enter_on_a_cell_reads_its_query_and_its_key(
    opened: Open, tiny: str, size_and_engine: tuple[Size, str]
) -> None:
    size, engine = size_and_engine
    async with opened(size, model=tiny, engine=engine) as it:
        await head(it, tiny)
        whole = np.nan_to_num(weights(it), nan=-1)
        pairs(it).go(90, 7)
        await it.press("enter")
        await shown(it, "head", position="90", key_position="7")
        await it.until(lambda: part(it) == "table key 3/4", "the first table")
        table = screen(it).query_one("#rows", DataTable)
        assert table.has_focus
        top = [int(str(table.get_row_at(i)[2])) for i in range(5)]
        assert top == np.argsort(-whole[90], kind="stable")[:5].tolist()
        assert {str(table.get_row_at(i)[0]) for i in range(5)} == {"90"}
        await it.press("v")
        assert part(it) == "table reader 4/4"
        by = [int(str(table.get_row_at(i)[0])) for i in range(5)]
        assert by == (7 + np.argsort(-whole[7:, 7], kind="stable")[:5]).tolist()
        assert {str(table.get_row_at(i)[2]) for i in range(5)} == {"7"}
        await it.press("c")
        assert "--position 90 --key-position 7" in it.app.clipboard
        await it.press("escape", "v")
        assert part(it) == "pairs 1/4"
        assert pairs(it).pair == (90, 7)
        assert pairs(it).has_focus
        await it.press("enter")
        await it.until(lambda: part(it) == "table key 3/4" and not it.app.session.jobs, "the same tables at once")
        await it.press("v", "v", "down", "enter")
        await shown(it, "head", position="91", key_position="7")
        await it.until(lambda: part(it) == "table key 3/4", "the next query's")
        await it.press("h")
        await shown(it, "head", position="", key_position="")


async def test_keys_change_how_the_weights_of_a_head_are_shown(opened: Open, tiny: str, size: Size) -> None:
    async with opened(size, model=tiny) as it:
        await looked(it, tiny)
        before = dict(values(it))
        for key in ("z", "Z", "R", "0", "G"):
            it.app.clear_notifications()
            await it.press(key)
            await told(it, "this key is for one head: press h first")
        assert values(it) == before
        await it.press("down", "h")
        await shown(it, "head")
        plain = weights(it)
        pairs(it).go(30, 3)
        for key, plan, note in (
            ("R", {"per_row": True}, "rows normalised"),
            ("R", {"per_row": False}, ""),
            ("0", {"without_sink": True}, "left out"),
            ("0", {"without_sink": False}, ""),
            ("G", {"gamma": 0.5}, "γ 0.5"),
            ("G", {"gamma": 0.25}, "γ 0.25"),
            ("G", {"gamma": 1.0}, ""),
        ):
            await it.press(key)
            await shown(it, "head", **plan)
            assert pairs(it).pair == (30, 3)
            assert it.sees(note)
            if key == "0" and note:
                rows = np.nansum(weights(it)[1:], axis=1)
                assert np.isnan(weights(it)[:, 0]).all()
                np.testing.assert_allclose(rows, 1, rtol=1e-5)
            if key == "R" and note:
                np.testing.assert_allclose(np.nanmax(weights(it), axis=1), 1, rtol=1e-6)
        np.testing.assert_array_equal(weights(it), plain)
        screen(it).query_one(PlanForm).set("gamma", 0.7)
        await it.press("G")
        await shown(it, "head", gamma=1.0)
        await it.press("question_mark")
        assert it.app.screen.query("Static")
        text = it.app.screen.text  # type: ignore[attr-defined]
        assert "What the cursor's query reads, and who reads its key" in text
