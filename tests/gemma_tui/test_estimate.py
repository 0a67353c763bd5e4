"""The memory of a training: closed forms, and what the engines really hold."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import training
from engines.base import DeviceInfo, Engine
from engines.blocks import Noise
from engines.gemma3 import GLOBAL, LOCAL, Gemma3Config, Rope
from engines.training import IGNORED, Batch, LoRASettings, OptimizerSettings, Rank1Settings, TrainingSettings
from gemma_tui.studies.estimate import Estimate, checkpoint_bytes, estimate, inference_bytes, remembered

GB = 10**9
LORA = TrainingSettings(LoRASettings(4, 8.0))
FULL = TrainingSettings()
RANK1 = TrainingSettings(rank1=Rank1Settings())
ATTENTION = ("q_proj", "v_proj")
SETTINGS = {
    "lora": LORA,
    "some": TrainingSettings(LoRASettings(4, 8.0, targets=ATTENTION, layers=(0, 4))),
    "dora": TrainingSettings(LoRASettings(4, 8.0, dora=True)),
    "dropout": TrainingSettings(LoRASettings(4, 8.0, dropout=0.1)),
    "merging": TrainingSettings(LoRASettings(4, 8.0), merging=True),
    "lora and rest": TrainingSettings(LoRASettings(4, 8.0), rest=True),
    "full": FULL,
    "sgd": TrainingSettings(optimizer=OptimizerSettings("sgd")),
    "adafactor": TrainingSettings(optimizer=OptimizerSettings("adafactor")),
    "muon": TrainingSettings(optimizer=OptimizerSettings("muon")),
    "lora by muon": replace(LORA, optimizer=OptimizerSettings("muon")),
    "rank1": RANK1,
    "rank1 and rest": TrainingSettings(rank1=Rank1Settings(targets=ATTENTION), rest=True),
    "rank1 with feedback": TrainingSettings(rank1=Rank1Settings(error_feedback=True, momentum=0.9)),
    "checkpointing": replace(FULL, checkpoint_activations=True),
    "lora checkpointing": replace(LORA, checkpoint_activations=True),
}
OPTIMIZERS = ("sgd", "adafactor", "muon", "lora by muon")
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def on(engine: str, device: str = "cpu") -> DeviceInfo:
    return DeviceInfo(engine, device, "1", ("float32", "bfloat16"), 16 * GB)


def of(config: Gemma3Config, settings: TrainingSettings, dtype: str = "float32", **changes: Any) -> Estimate:
    arguments = {"rows": 2, "sequence_length": 32, "device": on("torch"), **changes}
    return estimate(config, settings, dtype=dtype, **arguments)


@pytest.fixture(scope="module")
def wide() -> Gemma3Config:
    """Large enough that what grows with the model is more than what does not."""
    return Gemma3Config(
        vocab_size=512, hidden_size=96, intermediate_size=224, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32, sliding_window=64, layer_types=(*[LOCAL] * 5, GLOBAL),
        rope_global=Rope(1e6), rope_local=Rope(1e4), query_pre_attn_scalar=32,
    )  # fmt: skip


def a_batch(config: Gemma3Config, rows: int = 2, length: int = 32) -> Batch:
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length), dtype=np.int32)
    return Batch(tokens, tokens)


def test_full_training_in_bfloat16_by_hand(four_to_one: Gemma3Config) -> None:
    found, n = of(four_to_one, FULL, "bfloat16"), four_to_one.parameter_count()
    assert (found.weights, found.masters, found.trainables, found.gradients) == (2 * n, 2 * n, 0, 4 * n)
    assert found.optimizer == 8 * n
    assert found.casts == 2 * 7 * sum(out * inner for out, inner in four_to_one.linear_shapes().values())


def test_lora_by_hand(four_to_one: Gemma3Config) -> None:
    found, n = of(four_to_one, LORA, "bfloat16"), four_to_one.parameter_count()
    adapters = four_to_one.lora_count(4, LORA.lora.targets if LORA.lora else ())
    assert (found.weights, found.masters, found.casts) == (2 * n, 0, 0)
    assert (found.trainables, found.gradients, found.optimizer) == (4 * adapters, 4 * adapters, 8 * adapters)


def test_merging_keeps_its_matrices_in_float32(four_to_one: Gemma3Config) -> None:
    matrices = 7 * sum(out * inner for out, inner in four_to_one.linear_shapes().values())
    for settings in (SETTINGS["merging"], RANK1):
        assert of(four_to_one, settings, "bfloat16").masters == 2 * matrices
        assert of(four_to_one, settings, "float32").masters == 0
    # 40 inputs, 64 outputs of q_proj, and so on: one v and one b each.
    vectors = 7 * sum(out + inner for out, inner in four_to_one.linear_shapes().values())
    assert of(four_to_one, RANK1).trainables == of(four_to_one, RANK1).gradients == 4 * vectors
    assert of(four_to_one, RANK1, accumulate=2).gradients == 4 * matrices
    assert of(four_to_one, RANK1).optimizer == 0
    assert of(four_to_one, SETTINGS["rank1 with feedback"]).optimizer == 4 * matrices


def test_optimizers_by_hand(four_to_one: Gemma3Config) -> None:
    shapes = four_to_one.parameter_shapes()
    table = math.prod(shapes["model.embed_tokens.weight"])
    vectors = sum(s[0] for s in shapes.values() if len(s) == 1)
    matrices = four_to_one.parameter_count() - table - vectors
    assert of(four_to_one, SETTINGS["sgd"]).optimizer == 4 * (table + vectors + matrices)
    assert of(four_to_one, SETTINGS["muon"]).optimizer == 4 * (2 * table + 2 * vectors + matrices)
    assert of(four_to_one, SETTINGS["adafactor"]).optimizer == 4 * sum(map(sum, shapes.values()))
    still = TrainingSettings(optimizer=OptimizerSettings("sgd", momentum=0))
    assert of(four_to_one, still).optimizer == 0


def test_the_real_270m_by_hand() -> None:
    real = Gemma3Config(
        262_144, 640, 2048, 18, 4, 1, 256, 512, (*([LOCAL] * 5 + [GLOBAL]) * 3,), Rope(1e6), Rope(1e4), 256
    )
    found = of(real, FULL, "bfloat16", rows=4, sequence_length=512)
    assert real.parameter_count() == 268_098_176
    # 16 bytes each: float32 with its gradient and two moments.
    assert found.weights + found.masters + found.gradients + found.optimizer == 16 * 268_098_176
    # Per token and layer: 4 (4·640 + 1024 + 256) · 2 + 2 (2·640 + 2·1024 + 2·256 + 2·2048) + 4 (4 + 8 + 1) bytes.
    layer, ends = 30_720 + 15_872 + 52, 640 * (8 + 6 + 4)
    assert found.activations == 2048 * (18 * layer + ends)
    assert found.logits == 8 << 20
    assert found.workspace == 4 * 262_144 * 640


def test_checkpointing_keeps_one_layer_and_all_inputs(wide: Gemma3Config) -> None:
    whole, less = of(wide, FULL).activations, of(wide, SETTINGS["checkpointing"]).activations
    longer = replace(wide, num_hidden_layers=7, layer_types=(*wide.layer_types, LOCAL))
    layer = of(longer, FULL).activations - whole
    assert of(longer, SETTINGS["checkpointing"]).activations - less == 64 * 4 * 96
    assert whole - less == 5 * layer - 6 * 64 * 4 * 96


def test_activations_grow_with_the_tokens_and_masks_with_their_square(wide: Gemma3Config) -> None:
    one, two = (of(wide, LORA, sequence_length=n).activations for n in (32, 64))
    assert two == 2 * one
    assert of(wide, LORA, sequence_length=128).activations == 4 * one + 4 * 5 * 128**2
    for device in (on("mlx"), on("mlx", "gpu"), on("torch", "mps")):
        # Scores and weights of 6 layers, 2 rows and 4 heads.
        assert of(wide, LORA, device=device).activations == one + 2 * 4 * 6 * 2 * 4 * 32**2


@every_setting
def test_parameters_and_optimizer_are_what_the_engine_has(
    engine: Engine, four_to_one: Gemma3Config, settings: TrainingSettings, tmp_path: Path
) -> None:
    engine.initialise(four_to_one, 0, "float32")
    trainable = engine.start_training(settings)
    engine.train_step([a_batch(replace(four_to_one, vocab_size=64))], 1e-3)
    found = of(four_to_one, settings)
    if settings.rank1 is None:
        assert found.gradients == 4 * trainable
    # An engine counts the vectors of rank-1 updates as state, and for each parameter the counter of its steps.
    state = found.optimizer + (found.trainables if settings.rank1 else 0)
    assert state <= engine.optimizer_bytes() <= state + 8 * 2 * len(four_to_one.parameter_shapes())
    written = sum(path.stat().st_size for path in engine.save_state(tmp_path))
    headers = 220 * 4 * (len(four_to_one.parameter_shapes()) + 100) + 30_000
    assert checkpoint_bytes(four_to_one, settings) <= written <= checkpoint_bytes(four_to_one, settings) + headers


def test_logits_are_counted_as_the_engines_make_them(
    engine: Engine, four_to_one: Gemma3Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile of the vocabulary at a time, both by the same rule."""
    tiles, rule = [], training.vocabulary_tile
    watched = import_module(f"engines.{engine.name}.training")
    monkeypatch.setattr(watched, "vocabulary_tile", lambda count: tiles.append((count, rule(count))) or tiles[-1][1])
    monkeypatch.setattr(training, "LOGITS_BYTES", 4 * 64 * 10 + 3)
    engine.initialise(four_to_one, 0, "float32")
    engine.start_training(LORA)
    engine.train_step([a_batch(four_to_one)], 1e-3)
    assert tiles == [(64, 10)]
    assert of(four_to_one, LORA).logits == 4 * 64 * 10


