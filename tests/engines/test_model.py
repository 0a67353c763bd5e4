"""The architecture, against transformers; the wrong variants that are found in the wild must be told from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import inside
import numpy as np
import pytest

from engines.base import Engine, Sampling
from engines.gemma3 import Gemma3Config, Rope
from engines.training import IGNORED, Batch, LoRASettings, TrainingSettings

TOLERANCE = 1e-4
WINDOW = 8
LENGTHS = [WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 64]

TinyFolder = Callable[..., Path]
Tokens = Callable[..., np.ndarray]
Logits = Callable[[Any, np.ndarray], np.ndarray]


def gap(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    return float(np.abs(a - b).max())


# ------------------------------------------------------------------------------------------------ against transformers


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_are_those_of_transformers(
    engine: Engine,
    tiny_config: Gemma3Config,
    tiny_folder: TinyFolder,
    tokens: Tokens,
    reference_logits: Logits,
    length: int,
) -> None:
    folder, text = tiny_folder(tiny_config), tokens(length, batch=2)
    engine.load(folder, "float32")
    assert gap(engine.logits(text), reference_logits(folder, text)) <= TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
def test_torch_and_mlx_agree(
    both_engines: tuple[Engine, Engine],
    tiny_config: Gemma3Config,
    tiny_folder: TinyFolder,
    tokens: Tokens,
    length: int,
) -> None:
    folder, text = tiny_folder(tiny_config), tokens(length)
    for engine in both_engines:
        engine.load(folder, "float32")
    torch, mlx = (engine.logits(text) for engine in both_engines)
    assert gap(torch, mlx) <= TOLERANCE


def test_bfloat16_stays_near_float32(engine: Engine, tiny_config: Gemma3Config, tiny_folder: TinyFolder) -> None:
    folder = tiny_folder(tiny_config, dtype="bfloat16")
    text = np.arange(64, dtype=np.int32)[None]
    engine.load(folder, "float32")
    exact = engine.logits(text)
    engine.load(folder, "bfloat16")
    assert gap(engine.logits(text), exact) <= 0.1 * np.abs(exact).max()


# ------------------------------------------------------------------------------------------------ the wrong variants


def without_qk_norm(engine: Engine, config: Gemma3Config, patch: pytest.MonkeyPatch) -> None:
    norm, method = inside.module(engine, "model").RMSNorm, inside.call(engine)
    right = getattr(norm, method)

    def wrong(self: Any, x: Any) -> Any:
        return x if self.weight.shape[0] == config.head_dim else right(self, x)

    patch.setattr(norm, method, wrong)


def without_rope(engine: Engine, config: Gemma3Config, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(inside.module(engine, "model"), "rotate", lambda x, rotation: x)


def with_double_final_norm(engine: Engine, config: Gemma3Config, patch: pytest.MonkeyPatch) -> None:
    network = inside.module(engine, "model").Gemma3
    right = network.logits
    patch.setattr(network, "logits", lambda self, hidden: right(self, self.model.norm(hidden)))


def with_thetas_swapped(config: Gemma3Config) -> Gemma3Config:
    near, far = config.rope_local, config.rope_global
    return replace(config, rope_global=Rope(near.theta, far.factor), rope_local=Rope(far.theta, near.factor))


WRONG_CODE = {
    "no qk-norm": without_qk_norm,
    "no RoPE": without_rope,
    "double final norm": with_double_final_norm,
}
WRONG_CONFIG = {
    "thetas swapped": with_thetas_swapped,
    "window + 1": lambda config: replace(config, sliding_window=config.sliding_window + 1),
    "window - 1": lambda config: replace(config, sliding_window=config.sliding_window - 1),
    "pattern shifted": lambda config: replace(config, layer_types=config.layer_types[1:] + config.layer_types[:1]),
    "head_dim scale": lambda config: replace(config, query_pre_attn_scalar=config.head_dim),
    "no linear scaling": lambda config: replace(config, rope_global=Rope(config.rope_global.theta)),
}


@pytest.mark.parametrize("variant", WRONG_CODE)
def test_wrong_code_is_told_from_transformers(
    engine: Engine,
    tiny_config: Gemma3Config,
    tiny_folder: TinyFolder,
    tokens: Tokens,
    reference_logits: Logits,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
) -> None:
    folder, text = tiny_folder(tiny_config), tokens(WINDOW + 64)
    WRONG_CODE[variant](engine, tiny_config, monkeypatch)
    engine.load(folder, "float32")
    assert gap(engine.logits(text), reference_logits(folder, text)) > 100 * TOLERANCE


@pytest.mark.parametrize("variant", WRONG_CONFIG)
def test_wrong_config_is_told_from_transformers(
    engine: Engine,
    two_to_one: Gemma3Config,
    tiny_folder: TinyFolder,
    tokens: Tokens,
    reference_logits: Logits,
    variant: str,
) -> None:
    text = tokens(WINDOW + 64)
    engine.load(tiny_folder(WRONG_CONFIG[variant](two_to_one)), "float32")
    assert gap(engine.logits(text), reference_logits(tiny_folder(two_to_one), text)) > 100 * TOLERANCE


def test_the_shifted_five_to_one_pattern_is_told_from_transformers(
    engine: Engine, four_to_one: Gemma3Config, tiny_folder: TinyFolder, tokens: Tokens, reference_logits: Logits
) -> None:
    text = tokens(WINDOW + 64)
    engine.load(tiny_folder(WRONG_CONFIG["pattern shifted"](four_to_one)), "float32")
    assert gap(engine.logits(text), reference_logits(tiny_folder(four_to_one), text)) > 100 * TOLERANCE


# ------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize(
    "parts",
    [
        [5, 3, 11, 2, 9, 8, *[1] * 20],
        [WINDOW, *[1] * 50],
        [40, 1, 1, 7, 1, 8],
        [1] * 58,
    ],
    ids=["uneven", "one window", "long then mixed", "one by one"],
)
def test_cached_logits_are_the_uncached(
    engine: Engine, tiny_config: Gemma3Config, tiny_folder: TinyFolder, tokens: Tokens, parts: list[int]
) -> None:
    text = tokens(58)
    engine.load(tiny_folder(tiny_config), "float32")
    assert gap(inside.cached_logits(engine, text, parts), engine.logits(text)) <= TOLERANCE


def test_cached_logits_in_bfloat16_stay_near_the_uncached(
    engine: Engine, tiny_config: Gemma3Config, tiny_folder: TinyFolder, tokens: Tokens
) -> None:
    text = tokens(40)
    engine.load(tiny_folder(tiny_config), "bfloat16")
    exact = engine.logits(text)
    assert gap(inside.cached_logits(engine, text, [13, 9, *[1] * 18]), exact) <= 0.1 * np.abs(exact).max()


def test_the_cache_grows_without_losing_a_token(
    engine: Engine,
    two_to_one: Gemma3Config,
    tiny_folder: TinyFolder,
    tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engines.cache.GROWTH", 3)
    text = tokens(40)
    engine.load(tiny_folder(two_to_one), "float32")
    assert gap(inside.cached_logits(engine, text, [7, *[1] * 33]), engine.logits(text)) <= TOLERANCE


def test_a_local_layer_keeps_no_more_than_twice_its_window(
    engine: Engine, two_to_one: Gemma3Config, tiny_folder: TinyFolder
) -> None:
    engine.load(tiny_folder(two_to_one), "float32")
    cache = inside.model(engine).make_cache()[0]
    zeros = inside.zeros(engine, (1, 2, 1, 16))
    for _ in range(100):
        keys, _ = cache.append(zeros, zeros)
        assert cache._keys.shape[2] <= 2 * WINDOW
    assert keys.shape[2] == WINDOW


@pytest.mark.parametrize("prefill", [512, 5])
def test_greedy_decoding_takes_the_uncached_arg_max_past_the_window(
    engine: Engine,
    tiny_config: Gemma3Config,
    tiny_folder: TinyFolder,
    tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
    prefill: int,
) -> None:
    monkeypatch.setattr(inside.module(engine, "decoding"), "PREFILL", prefill)
    engine.load(tiny_folder(tiny_config), "float32")
    prompt = tokens(17)[0].tolist()
    made = list(engine.generate(prompt, Sampling(max_tokens=20)))
    whole = engine.logits(np.array([prompt + made], np.int32))[0]
    assert made == whole[len(prompt) - 1 : -1].argmax(-1).tolist()


# ------------------------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("lora", [None, LoRASettings(2, 4.0)], ids=["full", "lora"])
def test_checkpointed_activations_give_the_same_gradients(
    engine: Engine,
    two_to_one: Gemma3Config,
    tiny_folder: TinyFolder,
    tokens: Tokens,
    lora: LoRASettings | None,
) -> None:
    text = tokens(12, batch=2)
    batch = Batch(text, np.concatenate([text[:, 1:], np.full((2, 1), IGNORED, np.int32)], axis=1))
    found = []
    for kept in (False, True):
        engine.load(tiny_folder(two_to_one), "float32")
        engine.start_training(TrainingSettings(lora, checkpoint_activations=kept))
        found.append(inside.gradients(engine, batch))
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    assert any(np.abs(gradient).max() > 0.1 for gradient in plain.values())
    for name, gradient in plain.items():
        np.testing.assert_allclose(checkpointed[name], gradient, rtol=1e-4, atol=1e-5, err_msg=name)


def test_checkpointed_layers_run_again_in_the_backward_pass(
    engine: Engine,
    two_to_one: Gemma3Config,
    tiny_folder: TinyFolder,
    tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block, method = inside.module(engine, "model").Block, inside.call(engine)
    right, calls = getattr(block, method), []

    def counted(self: Any, *arguments: Any) -> Any:
        calls.append(self)
        return right(self, *arguments)

    monkeypatch.setattr(block, method, counted)
    engine.load(tiny_folder(two_to_one), "float32")
    engine.start_training(TrainingSettings(None, checkpoint_activations=True))
    inside.gradients(engine, Batch(tokens(6), tokens(6, seed=1)))
    assert len(calls) == 2 * two_to_one.num_hidden_layers
