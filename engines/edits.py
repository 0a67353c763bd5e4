"""Changes to a text's way through the model: heads put out, edges of attention cut, values of another run put in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config

Span = tuple[int, int]
"""First position, and the one after the last."""

ABLATIONS = ("zero", "mean")


@dataclass(frozen=True)
class Ablation:
    """The outputs of heads of a layer, before ``o_proj``, replaced at every position.

    Attributes:
        how: ``zero``; ``mean`` for the mean of each head's output over the positions of this text.
    """

    layer: int
    heads: tuple[int, ...]
    how: str = "zero"


@dataclass(frozen=True)
class Knockout:
    """Edges of attention that are cut before the softmax; a query that would see nothing keeps its own key.

    Attributes:
        queries, keys: the edges' ends; None for all.
        beyond: only edges with ``pos_q - pos_k >= beyond``.
    """

    layer: int
    heads: tuple[int, ...]
    queries: Span | None = None
    keys: Span | None = None
    beyond: int = 0


@dataclass(frozen=True)
class Patch:
    """Values of another run at the same positions.

    Attributes:
        heads: whose outputs before ``o_proj`` are replaced; None for the residual stream before the layer.
        values: float32 ``[heads, positions, head_dim]``, or ``[positions, hidden]`` of the residual stream.
    """

    layer: int
    heads: tuple[int, ...] | None
    positions: Span
    values: np.ndarray


Edit = Ablation | Knockout | Patch


def check_layer(config: Gemma3Config, layer: int) -> None:
    """Refuse a layer that is not there."""
    if not 0 <= layer < config.num_hidden_layers:
        raise UnsupportedError(f"layer {layer} is not there: the model has layers 0 to {config.num_hidden_layers - 1}")


def check_heads(config: Gemma3Config, layer: int, heads: Sequence[int]) -> None:
    """Refuse heads that are not there, and none at all."""
    check_layer(config, layer)
    wrong = [head for head in heads if not 0 <= head < config.num_attention_heads]
    if wrong or not heads:
        named = f"head L{layer}.H{wrong[0]} is not there" if wrong else "no head is named"
        raise UnsupportedError(f"{named}: a layer has heads 0 to {config.num_attention_heads - 1}")


def check_span(span: Span, length: int) -> None:
    """Refuse positions that are not there, and none at all."""
    if not 0 <= span[0] < span[1] <= length:
        raise UnsupportedError(f"positions {span[0]} to {span[1] - 1} are not there: the text has 0 to {length - 1}")


def check_edits(config: Gemma3Config, length: int, edits: Sequence[Edit]) -> None:
    """Refuse edits of what is not there, or with values of another shape."""
    for edit in edits:
        if isinstance(edit, Patch):
            check_span(edit.positions, length)
            room = edit.positions[1] - edit.positions[0]
            if edit.heads is None:
                check_layer(config, edit.layer)
                shape: tuple[int, ...] = (room, config.hidden_size)
            else:
                check_heads(config, edit.layer, edit.heads)
                shape = (len(edit.heads), room, config.head_dim)
            if edit.values.shape != shape:
                raise UnsupportedError(f"a patch of layer {edit.layer} has values {edit.values.shape}, not {shape}")
            continue
        check_heads(config, edit.layer, edit.heads)
        if isinstance(edit, Ablation) and edit.how not in ABLATIONS:
            raise UnsupportedError(f"ablation {edit.how!r} is not there: choose {' or '.join(ABLATIONS)}")
        if isinstance(edit, Knockout):
            for span in (edit.queries, edit.keys):
                if span is not None:
                    check_span(span, length)


def first_edited(config: Gemma3Config, edits: Sequence[Edit]) -> int:
    """The first layer that edits change, or whose input they do; the number of layers if there are none."""
    return min((edit.layer for edit in edits), default=config.num_hidden_layers)
