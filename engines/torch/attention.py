"""Attention, its masks and its cache in torch. The file mirrors ``engines/mlx/attention.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
    mask: Tensor


@dataclass(frozen=True)
class Doubled:
    """In place of a mask: a text of some tokens, and after it a copy of it whose blocks are read on their own.

    A square of both would be mostly empty; its rows are taken a tile at a time.
    """

    length: int
    text: Mask
    tiles: tuple[Tile, ...]


Mask = Tensor | str | Doubled | None
"""Boolean ``[queries, keys]`` or ``[batch, 1, queries, keys]``, true where a query sees a key; ``CAUSAL``; ``Doubled``;
or None for all."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a forward pass stand and what they see.

    Attributes:
        places: int64 ``[length]`` or ``[batch, 1, length]``, positions in the text.
        masks: of global (None) and of local layers (their window).
    """

    places: Tensor
    masks: dict[int | None, Mask]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Mask) -> Tensor:
    """Softmax attention ``[batch, heads, queries, head_dim]``; keys and values serve a group of heads each.

    Args:
        q: ``[batch, heads, queries, head_dim]``, normalised and rotated.
        k, v: ``[batch, kv_heads, keys, head_dim]``.
    """
    if isinstance(mask, Doubled):
        return _doubled_attention(q, k, v, scale, mask)
    if isinstance(mask, str):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def _doubled_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Doubled) -> Tensor:
    text, copy = slice(mask.length), slice(mask.length, None)
    outputs = [attention(q[:, :, text], k[:, :, text], v[:, :, text], scale, mask.text)]
    for tile in mask.tiles:
        keys, values = (
            torch.cat((x[:, :, text][:, :, tile.past], x[:, :, copy][:, :, tile.queries]), dim=2) for x in (k, v)
        )
        outputs.append(attention(q[:, :, copy][:, :, tile.queries], keys, values, scale, tile.mask))
    return torch.cat(outputs, dim=2)


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Boolean ``[..., queries, keys]``: a key is seen from its own position on, while ``pos_q - pos_k < window``."""
    distance = queries[..., :, None] - keys[..., None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def causal(
    start: int, length: int, window: int, device: torch.device, block: int = 0, pads: Tensor | None = None
) -> Layout:
    """``length`` tokens from position ``start`` on, each of which sees those before it.

    The keys end at the last of these tokens and reach back as far as ``KVCache`` keeps them.

    Args:
        window: of the local layers.
        block: so many tokens at the end see each other, too.
        pads: int64 ``[batch]``, how many columns before a row's first token there are; nothing else sees them.
    """
    queries = torch.arange(start, start + length, device=device)
    if pads is None and block == 0 and (length == 1 or start == 0):
        whole = None if length == 1 else CAUSAL
        near = whole if length <= window else visible(queries, queries, window)
        return Layout(queries, {None: whole, window: near})
    if pads is None and block == length and start + length <= window:
        return Layout(queries, {None: None, window: None})

    reach = torch.where(queries < start + length - block, queries, start + length - 1)

    def mask(first: int, window: int | None) -> Tensor:
        keys = torch.arange(first, start + length, device=device)
        seen = keys <= reach[:, None]
        if window is not None:
            seen &= queries[:, None] - keys < window
        if pads is None:
            return seen
        # Padding sees itself, because a row of nothing is not a number.
        return ((seen & (keys >= pads[:, None, None])) | (queries[:, None] == keys))[:, None]

    masks: dict[int | None, Mask] = {None: mask(0, None), window: mask(max(0, start - window + 1), window)}
    return Layout(queries if pads is None else (queries - pads[:, None]).clamp(min=0)[:, None], masks)


def packed(positions: Tensor, segments: Tensor, window: int) -> Layout:
    """Several documents in a row, each with positions of its own from 0 on.

    Args:
        positions, segments: ``[batch, length]``, of tokens and the numbers of their documents.
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    places = positions[:, None]
    masks: dict[int | None, Mask] = {None: same & visible(places, places, None)}
    return Layout(places, masks | {window: same & visible(places, places, window)})


def doubled(length: int, copied: int, block: int, window: int, device: torch.device) -> Layout:
    """A text and a copy of its first tokens in blocks, at the same positions (arXiv:2509.04185, figure 9).

    The text is read causally and never sees the copy; a token of the copy sees the text before its block, and the
    block.
    """
    places = torch.arange(length, device=device)
    text = causal(0, length, window, device)
    masks: dict[int | None, Mask] = {
        near: Doubled(length, text.masks[near], _tiles(places[:copied], block, near)) for near in (None, window)
    }
    return Layout(torch.cat((places, places[:copied])), masks)


def _tiles(places: Tensor, block: int, window: int | None) -> tuple[Tile, ...]:
    size, found = block * max(1, TILE // block), []
    for start in range(0, len(places), size):
        queries = places[start : start + size]
        first = 0 if window is None else max(0, start - window + 1)
        past = slice(first, start + len(queries) - block)
        keys, begins = torch.cat((places[past], queries)), queries // block * block
        seen = torch.cat((places[past] < begins[:, None], begins[:, None] == begins), dim=1)
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
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
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

    def select(self, rows: Tensor) -> None:
        """Go on with some rows of the batch, int64 ``[kept]``."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]

    def _moved(self, old: Tensor | None, like: Tensor, kept: int, rows: int) -> Tensor:
        batch, heads, _, dim = like.shape
        buffer = like.new_empty((batch, heads, rows, dim))
        if old is not None:
            buffer[:, :, :kept] = old[:, :, self._end - kept : self._end]
        return buffer
