"""Attention weights in tiles of queries, made again in float32, in torch. The file mirrors ``engines/mlx/tiles.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.edits import Knockout, Span
from engines.inspection import ROW_SUMS, LayerStatistics, first_key, no_tick, spans
from engines.torch.attention import visible

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

    q: Tensor
    k: Tensor
    v: Tensor
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

    weights: Tensor
    first: int
    start: int
    stop: int


def allowed(layer: Layer, start: int, stop: int, heads: range) -> Tensor:
    """Which edges there are, boolean ``[rows, keys]``, or ``[heads, rows, keys]`` where some are cut."""
    queries = torch.arange(start, stop, device=layer.q.device)
    keys = torch.arange(first_key(start, layer.window), stop, device=layer.q.device)
    seen = visible(queries, keys, layer.window)
    if not layer.cuts:
        return seen
    seen = seen.repeat(len(heads), 1, 1)
    for cut in layer.cuts:
        edges = queries[:, None] - keys >= cut.beyond
        if cut.queries is not None:
            edges &= ((queries >= cut.queries[0]) & (queries < cut.queries[1]))[:, None]
        if cut.keys is not None:
            edges &= (keys >= cut.keys[0]) & (keys < cut.keys[1])
        for head in set(cut.heads) & set(heads):
            seen[head - heads.start] &= ~edges
    own = queries[:, None] == keys
    return seen | (own & ~seen.any(-1, keepdim=True))


def tiles(layer: Layer, span: Span | None = None, heads: range | None = None) -> Iterator[Tile]:
    """The weights of some queries (all) and of heads that share no key head with others (all), tile by tile."""
    chosen = heads or range(layer.q.shape[0])
    group = layer.q.shape[0] // layer.k.shape[0]
    q, k = layer.q[chosen.start : chosen.stop], layer.k[chosen.start // group : (chosen.stop - 1) // group + 1]
    for start, stop in spans(span or (0, layer.length)):
        layer.tick()
        first = first_key(start, layer.window)
        rows = q[:, start:stop].reshape(k.shape[0], -1, q.shape[2])
        scores = (rows @ k[:, first:stop].transpose(1, 2) * layer.scale).view(len(chosen), stop - start, stop - first)
        scores.masked_fill_(~allowed(layer, start, stop, chosen), -torch.inf)
        yield Tile(scores.softmax(-1), first, start, stop)


def entropy(weights: Tensor) -> Tensor:
    """Of rows, nats."""
    return -(weights * weights.clamp_min(TINY).log()).sum(-1)


def statistics(layer: Layer, tokens: Tensor, sliding_window: int) -> LayerStatistics:
    """The sums of ``LayerStatistics``, one tile after the other."""
    heads, length, device = layer.q.shape[0], layer.length, layer.q.device
    values = layer.v.norm(dim=-1)
    received, by_distance = torch.zeros(2, heads, length, device=device)
    rows: list[Tensor] = []
    for tile in tiles(layer):
        a, keys = tile.weights, slice(tile.first, tile.stop)
        rows.append(_row_sums(tile, values[:, keys], tokens, sliding_window if layer.window is None else None))
        received[:, keys] += a.sum(1)
        by_distance[:, : a.shape[2]] += _diagonals(a)
    sums = dict(zip(ROW_SUMS, torch.cat(rows, -1).cpu().numpy(), strict=True))
    others = {"received": received, "by_distance": by_distance, "value_norm": values}
    return LayerStatistics(**sums, **{name: tensor.cpu().numpy() for name, tensor in others.items()})


def _row_sums(tile: Tile, values: Tensor, tokens: Tensor, sliding_window: int | None) -> Tensor:
    """The row statistics in their order, ``[9, heads, rows]``."""
    a = tile.weights
    (heads, n, count), rows = a.shape, torch.arange(a.shape[1], device=a.device)
    queries = rows + tile.start
    keys = torch.arange(tile.first, tile.stop, device=a.device)
    # Distances from the tile's end, because from the query they would be differences of large numbers.
    back = (tile.stop - 1 - keys).float()
    other = (keys > 0).float()
    features = torch.stack((other.expand_as(values), (other * back).expand_as(values), values), -1)
    elsewhere, reach, weighted = (a.view(values.shape[0], -1, count) @ features).view(heads, n, 3).unbind(-1)
    reach = reach - (tile.stop - 1 - queries) * elsewhere
    nothing = a.new_zeros(heads, n)
    before = a[:, rows, (queries - 1 - tile.first).clamp_min(0)] * (queries > 0)
    same = tokens[tile.start : tile.stop, None] == tokens[tile.first : tile.stop]
    duplicate = same & (keys < queries[:, None])
    induction = F.pad(duplicate[:, :-1], (1, 0))
    if tile.first > 0:
        induction[:, 0] = tokens[tile.start : tile.stop] == tokens[tile.first - 1]
    far = nothing
    if sliding_window is not None and tile.stop > sliding_window:
        near = tile.stop - sliding_window
        far = (a[:, :, :near] * (queries[:, None] - keys[:near] >= sliding_window)).sum(-1)
    return torch.stack((
        entropy(a), a[:, :, 0] if tile.first == 0 else nothing, elsewhere, reach, before,
        (a * duplicate).sum(-1), (a * induction).sum(-1), far, weighted,
    ))  # fmt: skip


def _diagonals(weights: Tensor) -> Tensor:
    """``[heads, keys]``: the sum over the tile's rows of the weight at each distance, from 0 on.

    A row more of padding than the rows are wide moves each row by one against the one before, so that a distance
    becomes a column.
    """
    heads, n, count = weights.shape
    width = count + n
    room = weights.new_zeros(heads, n * (width + 1))
    room[:, : n * width].view(heads, n, width)[:, :, n - 1 : n - 1 + count] = weights
    return room.view(heads, n, width + 1).sum(1)[:, :count].flip(-1)


def rows(layer: Layer, head: int, span: Span) -> np.ndarray:
    """Rows of one head, float32 ``[rows, T]``."""
    found = np.zeros((span[1] - span[0], layer.length), np.float32)
    for tile in tiles(layer, span, range(head, head + 1)):
        place = slice(tile.start - span[0], tile.stop - span[0])
        found[place, tile.first : tile.stop] = tile.weights[0].cpu().numpy()
    return found


def carried(layer: Layer, mass: Tensor) -> Tensor:
    """``mass · A`` with A the mean of the heads' weights; float32 ``[n, S]``, over the first S positions."""
    found = torch.zeros_like(mass)
    for tile in tiles(layer, (0, mass.shape[1])):
        found[:, tile.first : tile.stop] += mass[:, tile.start : tile.stop] @ tile.weights.mean(0)
    return found


def divergence(layer: Layer, other: Layer) -> np.ndarray:
    """Jensen-Shannon divergence of the rows of two layers, float32 ``[heads, T]``, nats (Lin, 1991)."""
    found = []
    for ours, theirs in zip(tiles(layer), tiles(other), strict=True):
        mixed = (ours.weights + theirs.weights) / 2
        found.append(entropy(mixed) - (entropy(ours.weights) + entropy(theirs.weights)) / 2)
    return torch.cat(found, -1).clamp_min(0).cpu().numpy()
