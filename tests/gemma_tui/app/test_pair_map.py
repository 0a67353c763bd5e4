"""The map of one head's attention: what a cell looks like, how it is told, what a key costs."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.color import Color, ColorSystem
from textual.app import App, ComposeResult
from textual.strip import Strip

from gemma_tui.heat import RAMP, VIRIDIS
from gemma_tui.pair_grid import LONGEST, MARKS, PairGrid, fit, token, zoomed
from gemma_tui.widgets.pair_map import BOTTOM, CURSOR, LOWER, NEITHER, TOP, UPPER, PairMap, _halves

from .conftest import SECONDS
from .pair_grids import dense, grid, pooled
from .test_hostile import FORBIDDEN, SEQUENCES

NAN = math.nan
SMALL = [[1.0, NAN, NAN], [0.25, 0.75, NAN], [0.0, 0.5, 0.5]]
LABELS = ("the", " sea", " is")
HOSTILE = SEQUENCES | {
    "nothing": "",
    "lines": "\n\t\r\n",
    "a mark alone": "\u0301",
    "a selector alone": "\ufe0f",
    "no width": "\u200b\u00ad",
    "very long": "x" * 9999,
    "very long and wide": "漢字" * 50,
}


class OneMap(App[None]):
    def __init__(self, shown: PairGrid) -> None:
        super().__init__()
        self.map = PairMap(shown)
        self.moves: list[tuple[int, int]] = []
        self.chosen: list[tuple[int, int]] = []

    def compose(self) -> ComposeResult:
        yield self.map

    def on_pair_map_moved(self, event: PairMap.Moved) -> None:
        self.moves.append((event.row, event.column))

    def on_pair_map_chosen(self, event: PairMap.Chosen) -> None:
        self.chosen.append((event.query, event.key))

    def lines(self) -> list[Strip]:
        return self.map.render_lines(self.map.room.region)

    def text(self) -> list[str]:
        return [strip.text.rstrip() for strip in self.lines()]

    def cells(self, line: int) -> list[tuple[str, Any, Any]]:
        """Glyph, foreground and background of each cell of a line of the map."""
        drawn = [
            (glyph, *(c.triplet and tuple(c.triplet) for c in (s.style.color, s.style.bgcolor) if c))
            for s in self.lines()[TOP + line]
            for glyph in s.text
            if s.style
        ]
        return drawn[self.map.gutter_width :]  # type: ignore[return-value]

    @property
    def at(self) -> tuple[int, int]:
        return self.map.row, self.map.column


@pytest.fixture
def colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")


class TestGrid:
    def test_a_pair_is_told_with_its_tokens_its_weight_and_its_rank(self) -> None:
        shown = grid(SMALL, LABELS)
        assert shown.reading(1, 0) == 'q 1 " sea" -> k 0 "the"  0.2500  rank 2 of 2 in its row'
        assert shown.reading(2, 2) == 'q 2 " is" -> k 2 " is"  0.5000  rank 1 of 3 in its row'
        assert shown.reading(2, 0) == 'q 2 " is" -> k 0 "the"  0.0000  rank 3 of 3 in its row'
        assert shown.reading(0, 2) == 'q 0 "the" -> k 2 " is"  not seen: after the query'
        assert grid([[1e-5]], LABELS).reading(0, 0).endswith("1.00e-05  rank 1 of 1 in its row")

    def test_a_pooled_cell_is_told_as_ranges_with_the_name_of_the_pooling(self) -> None:
        shown = pooled(20, 8)
        assert shown.pooled
        assert shown.reading(2, 1, 80).startswith('q 16-19 "the sea i…" -> k 8-15 "the sea is…"  max ')
        told = f"max {float(np.nanmax(dense(20)[16:20, 8:16])):.4f}"
        assert told in shown.reading(2, 1, 80)
        assert "q 16-19" in shown.reading(2, 1, 60)
        assert "k 8-15" in shown.reading(2, 1, 60)
        assert told in shown.reading(2, 1, 60)

    def test_the_rank_is_the_place_in_a_sorted_row(self) -> None:
        weights = dense(40, 16)
        shown = grid(weights, window=16)
        for row in (0, 7, 39):
            seen = np.flatnonzero(~np.isnan(weights[row]))
            order = sorted(seen, key=lambda column: -weights[row, column])
            assert [shown.rank(row, c) for c in order] == [(i + 1, len(seen)) for i in range(len(seen))]

    def test_why_a_pair_has_no_weight(self) -> None:
        shown = grid(dense(30, 10), window=10)
        assert "beyond the window of 10" in shown.reading(29, 19)
        assert "rank" in shown.reading(29, 20)
        assert "after the query" in shown.reading(3, 4)
        weights = dense(5)
        weights[:, 0] = NAN
        assert "left out" in grid(weights).reading(4, 0)
        cells = pooled(64, 8, window=16)
        assert "rank" in cells.reading(3, 1), "24 - 15 is in the window"
        assert "beyond" in cells.reading(4, 1), "32 - 15 is not"
        assert "after" in cells.reading(1, 2)
        cells.weights[:, 0] = NAN
        assert "left out" in cells.reading(2, 0), "16 - 7 is in the window"

    def test_shades_colour_and_the_weight_is_told(self) -> None:
        shown = grid([[0.5, NAN], [0.1, 0.2]], shades=np.array([[1, NAN], [NAN, 1]], np.float32))
        assert shown.tints[0, 0] == shown.tints[1, 1] == len(VIRIDIS) - 1
        assert shown.tints[1, 0] >= len(VIRIDIS), "left out of the colours"
        assert "0.1000  rank 2 of 2" in shown.reading(1, 0)

    def test_levels_go_from_zero_to_the_highest(self) -> None:
        shown = grid([np.linspace(0, 0.5, 9)])
        assert shown.tints.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8]]
        assert shown.heights.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 7]]

    def test_parts_must_go_together(self) -> None:
        facts = {"window": None, "pooling": "max", "row_labels": "ab", "column_labels": "ab"}
        with pytest.raises(ValueError, match="weights"):
            PairGrid(np.zeros((2, 1), np.float32), np.arange(3), np.arange(3), **facts)
        with pytest.raises(ValueError, match="ascend"):
            PairGrid(np.zeros((1, 1), np.float32), np.array([0, 3]), np.array([0, 2]), **facts)
        with pytest.raises(ValueError, match="ascend"):
            PairGrid(np.zeros((2, 1), np.float32), np.array([0, 1, 1]), np.array([0, 2]), **facts)

    def test_a_zoom_halves_around_a_position_and_doubles_again(self) -> None:
        assert zoomed((0, 100), 50, 0.5, 100) == (25, 75)
        assert zoomed((0, 100), 0, 0.5, 100) == (0, 50)
        assert zoomed((20, 41), 40, 0.5, 100) == (30, 41)
        assert zoomed((25, 75), 30, 2, 90) == (0, 90)
        assert zoomed((30, 50), 49, 2, 100) == (29, 69)
        for around in range(37):
            span, steps = (0, 37), 0
            while span[1] - span[0] > 1:
                inner = zoomed(span, around, 0.5, 37)
                assert span[0] <= inner[0] <= around < inner[1] <= span[1]
                span, steps = inner, steps + 1
            assert steps == 6, "37 19 10 5 3 2 1"
            while span != (0, 37):
                outer = zoomed(span, around, 2, 37)
                assert 0 <= outer[0] <= span[0] < span[1] <= outer[1] <= 37
                span, steps = outer, steps - 1
            assert steps == 0

    @pytest.mark.parametrize("label", HOSTILE.values(), ids=HOSTILE)
    def test_a_token_has_the_width_that_is_counted(self, label: str) -> None:
        shown = token(label)
        assert not FORBIDDEN.search(shown)
        assert len(shown) <= LONGEST + 1
        assert not re.search(f"[\u0300-\u036f]{{{MARKS + 1}}}", shown)
        for width in range(6):
            assert cell_len(fit(shown, width)) <= width
        for width in (0, 5, 20, 40, 80):
            assert cell_len(grid(SMALL, [label] * 3).reading(1, 0, width)) <= width


@pytest.mark.usefixtures("colour")
class TestColour:
    async def test_two_queries_to_a_line_and_what_is_not_seen_has_no_colour(self) -> None:
        app = OneMap(grid(SMALL, LABELS))
        async with app.run_test(size=(80, 8)) as pilot:
            app.map.go(2, 2)
            await pilot.pause()
            low, high = VIRIDIS[0], VIRIDIS[-1]
            first, second = app.cells(0), app.cells(1)
            assert first[0][:3] == (UPPER, high, VIRIDIS[2]), "1 above 0.25"
            assert first[1][:2] == (LOWER, VIRIDIS[6]), "nothing above 0.75"
            assert first[1][2] not in VIRIDIS
            assert first[2][0] == " "
            assert second[0][:2] == (UPPER, low), "zero is a colour"
            assert second[1][:2] == (UPPER, VIRIDIS[4])
            assert second[2] == (UPPER, (255, 255, 255), (0, 0, 0)), "the cursor"
            assert app.text()[-1] == app.map.reading == app.map.grid.reading(2, 2)

    async def test_a_pair_beyond_the_window_differs_from_a_later_one(self) -> None:
        app = OneMap(grid(dense(12, 4), window=4))
        async with app.run_test(size=(80, 12)) as pilot:
            await pilot.pause()
            drawn = [cell[0] for cell in app.cells(5)]
            assert "".join(drawn[:12]) == NEITHER * 7 + UPPER * 4 + LOWER
            assert f"{NEITHER} beyond window 4" in app.text()[-2]

    async def test_the_cursor_stands_on_its_half(self) -> None:
        app = OneMap(grid(dense(8)))
        async with app.run_test(size=(80, 12)) as pilot:
            for row, glyph in ((4, UPPER), (5, LOWER)):
                app.map.go(row, 3)
                await pilot.pause()
                assert app.cells(2)[3] == (glyph, (255, 255, 255), (0, 0, 0))
                line = app.text()[TOP + 2]
                assert line[: app.map.gutter_width].split()[0] == str(row), "the gutter names the cursor's row"
                assert line[app.map.gutter_width - 1] == glyph

    def test_every_look_is_distinct_among_256_colours(self) -> None:
        looks = [_halves(code) for code in (-1, -2, *range(len(VIRIDIS) * (len(VIRIDIS) + 3)))]
        colours = [(s.color, s.bgcolor) for _, s in looks]
        among = [tuple(c and c.downgrade(ColorSystem.EIGHT_BIT).number for c in pair) for pair in colours]
        full = {(g, *pair) for (g, _), pair in zip(looks, colours, strict=True)}
        assert len(full) == len({(g, *pair) for (g, _), pair in zip(looks, among, strict=True)})
        white, black = (Color.parse(f"rgb({c},{c},{c})").downgrade(ColorSystem.EIGHT_BIT) for c in (255, 0))
        assert not {white.number, black.number} & {pair[0] for pair in among[2:]}

    async def test_only_what_changed_is_drawn(self) -> None:
        app = OneMap(grid(dense(200)))
        async with app.run_test(size=(120, 40)) as pilot:
            app.map.go(40, 40)
            await pilot.pause()
            drawn: list[int] = []
            real = app.map.render_line

            def line(y: int) -> Strip:
                drawn.append(y)
                return real(y)

            app.map.render_line = line  # type: ignore[method-assign]
            here, height = app.map._line(40), app.map.room.height
            for key, lines in (("left", {here}), ("up", {here, here - 1}), ("shift+left", {here - 1})):
                drawn.clear()
                await pilot.press(key)
                await pilot.pause()
                assert set(drawn) == lines | {0, height - 1}

    async def test_a_whole_map_is_quick(self) -> None:
        app = OneMap(grid(dense(512)))
        async with app.run_test(size=(120, 40)) as pilot:
            app.map.go(300, 250)
            await pilot.pause()
            began = time.thread_time()
            for y in range(40):
                app.map.render_line(y)
            assert time.thread_time() - began < 0.1


@pytest.mark.usefixtures("no_colour")
class TestNoColour:
    async def test_one_query_to_a_line_and_weights_are_heights(self) -> None:
        app = OneMap(grid(SMALL, LABELS))
        async with app.run_test(size=(80, 8)) as pilot:
            app.map.go(1, 0)
            await pilot.pause()
            left = app.map.gutter_width
            lines = [line[left:] for line in app.text()[TOP : TOP + 3]]
            assert lines == [RAMP[-1], CURSOR + RAMP[6], RAMP[0] + RAMP[4] * 2]
            assert app.text()[0][left] == "▼"
            assert app.text()[TOP + 1][:left].split() == ["1", "sea", "►"]
            assert RAMP in app.text()[-2]
            tints = {c for strip in app.lines() for s in strip if s.style and (c := s.style.color) and c.triplet}
            assert all(len(set(tint.triplet)) == 1 for tint in tints if tint.triplet), "greys only"

    async def test_what_is_not_seen_is_no_height(self) -> None:
        app = OneMap(grid(dense(12, 4), window=4))
        async with app.run_test(size=(80, 18)) as pilot:
            await pilot.pause()
            row = app.text()[TOP + 11][app.map.gutter_width :]
            assert row[:8] == NEITHER * 8
            assert set(row[8:12]) <= set(RAMP)


@pytest.mark.parametrize("colours", ["colour", "no_colour"])
class TestKeys:
    @pytest.fixture(autouse=True)
    def terminal(self, colours: str, request: pytest.FixtureRequest) -> None:
        request.getfixturevalue(colours)

    async def test_keys_move_the_cursor_and_it_is_told(self) -> None:
        app = OneMap(grid(dense(100, 30), window=30))
        async with app.run_test(size=(80, 24)) as pilot:
            steps = (
                ("down", (1, 0)), ("right", (1, 1)), ("shift+down", (11, 1)), ("shift+right", (11, 11)),
                ("left", (11, 10)), ("up", (10, 10)), ("ctrl+end", (99, 10)), ("home", (99, 70)), ("end", (99, 99)),
                ("down", (99, 99)), ("ctrl+home", (0, 99)), ("end", (0, 0)), ("up", (0, 0)), ("shift+left", (0, 0)),
            )  # fmt: skip
            for key, place in steps:
                await pilot.press(key)
                assert app.at == place, key
            await pilot.pause()
            assert app.moves == [p for i, (_, p) in enumerate(steps) if i == 0 or p != steps[i - 1][1]]
            await pilot.press("pagedown")
            page = app.map.row
            assert 10 < page <= 2 * 24
            await pilot.press("pageup")
            assert app.at == (0, 0)

    async def test_the_cursor_is_always_seen(self) -> None:
        app = OneMap(grid(dense(300), ["word"] * 300))
        async with app.run_test(size=(80, 24)) as pilot:
            await pilot.pause()
            for place in ((299, 299), (0, 0), (150, 10), (150, 290), (5, 299), (299, 0), (120, 120)):
                app.map.go(*place)
                await pilot.pause()
                lines = app.text()
                gutter = app.map.gutter_width
                marked = [y for y in range(TOP, len(lines) - BOTTOM) if lines[y][gutter - 1 : gutter] in list("▀▄►")]
                assert len(marked) == 1
                assert lines[marked[0]].split()[0] == str(place[0])
                at = lines[0].index("▼")
                assert at - gutter + app.map.scroll_offset.x == place[1]
                assert f"{place[1]} " in lines[0]
            for step in ((0, 1), (1, 0), (0, -1), (-1, 0)) * 2:
                for _ in range(45):
                    app.map.action_move(*step)
                assert 0 <= app.map.column - app.map.scroll_offset.x < app.map.room.width - app.map.gutter_width
                assert TOP <= app.map._line(app.map.row) < app.map.room.height - BOTTOM

    async def test_a_grid_larger_than_the_one_before_is_scrolled_at_once(self) -> None:
        for size in ((80, 24), (40, 14)):
            app = OneMap(grid(dense(4)))
            async with app.run_test(size=size) as pilot:
                await pilot.pause()
                app.map.show(grid(dense(300)))
                app.map.go(299, 299)
                assert min(app.map.scroll_offset) > 0
                deadline = time.monotonic() + SECONDS
                while not (app.map.show_vertical_scrollbar and app.map._line(299) < app.map.room.height - BOTTOM):
                    assert time.monotonic() < deadline
                    await pilot.pause(0.02)
                assert "▼" in app.text()[0]

    async def test_another_grid_keeps_the_query_and_the_key(self) -> None:
        app = OneMap(pooled(64, 8))
        async with app.run_test(size=(80, 24)) as pilot:
            app.map.go(5, 2)
            app.map.show(grid(dense(64)))
            assert app.at == (40, 16)
            app.map.show(grid(dense(64, 16), window=16))
            assert app.at == (40, 16)
            app.map.show(grid(dense(10)))
            assert app.at == (9, 9)
            await pilot.pause()
            assert app.moves[-1] == (9, 9)
            assert app.text()[-1] == app.map.reading

    async def test_the_cursor_keeps_to_its_tokens_through_coarser_cells(self) -> None:
        app = OneMap(grid(dense(64)))
        async with app.run_test(size=(80, 24)) as pilot:
            app.map.go(45, 19)
            for coarse in (8, 16):
                app.map.show(pooled(64, coarse))
                assert app.at == (45 // coarse, 19 // coarse)
            app.map.show(grid(dense(64)))
            assert app.at == app.map.pair == (45, 19)
            app.map.show(pooled(64, 8))
            await pilot.press("up", "enter")
            await pilot.pause()
            assert app.chosen == [(32, 19)], "of a cell it went to, the first"
            app.map.show(grid(np.full((0, 0), 0.0), LABELS))
            await pilot.press("enter")
            await pilot.pause()
            assert len(app.chosen) == 1

    async def test_a_click_puts_the_cursor_there(self) -> None:
        app = OneMap(grid(dense(10)))
        async with app.run_test(size=(80, 16)) as pilot:
            await pilot.click(PairMap, offset=(app.map.gutter_width + 3, TOP + 2))
            first = 2 * app.map.rows_per_line
            assert app.at == (first, 3)
            await pilot.click(PairMap, offset=(app.map.gutter_width + 3, TOP + 2))
            assert app.at == (first + app.map.rows_per_line - 1, 3)
            for outside in ((0, 0), (0, TOP), (79, TOP + 2), (20, 15)):
                before = app.at
                await pilot.click(PairMap, offset=outside)
                assert app.at == before

    @pytest.mark.parametrize(
        "weights", [np.full((0, 0), 0.0), np.full((1, 1), NAN), np.zeros((3, 3)), np.full((2, 2), math.inf)], ids=str
    )
    async def test_whatever_it_shows_keys_do_no_harm(self, weights: np.ndarray) -> None:
        app = OneMap(grid(dense(20)))
        async with app.run_test(size=(60, 12)) as pilot:
            app.map.go(19, 19)
            app.map.show(grid(weights, LABELS))
            for key in ("down", "up", "right", "left", "end", "home", "pageup", "pagedown", "ctrl+end", "shift+right"):
                await pilot.press(key)
            await pilot.pause()
            assert app.text()[-1] == app.map.reading
            assert re.search("no weights|all zero", app.text()[-2])
            app.map.show(grid(dense(20)))
            await pilot.pause()
            assert "rank" in app.text()[-1]

    async def test_hostile_tokens_do_no_harm(self) -> None:
        labels = list(HOSTILE.values())
        app = OneMap(grid(dense(len(labels)), labels))
        async with app.run_test(size=(80, 24)) as pilot:
            for i in range(len(labels)):
                app.map.go(i, i)
                await pilot.pause()
                for strip in app.lines():
                    assert not FORBIDDEN.search(strip.text)
                    assert cell_len(strip.text) == app.map.room.width
                assert "rank" in app.text()[-1]

    async def test_a_new_size_shows_another_part(self) -> None:
        app = OneMap(pooled(512, 2))
        async with app.run_test(size=(80, 24)) as pilot:
            app.map.go(200, 100)
            await pilot.pause()
            before = app.map.reading
            for size in ((1, 1), (3, 2), (12, 5), (40, 10), (120, 40), (80, 24)):
                await pilot.resize_terminal(*size)
                await pilot.pause()
                assert all(cell_len(strip.text) == app.map.room.width for strip in app.lines())
                assert app.at == (200, 100)
                if size >= (12, 5):
                    assert any(mark in line for line in app.text()[TOP:-BOTTOM] for mark in "▀▄►")
            assert app.text()[-1] == app.map.reading == before
