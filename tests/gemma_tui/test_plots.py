from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np
import pytest

from gemma_tui.plots import MARKERS, Series, draw, legend, log_ticks, look, number_text, reduce, ticks

BLANK = "⠀"


def line(values: list[float | None], label: str = "loss") -> Series:
    return Series(label, [float(i) for i in range(len(values))], values)


def body(text: str) -> str:
    return "\n".join(text.splitlines()[1:])


def test_the_lowest_and_highest_point_of_every_column_are_kept() -> None:
    values = np.random.default_rng(0).standard_normal(4000)
    x, y = reduce(line(values.tolist()), columns=40)
    assert len(x) <= 80
    assert x == sorted(x)
    kept = dict(zip(x, y, strict=True))
    for column in np.split(np.arange(4000), 40):
        for place in (column[values[column].argmin()], column[values[column].argmax()]):
            assert kept[float(place)] == values[place]


@pytest.mark.parametrize("place", [0, 1, 1234, 9998, 9999])
@pytest.mark.parametrize("spike", [-50.0, 50.0])
def test_a_spike_is_not_lost(place: int, spike: float) -> None:
    values: list[float | None] = [1.0] * 10_000
    values[place] = spike
    x, y = reduce(line(values), columns=60)
    assert (float(place), spike) in zip(x, y, strict=True)


def test_few_points_are_kept_as_they_are() -> None:
    assert reduce(line([3.0, 1.0, 2.0]), columns=8) == ([0.0, 1.0, 2.0], [3.0, 1.0, 2.0])


@pytest.mark.parametrize("gap", [None, math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_left_out(gap: float | None) -> None:
    assert reduce(line([1.0, gap, 2.0]), columns=8) == ([0.0, 2.0], [1.0, 2.0])
    assert len(draw([line([1.0, gap, 2.0])], 40, 10, "t", colour=False).splitlines()) == 10


def test_a_point_without_a_place_on_the_x_axis_is_left_out() -> None:
    unplaced = Series("l", [0.0, math.nan, 2.0], [1.0, 5.0, 3.0])
    assert reduce(unplaced, columns=8) == ([0.0, 2.0], [1.0, 3.0])
    assert len(draw([unplaced], 40, 10, "t", colour=False).splitlines()) == 10


def test_a_logarithmic_axis_leaves_out_what_has_no_logarithm() -> None:
    assert reduce(line([0.0, -1.0, 1.0, 100.0, None]), columns=8, log=True) == ([2.0, 3.0], [0.0, 2.0])


def test_a_logarithmic_x_axis_leaves_out_what_has_no_logarithm() -> None:
    points = Series("l", [-1.0, 0.0, 1.0, 100.0], [1.0, 2.0, 3.0, 4.0])
    assert reduce(points, columns=8, log_x=True) == ([0.0, 2.0], [3.0, 4.0])
    assert len(draw([points], 40, 10, "t", colour=False, log_x=True).splitlines()) == 10


def test_a_logarithmic_axis_is_labelled_with_the_values_themselves() -> None:
    text = draw([line([1.0, 10.0, 100.0, 1000.0])], 40, 14, "t", log=True, colour=False)
    labels = {row.split("┤")[0].strip() for row in text.splitlines() if "┤" in row}
    assert {"10", "100"} <= labels


DRAWN = {
    "a line": [line([3.0, 2.0, 1.0])],
    "two lines": [line([3.0, 2.0, 1.0]), line([1.0, 4.0], "valid")],
    "nothing": [],
    "an empty series": [line([])],
    "only gaps": [line([None, math.nan])],
    "one point": [line([2.0])],
    "a constant": [line([5.0] * 9)],
    "huge": [line([1e300, -1e300])],
    "tiny": [line([1e-300, 2e-300])],
    "many points": [line([math.sin(i / 50) for i in range(5000)])],
    "ten lines": [line([float(i), 2.0], f"line {i}") for i in range(10)],
}


@pytest.mark.parametrize("size", [(80, 16), (40, 10), (24, 8)])
@pytest.mark.parametrize("kind", DRAWN)
def test_a_chart_has_exactly_the_size_asked_for_and_no_escape_without_colour(kind: str, size: tuple[int, int]) -> None:
    width, height = size
    rows = draw(DRAWN[kind], width, height, "loss, nats per token", colour=False).splitlines()
    assert len(rows) == height
    assert max(map(len, rows)) <= width
    assert {len(row) for row in rows[1:]} == {width}
    assert not any("\x1b" in row for row in rows)


def test_equal_ratios_stand_at_equal_distances_on_a_logarithmic_x_axis() -> None:
    lines = [Series(str(x), [x, x], [0.0, 1.0]) for x in (1.0, 4.0, 16.0, 64.0)]
    rows = draw(lines, 60, 12, "t", colour=False, log_x=True).splitlines()
    middle = next(row for row in rows if all(sign in row for sign in MARKERS[1:4]))
    places = [middle.index(sign) for sign in MARKERS[1:4]]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=1)
    assert {"1", "2", "5", "10"} <= set(rows[-1].split())


def test_colour_changes_no_character() -> None:
    assert "\x1b[" in draw([line([3.0, 2.0, 1.0])], 40, 10, "t", colour=True)


def test_lines_without_colour_are_told_apart_by_their_markers() -> None:
    text = draw([line([1.0] * 9, "train"), line([2.0] * 9, "valid")], 60, 12, "t", colour=False)
    assert text.splitlines()[0] == "t  ⠒ train  x valid"
    assert "x" in body(text)
    assert any("\u2801" <= c <= "\u28ff" for c in body(text))


def test_one_chart_leaves_nothing_for_the_next() -> None:
    alone = draw([line([1.0, 2.0])], 40, 10, "t", colour=False)
    draw([line([9.0, 1.0, 9.0])], 70, 20, "u", log=True)
    assert draw([line([1.0, 2.0])], 40, 10, "t", colour=False) == alone


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 17.0), (1e-9, 3e-9), (0.0, 1e12), (2.0, 2.0)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    places = ticks(low, high, 5)
    slack = (high - low) * 1e-6
    assert 1 <= len(places) <= 7
    assert all(low - slack <= place <= high + slack for place in places)
    assert places == sorted(places)


