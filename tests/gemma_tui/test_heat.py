from __future__ import annotations

import math
import re
import time
from typing import Any

import numpy as np
import pytest
from rich.color import Color, ColorSystem
from textual.app import App, ComposeResult
from textual.strip import Strip

from engines.training import LINEARS
from gemma_tui.heat import ABSENT, INFINITE, NO_LOGARITHM, RAMP, VIRIDIS, Heat, heatmap_text
from gemma_tui.widgets.heatmap import BOTTOM, TOP, HeatMap

VALUES = np.array([[0.0, 1.0, 2.0], [3.0, math.nan, 7.0]])
GOLDEN = """\
norms
    q   k   v
0 l ▁▁▁ ▂▂▂ ▃▃▃
1 G ▄▄▄ ··· ███
0 ▁▂▃▄▅▆▇█ 7  nats  G global"""


def heat(values: Any = VALUES, **facts: Any) -> Heat:
    array = np.array(values, np.float64)
    marks = ["lG"[i % 2] for i in range(len(array))]
    names = {"rows": [str(i) for i in range(len(array))], "columns": ["q_proj", "k_proj", "v_proj"]}
    return Heat(
        **{"title": "norms", "unit": "nats", "marks": marks, "meaning": "G global", **names, "values": array, **facts}
    )


def layers(count: int, columns: tuple[str, ...] = LINEARS) -> Heat:
    values = np.arange(count * len(columns), dtype=np.float64).reshape(count, len(columns))
    return heat(values, columns=columns)


class OneMap(App[None]):
    def __init__(self, shown: Heat) -> None:
        super().__init__()
        self.map = HeatMap(shown)

    def compose(self) -> ComposeResult:
        yield self.map

    def lines(self) -> list[Strip]:
        return self.map.render_lines(self.map.size.region)

    def text(self) -> list[str]:
        return [strip.text.rstrip() for strip in self.lines()]


class TestText:
    def test_without_colour_a_value_is_a_height(self) -> None:
        assert heatmap_text(heat(), 17, colour=False) == GOLDEN

    def test_with_colour_a_value_is_a_colour_and_nothing_else_changes(self) -> None:
        text = heatmap_text(heat(), 17, colour=True)
        plain = re.sub("\x1b\\[[0-9;]*m", "", text).splitlines()
        assert plain[:2] == GOLDEN.splitlines()[:2]
        assert plain[3].rstrip() == "1 G     ···"
        for tint in (VIRIDIS[0], VIRIDIS[-1]):
            assert "\x1b[48;2;{};{};{}m   \x1b[0m".format(*tint) in text

    def test_the_seven_matrices_fit_with_their_whole_names(self) -> None:
        lines = heatmap_text(layers(26), 80, colour=False).splitlines()
        assert len(lines) == 26 + 3
        assert lines[1].split() == list(LINEARS)
        assert max(map(len, lines)) <= 80

    def test_an_infinite_value_does_not_hide_the_others(self) -> None:
        lines = heatmap_text(heat([[0.0, math.inf, 1.0], [-math.inf, 0.5, math.nan]]), 17, colour=False).splitlines()
        assert lines[2] == f"0 l {RAMP[0] * 3} {INFINITE * 3} {RAMP[-1] * 3}"
        assert lines[3] == f"1 G {INFINITE * 3} {RAMP[4] * 3} {ABSENT * 3}"
        assert lines[4].startswith("0 ▁▂▃▄▅▆▇█ 1 ")

    def test_a_logarithm_has_room_for_what_differs_by_powers_of_ten(self) -> None:
        shown = heat([[1e-6, 1e-3, 1.0], [0.0, -1.0, 1e-6]], log=True)
        lines = heatmap_text(shown, 17, colour=False).splitlines()
        assert lines[2] == f"0 l {RAMP[0] * 3} {RAMP[4] * 3} {RAMP[-1] * 3}"
        assert lines[3] == f"1 G {NO_LOGARITHM * 3} {NO_LOGARITHM * 3} {RAMP[0] * 3}"
        assert lines[4] == "1e-06 ▁▂▃▄▅▆▇█ 1  nats  log scale  G global"

    @pytest.mark.parametrize("constant", [0.0, -3.0, 1e300, 5e-324])
    def test_a_constant_lies_in_the_middle(self, constant: float) -> None:
        np.testing.assert_array_equal(heat([[constant] * 3]).levels, 0.5)

    def test_the_largest_floats_have_a_scale(self) -> None:
        top = np.finfo(np.float64).max
        np.testing.assert_allclose(heat([[-top, 0.0, top]]).levels, [[0, 0.5, 1]])

    @pytest.mark.parametrize(
        "values", [np.empty((0, 3)), np.full((2, 3), math.nan), np.full((2, 3), math.inf)], ids=str
    )
    @pytest.mark.parametrize("colour", [False, True])
    def test_nothing_on_the_scale_is_said(self, values: np.ndarray, colour: bool) -> None:
        lines = heatmap_text(heat(values), 30, colour=colour).splitlines()
        assert len(lines) == len(values) + 3
        assert lines[-1].startswith("no values")

    def test_no_columns_are_no_fault(self) -> None:
        assert len(heatmap_text(heat(np.empty((2, 0)), columns=[]), 30, colour=False).splitlines()) == 5

    def test_columns_that_do_not_fit_come_below(self) -> None:
        shown = Heat("map", ["x", "y"], list("abcde"), np.arange(10.0).reshape(2, 5))
        lines = heatmap_text(shown, 14, colour=False).splitlines()
        assert [line.split() for line in lines[1:7:3]] == [["a", "b", "c", "d"], ["e"]]
        assert [line[0] for line in (*lines[2:4], *lines[5:7])] == ["x", "y", "x", "y"]
        assert lines[6] == f"y {RAMP[-1] * 2}"
        assert len(lines) == 8
        assert max(map(len, lines)) <= 14

    def test_names_and_values_must_go_together(self) -> None:
        with pytest.raises(ValueError, match="2 rows and 3 columns"):
            heat(np.zeros((2, 2)), rows=["a", "b"])
        with pytest.raises(ValueError, match="rows"):
            heat(marks=["l"])

    def test_foreign_names_are_cleaned(self) -> None:
        shown = heat(title="a\x1b[2J", rows=["\x1b]0;x", "b"], columns=["\x9bm", "k", "v"], unit="\x07", meaning="\x1b")
        text = heatmap_text(shown, 40, colour=False)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text + shown.reading(0, 0))


