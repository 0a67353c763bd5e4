"""Figures as files: whole, readable by others, and harmless whatever a token is."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from engines.errors import EngineError
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.exports import FORMATS, export, png
from gemma_tui.exports.svg import colour
from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.heat import VIRIDIS, Heat
from gemma_tui.plots import OKABE_ITO, Series
from gemma_tui.text import clean

HOSTILE = "</script></title></style><img src=x onerror=\"alert('1')\">&amp;\x1b[2J\x9b\u202e\u2028\x00\ufffe\ud800"
SVG = "{http://www.w3.org/2000/svg}"


def figure(name: str = "the", **changes: Any) -> Figure:
    values = np.array([[0.0, 0.25], [math.nan, 1.0]])
    parts: dict[str, Any] = {
        "title": f"title {name}",
        "notes": [f"note {name}"],
        "heats": [Heat(f"map {name}", [name, "b"], ["c", name], values, name, ["G", "·"], name)],
        "charts": [
            LineChart(f"chart {name}", [Series(name, [0, 1, 2], [1.0, None, 4.0]), Series("b", [1], [3.0])], name),
            LineChart("empty", [Series(name, [0.0], [math.nan])]),
            LineChart("decades", [Series("d", [0.0, 1.0], [1e-3, 1e3])], log=True),
        ],
        "tables": [Table("edge", ("token", name, "n"), [(name, 0.123456, 7), ("b", math.nan, np.int32(1234567))])],
        "arrays": {"weights": values, "edges": np.arange(3)},
        "facts": {"model": name, name: math.inf, "layers": (1, np.float32(0.5)), "folder": Path("a"), "none": None},
    }
    return Figure(**{**parts, **changes})


@pytest.fixture(autouse=True)
def fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has some."""
    monkeypatch.setattr(png, "letters_drawn", lambda: True)


