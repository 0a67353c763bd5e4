"""Attention, its masks and its cache in MLX. The file mirrors ``engines/torch/attention.py``."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from engines.cache import room

CAUSAL = "causal"
"""In place of a mask: query and key positions are equal and nothing is out of the window."""

TILE = 128
"""Queries of a masked copy that are taken together."""


@dataclass(frozen=True)
class Tile:
    """Some queries of the masked copy and what they see.

    Attributes:
        queries: the tokens of the copy.
        past: the tokens of the text before them that one of them may see.
        mask: boolean ``[queries, past + queries]``.
    """

    queries: slice
    past: slice
    mask: mx.array


@dataclass(frozen=True)
class Doubled:
    """In place of a mask: a text of some tokens, and after it a copy of it whose blocks are read on their own.

    A square of both would be mostly empty; its rows are taken a tile at a time.
    """

    length: int
    text: Mask
    tiles: tuple[Tile, ...]


Mask = mx.array | str | Doubled | None
"""Boolean ``[queries, keys]`` or ``[batch, 1, queries, keys]``, true where a query sees a key; ``CAUSAL``; ``Doubled``;
or None for all."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a forward pass stand and what they see.

    Attributes:
        places: int32 ``[length]`` or ``[batch, 1, length]``, positions in the text.
        masks: of global (None) and of local layers (their window).
    """

    places: mx.array
    masks: dict[int | None, Mask]


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask) -> mx.array:
    """Softmax attention ``[batch, heads, queries, head_dim]``; keys and values serve a group of heads each.

    Args:
        q: ``[batch, heads, queries, head_dim]``, normalised and rotated.
        k, v: ``[batch, kv_heads, keys, head_dim]``.
    """
    if isinstance(mask, Doubled):
        return _doubled_attention(q, k, v, scale, mask)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def _doubled_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Doubled) -> mx.array:
    text, copy = slice(mask.length), slice(mask.length, None)
    outputs = [attention(q[:, :, text], k[:, :, text], v[:, :, text], scale, mask.text)]
    for tile in mask.tiles:
        keys, values = (
            mx.concatenate([x[:, :, text][:, :, tile.past], x[:, :, copy][:, :, tile.queries]], axis=2) for x in (k, v)
        )
        outputs.append(attention(q[:, :, copy][:, :, tile.queries], keys, values, scale, tile.mask))
    return mx.concatenate(outputs, axis=2)


def visible(queries: mx.array, keys: mx.array, window: int | None) -> mx.array:
    """Boolean ``[..., queries, keys]``: a key is seen from its own position on, while ``pos_q - pos_k < window``."""
    distance = queries[..., :, None] - keys[..., None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def causal(start: int, length: int, window: int, block: int = 0, pads: mx.array | None = None) -> Layout:
    """``length`` tokens from position ``start`` on, each of which sees those before it.

    The keys end at the last of these tokens and reach back as far as ``KVCache`` keeps them.

    Args:
        window: of the local layers.
        block: so many tokens at the end see each other, too.
        pads: int32 ``[batch]``, how many columns before a row's first token there are; nothing else sees them.
    """
    queries = mx.arange(start, start + length)
    if pads is None and block == 0 and (length == 1 or start == 0):
        whole = None if length == 1 else CAUSAL
        near = whole if length <= window else visible(queries, queries, window)
        return Layout(queries, {None: whole, window: near})
    if pads is None and block == length and start + length <= window:
        return Layout(queries, {None: None, window: None})

    reach = mx.where(queries < start + length - block, queries, start + length - 1)

    def mask(first: int, window: int | None) -> mx.array:
        keys = mx.arange(first, start + length)
        seen = keys <= reach[:, None]
        if window is not None:
            seen &= queries[:, None] - keys < window
        if pads is None:
            return seen
        # Padding sees itself, because a row of nothing is not a number.
        return ((seen & (keys >= pads[:, None, None])) | (queries[:, None] == keys))[:, None]

    masks: dict[int | None, Mask] = {None: mask(0, None), window: mask(max(0, start - window + 1), window)}
    return Layout(queries if pads is None else mx.maximum(queries - pads[:, None], 0)[:, None], masks)


def packed(positions: mx.array, segments: mx.array, window: int) -> Layout:
    """Several documents in a row, each with positions of its own from 0 on.

    Args:
        positions, segments: ``[batch, length]``, of tokens and the numbers of their documents.
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    places = positions[:, None]
    masks: dict[int | None, Mask] = {None: same & visible(places, places, None)}
    return Layout(places, masks | {window: same & visible(places, places, window)})


def doubled(length: int, copied: int, block: int, window: int) -> Layout:
    """A text and a copy of its first tokens in blocks, at the same positions (arXiv:2509.04185, figure 9).

    The text is read causally and never sees the copy; a token of the copy sees the text before its block, and the
    block.
    """
    places = mx.arange(length)
    text = causal(0, length, window)
    masks: dict[int | None, Mask] = {
        near: Doubled(length, text.masks[near], _tiles(places[:copied], block, near)) for near in (None, window)
    }
    return Layout(mx.concatenate([places, places[:copied]]), masks)


def _tiles(places: mx.array, block: int, window: int | None) -> tuple[Tile, ...]:
    size, found = block * max(1, TILE // block), []
    for start in range(0, len(places), size):
        queries = places[start : start + size]
        first = 0 if window is None else max(0, start - window + 1)
        past = slice(first, start + len(queries) - block)
        keys, begins = mx.concatenate([places[past], queries]), queries // block * block
        seen = mx.concatenate([places[past] < begins[:, None], begins[:, None] == begins], axis=1)
        if window is not None:
            seen &= queries[:, None] - keys < window
        found.append(Tile(slice(start, start + len(queries)), past, seen))
    return tuple(found)


class KVCache:
    """Keys and values of the tokens so far, of which a local layer keeps what its window can still see.

    Attributes:
        length: tokens seen so far.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.length = 0
        self._end = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def append(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Add ``[batch, kv_heads, new, head_dim]``; returns all keys and values the new tokens may see."""
        new = k.shape[2]
        kept = self.length if self.window is None else min(self.length, self.window - 1)
        if self._keys is None or self._values is None or self._end + new > self._keys.shape[2]:
            rows = room(kept, new, self.window)
            self._keys, self._values = self._moved(self._keys, k, kept, rows), self._moved(self._values, v, kept, rows)
            self._end = kept
        self._keys[:, :, self._end : self._end + new] = k
        self._values[:, :, self._end : self._end + new] = v
        self._end += new
        self.length += new
        seen = slice(self._end - kept - new, self._end)
        return self._keys[:, :, seen], self._values[:, :, seen]

    def crop(self, count: int) -> None:
        """Forget the last tokens; they came with the last ``append``."""
        self.length -= count
        self._end -= count

    def select(self, rows: mx.array) -> None:
        """Go on with some rows of the batch, int32 ``[kept]``."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]

    def _moved(self, old: mx.array | None, like: mx.array, kept: int, rows: int) -> mx.array:
        batch, heads, _, dim = like.shape
        buffer = mx.zeros((batch, heads, rows, dim), like.dtype)
        if old is not None:
            buffer[:, :, :kept] = old[:, :, self._end - kept : self._end]
        return buffer
