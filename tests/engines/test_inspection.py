"""What an engine shows of the inside of a text, against transformers' eager attention and dense formulas."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import LORA, batch, random_factors

from engines import open_engine
from engines.adapters import write_adapter
from engines.base import Engine
from engines.edits import Ablation, Patch
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config
from engines.inspection import Attribution, LayerStatistics
from engines.training import Rank1Settings, TrainingSettings

TOLERANCE = {"torch": 1e-6, "mlx": 1e-4}

ROUNDING = {"float32": 1e-4, "bfloat16": 2**-7}
"""Of the sum of an attribution's parts, as a share of their size."""


def eager(network: Any, ids: np.ndarray, **arguments: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """transformers' weights ``[heads, T, T]`` of every layer, and its hidden states ``[T, hidden]``."""
    import torch

    with torch.no_grad():
        found = network.model(
            torch.from_numpy(ids[None]).long(), output_attentions=True, output_hidden_states=True, **arguments
        )
    return [a[0].numpy() for a in found.attentions], [h[0].numpy() for h in found.hidden_states]


@pytest.mark.parametrize("extra", [-1, 0, 1, 64])
def test_weights_equal_transformers_eager(
    engine: Engine, tiny_config: Gemma3Config, tiny_folder: Any, text: Any, reference_model: Any, extra: int
) -> None:
    folder = tiny_folder(tiny_config)
    ids = text(tiny_config.sliding_window + extra)
    engine.load(folder, "float32")
    # In float64, because transformers' own float32 is as far from that as ours.
    weights, _ = eager(reference_model(folder).double(), ids)
    inspection = engine.inspect(ids)
    for layer, expected in enumerate(weights):
        for head in range(tiny_config.num_attention_heads):
            found = inspection.attention(layer, head, (0, len(ids)))
            assert np.abs(found - expected[head]).max() <= TOLERANCE[engine.name], (layer, head)


def dense(a: np.ndarray, v: np.ndarray, ids: np.ndarray, window: int, local: bool) -> dict[str, np.ndarray]:
    """Every statistic of ``LayerStatistics`` by its definition, in float64, from A and V."""
    a = a.astype(np.float64)
    heads, length, _ = a.shape
    q, k = np.arange(length)[:, None], np.arange(length)[None]
    same = ids[:, None] == ids[None]
    duplicate = same & (k < q)
    induction = np.zeros_like(duplicate)
    induction[:, 1:] = duplicate[:, :-1]
    values = np.linalg.norm(v.astype(np.float64), axis=-1)
    group = heads // len(v)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(a > 0, a * np.log(a), 0).sum(-1)
    return {
        "entropy": entropy,
        "first": a[:, :, 0],
        "elsewhere": a[:, :, 1:].sum(-1),
        "reach": (a * (q - k) * (k > 0)).sum(-1),
        "previous": (a * (q - k == 1)).sum(-1),
        "duplicate": (a * duplicate).sum(-1),
        "induction": (a * np.tril(induction)).sum(-1),
        "beyond": (a * (q - k >= window)).sum(-1) if not local else np.zeros((heads, length)),
        "weighted_value": (a * values.repeat(group, 0)[:, None]).sum(-1),
        "received": a.sum(1),
        "by_distance": np.stack([np.trace(a, -d, 1, 2) for d in range(length)], -1),
        "value_norm": values,
    }


@pytest.mark.parametrize("length", [5, 300])
def test_streamed_statistics_equal_those_of_dense_weights(
    engine: Engine, config: Gemma3Config, folder: Path, text: Any, reference_model: Any, length: int
) -> None:
    """300 is not a multiple of the tile."""
    ids = text(length)
    engine.load(folder, "float32")
    network = reference_model(folder)
    weights, hidden = eager(network, ids)
    inspection = engine.inspect(ids)
    for layer, a in enumerate(weights):
        v = values_of(network, layer, hidden[layer], config)
        expected = dense(a, v, ids, config.sliding_window, config.is_local(layer))
        found = inspection.statistics(layer)
        for name, wanted in expected.items():
            statistic = getattr(found, name)
            assert statistic.dtype == np.float32
            assert statistic.shape == wanted.shape
            scale = max(1.0, np.abs(wanted).max())
            assert np.abs(statistic - wanted).max() <= 2e-5 * scale, (layer, name)


def values_of(network: Any, layer: int, hidden: np.ndarray, config: Gemma3Config) -> np.ndarray:
    """``[kv_heads, T, head_dim]`` by transformers' modules."""
    import torch

    block = network.model.layers[layer]
    with torch.no_grad():
        v = block.self_attn.v_proj(block.input_layernorm(torch.from_numpy(hidden)))
    return v.view(len(hidden), config.num_key_value_heads, config.head_dim).transpose(0, 1).numpy()


def test_mlx_has_the_weights_of_one_tile_at_a_time(config: Gemma3Config, text: Any, monkeypatch: Any) -> None:
    """It is lazy, so that the tiles of a layer could pile up until a sum is wanted."""
    mx = pytest.importorskip("mlx.core")
    tiles = importlib.import_module("engines.mlx.tiles")
    monkeypatch.setattr(tiles.spans, "__defaults__", (16,))
    engine = open_engine("mlx")
    engine.initialise(config, 0, "float32")
    inspection, layer, length = engine.inspect(text(512)), config.global_layers[0], 512
    inspection.queries_keys(layer)
    tile = config.num_attention_heads * 16 * length * 4
    for compute in (inspection.statistics, lambda layer: inspection.divergence(layer, *inspection.queries_keys(layer))):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        compute(layer)
        assert mx.get_peak_memory() - before < 16 * tile


def test_rows_sum_to_one_and_unseen_keys_are_exactly_zero(
    engine: Engine, config: Gemma3Config, folder: Path, text: Any
) -> None:
    engine.load(folder, "float32")
    inspection = engine.inspect(text(140))
    for layer in range(config.num_hidden_layers):
        rows = inspection.attention(layer, 1, (100, 140))
        assert np.allclose(rows.sum(1), 1, atol=1e-6)
        window = config.window(layer) or 1000
        distance = np.arange(100, 140)[:, None] - np.arange(140)
        assert (rows[(distance < 0) | (distance >= window)] == 0).all()
        assert (rows[(distance >= 0) & (distance < window)] > 0).all()


def test_the_streams_equal_transformers_hidden_states(
    engine: Engine, config: Gemma3Config, folder: Path, text: Any, reference_model: Any
) -> None:
    import torch

    ids = text(40)
    engine.load(folder, "float32")
    network = reference_model(folder)
    _, hidden = eager(network, ids)
    inspection, last = engine.inspect(ids), config.num_hidden_layers
    for layer in range(last):
        found = inspection.stream(layer, (0, 40))
        assert np.abs(found - hidden[layer]).max() <= 1e-4 * np.abs(hidden[layer]).max()
    # The last of transformers' hidden states has gone through the final norm, that of an inspection has not.
    with torch.no_grad():
        normed = network.model.norm(torch.from_numpy(inspection.stream(last, (0, 40)))).numpy()
    assert np.allclose(normed, hidden[last], atol=1e-4)
    assert not np.allclose(inspection.stream(last, (0, 40)), hidden[last], atol=1e-2)


def test_facts_of_a_residual_stream(engine: Engine, folder: Path, text: Any) -> None:
    engine.load(folder, "float32")
    inspection = engine.inspect(text(33))
    h, facts = inspection.stream(2, (0, 33)), inspection.residual(2)
    assert np.allclose(facts.rms, np.sqrt((h**2).mean(-1)), rtol=1e-5)
    assert facts.median == pytest.approx(np.sort(np.abs(h), axis=None)[(h.size - 1) // 2], rel=1e-5)
    order = np.argsort(-np.abs(h), axis=None)[:3]
    for (value, position, dimension), index in zip(facts.largest, order, strict=True):
        assert (position, dimension) == divmod(int(index), h.shape[1])
        assert value == pytest.approx(abs(h[position, dimension]), rel=1e-6)


def test_the_lens_ends_in_the_models_own_prediction(
    engine: Engine, config: Gemma3Config, folder: Path, text: Any, reference_model: Any
) -> None:
    import torch

    ids = text(90)
    engine.load(folder, "float32")
    network = reference_model(folder)
    _, hidden = eager(network, ids)
    with torch.no_grad():
        final = network(torch.from_numpy(ids[None]).long()).logits[0].log_softmax(-1).numpy()
        targets = np.roll(ids, -1)
        for layer, rows in enumerate(engine.inspect(ids).lens((3, 90), targets[3:])):
            if layer < config.num_hidden_layers:
                logits = network.lm_head(network.model.norm(torch.from_numpy(hidden[layer])))
                log_probs = logits.log_softmax(-1).numpy()
            else:
                log_probs = final
            p = np.exp(log_probs[3:])
            wanted = log_probs[np.arange(3, 90), targets[3:]]
            assert (rows.top == p.argmax(-1)).all()
            assert np.allclose(rows.probability, p.max(-1), atol=1e-4)
            assert np.allclose(rows.entropy, -(p * log_probs[3:]).sum(-1), atol=1e-4)
            assert np.allclose(rows.kl, (np.exp(final) * (final - log_probs)).sum(-1)[3:], atol=1e-4)
            assert np.allclose(rows.log_prob, wanted, atol=1e-4)
            assert (np.abs(rows.rank - (log_probs[3:] > wanted[:, None]).sum(-1)) <= 1).all()
    assert layer == config.num_hidden_layers
    assert np.abs(rows.kl).max() < 1e-6


@pytest.mark.parametrize("contrast", [None, 7])
def test_attribution_sums_to_the_logit(
    engine: Engine, tiny_config: Gemma3Config, tiny_folder: Any, text: Any, contrast: int | None
) -> None:
    engine.load(tiny_folder(tiny_config), "float32")
    ids = text(40)
    logits = engine.logits(ids[None])[0]
    inspection = engine.inspect(ids)
    for position, token in ((39, 3), (12, 20), (0, 5)):
        parts = inspection.attribution(position, token, contrast)
        wanted = logits[position, token] - (logits[position, contrast] if contrast is not None else 0)
        assert parts.sources.shape == (tiny_config.num_hidden_layers, tiny_config.num_attention_heads, position + 1)
        assert parts.logit == pytest.approx(wanted, abs=1e-4)
        assert parts.total == pytest.approx(parts.logit, abs=1e-4 * max(1, abs(parts.logit)))
        assert np.abs(parts.sources).sum() > 0.1


def test_attribution_of_a_head_is_what_its_output_writes(
    engine: Engine, config: Gemma3Config, folder: Path, text: Any, reference_model: Any
) -> None:
    """By the formula, with transformers' modules: post-norm and final norm with their scales held fixed."""
    import torch

    ids, layer, head, position, token = text(20), 1, 2, 19, 9
    engine.load(folder, "float32")
    network = reference_model(folder)
    inspection = engine.inspect(ids)
    z = torch.from_numpy(inspection.head_outputs(layer, range(config.num_attention_heads), (position, position + 1)))
    block, norm = network.model.layers[layer], network.model.norm
    with torch.no_grad():
        matrix = block.self_attn.o_proj.weight.view(config.hidden_size, config.num_attention_heads, -1)
        written = matrix[:, head] @ z[head, 0]
        y = block.self_attn.o_proj(z[:, 0].flatten())
        r = torch.from_numpy(inspection.stream(config.num_hidden_layers, (position, position + 1)))[0]

        def rms(x: torch.Tensor) -> torch.Tensor:
            return (x.square().mean() + config.rms_norm_eps).sqrt()

        gains = (1 + norm.weight) * (1 + block.post_attention_layernorm.weight)
        expected = float((network.lm_head.weight[token] * gains * written).sum() / (rms(y) * rms(r)))
    found = inspection.attribution(position, token).sources[layer, head].sum()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_divergence_is_that_of_the_dense_rows(engine: Engine, config: Gemma3Config, folder: Path, text: Any) -> None:
    engine.load(folder, "float32")
    one, other = engine.inspect(text(150)), engine.inspect(text(300)[150:])
    for layer in range(config.num_hidden_layers):
        found = one.divergence(layer, *other.queries_keys(layer))
        for head in range(config.num_attention_heads):
            p, q = (i.attention(layer, head, (0, 150)).astype(np.float64) for i in (one, other))
            assert np.allclose(found[head], jensen_shannon(p, q), atol=1e-5)
    assert found.max() > 0.05
    same = one.divergence(0, *one.queries_keys(0))
    assert np.abs(same).max() < 1e-6


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        halves = [np.where(x > 0, x * np.log(x / middle), 0).sum(-1) / 2 for x in (p, q)]
    return halves[0] + halves[1]


def test_both_engines_show_the_same(
    both_engines: tuple[Engine, Engine], config: Gemma3Config, folder: Path, text: Any
) -> None:
    ids, found = text(200), []
    for engine in both_engines:
        engine.load(folder, "float32")
        found.append(engine.inspect(ids))
    ours, theirs = found
    for layer in range(config.num_hidden_layers):
        a, b = ours.statistics(layer), theirs.statistics(layer)
        for name in LayerStatistics.__dataclass_fields__:
            x, y = getattr(a, name), getattr(b, name)
            assert np.abs(x - y).max() <= 1e-4 * max(1, np.abs(x).max()), (layer, name)
    one, other = (i.attribution(150, 3) for i in found)
    assert np.allclose(one.sources, other.sources, atol=1e-4)
    assert np.allclose(one.mlps, other.mlps, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_seen(
    engine: Engine, config: Gemma3Config, folder: Path, tmp_path: Path, text: Any, dora: bool
) -> None:
    lora = replace(LORA, dora=dora)
    write_adapter(tmp_path, random_factors(config, lora), lora, config, str(folder))
    engine.load(folder, "float32")
    plain = engine.inspect(text(30)).attention(1, 0, (0, 30))
    engine.load_adapter(tmp_path)
    inspection = engine.inspect(text(30))
    assert not np.allclose(plain, inspection.attention(1, 0, (0, 30)), atol=1e-3)
    for position, token in ((29, 4), (11, 8)):
        parts = inspection.attribution(position, token)
        wanted = engine.logits(text(30)[None])[0, position, token]
        assert parts.total == pytest.approx(wanted, abs=1e-4 * size(parts))


def size(parts: Attribution) -> float:
    """The absolute values of the parts, summed: what they are rounded against."""
    return abs(parts.embedding) + float(np.abs(parts.sources).sum() + np.abs(parts.mlps).sum())


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        (TrainingSettings(replace(LORA, dropout=0.2)), "float32"),
        (TrainingSettings(LORA, merging=True), "bfloat16"),
        (TrainingSettings(rank1=Rank1Settings()), "float32"),
        (TrainingSettings(rank1=Rank1Settings(), rest=True), "bfloat16"),
        (TrainingSettings(), "float32"),
    ],
    ids=["lora", "masters", "rank1", "rank1 and the rest", "full"],
)
def test_training_goes_on_as_if_nobody_had_looked(
    engine: Engine, folder: Path, text: Any, settings: TrainingSettings, dtype: str
) -> None:
    """And what is seen between two steps is the model of that moment."""
    found = []
    for looks in (False, True):
        engine.load(folder, dtype)
        engine.start_training(settings)
        first = engine.train_step([batch()], 1e-2)
        if looks:
            inspection = engine.inspect(text(20), [Ablation(1, (0,), "mean")])
            lens = inspection.lens((0, 20), text(20))
            next(lens)
            inspection.statistics(2)
            parts = engine.inspect(text(20)).attribution(19, 5)
            wanted = engine.logits(text(20)[None])[0, 19, 5]
            assert parts.total == pytest.approx(wanted, abs=ROUNDING[dtype] * size(parts))
        found.append([first.loss, *(engine.train_step([batch(seed=1)], 1e-2).loss for _ in range(2))])
    assert found[0] == found[1]


def test_a_model_in_bfloat16(engine: Engine, config: Gemma3Config, folder: Path, text: Any) -> None:
    ids, other, last = text(140), text(280)[140:], config.num_hidden_layers
    engine.load(folder, "float32")
    exact = engine.inspect(ids).attention(0, 1, (0, 140))
    engine.load(folder, "bfloat16")
    inspection, donor = engine.inspect(ids), engine.inspect(other)
    rows = inspection.attention(0, 1, (0, 140))
    assert np.allclose(rows.sum(1), 1, atol=1e-6)
    assert np.abs(rows - exact).max() <= 5e-2
    logits = engine.logits(ids[None])[0]
    for position, token in ((139, 3), (12, 20), (0, 5)):
        parts = inspection.attribution(position, token)
        assert abs(parts.logit - logits[position, token]) <= ROUNDING["bfloat16"] * size(parts)
        assert abs(parts.total - parts.logit) <= ROUNDING["bfloat16"] * size(parts)
    values = donor.head_outputs(1, (0, 2), (4, 9))
    some = engine.inspect(ids, [Patch(1, (0, 2), (4, 9), values), Ablation(2, (1,), "mean")])
    assert np.array_equal(some.head_outputs(1, (0, 2), (4, 9)), values)
    assert np.ptp(some.head_outputs(2, (1,), (0, 140)), axis=1).max() == 0
    whole = engine.inspect(ids, [Patch(1, None, (0, 140), donor.stream(1, (0, 140)))])
    assert np.array_equal(whole.stream(last, (0, 140)), donor.stream(last, (0, 140)))
    for statistic in vars(some.statistics(2)).values():
        assert statistic.dtype == np.float32
    effect = some.effect(inspection, (0, 140), np.roll(ids, -1))
    assert np.allclose(effect.base_logit, logits[np.arange(140), np.roll(ids, -1)], atol=0.1)
    assert effect.kl.max() > 0.1
    *_, rows = inspection.lens((0, 140), np.roll(ids, -1))
    assert np.abs(rows.kl).max() < 1e-6


def test_texts_and_places_that_are_not_there_are_refused(
    engine: Engine, config: Gemma3Config, folder: Path, text: Any
) -> None:
    with pytest.raises(UnsupportedError, match="no model is loaded"):
        engine.inspect(text(10))
    engine.load(folder, "float32")
    with pytest.raises(UnsupportedError, match="the text is empty"):
        engine.inspect(np.zeros(0, np.int32))
    with pytest.raises(UnsupportedError, match="513 tokens, more than the context of 512"):
        engine.inspect(text(513))
    with pytest.raises(UnsupportedError, match="outside the vocabulary"):
        engine.inspect(np.array([3, 64], np.int32))
    inspection = engine.inspect(text(10))
    for call in (
        lambda: inspection.attention(0, 9, (0, 1)),
        lambda: inspection.attention(0, 0, (0, 11)),
        lambda: inspection.statistics(config.num_hidden_layers),
        lambda: inspection.attribution(10, 0),
        lambda: inspection.residual(config.num_hidden_layers + 1),
        lambda: inspection.advance(config.num_hidden_layers + 1),
        lambda: inspection.stream(-1, (0, 1)),
        lambda: engine.inspect(text(10), [Ablation(0, (0,))]).attribution(3, 1),
        lambda: inspection.divergence(0, *engine.inspect(text(9)).queries_keys(0)),
    ):
        with pytest.raises(UnsupportedError):
            call()


def test_a_tick_breaks_off_between_tiles_and_what_it_broke_off_can_begin_again(
    engine: Engine, folder: Path, text: Any
) -> None:
    engine.load(folder, "float32")
    ids, whole = text(400), engine.inspect(text(400)).statistics(2)
    inspection, ticks = engine.inspect(ids), [0]

    def tick() -> None:
        ticks[0] += 1
        if ticks[0] in (3, 10, 15):
            raise KeyboardInterrupt

    inspection.tick = tick
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            inspection.statistics(2)
    assert ticks == [15]
    assert np.array_equal(inspection.statistics(2).by_distance, whole.by_distance)
    assert engine.inspect(ids, [Ablation(1, (0,))], inspection).tick is tick
