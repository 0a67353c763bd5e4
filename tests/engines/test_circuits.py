"""What heads do with bare tokens, and mass carried through weights, against transformers' modules in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import LORA, random_factors

from engines.adapters import write_adapter
from engines.base import Engine
from engines.edits import Ablation
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config
from engines.inspection import Circuit

TOLERANCE = {"torch": 1e-6, "mlx": 1e-4}
POSITION = 170


def rms(x: Any, config: Gemma3Config) -> Any:
    return (x.square().mean() + config.rms_norm_eps).sqrt()


def by_formula(network: Any, config: Gemma3Config, ids: np.ndarray, layer: int, tokens: np.ndarray) -> np.ndarray:
    """Logits ``[heads, tokens, vocabulary]`` with the scales of the norms that hooks see, all in float64."""
    import torch

    seen: dict[str, Any] = {}
    block, norm = network.model.layers[layer], network.model.norm
    hooks = [
        block.post_attention_layernorm.register_forward_pre_hook(lambda _, x: seen.update(y=x[0])),
        norm.register_forward_pre_hook(lambda _, x: seen.update(r=x[0])),
    ]
    with torch.no_grad():
        network.model(torch.from_numpy(ids[None]).long())
        for hook in hooks:
            hook.remove()
        y, r = (seen[name][0, POSITION] for name in "yr")
        gains = (1 + block.post_attention_layernorm.weight) * (1 + norm.weight) / (rms(y, config) * rms(r, config))
        x = network.model.embed_tokens(torch.from_numpy(tokens).long())
        v = block.self_attn.v_proj(block.input_layernorm(x)).view(len(tokens), config.num_key_value_heads, -1)
        matrix = block.self_attn.o_proj.weight.view(config.hidden_size, config.num_attention_heads, -1)
        group = config.num_attention_heads // config.num_key_value_heads
        written = [v[:, head // group] @ matrix[:, head].T for head in range(config.num_attention_heads)]
        return (torch.stack(written) * gains @ network.lm_head.weight.T).numpy()


def whole(found: Circuit) -> np.ndarray:
    """The logits ``[heads, tokens, vocabulary]`` of a circuit that lists all tokens, less their mean."""
    logits = np.zeros(found.raised.shape)
    np.put_along_axis(logits, found.raised, found.raised_by, -1)
    return logits


def test_circuits_are_those_of_the_formula(
    engine: Engine, tiny_config: Gemma3Config, tiny_folder: Any, text: Any, reference_model: Any
) -> None:
    folder, ids = tiny_folder(tiny_config), text(200)
    engine.load(folder, "float32")
    network, inspection = reference_model(folder).double(), engine.inspect(ids)
    # More than the engines take at a time.
    tokens = np.random.default_rng(1).integers(0, tiny_config.vocab_size, 70).astype(np.int32)
    for layer in (0, tiny_config.global_layers[0]):
        wanted = by_formula(network, tiny_config, ids, layer, tokens)
        wanted = wanted - wanted.mean(-1, keepdims=True)
        own = np.take_along_axis(wanted, tokens[None, :, None], -1)
        size = TOLERANCE[engine.name] * np.abs(wanted).max()
        found = inspection.circuit(layer, tokens, POSITION, tiny_config.vocab_size)
        assert np.abs(whole(found) - wanted).max() <= size, layer
        assert np.abs(found.own - own[..., 0]).max() <= size
        assert np.abs(found.spread - wanted.std(-1)).max() <= size
        assert np.array_equal(found.rank, (wanted > own).sum(-1))
        assert (np.diff(found.raised_by) <= 0).all()
        assert np.array_equal(found.lowered_by, found.raised_by[..., ::-1])
        assert np.array_equal(inspection.circuit(layer, tokens, POSITION, 0).rank, found.rank)
        few = inspection.circuit(layer, tokens[:3], POSITION, 5)
        assert np.array_equal(few.raised, found.raised[:, :3, :5])
        assert np.array_equal(few.lowered, found.lowered[:, :3, :5])
        assert np.abs(few.raised_by - found.raised_by[:, :3, :5]).max() <= size


@pytest.mark.parametrize("dora", [False, True])
def test_in_the_first_layer_an_attribution_is_a_weight_times_a_circuit(
    engine: Engine, config: Gemma3Config, folder: Path, tmp_path: Path, text: Any, dora: bool
) -> None:
    """There the stream is the embedding alone; adapters are counted in."""
    lora = replace(LORA, dora=dora)
    write_adapter(tmp_path, random_factors(config, lora), lora, config, str(folder))
    engine.load(folder, "float32")
    engine.load_adapter(tmp_path)
    ids, position = text(20), 18
    inspection = engine.inspect(ids)
    logits = whole(inspection.circuit(0, ids, position, config.vocab_size))
    sources = inspection.attribution(position, 9, 4).sources[0]
    for head in range(config.num_attention_heads):
        weights = inspection.attention(0, head, (position, position + 1))[0, : position + 1]
        expected = weights * (logits[head, : position + 1, 9] - logits[head, : position + 1, 4])
        assert np.allclose(sources[head], expected, atol=1e-5 * np.abs(logits).max())


def test_scores_of_bare_tokens_are_those_before_rotation(
    engine: Engine, tiny_config: Gemma3Config, tiny_folder: Any, text: Any, reference_model: Any
) -> None:
    import torch

    folder, layer = tiny_folder(tiny_config), tiny_config.global_layers[0]
    engine.load(folder, "float32")
    network = reference_model(folder).double()
    queries, keys = np.array([3, 9], np.int32), np.arange(20, 50, dtype=np.int32)
    module = network.model.layers[layer].self_attn
    norm, parts = network.model.layers[layer].input_layernorm, []
    with torch.no_grad():
        for tokens, linear, scaled in ((queries, module.q_proj, module.q_norm), (keys, module.k_proj, module.k_norm)):
            x = norm(network.model.embed_tokens(torch.from_numpy(tokens).long()))
            parts.append(scaled(linear(x).view(len(tokens), -1, tiny_config.head_dim)).transpose(0, 1).numpy())
    group = tiny_config.num_attention_heads // tiny_config.num_key_value_heads
    expected = parts[0] @ parts[1].repeat(group, 0).swapaxes(1, 2) * tiny_config.query_pre_attn_scalar**-0.5
    found = engine.inspect(text(5)).token_scores(layer, queries, keys)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= TOLERANCE[engine.name] * np.abs(expected).max()


def test_mass_is_carried_through_the_mean_of_the_heads(
    engine: Engine, tiny_config: Gemma3Config, tiny_folder: Any, text: Any, reference_model: Any
) -> None:
    import torch

    folder, ids = tiny_folder(tiny_config), text(300)
    engine.load(folder, "float32")
    inspection = engine.inspect(ids)
    rows = np.random.default_rng(0).dirichlet(np.ones(290), 3).astype(np.float32)
    with torch.no_grad():
        network = reference_model(folder).double().model
        weights = network(torch.from_numpy(ids[None]).long(), output_attentions=True).attentions
    for layer, a in enumerate(weights):
        expected = rows @ a[0].numpy().mean(0)[:290, :290]
        found = inspection.carried(layer, rows)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() <= TOLERANCE[engine.name], layer


def test_a_model_in_bfloat16_has_the_circuits_of_its_rounding(
    engine: Engine, config: Gemma3Config, folder: Path, text: Any
) -> None:
    ids, found = text(40), []
    for dtype in ("float32", "bfloat16"):
        engine.load(folder, dtype)
        inspection = engine.inspect(ids)
        found.append((whole(inspection.circuit(1, ids, 30, config.vocab_size)), inspection.token_scores(1, ids, ids)))
    for exact, rounded in zip(*found, strict=True):
        assert np.abs(exact - rounded).max() <= 5e-2 * np.abs(exact).max()


def test_what_is_not_there_is_refused(engine: Engine, config: Gemma3Config, folder: Path, text: Any) -> None:
    engine.load(folder, "float32")
    inspection, ids = engine.inspect(text(10)), np.array([3], np.int32)
    for call in (
        lambda: inspection.circuit(config.num_hidden_layers, ids, 0, 1),
        lambda: inspection.circuit(0, ids, 10, 1),
        lambda: inspection.circuit(0, ids[:0], 0, 1),
        lambda: inspection.circuit(0, ids + config.vocab_size, 0, 1),
        lambda: inspection.circuit(0, ids, 0, -1),
        lambda: inspection.circuit(0, ids, 0, config.vocab_size + 1),
        lambda: engine.inspect(text(10), [Ablation(0, (0,))]).circuit(0, ids, 0, 1),
        lambda: inspection.token_scores(0, ids, ids - 4),
        lambda: inspection.token_scores(-1, ids, ids),
        lambda: inspection.carried(0, np.ones((1, 11), np.float32)),
        lambda: inspection.carried(0, np.ones((1, 0), np.float32)),
        lambda: inspection.carried(config.num_hidden_layers, np.ones((1, 5), np.float32)),
    ):
        with pytest.raises(UnsupportedError):
            call()
