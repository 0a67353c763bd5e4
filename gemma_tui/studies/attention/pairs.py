"""One head, query by key: a pooled map of its weights, the strongest edges, what a token reads and who reads it."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from engines.edits import Span, check_heads, check_span
from engines.inspection import TILE
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure, Table
from gemma_tui.heat import Heat
from gemma_tui.studies.attention.heads import head_name
from gemma_tui.studies.attention.parts import part
from gemma_tui.studies.attention.pooling import POOLINGS, Pool, cells
from gemma_tui.studies.attention.reading import Reading, View, window_notes
from gemma_tui.text import one_line

SPAN = re.compile(r"([0-9]{0,9}):([0-9]{0,9})")
EDGE_COLUMNS = ("query", "query_token", "key", "key_token", "distance", "weight")


@dataclass(frozen=True)
class Shading:
    """How weights become the values of a map.

    Attributes:
        pooling: of the visible weights of a cell, ``max`` or ``mean``.
        per_row: on the map each row is divided by the largest weight it has anywhere.
        without_sink: key 0 is dropped, and each row divided by what it has elsewhere.
        gamma: the pooled values are raised to this power; below 1 it lifts what is weak.
    """

    pooling: str = "max"
    per_row: bool = False
    without_sink: bool = False
    gamma: float = 1.0

    def check(self) -> None:
        """Refuse a pooling that is not there, and a power that is not positive."""
        if self.pooling not in POOLINGS:
            raise UsageError(f"pooling {self.pooling[:40]!r} is not there: choose {' or '.join(POOLINGS)}")
        if not 0 < self.gamma < np.inf:
            raise UsageError(f"gamma {self.gamma} must be positive: 0.5 lifts weak weights, 1 leaves them")


@dataclass(frozen=True)
class Edge:
    """A weight, and the positions it joins."""

    query: int
    key: int
    weight: float


@dataclass(frozen=True)
class Ranked:
    """The strongest of some edges, and the sum of the weights of the others."""

    edges: list[Edge]
    rest: float


@dataclass(frozen=True, eq=False)
class PairMap:
    """The weights of one head in cells.

    Attributes:
        query_edges, key_edges: int ``[rows + 1]`` and ``[columns + 1]``; a cell goes from one to before the next.
        weights: float64 ``[rows, columns]``, pooled, before gamma; NaN where no weight of the cell is visible.
        strongest: edges inside the rectangle by their weights, not divided per row; a row that sees one key only has
            no choice, and is left out.
    """

    query_edges: np.ndarray
    key_edges: np.ndarray
    weights: np.ndarray
    shading: Shading
    strongest: list[Edge]

    @property
    def values(self) -> np.ndarray:
        """What is shown."""
        return self.weights**self.shading.gamma


def pair_map(
    reading: Reading,
    layer: int,
    head: int,
    queries: Span | None = None,
    keys: Span | None = None,
    shape: tuple[int, int] = (48, 64),
    shading: Shading | None = None,
    top: int = 10,
) -> Generator[float, None, PairMap]:
    """The weights of a head over a rectangle of queries and keys (all), in at most ``shape`` cells.

    Holds the rows of ``TILE`` queries at a time.

    Raises:
        UsageError: a shading that is not there, or no cells.
        UnsupportedError: a head or positions that are not there.
    """
    shading = shading or Shading()
    shading.check()
    if min(shape) < 1:
        raise UsageError(f"a map of {shape[0]} by {shape[1]} cells shows nothing: take at least 1 by 1")
    queries, keys = queries or (0, reading.length), keys or (0, reading.length)
    check_heads(reading.inspection.config, layer, (head,))
    check_span(keys, reading.length)
    check_span(queries, reading.length)
    pool = Pool(cells(queries, shape[0]), cells(keys, shape[1]), shading.pooling)
    strongest: list[Edge] = []
    for start, rows in _rows(reading, layer, head, queries, shading):
        highest = np.where(np.isnan(rows), 0, rows).max(1)
        pool.add(start, (_divided(rows, highest) if shading.per_row else rows)[:, slice(*keys)])
        first = max(start, 2 if shading.without_sink else 1)
        strongest = _stronger(strongest, rows[first - start :, slice(*keys)], first, keys[0], top)
        yield (start + len(rows) - queries[0]) / (queries[1] - queries[0])
    return PairMap(pool.queries, pool.keys, pool.result(), shading, strongest)


def _rows(reading: Reading, layer: int, head: int, queries: Span, shading: Shading) -> Iterator[tuple[int, np.ndarray]]:
    """Weights float64 ``[queries, T]`` a tile at a time, without the sink if that is asked for; NaN is not visible."""
    window = reading.inspection.config.window(layer)
    for start in range(*queries, TILE):
        stop = min(start + TILE, queries[1])
        weights = reading.inspection.attention(layer, head, (start, stop)).astype(np.float64)
        distance = np.arange(start, stop)[:, None] - np.arange(reading.length)
        weights[(distance < 0) | (distance >= (window or reading.length))] = np.nan
        if shading.without_sink:
            weights[:, 0] = np.nan
            weights = _divided(weights, np.nansum(weights, axis=1))
        yield start, weights


def _divided(weights: np.ndarray, divisors: np.ndarray) -> np.ndarray:
    """Rows over their divisors; a row that has nothing is NaN."""
    return weights / np.where(divisors > 0, divisors, np.nan)[:, None]


def _stronger(known: list[Edge], weights: np.ndarray, query: int, key: int, count: int) -> list[Edge]:
    """The strongest of some edges and of those of a tile, whose first is ``query`` to ``key``."""
    flat = np.nan_to_num(weights.ravel(), nan=-1.0)
    some = np.argpartition(-flat, count)[:count] if flat.size > count else np.arange(flat.size)
    found = [
        Edge(query + int(place // weights.shape[1]), key + int(place % weights.shape[1]), float(flat[place]))
        for place in some
        if flat[place] >= 0
    ]
    return _best([*known, *found], count).edges


def top_keys(
    reading: Reading, layer: int, head: int, query: int, count: int = 10, shading: Shading | None = None
) -> Ranked:
    """What a token reads: the keys with the most weight, and the mass of the others."""
    ((_, rows),) = _rows(reading, layer, head, (query, query + 1), shading or Shading())
    return _best([Edge(query, int(key), float(rows[0, key])) for key in np.flatnonzero(np.isfinite(rows[0]))], count)


def readers(
    reading: Reading, layer: int, head: int, key: int, count: int = 10, shading: Shading | None = None
) -> Generator[float, None, Ranked]:
    """Who reads a token: the queries that give it the most weight, and the sum over the others."""
    check_span((key, key + 1), reading.length)
    end = min(reading.length, key + (reading.inspection.config.window(layer) or reading.length))
    edges: list[Edge] = []
    for start, rows in _rows(reading, layer, head, (key, end), shading or Shading()):
        column = rows[:, key]
        edges += [Edge(start + int(row), key, float(column[row])) for row in np.flatnonzero(np.isfinite(column))]
        yield (start + len(rows) - key) / (end - key)
    return _best(edges, count)


def _best(edges: list[Edge], count: int) -> Ranked:
    ranked = sorted(edges, key=lambda edge: (-edge.weight, edge.query, edge.key))
    return Ranked(ranked[:count], float(sum(edge.weight for edge in ranked[count:])))


def find_token(labels: Sequence[str], text: str, after: int = -1) -> int:
    """Where a piece of text next begins, in tokens; upper and lower case are one, and it may run over several tokens.

    Args:
        labels: the tokens as they are shown.

    Raises:
        UsageError: it is not there after that position.
    """
    written = [label.casefold() for label in labels]
    starts = np.concatenate(([0], np.cumsum([len(token) for token in written])))
    begin = int(starts[min(after + 1, len(written))])
    wanted = text.replace(" ", "▁").casefold()
    place = "".join(written).find(wanted, begin) if wanted else -1
    if place < 0:
        where = f"after position {after}" if after >= 0 else "in the text"
        raise UsageError(f"{one_line(text, 40)!r} is not {where}: look for a part of it, or start at the beginning")
    return int(np.searchsorted(starts, place, "right")) - 1


def span_of(text: str, name: str, length: int) -> Span | None:
    """Positions as they are typed: ``100:400`` are 100 to 399, ``100:`` all from there on; None where nothing is.

    Raises:
        UsageError: it is not written like that, or the text has no such positions; ``name`` is the option's.
    """
    if not text:
        return None
    shown, found = one_line(text, 40), SPAN.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{name}: {shown!r} cannot be read: write 100:400 for positions 100 to 399, 100: or :400")
    first, end = int(found[1] or 0), int(found[2] or length)
    if not first < end <= length:
        raise UsageError(f"{name}: {shown} is not there: the text has positions 0 to {length - 1}, the smaller first")
    return first, end


def head_view(
    reading: Reading,
    layer: int,
    head: int,
    shape: tuple[int, int],
    shading: Shading,
    query: int | None = None,
    key: int | None = None,
    top: int = 10,
    queries: Span | None = None,
    keys: Span | None = None,
) -> View:
    """The pooled map of a head, its strongest edges, and if asked what one query reads and who reads one key.

    Args:
        queries, keys: the part of the text that the map and the edges are of; None for all.
    """
    parts = 1 if key is None else 2
    found = yield from part(pair_map(reading, layer, head, queries, keys, shape, shading, top), 0, parts)
    tables, notes = [Table("edge", EDGE_COLUMNS, _lines(reading, found.strongest))], _notes(reading, found)
    if query is not None:
        read = top_keys(reading, layer, head, query, top, shading)
        tables.append(Table("key", EDGE_COLUMNS, _lines(reading, read.edges)))
        notes.append(f"position {query} {reading.labels[query]}: weight on keys that are not listed {read.rest:.4g}")
    if key is not None:
        seen = yield from part(readers(reading, layer, head, key, top, shading), 1, parts)
        tables.append(Table("reader", EDGE_COLUMNS, _lines(reading, seen.edges)))
        notes.append(f"position {key} {reading.labels[key]}: weight from queries not listed {seen.rest:.4g}")
    config = reading.inspection.config
    kind = "local" if config.is_local(layer) else "global"
    spans = [(int(edges[0]), int(edges[-1])) for edges in (found.query_edges, found.key_edges)]
    shown = _part(reading, spans)
    return Figure(
        f"{head_name(layer, head)}, {kind}{shown}",
        notes=notes,
        heats=[_heat(reading, f"{head_name(layer, head)}: query (down) by key (across){shown}", found)],
        tables=tables,
        arrays={
            "weights": found.weights,
            "values": found.values,
            "query_edges": found.query_edges,
            "key_edges": found.key_edges,
        },
        facts={**reading.facts, "layer": layer, "head": head, "kind": kind, **vars(shading), "queries": spans[0],
               "keys": spans[1]},
    )  # fmt: skip


def _part(reading: Reading, spans: Sequence[Span]) -> str:
    """Which queries and keys, where they are not those of the whole text."""
    if all(span == (0, reading.length) for span in spans):
        return ""
    return "".join(f", {name} {a}-{b - 1}" for name, (a, b) in zip(("queries", "keys"), spans, strict=True))


def _lines(reading: Reading, edges: list[Edge]) -> list[tuple[int, str, int, str, int, float]]:
    names = reading.labels
    return [(e.query, names[e.query], e.key, names[e.key], e.query - e.key, e.weight) for e in edges]


def _heat(reading: Reading, title: str, found: PairMap) -> Heat:
    """A cell of one token is called by its place and itself, another by the first and the last place."""
    rows, columns = (
        [f"{a} {reading.labels[a]}" if b == a + 1 else f"{a}-{b - 1}" for a, b in pairwise(edges.tolist())]
        for edges in (found.query_edges, found.key_edges)
    )
    return Heat(title, rows, columns, found.values)


def _notes(reading: Reading, found: PairMap) -> list[str]:
    rows, columns = (int(np.diff(edges).max()) for edges in (found.query_edges, found.key_edges))
    shading, notes = found.shading, window_notes(reading)
    if rows * columns > 1:
        notes.append(f"a cell is the {shading.pooling} of the visible weights of up to {rows} × {columns} tokens")
    if shading.without_sink:
        notes.append("position 0 is taken out, and rows are renormalised")
    if shading.per_row:
        notes.append("on the map rows are divided by their largest weight; in tables they are not")
    if shading.gamma != 1:
        notes.append(f"the map shows weight ** {shading.gamma:g}; tables and arrays do not")
    return notes
