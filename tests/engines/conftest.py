"""The oracle of the engines' tests: transformers' own Gemma-3, eager and in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import LORA, random_factors

from engines.adapters import write_adapter
from engines.gemma3 import Gemma3Config


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


@pytest.fixture
def config(two_to_one: Gemma3Config) -> Gemma3Config:
    """Two queries to a key; a square q_proj."""
    return two_to_one


@pytest.fixture
def folder(config: Gemma3Config, tiny_folder: Callable[..., Path]) -> Path:
    """A model of that config."""
    return tiny_folder(config)


@pytest.fixture
def adapter(config: Gemma3Config, folder: Path, tmp_path: Path) -> Path:
    """An adapter whose B is not zero, so that it changes the logits."""
    target = tmp_path / "adapter"
    write_adapter(target, random_factors(config, LORA), LORA, config, str(folder))
    return target


@pytest.fixture
def text(tokens: Callable[..., np.ndarray]) -> Callable[[int], np.ndarray]:
    """``text(length)``: int32 ids with many repetitions."""
    return lambda length: tokens(length)[0] % 24