def test_more_lines_than_colours_still_differ() -> None:
    for colour in (True, False):
        looks = [look(i, colour) for i in range(30)]
        assert len({(it.marker, it.tint) for it in looks}) == 30
        assert len({it.coloured() for it in looks}) == 30
        assert (
            len(draw([line([float(i)] * 9, str(i)) for i in range(30)], 60, 40, "t", colour=colour).splitlines()) == 40
        )


def test_a_line_keeps_its_look_when_it_stands_elsewhere() -> None:
    alone = draw([Series("b", [0.0, 1.0], [1.0, 2.0], look=1)], 40, 10, "t", colour=False)
    assert MARKERS[1] in body(alone)
    assert BLANK not in body(alone)


def test_the_legend_takes_as_many_lines_as_it_needs() -> None:
    names = [f"a-long-name-{i}" for i in range(9)]
    rows = legend([line([1.0], name) for name in names], 40, colour=False)
    assert all(len(row) <= 40 for row in rows)
    assert len(rows) > 1
    assert all(any(name in row for row in rows) for name in names)


@pytest.mark.parametrize("size", [(80, 16), (40, 10), (24, 8)])
def test_the_name_of_the_x_axis_takes_a_line_of_the_chart(size: tuple[int, int]) -> None:
    width, height = size
    lines = [line([3.0, 2.0], "a"), line([1.0, 2.0], "b")]
    rows = draw(lines, width, height, "t", colour=False, x_label="tokens seen", named=False).splitlines()
    assert (len(rows), rows[0]) == (height, "t")
    assert "tokens seen" in rows[-1]


@pytest.mark.parametrize(
    "values", [[1.0, math.nan, 3.0], np.array([1.0, math.nan, 3.0]), array("d", [1.0, math.nan, 3.0])]
)
def test_lists_and_buffers_are_one_to_a_chart(values: Any) -> None:
    x = type(values)([0.0, 1.0, 2.0]) if isinstance(values, list) else array("d", [0.0, 1.0, 2.0])
    assert reduce(Series("l", x, values), columns=8) == ([0.0, 2.0], [1.0, 3.0])


def test_a_point_is_added_to_a_list_or_buffer_but_not_to_an_array_of_numpy() -> None:
    for y in ([], array("d")):
        grown = Series("l", array("d"), y)
        grown.add(1.0, None)
        grown.add(2.0, 5.0)
        assert reduce(grown, columns=8) == ([2.0], [5.0])
    with pytest.raises(TypeError):
        Series("l", np.empty(0), np.empty(0)).add(1.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (2.0, 6.0, [2, 3, 4, 5, 6]),
        (1.0, 1000.0, [1, 3, 10, 30, 100, 300, 1000]),
        (1e-9, 1e9, None),
        (1e-300, 1e308, None),
    ],
)
def test_a_logarithmic_axis_has_round_numbers(low: float, high: float, wanted: list[float] | None) -> None:
    places = log_ticks(math.log10(low), math.log10(high), 7)
    assert 1 <= len(places) <= 9
    assert all(math.log10(low) - 1e-6 <= place <= math.log10(high) + 1e-6 for place in places)
    if wanted:
        assert [10**place for place in places] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (2.5, "2.5"), (9999.0, "9999"), (20_000.0, "20k"), (-1.5e6, "-1.5M"), (2e9, "2G"), (3e-5, "3e-05")],
)
def test_a_number_at_an_axis_is_short(value: float, text: str) -> None:
    assert number_text(value) == text
