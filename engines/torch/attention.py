"""Attention, its masks and its cache in torch. The file mirrors ``engines/mlx/attention.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CAUSAL = "causal"
"""In place of a mask: query and key positions are equal and nothing is out of the window."""

GROWTH = 256
"""A cache grows by this many tokens, so that it is copied rarely."""


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | str | None) -> Tensor:
    """Softmax attention ``[batch, heads, queries, head_dim]``; keys and values serve a group of heads each.

    Args:
        q: ``[batch, heads, queries, head_dim]``, normalised and rotated.
        k, v: ``[batch, kv_heads, keys, head_dim]``.
        mask: boolean ``[queries, keys]`` or ``[batch, 1, queries, keys]``, true where a query sees a key; ``CAUSAL``;
            or None for all.
    """
    if isinstance(mask, str):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Boolean ``[..., queries, keys]``: a key is seen from its own position on, while ``pos_q - pos_k < window``."""
    distance = queries[..., :, None] - keys[..., None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def masks(start: int, length: int, window: int, device: torch.device) -> dict[int | None, Tensor | str | None]:
    """The mask of global (None) and of local layers (their window) for ``length`` tokens from position ``start`` on.

    The keys end at the last of these tokens and reach back as far as ``KVCache`` keeps them.
    """
    if length == 1:
        return {None: None, window: None}
    queries = torch.arange(start, start + length, device=device)
    if start == 0:
        return {None: CAUSAL, window: CAUSAL if length <= window else visible(queries, queries, window)}
    within = torch.arange(max(0, start - window + 1), start + length, device=device)
    everything = torch.arange(start + length, device=device)
    return {None: visible(queries, everything, None), window: visible(queries, within, window)}


def packed_masks(positions: Tensor, segments: Tensor, window: int) -> dict[int | None, Tensor | str | None]:
    """As ``masks``, where several documents are packed into a row, each with positions of its own from 0 on.

    Args:
        positions, segments: ``[batch, length]``, of tokens and the numbers of their documents.
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    places = positions[:, None]
    return {None: same & visible(places, places, None), window: same & visible(places, places, window)}


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
            room = kept + new + (GROWTH if self.window is None else self.window)
            self._keys, self._values = self._moved(self._keys, k, kept, room), self._moved(self._values, v, kept, room)
            self._end = kept
        self._keys[:, :, self._end : self._end + new] = k
        self._values[:, :, self._end : self._end + new] = v
        self._end += new
        self.length += new
        seen = slice(self._end - kept - new, self._end)
        return self._keys[:, :, seen], self._values[:, :, seen]

    def _moved(self, old: Tensor | None, like: Tensor, kept: int, room: int) -> Tensor:
        batch, heads, _, dim = like.shape
        buffer = like.new_empty((batch, heads, room, dim))
        if old is not None:
            buffer[:, :, :kept] = old[:, :, self._end - kept : self._end]
        return buffer
