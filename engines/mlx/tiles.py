"""Attention weights in tiles of queries, made again in float32, in MLX. The file mirrors ``engines/torch/tiles.py``.

MLX is lazy, so that every tile is computed before the next one is described.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from engines.edits import Knockout, Span
from engines.inspection import ROW_SUMS, LayerStatistics, first_key, no_tick, spans
from engines.mlx.attention import visible

TINY = 1e-37
"""Not so small that a device takes it for zero."""


@dataclass
class Layer:
    """What the attention of one layer is made from.

    Attributes:
        q, k, v: float32 ``[heads or kv_heads, T, head_dim]``, normalised and rotated.
        window: keys that a query sees; None for all.
        tick: called before each tile.
    """

    q: mx.array
    k: mx.array
    v: mx.array
    scale: float
    window: int | None
    cuts: Sequence[Knockout] = ()
    tick: Callable[[], object] = no_tick

    @property
    def length(self) -> int:
        """T."""
        return self.q.shape[1]


@dataclass
class Tile:
    """Weights ``[heads, rows, keys]`` of queries ``start`` to ``stop - 1`` over keys ``first`` to ``stop - 1``."""

    weights: mx.array
    first: int
    start: int
    stop: int


def allowed(layer: Layer, start: int, stop: int, heads: range) -> mx.array:
    """Which edges there are, boolean ``[rows, keys]``, or ``[heads, rows, keys]`` where some are cut."""
    queries = mx.arange(start, stop)
    keys = mx.arange(first_key(start, layer.window), stop)
    seen = visible(queries, keys, layer.window)
    if not layer.cuts:
        return seen
    seen = mx.repeat(seen[None], len(heads), axis=0)
    for cut in layer.cuts:
        edges = queries[:, None] - keys >= cut.beyond
        if cut.queries is not None:
            edges &= ((queries >= cut.queries[0]) & (queries < cut.queries[1]))[:, None]
        if cut.keys is not None:
            edges &= (keys >= cut.keys[0]) & (keys < cut.keys[1])
        for head in set(cut.heads) & set(heads):
            seen[head - heads.start] &= ~edges
    own = queries[:, None] == keys
    return seen | (own & ~seen.any(axis=-1, keepdims=True))


def tiles(layer: Layer, span: Span | None = None, heads: range | None = None) -> Iterator[Tile]:
    """The weights of some queries (all) and of heads that share no key head with others (all), tile by tile."""
    chosen = heads or range(layer.q.shape[0])
    group = layer.q.shape[0] // layer.k.shape[0]
    q, k = layer.q[chosen.start : chosen.stop], layer.k[chosen.start // group : (chosen.stop - 1) // group + 1]
    for start, stop in spans(span or (0, layer.length)):
        layer.tick()
        first = first_key(start, layer.window)
        rows = q[:, start:stop].reshape(k.shape[0], -1, q.shape[2])
        scores = rows @ k[:, first:stop].swapaxes(1, 2) * layer.scale
        scores = scores.reshape(len(chosen), stop - start, stop - first)
        scores = mx.where(allowed(layer, start, stop, chosen), scores, -mx.inf)
        yield Tile(mx.softmax(scores, axis=-1), first, start, stop)


def entropy(weights: mx.array) -> mx.array:
    """Of rows, nats."""
    return -(weights * mx.log(mx.maximum(weights, TINY))).sum(axis=-1)


def statistics(layer: Layer, tokens: mx.array, sliding_window: int) -> LayerStatistics:
    """The sums of ``LayerStatistics``, one tile after the other."""
    heads, length = layer.q.shape[0], layer.length
    values = mx.linalg.norm(layer.v, axis=-1)
    received, by_distance = mx.zeros((2, heads, length))
    rows: list[mx.array] = []
    for tile in tiles(layer):
        a, keys = tile.weights, slice(tile.first, tile.stop)
        rows.append(_row_sums(tile, values[:, keys], tokens, sliding_window if layer.window is None else None))
        received[:, keys] += a.sum(axis=1)
        by_distance[:, : a.shape[2]] += _diagonals(a)
        mx.eval(rows[-1], received, by_distance)
    sums = dict(zip(ROW_SUMS, np.array(mx.concatenate(rows, axis=-1)), strict=True))
    others = {"received": received, "by_distance": by_distance, "value_norm": values}
    return LayerStatistics(**sums, **{name: np.array(array) for name, array in others.items()})


def _row_sums(tile: Tile, values: mx.array, tokens: mx.array, sliding_window: int | None) -> mx.array:
    """The row statistics in their order, ``[9, heads, rows]``."""
    a = tile.weights
    (heads, n, count), rows = a.shape, mx.arange(a.shape[1])
    queries = rows + tile.start
    keys = mx.arange(tile.first, tile.stop)
    # Distances from the tile's end, because from the query they would be differences of large numbers.
    back = (tile.stop - 1 - keys).astype(mx.float32)
    other = (keys > 0).astype(mx.float32)
    features = mx.stack([mx.broadcast_to(other, values.shape), mx.broadcast_to(other * back, values.shape), values], -1)
    sums = (a.reshape(values.shape[0], -1, count) @ features).reshape(heads, n, 3)
    elsewhere, reach, weighted = (sums[..., i] for i in range(3))
    reach = reach - (tile.stop - 1 - queries) * elsewhere
    nothing = mx.zeros((heads, n))
    before = a[:, rows, mx.maximum(queries - 1 - tile.first, 0)] * (queries > 0)
    same = tokens[tile.start : tile.stop, None] == tokens[tile.first : tile.stop]
    duplicate = same & (keys < queries[:, None])
    induction = mx.pad(duplicate[:, :-1], [(0, 0), (1, 0)])
    if tile.first > 0:
        induction[:, 0] = tokens[tile.start : tile.stop] == tokens[tile.first - 1]
    far = nothing
    if sliding_window is not None and tile.stop > sliding_window:
        near = tile.stop - sliding_window
        far = (a[:, :, :near] * (queries[:, None] - keys[:near] >= sliding_window)).sum(axis=-1)
    return mx.stack([
        entropy(a), a[:, :, 0] if tile.first == 0 else nothing, elsewhere, reach, before,
        (a * duplicate).sum(axis=-1), (a * induction).sum(axis=-1), far, weighted,
    ])  # fmt: skip


def _diagonals(weights: mx.array) -> mx.array:
    """``[heads, keys]``: the sum over the tile's rows of the weight at each distance, from 0 on.

    A row more of padding than the rows are wide moves each row by one against the one before, so that a distance
    becomes a column.
    """
    heads, n, count = weights.shape
    width = count + n
    room = mx.pad(weights, [(0, 0), (0, 0), (n - 1, 1)]).reshape(heads, n * width)
    room = mx.pad(room, [(0, 0), (0, n)])
    return room.reshape(heads, n, width + 1).sum(axis=1)[:, :count][:, ::-1]


def rows(layer: Layer, head: int, span: Span) -> np.ndarray:
    """Rows of one head, float32 ``[rows, T]``."""
    found = np.zeros((span[1] - span[0], layer.length), np.float32)
    for tile in tiles(layer, span, range(head, head + 1)):
        place = slice(tile.start - span[0], tile.stop - span[0])
        found[place, tile.first : tile.stop] = np.array(tile.weights[0])
    return found


def carried(layer: Layer, mass: mx.array) -> mx.array:
    """``mass · A`` with A the mean of the heads' weights; float32 ``[n, S]``, over the first S positions."""
    found = mx.zeros(mass.shape)
    for tile in tiles(layer, (0, mass.shape[1])):
        found[:, tile.first : tile.stop] += mass[:, tile.start : tile.stop] @ tile.weights.mean(axis=0)
        mx.eval(found)
    return found


def divergence(layer: Layer, other: Layer) -> np.ndarray:
    """Jensen-Shannon divergence of the rows of two layers, float32 ``[heads, T]``, nats (Lin, 1991)."""
    found = []
    for ours, theirs in zip(tiles(layer), tiles(other), strict=True):
        mixed = (ours.weights + theirs.weights) / 2
        found.append(entropy(mixed) - (entropy(ours.weights) + entropy(theirs.weights)) / 2)
        mx.eval(found[-1])
    return np.array(mx.maximum(mx.concatenate(found, axis=-1), 0))