def test_every_colour_has_one_of_its_own_among_256_and_gets_brighter() -> None:
    among = [Color.from_rgb(*tint).downgrade(ColorSystem.EIGHT_BIT).number for tint in VIRIDIS]
    assert len(set(among)) == len(VIRIDIS)
    light = [0.2126 * (r / 255) ** 2.2 + 0.7152 * (g / 255) ** 2.2 + 0.0722 * (b / 255) ** 2.2 for r, g, b in VIRIDIS]
    assert light == sorted(light)


class TestWidget:
    async def test_it_draws_what_the_text_is_with_a_cursor_and_its_value(self) -> None:
        app = OneMap(heat())
        async with app.run_test(size=(17, 8)) as pilot:
            await pilot.pause()
            text = app.text()
            assert text[:4] == ["norms", "    q   k   v", "0 l [▁] ▂▂▂ ▃▃▃", "1 G ▄▄▄ ··· ███"]
            assert text[-1] == "0 l q_proj: 0 nat"
            await pilot.press("down", "right")
            assert app.text()[3] == "1 G ▄▄▄ [·] ███"
            assert app.map.reading == "1 G k_proj: missing"
            await pilot.press("right", "right", "right", "down")
            assert app.text()[2:4] == ["0 l ▁▁▁ ▂▂▂ ▃▃▃", "1 G ▄▄▄ ··· [█]"]
            assert app.map.reading == "1 G v_proj: 7 nats"

    async def test_only_what_is_seen_is_drawn_and_the_cursor_is_followed(self) -> None:
        app = OneMap(layers(1000))
        async with app.run_test(size=(80, 14)) as pilot:
            await pilot.pause()
            drawn: list[int] = []
            real = app.map._row

            def row(number: int) -> Strip:
                drawn.append(number)
                return real(number)

            app.map._row = row  # type: ignore[method-assign]
            app.map.refresh()
            await pilot.pause()
            assert max(drawn) < 14
            for keys, seen in (("end", "999 G"), ("home", "  0 l"), ("pagedown", " 10 l"), ("pagedown", " 20 l")):
                await pilot.press(keys)
                await pilot.pause()
                text = app.text()
                assert text[0] == "norms", "the title stays"
                assert text[1].split() == list(LINEARS), "the names stay"
                assert any(line.startswith(seen) and "[" in line for line in text[TOP:-BOTTOM])
                assert text[-1].startswith(seen.strip())
            drawn.clear()
            await pilot.press("right")
            await pilot.pause()
            assert set(drawn) == {20}, "a cursor that moves along a row costs that row"

    async def test_a_new_size_gives_other_cells_and_what_is_too_wide_is_scrolled(self) -> None:
        app = OneMap(layers(4))
        async with app.run_test(size=(80, 12)) as pilot:
            await pilot.pause()
            wide = app.text()
            assert wide[1].split() == list(LINEARS)
            await pilot.resize_terminal(40, 12)
            await pilot.pause()
            assert app.text()[1].split() == ["q", "k", "v", "o", "gate", "up", "down"]
            await pilot.resize_terminal(14, 12)
            await pilot.pause()
            for _ in range(6):
                await pilot.press("right")
            await pilot.pause()
            assert "[" in app.text()[TOP]
            assert app.text()[TOP].startswith("0 l ")
            for size in ((1, 1), (3, 2), (20, 4), (80, 12)):
                await pilot.resize_terminal(*size)
                await pilot.pause()
                assert all(strip.cell_length == app.map.size.width for strip in app.lines())
            await pilot.press("home", *["left"] * 6)
            await pilot.pause()
            assert app.text()[: TOP + 4] == wide[: TOP + 4]

    async def test_colours_and_no_colours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for no_color in (True, False):
            if not no_color:
                monkeypatch.delenv("NO_COLOR", raising=False)
            else:
                monkeypatch.setenv("NO_COLOR", "1")
            app = OneMap(heat())
            async with app.run_test(size=(17, 8)) as pilot:
                await pilot.pause()
                cells = [s for strip in app.lines()[TOP:4] for s in strip]
                tints = {s.style.bgcolor.triplet for s in cells if s.style and s.style.bgcolor}
                glyphs = set("".join(s.text for s in cells)) & set(RAMP)
                assert (set(VIRIDIS[:1]) <= {tuple(t) for t in tints if t}) is not no_color
                assert bool(glyphs) is no_color
                assert any("[" in s.text for s in cells)
                assert any(ABSENT in s.text for s in cells)

    @pytest.mark.parametrize("values", [np.empty((0, 3)), np.full((2, 3), math.inf), np.full((1, 3), 2.0)], ids=str)
    async def test_whatever_it_shows_keys_do_no_harm(self, values: np.ndarray) -> None:
        app = OneMap(heat())
        async with app.run_test(size=(30, 10)) as pilot:
            await pilot.press("end", "right", "right")
            app.map.show(heat(values))
            await pilot.pause()
            for key in ("down", "up", "right", "left", "end", "home", "pageup", "pagedown"):
                await pilot.press(key)
            await pilot.pause()
            assert app.text()[0] == "norms"
            row = f"{len(values) - 1} {'lG'[len(values) - 1]}"
            assert app.text()[-1] == (f"{row} k_proj: {values[0, 0]:g} nats" if values.size else "no values")

    async def test_a_click_puts_the_cursor_there(self) -> None:
        app = OneMap(heat())
        async with app.run_test(size=(17, 8)) as pilot:
            await pilot.click(HeatMap, offset=(12, TOP + 1))
            await pilot.pause()
            assert app.map.reading == "1 G v_proj: 7 nats"
            await pilot.click(HeatMap, offset=(0, 0))
            assert app.map.reading == "1 G v_proj: 7 nats"

    async def test_it_is_quick(self) -> None:
        app = OneMap(layers(62))
        async with app.run_test(size=(120, 40)) as pilot:
            await pilot.pause()
            app.lines()
            began = time.thread_time()
            for row in range(36):
                app.map.render_line(row)
            taken = time.thread_time() - began
            print(f"{taken * 1e3:.1f} ms")
            assert taken < 0.05
