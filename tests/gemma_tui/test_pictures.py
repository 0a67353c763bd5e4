"""A figure as PNG: the colours and places of its SVG, and no picture without its words."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from gemma_tui.errors import GemmaTuiError
from gemma_tui.exports import check_target, export, png
from gemma_tui.exports.png import letters_drawn
from gemma_tui.figure import Figure, LineChart
from gemma_tui.heat import Heat
from gemma_tui.plots import OKABE_ITO, Series

SVG = "{http://www.w3.org/2000/svg}"
FIGURE = Figure(
    "title",
    heats=[Heat("map", ["a", "b"], ["c", "d"], np.array([[0.0, 0.25], [np.nan, 1.0]]))],
    charts=[LineChart("chart", [Series("a", [0, 1], [1.0, 4.0]), Series("b", [0, 1], [4.0, 1.0])])],
)


def decoded(data: bytes) -> np.ndarray:
    """Pixels (height, width, 4) of a PNG with 8-bit RGBA, as the standard has it."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        chunks.append((kind, data[at + 8 : at + 8 + size]))
        at += 12 + size
    width, height, *form = struct.unpack(">IIBBBBB", chunks[0][1])
    assert form == [8, 6, 0, 0, 0]
    raw = zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    stride, above, rows = 4 * width + 1, bytearray(4 * width), []
    for start in range(0, len(raw), stride):
        above = _unfiltered(raw[start], bytearray(raw[start + 1 : start + stride]), above)
        rows.append(above)
    return np.array(rows, dtype=np.uint8).reshape(height, width, 4)


def _unfiltered(way: int, line: bytearray, above: bytearray) -> bytearray:
    for i in range(len(line)) if way else ():
        a, b, c = (line[i - 4], above[i], above[i - 4]) if i >= 4 else (0, above[i], 0)
        if way == 4:
            p = a + b - c
            nearest = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
        line[i] = line[i] + (a, b, (a + b) // 2, nearest if way == 4 else 0)[way - 1] & 255
    return line


def tint(name: str) -> list[int]:
    return [*bytes.fromhex(name.removeprefix("#")), 255]


def test_a_picture_has_the_colours_of_the_svg_in_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "letters_drawn", lambda: True)
    export(FIGURE, tmp_path / "f.PNG")
    export(FIGURE, tmp_path / "f.svg")
    pixels = decoded((tmp_path / "f.PNG").read_bytes())
    root = ElementTree.parse(tmp_path / "f.svg").getroot()
    assert pixels.shape == (2 * int(root.get("height", "")), 2 * int(root.get("width", "")), 4)
    assert pixels[0, 0].tolist() == pixels[-1, -1].tolist() == [255] * 4
    heat = root.findall(f"{SVG}g")[1]
    down = float(heat.get("transform", "").split()[1].rstrip(")"))
    cells = [cell for cell in heat.iter(f"{SVG}rect") if cell.find(f"{SVG}title") is not None]
    assert len(cells) == 3
    for cell in cells:
        x, y, width, height = (float(cell.get(name, "")) for name in ("x", "y", "width", "height"))
        middle = pixels[round(2 * (down + y + height / 2)), round(2 * (x + width / 2))]
        assert middle.tolist() == tint(cell.get("fill", ""))
    for place in (0, 1):
        assert (pixels == [*OKABE_ITO[place], 255]).all(-1).sum() > 1000
    words = pixels[: round(2 * down)]
    assert bool((words[..., :3] < 100).all(-1).any()) == letters_drawn()


def test_a_picture_without_its_words_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "DRAW", png.DRAW.replace("svg_string=", "skip_system_fonts=True, svg_string="))
    assert not letters_drawn()
    for refused in (check_target, lambda path: export(FIGURE, path)):
        with pytest.raises(GemmaTuiError, match=r"install one .*, or take \.svg") as caught:
            refused(tmp_path / "f.png")
        assert "\n" not in str(caught.value)
    check_target(tmp_path / "f.svg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("pictures", "drawn"), [("   ", False), (" ▯▯", False), (" aa", False), ("aax", False), (" ax", True)]
)
def test_letters_are_drawn_where_they_are_not_alike(
    pictures: str, drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    coming = iter(pictures)
    monkeypatch.setattr(png, "drawn", lambda svg: next(coming).encode())
    assert letters_drawn() == drawn


def test_a_picture_that_cannot_be_drawn_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "letters_drawn", lambda: True)
    with pytest.raises(GemmaTuiError, match=r"pixels: take \.svg"):
        export(Figure("x" * 1_000_000), tmp_path / "f.png")
    monkeypatch.setattr(png, "DRAW", "raise ValueError('a\\nb')")
    with pytest.raises(GemmaTuiError, match=r"cannot be drawn \(b\): take \.svg"):
        export(FIGURE, tmp_path / "f.png")
    monkeypatch.setattr(png, "DRAW", "import os; os.abort()")
    with pytest.raises(GemmaTuiError, match=r"cannot be drawn \(exit code -6\)"):
        export(FIGURE, tmp_path / "f.png")
    assert not list(tmp_path.iterdir())
