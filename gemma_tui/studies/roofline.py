"""What a forward pass of k tokens should cost beside one of a single token: the roofline of arXiv:2509.04185 (fig. 11).

An operation takes as long as its arithmetic or its traffic, whichever takes longer. The printed listing gives the MLP
an inner width of ``hidden * inner`` and keys and values ``heads * kv_heads`` channels; its tables 3 and 4 are of that.
With the true shapes the weights weigh a thousandth, so the cache counts, and long blocks cost more.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.gemma3 import Gemma3Config

PRINTED, CORRECTED = "printed", "corrected"
FORMS = (PRINTED, CORRECTED)


@dataclass(frozen=True)
class Machine:
    """What a device does at best.

    Attributes:
        flops, attention_flops: floating-point operations a second, of products with weights and inside attention.
        bandwidth: bytes a second.
    """

    flops: float
    attention_flops: float
    bandwidth: float


H100 = Machine(1978e12, 989e12, 3.35 * 1024**4)
"""The paper's: products in FP8, attention in 16 bits."""


@dataclass(frozen=True)
class Shape:
    """What is computed for a token.

    Attributes:
        inner: width of the MLP.
        matrices: of the MLP; the last one leads back to ``hidden``.
        windows: of each layer, None for a global one.
        vocabulary: rows of the head, 0 to leave it out.
        weight_bytes: of a weight.
        item_bytes: of an activation, a key or a value.
    """

    hidden: int
    inner: int
    heads: int
    head_dim: int
    kv_heads: int
    matrices: int = 2
    windows: tuple[int | None, ...] = (None,)
    vocabulary: int = 0
    weight_bytes: float = 1
    item_bytes: int = 1


PAPER = Shape(4096, 4 * 4096, 32, 128, 8)
"""One layer of an 8B model, as in the listing."""


def shape_of(config: Gemma3Config, item_bytes: int) -> Shape:
    """A whole Gemma-3: all layers with their windows, three matrices in an MLP, and the head."""
    return Shape(
        config.hidden_size, config.intermediate_size, config.num_attention_heads, config.head_dim,
        config.num_key_value_heads, 3, tuple(config.window(i) for i in range(config.num_hidden_layers)),
        config.vocab_size, config.weight_bytes(item_bytes) / config.parameter_count(), item_bytes,
    )  # fmt: skip


def seconds(machine: Machine, shape: Shape, tokens: int, cached: int, batch: int = 1, form: str = CORRECTED) -> float:
    """Of one forward pass.

    Args:
        tokens: of each row, after so many ``cached``.
    """
    rows, s = batch * tokens, shape
    inner = s.hidden * s.inner if form == PRINTED else s.inner
    channels = s.heads * s.kv_heads if form == PRINTED else s.kv_heads * s.head_dim
    layer = 2 * _product(machine, s, rows, s.hidden, s.heads * s.head_dim)
    layer += 2 * _product(machine, s, rows, s.hidden, channels)
    layer += s.matrices * _product(machine, s, rows, s.hidden, inner)
    attention = sum(_attention(machine, s, batch, tokens, min(cached, window or cached)) for window in s.windows)
    head = _product(machine, s, rows, s.hidden, s.vocabulary) if s.vocabulary else 0.0
    return len(s.windows) * layer + attention + head


def slowdown(machine: Machine, shape: Shape, tokens: int, cached: int, batch: int = 1, form: str = CORRECTED) -> float:
    """``time(k) / time(1)``."""
    alone = seconds(machine, shape, 1, cached, batch, form)
    return seconds(machine, shape, tokens, cached, batch, form) / alone


def speed_up(
    machine: Machine, shape: Shape, block: int, fewer: float, cached: int, batch: int = 1, form: str = CORRECTED
) -> float:
    """Times faster than next-token decoding, where a block takes ``block / fewer`` passes."""
    one, double, rest = (seconds(machine, shape, n, cached, batch, form) for n in (1, 2 * block, block))
    return gain(block, fewer, one, double, rest)


def gain(block: int, fewer: float, one: float, double: float, rest: float) -> float:
    """``k time(1) / (time(2k) + (l - 1) time(k))``: the first pass of a block reads the block before it, too.

    Args:
        one, double, rest: seconds of passes of 1, ``2 * block`` and ``block`` tokens.
    """
    return block * one / (double + (block / fewer - 1) * rest)


def _product(machine: Machine, shape: Shape, rows: int, inner: int, columns: int) -> float:
    moved = rows * (inner + columns) * shape.item_bytes + inner * columns * shape.weight_bytes
    return max(2 * rows * inner * columns / machine.flops, moved / machine.bandwidth)


def _attention(machine: Machine, shape: Shape, batch: int, tokens: int, cached: int) -> float:
    """Scores and their values without their square in memory; queries are read, outputs written."""
    arithmetic = 4 * batch * shape.heads * tokens * cached * shape.head_dim
    channels = 2 * cached * shape.kv_heads + 2 * tokens * shape.heads
    moved = batch * channels * shape.head_dim * shape.item_bytes
    return max(arithmetic / machine.attention_flops, moved / machine.bandwidth)
