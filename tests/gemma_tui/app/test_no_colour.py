from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from textual.app import App, ComposeResult

from gemma_tui.plots import MARKERS, OKABE_ITO, SIGNS, Series, draw
from gemma_tui.widgets.chart import Chart

LINES = [
    Series("training", [float(i) for i in range(20)], [5 - i / 10 for i in range(20)]),
    Series("validation", [float(i) for i in range(20)], [4 - i / 10 for i in range(20)]),
]


class OneChart(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.chart = Chart("loss")

    def compose(self) -> ComposeResult:
        yield self.chart


async def rendered(size: tuple[int, int] = (60, 16)) -> list[list[tuple[str, object]]]:
    """The lines of a chart on the screen: for each piece its text and its colour."""
    app = OneChart()
    async with app.run_test(size=size) as pilot:
        app.chart.show(LINES)
        app.chart.refresh()
        await pilot.pause()
        strips = app.chart.render_lines(app.chart.size.region)
        return [[(s.text, s.style.color if s.style else None) for s in strip] for strip in strips]


def colours(lines: list[list[tuple[str, object]]]) -> set[str]:
    triplets = [c.triplet for line in lines for _, c in line if c is not None and c.triplet]  # type: ignore[attr-defined]
    return {t.hex for t in triplets if len({t.red, t.green, t.blue}) > 1}


def test_without_colour_the_lines_differ_by_their_markers_and_no_escape_is_written() -> None:
    text = draw(LINES, 60, 16, "loss", colour=False)
    assert "\x1b" not in text
    assert f"{SIGNS[0]} training  {SIGNS[1]} validation" in text.splitlines()[0]
    assert MARKERS[1] in "".join(text.splitlines()[1:])
    assert len(set(MARKERS)) == len(MARKERS) == len(SIGNS) == len(OKABE_ITO)


def test_with_colour_the_lines_have_the_palettes_colours() -> None:
    text = draw(LINES, 60, 16, "loss", colour=True)
    for r, g, b in OKABE_ITO[:2]:
        assert f"38;2;{r};{g};{b}m" in text
    assert MARKERS[1] not in "".join(row.split("m", 1)[-1] for row in text.splitlines()[1:])


async def test_a_chart_under_no_color_has_no_colour_of_its_own() -> None:
    lines = await rendered()
    assert not colours(lines)
    assert any(MARKERS[1] in text for line in lines[1:] for text, _ in line)


async def test_a_chart_with_colours_shows_the_palette(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    lines = await rendered()
    assert {"#e69f00", "#56b4e9"} <= colours(lines)


@pytest.mark.parametrize("value", ["", "0", "1"])
async def test_a_chart_agrees_with_the_app_on_what_no_color_means(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", value)
    lines = await rendered()
    assert bool(colours(lines)) is not OneChart().no_color
    marked = any(MARKERS[1] in text for line in lines[1:] for text, _ in line)
    assert marked is OneChart().no_color


@pytest.mark.parametrize("size", [(1, 1), (11, 20), (40, 3), (12, 4)], ids=str)
async def test_a_chart_that_has_no_room_stays_empty_or_small(size: tuple[int, int]) -> None:
    lines = await rendered(size)
    assert all(sum(len(text) for text, _ in line) <= size[0] for line in lines)


async def test_a_chart_knows_whether_there_is_something_new_to_draw() -> None:
    app = OneChart()
    async with app.run_test(size=(60, 16)) as pilot:
        chart = app.chart
        assert not chart.stale
        chart.show(LINES)
        assert chart.stale
        chart.redraw()
        assert not chart.stale
        await pilot.pause()
        assert MARKERS[1] in "".join(strip.text for strip in chart.render_lines(chart.size.region)[1:])


def test_a_chart_of_the_command_line_without_colour_has_no_escape(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), no_color=True, width=60)
    console.print(draw(LINES, 60, 16, "loss", colour=False), markup=False, highlight=False)
    assert "\x1b" not in console.file.getvalue()  # type: ignore[attr-defined]