def kept_by_torch(config: Gemma3Config, settings: TrainingSettings, dtype: str) -> int:
    """Bytes that torch saves for the way back, without the parameters themselves."""
    import torch

    from engines.torch.engine import TorchEngine
    from engines.torch.training import summed_loss

    engine = TorchEngine()
    engine.initialise(config, 0, dtype)
    engine.start_training(settings)
    network = engine._loaded().train()
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Any] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = summed_loss(network, a_batch(config))
    del loss
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in OPTIMIZERS])
def test_activations_are_about_what_torch_keeps(wide: Gemma3Config, name: str, dtype: str) -> None:
    settings = SETTINGS[name]
    found = of(wide, settings, dtype)
    kept = kept_by_torch(wide, settings, dtype)
    if settings.rest or (settings.lora is None and settings.rank1 is None):
        kept -= 4 * 512 * 96  # the gradient of the head, which is counted with the gradients
    expected = found.activations + found.casts
    if settings.checkpoint_activations:
        assert kept < expected
    else:
        assert 0.85 < kept / expected < 1.1


@pytest.fixture
def peak() -> Any:
    """The most bytes of tensors that lived at a time while it was entered."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.known: weakref.WeakSet[Any] = weakref.WeakSet()
            self.now = self.most = 0

        def add(self, value: torch.Tensor) -> None:
            storage = value.untyped_storage()
            if storage not in self.known:
                self.known.add(storage)
                count = storage.nbytes()
                self.now += count
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.drop, count)

        def drop(self, count: int) -> None:
            self.now -= count

        def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = call(*args, **(kwargs or {}))
            for value in tree_leaves(result):
                if isinstance(value, torch.Tensor):
                    self.add(value)
            return result

    return Watch()


def two_steps(config: Gemma3Config, settings: TrainingSettings, dtype: str, batch: Batch, peak: Any) -> None:
    """Torch, watched by ``peak``."""
    from engines.torch.engine import TorchEngine

    engine = TorchEngine()
    with peak:
        engine.initialise(config, 0, dtype)
        for parameter in engine._loaded().parameters():
            peak.add(parameter)
        engine.start_training(settings)
        for _ in range(2):
            engine.train_step([batch], 1e-3)


@every_setting
def test_the_total_is_about_the_peak_of_a_step(wide: Gemma3Config, settings: TrainingSettings, peak: Any) -> None:
    two_steps(wide, settings, "bfloat16", a_batch(wide), peak)
    found = of(wide, settings, "bfloat16")
    assert 0.7 < peak.most / (found.total - found.kept) < 1.1


def a_noised_batch(config: Gemma3Config, rows: int, length: int) -> Batch:
    """Half of the tokens of the copy are masked, in blocks of 8."""
    plain = a_batch(config, rows, length)
    masked = np.random.default_rng(1).random(plain.tokens.shape) < 0.5
    tokens, labels = np.where(masked, 4, plain.tokens), np.where(masked, plain.tokens, IGNORED)
    return replace(plain, noise=Noise(tokens.astype(np.int32), labels.astype(np.int32), 8))


@pytest.mark.parametrize("settings", [LORA, FULL], ids=["lora", "full"])
def test_a_masked_copy_counts_as_a_row(wide: Gemma3Config, settings: TrainingSettings, peak: Any) -> None:
    two_steps(wide, settings, "float32", a_noised_batch(wide, 2, 128), peak)
    found = of(wide, settings, rows=4, sequence_length=128)
    assert 0.85 < peak.most / (found.total - found.kept) < 1.15


def peak_of_mlx(config: Gemma3Config, settings: TrainingSettings, batches: list[Batch]) -> int:
    """The most bytes of arrays at a time in the second step, float32."""
    mx = pytest.importorskip("mlx.core")
    from engines.mlx.engine import MLXEngine

    engine = MLXEngine()
    engine.initialise(config, 0, "float32")
    engine.start_training(settings)
    engine.train_step(batches, 1e-3)
    mx.reset_peak_memory()
    engine.train_step(batches, 1e-3)
    peak = mx.get_peak_memory()
    engine.unload()
    return peak


@pytest.mark.parametrize("settings", [LORA, FULL, SETTINGS["lora checkpointing"]], ids=["lora", "full", "less"])
def test_the_total_is_about_the_peak_of_mlx(wide: Gemma3Config, settings: TrainingSettings) -> None:
    peak = peak_of_mlx(wide, settings, [a_batch(wide, length=128)])
    found = of(wide, settings, sequence_length=128, device=on("mlx"))
    assert 0.75 < peak / (found.total - found.kept) < 1.3


@pytest.mark.parametrize("settings", [LORA, FULL], ids=["lora", "full"])
def test_a_masked_copy_counts_as_a_row_of_mlx(wide: Gemma3Config, settings: TrainingSettings) -> None:
    peak = peak_of_mlx(wide, settings, [a_noised_batch(wide, 2, 256)])
    found = of(wide, settings, rows=4, sequence_length=256, device=on("mlx"))
    assert 0.85 < peak / (found.total - found.kept) < 1.15


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["full", "adafactor", "lora and rest", "rank1"])
def test_what_mlx_makes_anew_is_there_on_every_device(wide: Gemma3Config, name: str, accumulate: int) -> None:
    config, settings = replace(wide, intermediate_size=4096), SETTINGS[name]
    peak = peak_of_mlx(config, settings, [a_batch(config, 1, 15)] * accumulate)
    shape = {"rows": 1, "sequence_length": 15, "accumulate": accumulate}
    for device in (on("mlx", "metal"), on("mlx", "cuda")):
        assert 0.85 < peak / of(config, settings, **shape, device=device).total < 1.2
    assert of(config, settings, **shape).renewed == 0


@pytest.mark.parametrize("window", [64, 512, 700])
@pytest.mark.parametrize("length", [5, 512, 700, 2048])
def test_a_cache_has_the_rows_that_are_estimated(
    engine: Engine, two_to_one: Gemma3Config, monkeypatch: pytest.MonkeyPatch, length: int, window: int
) -> None:
    config = replace(two_to_one, sliding_window=window)
    engine.initialise(config, 0, "float32")
    reader = import_module(f"engines.{engine.name}.decoding").Reader(engine._loaded(), np.zeros(1, np.int64), None)
    forward, seen = reader._forward, list[int]()

    def watched(ids: Any, block: int) -> Any:
        hidden = forward(ids, block)
        seen.append(sum(layer._keys.nbytes + layer._values.nbytes for layer in reader._cache))
        return hidden

    monkeypatch.setattr(reader, "_forward", watched)
    reader.read(np.ones((1, length), np.int32), np.zeros((1, 0), np.int32), np.ones((1, 1), np.bool_), False)
    # Nothing but the weights and the cache grows with the heads of keys and values.
    double = replace(config, num_key_value_heads=2 * config.num_key_value_heads)
    device = engine.device()
    more, less = (inference_bytes(c, length, 1, "float32", device) - c.weight_bytes(4) for c in (double, config))
    assert more - less == max(seen)


@pytest.mark.parametrize(("total", "verdict"), [(143, "fits"), (142, "tight"), (118, "tight"), (117, "too large")])
def test_verdicts(total: int, verdict: str) -> None:
    found = Estimate(100, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, available=total)
    assert found.verdict == verdict


def test_one_line_says_all() -> None:
    found = Estimate(5 * GB, 0, 1000, 0, 2 * GB, 0, 400_000_000, 0, 0, 0, 0, available=16 * GB)
    assert found.text == ("fits: about 7.4 GB of 16.0 GB (46%); weights 5.0 GB, optimizer 2.0 GB, activations 400.0 MB")
    assert replace(found, ratio=1.5).text.startswith("fits: about 11.1 GB of 16.0 GB (69%); ")
    assert replace(found, ratio=1.5).text.endswith(", times 1.50 as earlier runs measured")
    assert replace(found, ratio=2.0).verdict == "too large"


def test_earlier_runs_correct_the_estimate() -> None:
    assert remembered([]) == 1
    assert remembered([(100, 120)]) == 1.2
    assert remembered([(100, 120), (200, 220), (100, 900)]) == 1.2
    assert remembered([(0, 5), (math.nan, 5), (5, math.inf), (5, -1)]) == 1
