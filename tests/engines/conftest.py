"""The oracle of the engines' tests: transformers' own Gemma-3, eager and in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def reference_model() -> Callable[[Path], Any]:
    """``reference_model(folder)``: the folder as transformers reads it."""
    import torch
    from transformers import Gemma3ForCausalLM

    def load(folder: Path) -> Any:
        return Gemma3ForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()

    return load


@pytest.fixture(scope="session")
def reference_logits(reference_model: Callable[[Path], Any]) -> Callable[..., Any]:
    """``reference_logits(model or folder, tokens)``: float32 ``[batch, length, vocabulary]``."""
    import torch

    def logits(model: Any, tokens: Any) -> Any:
        network = reference_model(model) if isinstance(model, Path) else model
        with torch.no_grad():
            return network(torch.from_numpy(tokens).long()).logits.numpy()

    return logits
