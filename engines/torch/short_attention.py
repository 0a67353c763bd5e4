"""Causal attention of many short sequences at once on a CPU, whose cache holds the weights: for small networks.

Fused attention takes one sequence and head after the other; with heads of a few dimensions its tiles are nearly empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engines.torch.attention import CAUSAL, attention

SAFE_LOGIT = 60.0
"""exp of it, and the sum of as many as a vocabulary has, are far from the ends of float32."""

WIDE = 16
"""Heads of as many dimensions fill the tiles of fused attention."""

WEIGHTS_BYTES = 2 << 20
"""Weights are made for as many sequences and heads at a time as fit in this, so that they stay in the cache."""


def short_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal softmax attention, as ``engines.torch.attention.attention`` has it, which is taken where it is faster.

    Args:
        q, k, v: float32 ``[batch, heads, length, head_dim]``.
    """
    *_, length, head_dim = q.shape
    fits = head_dim < WIDE and 4 * length**2 <= WEIGHTS_BYTES
    if q.device.type != "cpu" or not fits or not _is_safe(q.detach(), k.detach(), scale):
        return attention(q, k, v, scale, CAUSAL)
    turned = (x.transpose(2, 3).flatten(0, 1).contiguous() for x in (q, k, v))
    out: Any = _ShortAttention.apply(*turned, scale / math.log(2))  # 2 ** x is made faster than e ** x
    return out.unflatten(0, q.shape[:2]).transpose(2, 3)


def _is_safe(q: Tensor, k: Tensor, scale: float) -> bool:
    """Whether no score can reach ``SAFE_LOGIT``, by Cauchy and Schwarz."""
    return scale * float(q.norm(dim=-1).amax() * k.norm(dim=-1).amax()) < SAFE_LOGIT


class _ShortAttention(torch.autograd.Function):
    """Attention whose scores are safe to exponentiate as they are; weights are made again on the way back.

    Everything is ``[n, head_dim, length]``: the products then have their long side last, where they are fastest.
    Weights are ``[n, keys, queries]``.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, mass = torch.empty_like(v), v.new_empty((len(v), 1, v.shape[2]))
        for part, weights in _exponentials(q, k, scale):
            torch.sum(weights, 1, keepdim=True, out=mass[part])
            torch.bmm(v[part], weights, out=out[part])
        out /= mass
        ctx.save_for_backward(q, k, v, out, mass)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, mass = ctx.saved_tensors
        above = outputs[0] / mass
        shared = (above * out).sum(1, keepdim=True)
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        for part, weights in _exponentials(q, k, ctx.scale):
            torch.bmm(above[part], weights.transpose(1, 2), out=gradients[2][part])
            scores = torch.bmm(v[part].transpose(1, 2), above[part]).sub_(shared[part]).mul_(weights)
            torch.bmm(k[part], scores, out=gradients[0][part])
            torch.bmm(q[part], scores.transpose(1, 2), out=gradients[1][part])
        unit = ctx.scale * math.log(2)
        return gradients[0].mul_(unit), gradients[1].mul_(unit), gradients[2], None


def _exponentials(q: Tensor, k: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """For some sequences after the other ``2 ** (scale * k q)`` ``[n, keys, queries]``, 0 where a key is to come."""
    count, _, length = q.shape
    seen = q.new_ones((length, length)).triu()
    size = max(1, WEIGHTS_BYTES // (4 * length * length))
    room = q.new_empty((min(size, count), length, length))
    scaled = q * scale
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        weights = room[: part.stop - start]
        torch.bmm(k[part].transpose(1, 2), scaled[part], out=weights)
        yield part, weights.exp2_().mul_(seen)
