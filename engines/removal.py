"""Parts of a loaded model that are taken away for a while: heads, MLPs, adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from engines.edits import check_heads, check_layer
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config


@dataclass(frozen=True)
class Removal:
    """What is taken away.

    Attributes:
        heads: by layer; their outputs before ``o_proj`` are zero. The norm after it makes up for the length that their
            sum loses; without all of them attention adds nothing to the residual stream.
        mlps: layers whose MLP adds nothing to the residual stream.
        adapters: linears like ``model.layers.0.self_attn.q_proj`` that compute without what an adapter adds, of DoRA
            without its magnitude, too.
    """

    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    mlps: tuple[int, ...] = ()
    adapters: tuple[str, ...] = ()


def check_removal(config: Gemma3Config, removal: Removal, adapted: Collection[str]) -> None:
    """Refuse to take away what is not there."""
    for layer, heads in removal.heads.items():
        check_heads(config, layer, heads)
    for layer in removal.mlps:
        check_layer(config, layer)
    wrong = [name for name in removal.adapters if name not in adapted]
    if wrong:
        raise UnsupportedError(f"{wrong[0][:80]} has no adapter: the model has {len(adapted)} of them")


@contextmanager
def taken_away(model: Any, adapted: Mapping[str, Any], removal: Removal) -> Iterator[None]:
    """Switches of a whole model turned, and turned back; no weight is touched.

    Args:
        model: a ``Gemma3`` of either engine.
        adapted: its adapted linears by name.
    """
    check_removal(model.config, removal, adapted)
    layers = model.model.layers
    try:
        for layer, heads in removal.heads.items():
            layers[layer].self_attn.silent = tuple(heads)
        for layer in removal.mlps:
            layers[layer].mlp_off = True
        for name in removal.adapters:
            adapted[name].off = True
        yield
    finally:
        for layer in removal.heads:
            layers[layer].self_attn.silent = ()
        for layer in removal.mlps:
            layers[layer].mlp_off = False
        for name in removal.adapters:
            adapted[name].off = False