class Tags(HTMLParser):
    """Every tag, attribute and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("ending", FORMATS)
def test_a_hostile_token_is_harmless_in_every_format(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"f{ending}"
    export(figure(HOSTILE), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if ending in (".npz", ".png", ".csv"):
        return
    text = path.read_bytes().decode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\ufffe\ud800-\udfff]", text)
    if ending != ".json":
        assert "<img" not in text
        assert "<script" not in text


def test_a_page_is_one_file_with_nothing_that_runs_or_is_fetched(tmp_path: Path) -> None:
    export(figure(HOSTILE), tmp_path / "f.html")
    text = (tmp_path / "f.html").read_text("utf-8")
    page = Tags()
    page.feed(text)
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "p", "div", "svg", "g", "rect", "text", "path"}
    allowed |= {"polyline", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre"}
    assert {tag for tag, _ in page.tags} <= allowed
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "href", "style", "xlink:href")}
    assert "://" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text
    assert "onerror=\"alert('1')\">&amp;␛[2J" in page.text  # shown as it is
    assert "1234567" in page.text
    assert "0.1235" in page.text


def test_an_svg_is_xml_with_a_cell_per_value_and_a_line_per_series(tmp_path: Path) -> None:
    export(figure(HOSTILE), tmp_path / "f.svg")
    root = ElementTree.parse(tmp_path / "f.svg").getroot()
    cells = [r for r in root.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    assert [c.get("fill") for c in cells] == [colour(0), colour(0.25), colour(1)]
    assert "b · " in str(cells[2].find(f"{SVG}title").text)
    assert str(cells[1].find(f"{SVG}title").text).split(": ")[-1].startswith("0.25")
    lines = list(root.iter(f"{SVG}polyline"))
    assert len(lines) == 3
    tints = ["#{:02x}{:02x}{:02x}".format(*tint) for tint in OKABE_ITO]
    assert [line.get("stroke") for line in lines] == [tints[0], tints[1], tints[0]]
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in lines[0].get("points").split())
    assert (x0, x1) == (64, 744)
    assert (y0, y1) == (220, 24)  # up is more
    shown = [str(t.text) for t in root.iter(f"{SVG}text")]
    assert {"no values", "1000", "0.001"} <= set(shown)


def test_an_svg_has_equal_ratios_at_equal_distances_on_a_logarithmic_x_axis(tmp_path: Path) -> None:
    chart = LineChart("c", [Series("a", [0.0, 1.0, 10.0, 1000.0], [7.0, 1.0, 1.0, 2.0])], "x", log_x=True)
    export(figure(heats=[], charts=[chart]), tmp_path / "f.svg")
    root = ElementTree.parse(tmp_path / "f.svg").getroot()
    (line,) = root.iter(f"{SVG}polyline")
    xs = [float(point.split(",")[0]) for point in str(line.get("points")).split()]
    assert xs == pytest.approx([64, 64 + 680 / 3, 744], abs=0.1), "0 has no place there"
    assert {"1", "10", "100", "1000"} <= {str(t.text) for t in root.iter(f"{SVG}text")}


def test_a_picture_is_as_wide_as_its_longest_line(tmp_path: Path) -> None:
    export(figure("x" * 300), tmp_path / "f.svg")
    root = ElementTree.parse(tmp_path / "f.svg").getroot()
    assert float(root.get("width", "0")) > 300 * 6
    shown = [str(t.text) for t in root.iter(f"{SVG}text")]
    assert any("grey: not there" in text for text in shown)
    notes = [" ".join(f"word{i}" for i in range(60)), "y" * 130]
    export(figure(notes=notes), tmp_path / "f.svg")
    root = ElementTree.parse(tmp_path / "f.svg").getroot()
    assert float(root.get("width", "0")) == pytest.approx(130 * 6.6 + 8, abs=1), "as its longest word"
    lines = [str(t.text) for t in root.iter(f"{SVG}text")][1:6]
    assert " ".join(lines[:4]) == notes[0], "notes are broken between words"
    assert lines[4] == notes[1]
    export(figure(heats=[Heat("whole", ["a"], ["b"], np.ones((1, 1)))]), tmp_path / "f.svg")
    assert "grey" not in (tmp_path / "f.svg").read_text("utf-8")


def test_colours_are_viridis() -> None:
    steps = [colour(i / (len(VIRIDIS) - 1)) for i in range(len(VIRIDIS))]
    assert steps == ["#{:02x}{:02x}{:02x}".format(*tint) for tint in VIRIDIS]
    assert colour(1 / 16) == "#461768"  # half-way between the first two


def test_json_has_null_for_what_is_not_a_number(tmp_path: Path) -> None:
    export(figure(HOSTILE), tmp_path / "f.json")
    found = json.loads((tmp_path / "f.json").read_text("ascii"))
    assert found["title"] == f"title {HOSTILE}"
    assert found["facts"] == {"model": HOSTILE, HOSTILE: None, "layers": [1, 0.5], "folder": "a", "none": None}
    table = {"kind": "edge", "columns": ["token", HOSTILE, "n"]}
    assert found["tables"] == [{**table, "rows": [[HOSTILE, 0.123456, 7], ["b", None, 1234567]]}]


def test_npz_has_the_arrays_and_where_they_are_from(tmp_path: Path) -> None:
    export(figure("▁the"), tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz", allow_pickle=False) as found:
        assert set(found) == {"weights", "edges", "facts"}
        np.testing.assert_array_equal(found["weights"], figure().arrays["weights"])
        assert json.loads(str(found["facts"]))["model"] == "▁the"


def test_csv_has_every_table_in_full(tmp_path: Path) -> None:
    third = 1 / 3
    tables = [
        Table("head", ("head", "kl"), [("L0.H1", third), ("L1.H0", np.float32(0.1)), ("L1.H1", math.nan)]),
        Table("token", ("token", "n"), [('a "b",\nc', -7), (None, np.int64(2**53 + 1))]),
    ]
    export(figure(tables=tables), tmp_path / "f.csv")
    text = (tmp_path / "f.csv").read_bytes().decode("utf-8")
    assert text.replace("\r\n", "").count("\n") == 1  # lines end as RFC 4180 has it, but inside a cell
    head, token = text.split("\r\n\r\n")
    rows = list(csv.reader(head.splitlines(), strict=True))
    assert rows[0] == ["table", "head", "kl"]
    assert [float(row[2]) for row in rows[1:3]] == [third, float(np.float32(0.1))]
    assert rows[3] == ["head", "L1.H1", ""]
    rows = list(csv.reader(token.splitlines(keepends=True), strict=True))
    assert rows == [["table", "token", "n"], ["token", 'a "b",\nc', "-7"], ["token", "", "9007199254740993"]]


def test_csv_is_harmless_to_a_terminal_and_a_spreadsheet(tmp_path: Path) -> None:
    cells = ["=1+1", "+", "-2", "@SUM(A1)", "\t=1", " \n-x", "＝1", "a=b", "", "'=", HOSTILE, -2, -0.5, True]
    table = Table("edge", ("=token", HOSTILE), [(cell, "") for cell in cells])
    export(figure(tables=[table]), tmp_path / "f.csv")
    with (tmp_path / "f.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file, strict=True)
    assert head == ["table", "'=token", clean(HOSTILE)]
    shown = ["'=1+1", "'+", "'-2", "'@SUM(A1)", "'\t=1", "' \n-x", "'＝1", "a=b", "", "'=", clean(HOSTILE)]
    assert [row[1] for row in rows] == [*shown, "-2", "-0.5", "True"]
    assert "\x1b" in HOSTILE
    assert "\x1b" not in clean(HOSTILE)


def test_csv_of_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GemmaTuiError, match="no table"):
        export(figure(tables=[]), tmp_path / "f.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [ending for ending in FORMATS if ending != ".csv"])
def test_a_figure_with_nothing_in_it_is_written(tmp_path: Path, ending: str) -> None:
    export(Figure("nothing"), tmp_path / f"f{ending}")
    empty = figure(heats=[Heat("m", [], [], np.zeros((0, 0)))], charts=[LineChart("c", [])])
    export(empty, tmp_path / f"f{ending.upper()}")
    assert (tmp_path / f"f{ending}").stat().st_size > 0


def test_where_no_file_can_be_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "file").write_text("")
    for name, words in (
        ("none/f.svg", "is not there"),
        ("file/f.svg", "is not there"),
        ("folder.svg", "is a folder"),
        ("f.gif", "take .json, .npz, .csv, .svg, .png, .html"),
        ("f", "no ending"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            export(figure(), tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(EngineError, match="cannot be written"):
        export(figure(), tmp_path / f"{'x' * 250}.svg")


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="is not writable"):
        export(figure(), tmp_path / "f.svg")


def test_a_file_stays_whole_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "f.svg"
    export(figure(), path)
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        export(figure(charts=[None]), path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".f.svg*"))
