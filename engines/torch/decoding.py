"""Next-token decoding in torch. The file mirrors ``engines/mlx/decoding.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from engines.base import Sampling
from engines.sampling import choose
from engines.torch.model import Gemma3

PREFILL = 512
"""Prompt tokens per forward pass, so that a long prompt needs no long square of scores."""


def generate(model: Gemma3, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
    """Yield tokens after the prompt, until ``max_tokens`` or a stop id, which is yielded too."""
    device = model.model.embed_tokens.weight.device
    generator = np.random.default_rng(sampling.seed)
    cache = model.make_cache()
    tokens = torch.tensor([list(prompt)], device=device)
    for _ in range(sampling.max_tokens):
        # Not a decorator: a mode left on while the generator waits would leak to its caller.
        with torch.inference_mode():
            for part in tokens.split(PREFILL, dim=1):
                hidden = model(part, cache)
            logits = model.logits(hidden[0, -1])
            token = int(logits.argmax()) if sampling.temperature == 0 else _draw(logits, sampling, generator)
        yield token
        if token in sampling.stop_ids:
            return
        tokens = torch.tensor([[token]], device=device)


def _draw(logits: torch.Tensor, sampling: Sampling, generator: np.random.Generator) -> int:
    return choose(logits.float().cpu().numpy(), sampling, generator)
