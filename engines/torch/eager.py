"""The reference for attention weights: transformers' own eager Gemma-3, where that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engines.errors import UnsupportedError


def eager_attention(folder: Path, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The weights of every layer in turn, float32 ``[heads, T, T]``, of int32 ``[T]``.

    All are in memory at once, beside a second copy of the model: give a short text.

    Raises:
        UnsupportedError: transformers or torch is not installed, or does not read the folder.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        raise UnsupportedError("the check needs transformers: pip install 'gemma-tui[check]'")
    import torch
    from transformers import Gemma3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would be drawn over the screen
    logging.set_verbosity_error()
    try:
        model = Gemma3ForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False, local_files_only=True,
            use_safetensors=True,
        ).eval()  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UnsupportedError(f"transformers does not read {folder} ({reason}): the check is left out") from None
    with torch.inference_mode():
        found = model.model(torch.from_numpy(tokens[None]).long(), output_attentions=True)
        for weights in found.attentions:
            yield weights[0].numpy()
