"""A figure as SVG: maps in viridis, lines in Okabe and Ito's colours. Nothing in it runs or is fetched."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from textwrap import wrap
from typing import BinaryIO

import numpy as np
from rich.cells import cell_len

from gemma_tui.figure import Figure, LineChart
from gemma_tui.heat import VIRIDIS, Heat, legend
from gemma_tui.plots import OKABE_ITO, Series, log_ticks, number_text, reduce, ticks
from gemma_tui.text import clean

WIDTH, HEIGHT = 760, 260
"""Of a chart, pixels."""

LINE, LETTER = 16, 6.6
"""Height of a line of text, and about the width of a letter at 11 pixels."""

LEFT, RIGHT, TOP, BOTTOM = 64, 16, 24, 40
"""Room around a chart's axes."""

LABEL = 28
"""Letters of a row's or column's name; the whole name is in the cell's title."""

FONTS = "ui-monospace,monospace,'DejaVu Sans Mono','Liberation Mono','Noto Sans Mono','DejaVu Sans','Noto Sans'"
"""What comes after ``monospace`` is for those who know no font by that name."""

STYLE = f"text{{font:11px {FONTS};fill:#222}}.t{{font-weight:bold}}.m{{text-anchor:middle}}.e{{text-anchor:end}}"
DASHES = ("", "6 3", "2 3", "8 3 2 3")

Drawn = tuple[list[str], float, float]
"""Elements, and the width and height they take."""


def escaped(text: str) -> str:
    """Foreign text for SVG or HTML, in an attribute or between tags: cleaned, and nothing in it is markup."""
    # XML knows no way at all to write these two.
    return html.escape(clean(text).replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd"), quote=True)


def write_svg(figure: Figure, file: BinaryIO) -> None:
    """All maps and charts below one another, under the title and the notes."""
    pieces, width, height = stacked([heading(figure), *drawings(figure)])
    file.write(document(pieces, width, height).encode("utf-8"))


def document(pieces: list[str], width: float, height: float, namespace: bool = True) -> str:
    """Elements as an SVG of its own; inside HTML it needs no namespace."""
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    name = 'xmlns="http://www.w3.org/2000/svg" ' if namespace else ""
    head = f"<svg {name}{size}><style>{STYLE}</style>"
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *pieces, "</svg>\n"])


def drawings(figure: Figure) -> Iterator[Drawn]:
    """Every map and chart by itself."""
    yield from (heat_map(heat) for heat in figure.heats)
    yield from (line_chart(chart) for chart in figure.charts)


def stacked(parts: Sequence[Drawn]) -> Drawn:
    """Parts below one another."""
    pieces, y = [], 0.0
    for elements, _, height in parts:
        pieces += [f'<g transform="translate(0 {y:.0f})">', *elements, "</g>"]
        y += height + LINE
    return pieces, max(width for _, width, _ in parts), y


def heading(figure: Figure) -> Drawn:
    """Title and notes, these no wider than a chart where words allow it."""
    letters = int((WIDTH - 8) / LETTER)
    wrapped = (wrap(note, letters, break_long_words=False, break_on_hyphens=False) for note in figure.notes)
    lines = [figure.title, *(line for note in wrapped for line in note)]
    elements = [label(4, LINE * (i + 1), line, "" if i else "t") for i, line in enumerate(lines)]
    return elements, max(WIDTH, *(extent(line) + 8 for line in lines)), LINE * (len(lines) + 1)


def label(x: float, y: float, text: str, kind: str = "", more: str = "") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{more}>{escaped(text)}</text>'


def colour(level: float) -> str:
    """Viridis at a level from 0 to 1, between its steps."""
    place = min(max(level, 0.0), 1.0) * (len(VIRIDIS) - 1)
    step = min(int(place), len(VIRIDIS) - 2)
    pairs = zip(VIRIDIS[step], VIRIDIS[step + 1], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - step)):02x}" for a, b in pairs)


def heat_map(heat: Heat) -> Drawn:
    """A map; a value is read by resting on its cell. What is not on the scale has no cell."""
    rows, columns = heat.values.shape
    cell = max(6.0, min(32.0, (WIDTH - 200) / max(columns, 1)))
    tall = max(6.0, min(cell, 20.0))
    names = [f"{name} {heat.marks[i]}" if heat.marks else name for i, name in enumerate(heat.rows)]
    left = 8 + LETTER * min(LABEL + 2, max((len(name) for name in names), default=0))
    over = LINE + LETTER * min(LABEL, max((len(name) for name in heat.columns), default=0))
    top, bottom = LINE + over, LINE + over + rows * tall
    elements = [label(4, LINE, heat.title, "t")]
    elements += [label(left - 4, top + (i + 0.5) * tall + 4, names[i][: LABEL + 2], "e") for i in _some(rows, tall)]
    for j in _some(columns, cell):
        x = left + (j + 0.5) * cell + 4
        elements.append(
            label(x, top - 4, heat.columns[j][:LABEL], "", f' transform="rotate(-90 {x:.1f} {top - 4:.1f})"')
        )
    elements.append(f'<rect x="{left}" y="{top}" width="{columns * cell}" height="{rows * tall}" fill="#e4e4e4"/>')
    elements += list(_cells(heat, left, top, cell, tall))
    scale, end = _scale(heat, left, bottom + 6)
    wide = max(WIDTH, left + columns * cell, end, extent(heat.title)) + 8
    return [*elements, *scale], wide, bottom + 2.5 * LINE


