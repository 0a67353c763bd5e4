"""Stacks of small networks: both engines compute GPT-2 and Gemma-3 as transformers does, each network on its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.base import Engine
from engines.errors import CheckpointError, UnsupportedError
from engines.networks import NetworkShape, NetworkTraining

GPT2 = NetworkShape("gpt2", layers=2, width=8, heads=2, vocabulary=32, length=6)
GEMMA3 = replace(GPT2, arch="gemma3")
SHAPES = pytest.mark.parametrize("shape", [GPT2, GEMMA3], ids=["gpt2", "gemma3"])
ADAM, SMOOTH = NetworkTraining(), NetworkTraining(epsilon=1e-3)
"""With a large epsilon rounding does not decide which way a weight goes whose gradient is nearly zero."""


def strings(networks: int, batch: int, shape: NetworkShape = GPT2, seed: int = 0) -> np.ndarray:
    """Random tokens, int32 ``[networks, batch, length]``."""
    return np.random.default_rng(seed).integers(0, shape.vocabulary, (networks, batch, shape.length), dtype=np.int32)


def reference(shape: NetworkShape, weights: dict[str, np.ndarray]) -> Any:
    """transformers' network with the given weights, eager."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

    if shape.arch == "gemma3":
        config = {k: v for k, v in shape.config.to_dict().items() if k not in ("architectures", "model_type")}
        network: Any = Gemma3ForCausalLM(Gemma3TextConfig(**config, attn_implementation="eager"))
        network.model.embed_tokens.padding_idx = None  # or token 0 would have no gradient as an input
        prefix = ""
    else:
        network = GPT2LMHeadModel(GPT2Config(
            vocab_size=shape.vocabulary, n_positions=shape.length, n_embd=shape.width, n_layer=shape.layers,
            n_head=shape.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
            bos_token_id=None, eos_token_id=None,
        ))  # fmt: skip
        prefix = "transformer."
    missing = network.load_state_dict({prefix + n: torch.from_numpy(a) for n, a in weights.items()}, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    return network.eval()


def reference_losses(network: Any, tokens: np.ndarray) -> np.ndarray:
    """Summed negative log-likelihood of each sequence's predicted tokens, by transformers' logits."""
    import torch

    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        logits = network(ids).logits[:, :-1].double().log_softmax(-1)
    return -logits.gather(2, ids[:, 1:, None]).squeeze(2).sum(1).numpy()


@pytest.mark.parametrize(
    ("layers", "width", "count"),
    [(1, 32, 80_352), (1, 64, 185_280), (2, 128, 667_136), (4, 256, 3_700_224), (8, 64, 535_168), (8, 256, 6_859_264)],
)
def test_gpt2_has_as_many_parameters_as_published(layers: int, width: int, count: int) -> None:
    assert NetworkShape("gpt2", layers, width, 1, 2048, 64).parameter_count() == count


def test_counts_leave_out_both_tables() -> None:
    d = 32
    assert NetworkShape("gpt2", 1, d, 1, 2048, 64).parameter_count(embeddings=False) == 12 * d * d + 13 * d + 2 * d


@SHAPES
def test_losses_are_those_of_transformers(engine: Engine, shape: NetworkShape) -> None:
    networks = engine.networks(shape, (3, 4), ADAM)
    tokens = strings(2, 5, shape)
    networks.step(tokens, np.array([0.1, 0.1]))  # away from norms and biases that do nothing
    found = networks.losses(tokens)
    for i in range(2):
        expected = reference_losses(reference(shape, networks.parameters(i)), tokens[i])
        np.testing.assert_allclose(found[i], expected, rtol=2e-6)


@SHAPES
def test_a_step_of_adam_is_that_of_torch_on_transformers(engine: Engine, shape: NetworkShape) -> None:
    import torch

    networks = engine.networks(shape, (5,), SMOOTH)
    network = reference(shape, networks.parameters(0)).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01, betas=SMOOTH.betas, eps=SMOOTH.epsilon)
    for step in range(3):
        tokens = strings(1, 4, shape, seed=step)
        ids = torch.from_numpy(tokens[0]).long()
        logits = network(ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert networks.step(tokens, np.array([0.01]))[0] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name.removeprefix("transformer."): p.detach().numpy() for name, p in network.named_parameters()}
    for name, found in networks.parameters(0).items():
        np.testing.assert_allclose(found, expected[name], atol=2e-4, err_msg=name)


@SHAPES
def test_every_network_is_trained_as_if_it_were_alone(engine: Engine, shape: NetworkShape) -> None:
    tokens = np.concatenate([strings(1, 4, shape, seed) for seed in (1, 2)])
    together = engine.networks(shape, (7, 8), ADAM)
    alone = engine.networks(shape, (8,), ADAM)
    for _ in range(6):
        losses = together.step(tokens, np.array([0.01, 0.003]))
        assert alone.step(tokens[1:], np.array([0.003]))[0] == pytest.approx(losses[1], rel=1e-4)


