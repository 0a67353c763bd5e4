"""Whether a model fits this machine: weights, cache and the least that training adds."""

from __future__ import annotations

import psutil

from engines.gemma3 import Gemma3Config
from engines.training import LINEARS
from gemma_tui.hub.demo import packaged
from gemma_tui.hub.models import Summary

TIGHT, FULL = 0.70, 0.85
"""Shares of the memory from which on a model is called tight, and from which on it does not fit."""

CONTEXT = 2048
RANK = 8


def estimates(config: Gemma3Config) -> dict[str, int]:
    """Bytes by use, with weights in float32 as on a CPU, or packed; activations are not in it.

    Training keeps a float32 gradient and AdamW's two moments for each trained parameter, and packed weights take no
    updates.
    """
    weights = config.weight_bytes(4)
    adapters = config.lora_count(RANK, LINEARS)
    uses = {
        f"inference at {CONTEXT:,} tokens": weights + config.cache_bytes(CONTEXT, item=4),
        f"LoRA training, rank {RANK}, before activations": weights + 16 * adapters,
    }
    if config.quantization is None:
        uses["full training, before activations"] = weights + 12 * config.parameter_count()
    return uses


def band(needed: int, available: int) -> str:
    """``fits``, ``tight`` or ``too large``."""
    share = needed / max(1, available)
    return "fits" if share < TIGHT else "tight" if share < FULL else "too large"


def state(item: Summary) -> str:
    """What one can do with a model here, in a few words."""
    if item.problem:
        return "no weights" if item.parameters else "broken"
    if not item.installed:
        return "import with enter" if packaged() else "needs the extra `demo`"
    return here(item.nbytes if item.packed else 4 * item.parameters)


def here(needed: int) -> str:
    """``fits``, ``tight`` or ``too large`` on this machine."""
    return band(needed, psutil.virtual_memory().total)