def _some(count: int, size: float) -> range:
    """Which names there is room for."""
    return range(0, count, max(1, math.ceil(11 / size)))


def _cells(heat: Heat, left: float, top: float, cell: float, tall: float) -> Iterator[str]:
    for i, j in np.argwhere(np.isfinite(heat.levels)).tolist():
        place = f'x="{left + j * cell:.1f}" y="{top + i * tall:.1f}" width="{cell:.1f}" height="{tall:.1f}"'
        title = f"<title>{escaped(heat.reading(i, j))}</title>"
        yield f'<rect {place} fill="{colour(float(heat.levels[i, j]))}">{title}</rect>'


def _scale(heat: Heat, x: float, y: float) -> tuple[list[str], float]:
    """The legend and where it ends: lowest value, colours, highest value, and what else there is to know."""
    low, high, notes = legend(heat)
    start = x + extent(low) + LETTER if high else x
    after = start + 134 if high else start
    rest = "  ".join(part for part in (high or low, notes, "" if _complete(heat) else "grey: not there") if part)
    steps = [
        f'<rect x="{start + 4 * i:.1f}" y="{y:.1f}" width="4.2" height="12" fill="{colour(i / 31)}"/>'
        for i in range(32 if high else 0)
    ]
    ends = [label(x, y + 11, low)] if high else []
    return [*ends, *steps, label(after, y + 11, rest)], after + extent(rest)


def _complete(heat: Heat) -> bool:
    return bool(np.isfinite(heat.levels).all())


def extent(text: str) -> float:
    """About how wide a line of text is, pixels."""
    return LETTER * cell_len(text)


def line_chart(chart: LineChart) -> Drawn:
    """Lines over one axis, each named below."""
    lines = [reduce(series, WIDTH - LEFT - RIGHT, chart.log, chart.log_x) for series in chart.series]
    xs, ys = ([v for line in lines for v in line[axis]] for axis in (0, 1))
    elements = [label(4, LINE, chart.title, "t")]
    if not xs:
        return [*elements, label(LEFT, 2.5 * LINE, "no values")], WIDTH, 4 * LINE
    across, down = _axis(xs, LEFT, WIDTH - RIGHT), _axis(ys, HEIGHT - BOTTOM, TOP)
    elements += _grid(chart, (min(xs), max(xs)), (min(ys), max(ys)), across, down)
    for number, (series, (x, y)) in enumerate(zip(chart.series, lines, strict=True)):
        points = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in zip(x, y, strict=True))
        elements += [*_line(series, number, points), *_key(series, number, HEIGHT + LINE * number)]
    wide = max(WIDTH, extent(chart.title), *(LEFT + 40 + extent(series.label) for series in chart.series))
    return elements, wide, HEIGHT + LINE * len(chart.series)


def _axis(values: list[float], start: float, end: float) -> Callable[[float], float]:
    """Where a value is, in pixels; one value alone is in the middle."""
    low, high = min(values), max(values)
    # Halves, because the distance between two large floats may be none.
    half = high / 2 - low / 2
    return lambda value: start + (end - start) * ((value / 2 - low / 2) / half if half > 0 else 0.5)


def _grid(
    chart: LineChart,
    xs: tuple[float, float],
    ys: tuple[float, float],
    across: Callable[[float], float],
    down: Callable[[float], float],
) -> list[str]:
    """Round numbers on both axes."""
    elements = []
    for value, shown in _ticks(*ys, 6, chart.log):
        y = down(value)
        elements.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        elements.append(label(LEFT - 6, y + 4, shown, "e"))
    for value, shown in _ticks(*xs, 8, chart.log_x):
        elements.append(f'<path d="M{across(value):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#eee"/>')
        elements.append(label(across(value), HEIGHT - BOTTOM + LINE, shown, "m"))
    return [*elements, label((LEFT + WIDTH) / 2, HEIGHT - 6, chart.x_label, "m")]


def _ticks(low: float, high: float, count: int, log: bool) -> list[tuple[float, str]]:
    """Places on an axis, and the numbers that stand there."""
    places = (log_ticks if log else ticks)(low, high, count)
    return [(place, number_text(10.0 ** min(place, 308.0) if log else place)) for place in places]


def _look(series: Series, number: int) -> str:
    turn, place = divmod(number if series.look is None else series.look, len(OKABE_ITO))
    dashes = DASHES[turn % len(DASHES)]
    tint = "#{:02x}{:02x}{:02x}".format(*OKABE_ITO[place])
    return (
        f'stroke="{tint}" stroke-width="1.8" fill="none" stroke-linecap="round" stroke-dasharray="{dashes or "none"}"'
    )


def _line(series: Series, number: int, points: str) -> list[str]:
    if not points:
        return []
    # A single point is a line to itself, which round ends make a dot.
    points = points if " " in points else f"{points} {points}"
    return [f'<polyline points="{points}" {_look(series, number)}><title>{escaped(series.label)}</title></polyline>']


def _key(series: Series, number: int, y: float) -> list[str]:
    return [f'<path d="M{LEFT} {y + 8}h24" {_look(series, number)}/>', label(LEFT + 32, y + 12, series.label)]