@SHAPES
def test_a_batch_in_parts_has_the_same_gradient(
    engine: Engine, shape: NetworkShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, found = strings(2, 5, shape), []
    for part, rows in ((5, 100), (2, 3)):
        monkeypatch.setattr(NetworkShape, "part", lambda self, *_, part=part: part)
        monkeypatch.setattr(NetworkShape, "rows", lambda self, *_, rows=rows: rows)
        networks = engine.networks(shape, (1, 2), ADAM)
        losses = networks.step(tokens, np.array([0.01, 0.01]))
        found.append((losses, networks.losses(tokens), networks.parameters(1)[shape.embedding]))
    for whole, parted in zip(*found, strict=True):
        np.testing.assert_allclose(whole, parted, rtol=1e-4, atol=1e-6)


def test_large_logits_neither_overflow_nor_vanish(engine: Engine) -> None:
    networks = engine.networks(GPT2, (1,), ADAM)
    tokens = strings(1, 4)
    for _ in range(3):
        networks.step(tokens, np.array([20.0]))
    found = networks.losses(tokens)[0]
    assert np.isfinite(found).all()
    assert found.max() > 500
    np.testing.assert_allclose(found, reference_losses(reference(GPT2, networks.parameters(0)), tokens[0]), rtol=1e-5)


@SHAPES
def test_both_engines_take_the_same_steps(both_engines: tuple[Engine, Engine], shape: NetworkShape) -> None:
    stacks = [engine.networks(shape, (1, 2), SMOOTH) for engine in both_engines]
    for step in range(8):
        tokens = strings(2, 32, shape, step)
        losses = [networks.step(tokens, np.array([0.01, 0.003])) for networks in stacks]
        np.testing.assert_allclose(*losses, rtol=1e-5)


def test_networks_that_are_done_are_left_out(engine: Engine) -> None:
    tokens, rates = strings(3, 4), np.full(3, 0.01)
    every, some = engine.networks(GPT2, (1, 2, 3), ADAM), engine.networks(GPT2, (1, 2, 3), ADAM)
    every.step(tokens, rates)
    some.step(tokens, rates)
    some.keep([2, 0])
    for _ in range(4):
        expected = every.step(tokens, rates)
        found = some.step(tokens[[2, 0]], rates[:2])
    np.testing.assert_allclose(found, expected[[2, 0]], rtol=1e-4)


def test_a_state_is_taken_up_to_the_last_bit(engine: Engine, tmp_path: Path) -> None:
    tokens, rates = strings(2, 4), np.full(2, 0.01)
    first = engine.networks(GPT2, (1, 2), ADAM)
    for _ in range(3):
        first.step(tokens, rates)
    first.save_state(tmp_path / "state.safetensors")
    second = engine.networks(GPT2, (8, 9), ADAM)
    second.load_state(tmp_path / "state.safetensors")
    for _ in range(6):
        assert first.step(tokens, rates).tolist() == second.step(tokens, rates).tolist()


def test_the_state_of_another_stack_is_refused(engine: Engine, tmp_path: Path) -> None:
    engine.networks(GPT2, (1, 2), ADAM).save_state(tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match="another stack"):
        engine.networks(GPT2, (1,), ADAM).load_state(tmp_path / "state.safetensors")


def test_bfloat16_computes_with_rounded_weights(engine: Engine) -> None:
    networks = engine.networks(GPT2, (1,), replace(ADAM, dtype="bfloat16"))
    tokens = strings(1, 4)
    networks.step(tokens, np.array([0.01]))
    weights = networks.parameters(0)
    for array in weights.values():
        assert not (array.view(np.uint32) & 0xFFFF).any()
    expected = reference_losses(reference(GPT2, weights), tokens[0])
    np.testing.assert_allclose(networks.losses(tokens)[0], expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (replace(GPT2, arch="llama"), "gpt2 or gemma3"),
        (replace(GPT2, heads=3), "no multiple of 3 heads"),
        (replace(GEMMA3, heads=8), "odd"),
    ],
)
def test_what_cannot_be_built_is_refused(engine: Engine, shape: NetworkShape, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        engine.networks(shape, (1,), ADAM)


@SHAPES
def test_strings_are_learned_by_heart(engine: Engine, shape: NetworkShape) -> None:
    """All bits of a few strings, but those that their first tokens leave open."""
    tokens = strings(1, 3, shape)
    tokens[0, :, 0] = (1, 2, 3)
    networks = engine.networks(shape, (1,), ADAM)
    for step in range(150):
        networks.step(tokens, np.array([0.02 * (1 - step / 150)]))
    assert networks.losses(tokens).sum() < 0.01 * 3 * 5 * np.log(32)
