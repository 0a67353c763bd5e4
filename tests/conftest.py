"""What tests of every package share: both engines, tiny models in memory and on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from engines import ENGINES, available_engines, open_engine
from engines.base import Engine
from engines.checkpoints import as_bfloat16, write_arrays, write_json
from engines.gemma3 import GLOBAL, LOCAL, Gemma3Config, Rope

# Tiny matrices gain nothing from threads, and lose much when they wait for one another; read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Read when the hub's client is imported, which may be before a test's own environment is set.
os.environ["HF_HUB_OFFLINE"] = "1"

# How long an example takes says more about the machine than about the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

TinyFolder = Callable[..., Path]
"""``tiny_folder(config, seed=0, dtype="float32")``: a model folder with random weights."""


def opened(name: str) -> Engine:
    if name not in available_engines():
        pytest.skip(f"{name} is not installed")
    return open_engine(name)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Each engine in turn: a test that takes it states what both must do."""
    engine = opened(request.param)
    yield engine
    engine.unload()


@pytest.fixture
def torch_engine() -> Iterator[Engine]:
    """For what is one for both engines and was tested on both below."""
    engine = opened("torch")
    yield engine
    engine.unload()


@pytest.fixture
def both_engines() -> Iterator[tuple[Engine, Engine]]:
    """torch and MLX side by side."""
    pair = opened("torch"), opened("mlx")
    yield pair
    for engine in pair:
        engine.unload()


@pytest.fixture(scope="session")
def four_to_one() -> Gemma3Config:
    """Four query heads share one key; the softmax scale is not head_dim's; √40 has no exact bfloat16.

    Layer 5 of 7 is global: five local layers before it, as in every Gemma-3, and one after it.
    """
    return Gemma3Config(
        vocab_size=64,
        hidden_size=40,
        intermediate_size=48,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        layer_types=(*[LOCAL] * 5, GLOBAL, LOCAL),
        rope_global=Rope(1e6),
        rope_local=Rope(1e4),
        query_pre_attn_scalar=24,
        max_position_embeddings=512,
    )


@pytest.fixture(scope="session")
def two_to_one() -> Gemma3Config:
    """Two query heads to a key, the global rotation scaled by 8, and heads · head_dim = hidden_size."""
    return Gemma3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=(LOCAL, LOCAL, GLOBAL),
        rope_global=Rope(1e6, 8.0),
        rope_local=Rope(1e4),
        query_pre_attn_scalar=21,
        max_position_embeddings=512,
    )


@pytest.fixture(scope="session", params=["four_to_one", "two_to_one"])
def tiny_config(request: pytest.FixtureRequest) -> Gemma3Config:
    """Both tiny configs in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """Writes a model folder; equal shapes and seeds give equal weights, and no norm weight is zero."""

    def write(config: Gemma3Config, seed: int = 0, dtype: str = "float32") -> Path:
        folder = tmp_path_factory.mktemp("model")
        arrays = random_weights(config, seed)
        if dtype == "bfloat16":
            arrays = {name: as_bfloat16(array) for name, array in arrays.items()}
        write_arrays(folder / "model.safetensors", arrays)
        write_json(folder / "config.json", config.to_dict())
        return folder

    return write


def random_weights(config: Gemma3Config, seed: int) -> dict[str, np.ndarray]:
    """Weights large enough that every part of the model shows in the logits."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(shape, np.float32) * np.float32(0.5 if len(shape) == 1 else 0.2)
        for name, shape in config.parameter_shapes().items()
    }


@pytest.fixture
def tokens() -> Callable[..., np.ndarray]:
    """``tokens(length, batch=1, seed=0)``: int32 ids of the tiny vocabulary."""

    def draw(length: int, batch: int = 1, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 64, (batch, length), dtype=np.int32)

    return draw
