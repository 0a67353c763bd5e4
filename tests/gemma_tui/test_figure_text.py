"""Figures as text for a terminal."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from rich.cells import cell_len

from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.figure_text import cell_text, figure_text, table_lines
from gemma_tui.heat import Heat
from gemma_tui.plots import Series

HOSTILE = "\x1b[31m\x9b\u202e日本\n"


def figure(name: str) -> Figure:
    heat = Heat(name, ["a", name], ["x", "y"], np.array([[0.0, 1.0], [2.0, math.nan]]))
    series = [Series(name, [0, 1], [1.0, 2.0]), Series("b", [0, 1], [2.0, 1.0])]
    table = Table("k", ("token", "weight"), [(name, 0.123456), ("b", 1e-7)])
    return Figure(name, [f"note {name}"], [heat], [LineChart(name, series, name)], [table])


def test_all_parts_are_there_in_order() -> None:
    text = figure_text(figure("seen"), 60)
    pieces = ("seen\nnote seen", "███", "⠒ seen  x b", "token  weight", "1e-07")
    assert sorted(pieces, key=text.index) == list(pieces)
    assert all(cell_len(line) <= 60 for line in text.splitlines())


def test_a_chart_may_have_a_logarithmic_x_axis() -> None:
    lines = [Series("a", [1.0, 1000.0], [1.0, 2.0])]
    log, linear = (
        figure_text(Figure("f", charts=[LineChart("c", lines, "x", log_x=on)])).split() for on in (True, False)
    )
    assert {"1", "10", "100", "1000"} <= set(log)
    assert "10" not in linear


@pytest.mark.parametrize("colour", [False, True])
def test_no_escape_comes_from_outside(colour: bool) -> None:
    text = figure_text(figure(HOSTILE), 60, colour)
    assert ("\x1b[" in text) == colour
    own = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", own)
    assert "\x1b[31m" not in text


def test_numbers_have_four_digits_and_text_one_line() -> None:
    values = [0.123456, 123456.0, 7, np.int64(1234567), np.float32(0.5), math.nan, None, True, "a\nb", math.inf]
    shown = ["0.1235", "123.5k", "7", "1234567", "0.5", "", "", "True", "a b", "inf"]
    assert [cell_text(value) for value in values] == shown


def test_a_table_is_aligned_and_cut_after_some_rows() -> None:
    rows = [("日本", 0.5), ("abcdef", 12.25), ("c", 1.0)]
    assert list(table_lines(Table("k", ("token", "weight"), rows), rows=2)) == [
        "token   weight",
        "日本       0.5",
        "abcdef   12.25",
        "… 1 rows more",
    ]


def test_columns_that_do_not_fit_come_below() -> None:
    columns = ("head", *(f"metric_{i}" for i in range(9)))
    lines = list(table_lines(Table("head", columns, [("L0.H0", *range(9))]), 40))
    assert all(len(line) <= 40 for line in lines)
    assert lines[:3] == ["head   metric_0  metric_1  metric_2", "L0.H0         0         1         2", ""]
    assert len(lines) == 8
    assert sum(line.startswith("L0.H0") for line in lines) == 3


def test_long_text_in_a_table_is_cut() -> None:
    lines = list(table_lines(Table("k", ("t", "n"), [("x" * 90, 1)]), 80))
    assert lines[1] == "x" * 31 + "…  1"


def test_an_empty_table_has_its_names() -> None:
    assert list(table_lines(Table("k", ("a", "b"), []))) == ["a  b"]
    assert list(table_lines(Table("k", (), []))) == []
