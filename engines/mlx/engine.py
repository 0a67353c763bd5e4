"""The MLX engine: Metal, CUDA or CPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from engines.adapters import Factors, read_adapter, target_modules, write_adapter
from engines.base import (
    LINEARS,
    Batch,
    Capabilities,
    DeviceInfo,
    LoRASettings,
    Merge,
    ModelInfo,
    Progress,
    Sampling,
    StepResult,
    TokenScores,
    TrainingSettings,
)
from engines.blocks import BlockDecoding, DecodingPass
from engines.checkpoints import as_bfloat16, write_json, write_safetensors
from engines.decoding import decode, prompt_lengths
from engines.edits import Edit
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config, Quantization, read_config
from engines.initialisation import gemma3_weights
from engines.inspection import Inspection
from engines.memory import ensure_memory, training_bytes
from engines.mlx import adapters, decoding, device, merging, optimizers, rank1, scoring, state, training
from engines.mlx.inspection import MLXInspection
from engines.mlx.model import Gemma3
from engines.mlx.networks import MLXNetworks
from engines.mlx.packing import array_of, quantise_folder
from engines.networks import NetworkShape, NetworkTraining
from engines.origin import first_weights
from engines.peak import Peak
from engines.quantization import Packed, check_adapted, check_trainable, iterate_quantized
from engines.removal import Removal, taken_away

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


class MLXEngine:
    """One Gemma-3 in MLX; see ``engines.base.Engine`` for what each method promises."""

    name = "mlx"

    def __init__(self) -> None:
        self._device = device.choose_device()
        self._seed = 0
        self._model: Gemma3 | None = None
        self._info: ModelInfo | None = None
        self._settings: TrainingSettings | None = None
        self._training: training.Training | None = None
        self._start: tuple[Factors, LoRASettings] | None = None
        self._touched: set[str] = set()
        self._reduced = False

    def device(self) -> DeviceInfo:
        return device.describe(self._device)

    def capabilities(self) -> Capabilities:
        return Capabilities()

    def memory(self) -> int:
        return device.used(self._device)

    def peak(self, dtype: str) -> Peak:
        return device.measure(self._device, _dtype(dtype))

    def peak_memory(self, reset: bool = False) -> int:
        peak = device.peak_memory(self._device)
        if reset:
            device.reset_peak_memory(self._device)
        return peak

    def model(self) -> ModelInfo | None:
        return self._info

    def load(self, folder: Path, dtype: str | None = None, progress: Progress | None = None) -> ModelInfo:
        config = read_config(folder)
        weights = iterate_quantized(folder, config)
        return self._build(str(folder), config, weights, dtype, progress)

    def initialise(self, config: Gemma3Config, seed: int, dtype: str | None = None) -> ModelInfo:
        info = self._build("", config, gemma3_weights(config, seed), dtype, None)
        self._seed = seed
        return info

    def unload(self) -> None:
        self._model = self._info = self._settings = self._training = None
        self._start = None
        self._touched = set()
        device.release()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        model = self._loaded().eval()
        return np.array(model.logits(model(mx.array(tokens))).astype(mx.float32))

    def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        return scoring.log_probs(self._loaded().eval(), tokens)

    def token_scores(self, tokens: np.ndarray, sampling: Sampling | None = None) -> TokenScores:
        if sampling is not None:
            sampling.check_scored()
        return scoring.token_scores(self._loaded().eval(), tokens, sampling)

    def inspect(self, tokens: np.ndarray, edits: Sequence[Edit] = (), base: Inspection | None = None) -> MLXInspection:
        return MLXInspection(self._whole(), tokens, edits, base)

    def adapters(self) -> tuple[str, ...]:
        return tuple(adapters.lora_layers(self._loaded()))

    @contextmanager
    def without(self, removal: Removal) -> Iterator[None]:
        model = self._whole()
        with taken_away(model, adapters.lora_layers(model), removal):
            self._reduced = True
            try:
                yield
            finally:
                self._reduced = False

    def networks(self, shape: NetworkShape, seeds: Sequence[int], training: NetworkTraining) -> MLXNetworks:
        return MLXNetworks(shape, seeds, training)

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        return (int(said.tokens[0]) for said in self.decode([prompt], sampling))

    def decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, blocks: BlockDecoding | None = None
    ) -> Iterator[DecodingPass]:
        how = blocks or BlockDecoding(block=1)
        how.check()
        lengths = prompt_lengths(prompts)
        banned = None if blocks is None else blocks.mask
        reader = decoding.Reader(self._loaded().eval(), lengths.max() - lengths, banned)
        return decode(reader, prompts, sampling, how)

    def start_training(self, settings: TrainingSettings) -> int:
        model = self._whole()
        settings.check()
        check_trainable(model.config, settings, bool(adapters.lora_layers(model)))
        needed = training_bytes(model.config, settings, ITEM_BYTES[self._loaded_info().dtype])
        ensure_memory("training", needed, device.free(self._device))
        self._settings = settings
        self._info = replace(self._loaded_info(), trained=True)
        self._training = training.start_training(model, settings)
        self._touched |= set(self._training.trained)
        return sum(p.size for _, p in tree_flatten(model.trainable_parameters()))

    def train_step(self, batches: Sequence[Batch], learning_rate: float, observe: bool = False) -> StepResult:
        return training.train_step(self._whole(), self._started(), batches, learning_rate, observe)

    def merge(self, reset: str, seed: int, count: bool = False) -> Merge:
        check_adapted(self._whole().config)
        return merging.merge(self._whole(), reset, seed, count)

    def prune_optimizer(self, how: str, ratio: float, seed: int) -> float:
        started, slots = self._started(), adapters.lora_layers(self._whole())
        pruned = [name for name in started.trained if name.rpartition(".")[0] in slots]
        return optimizers.prune(started.optimizer, pruned, how, ratio, seed)

    def updates(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, np.ndarray, float]]:
        wanted = list(target_modules(self._whole().config, LINEARS)) if names is None else names
        start = first_weights(self._loaded_info(), self._seed, self._start, wanted)
        return merging.updates(self._whole(), start)

    def save_state(self, folder: Path) -> list[Path]:
        return state.save(self._whole(), self._started(), self._touched, folder)

    def load_state(self, folder: Path) -> None:
        state.load(self._whole(), self._started(), folder)

    def optimizer_bytes(self) -> int:
        started, merged = self._started(), rank1.rank1_layers(self._loaded())
        buffers = sum(layer.buffer.nbytes for layer in merged.values() if layer.buffer is not None)
        vectors = sum(layer.lora_A.nbytes + layer.lora_B.nbytes for layer in merged.values())
        return optimizers.nbytes(started.optimizer) + buffers + vectors

    def loss(self, batch: Batch) -> float:
        model = self._loaded().eval()
        return float(training.summed_loss(model, batch))

    def masked_loss(self, batch: Batch) -> float:
        return float(training.summed_losses(self._loaded().eval(), batch, batch.noised())[1])

    def stop_training(self) -> None:
        self._training = None
        device.release()

    def save_adapter(self, folder: Path, base: str) -> None:
        model = self._whole()
        if self._settings is None or self._settings.lora is None:
            raise UnsupportedError("the model has no adapters to save")
        write_adapter(folder, adapters.factors_of(model), self._settings.lora, model.config, base)

    def load_adapter(self, folder: Path) -> None:
        model = self._whole()
        factors, lora = read_adapter(folder, model.config)
        adapters.put_lora(model, factors, lora)
        self._start = (factors, lora)
        self._settings = TrainingSettings(lora)
        self._info = replace(self._loaded_info(), adapter=str(folder))

    def save_model(self, folder: Path, config: Mapping[str, Any], dtype: str | None = None) -> None:
        model, stored = self._whole(), dtype or self._loaded_info().dtype
        check_adapted(model.config)
        adapted = {f"{name}.weight" for name in (*adapters.lora_layers(model), *rank1.rank1_layers(model))}
        kind = "BF16" if stored == "bfloat16" else "F32"
        shapes = {name: (kind, shape) for name, shape in model.config.parameter_shapes().items()}
        parameters = dict(tree_flatten(model.parameters()))

        def arrays() -> Iterator[tuple[str, np.ndarray]]:
            for name in shapes:
                module = name.removesuffix(".weight")
                value = merging.effective(model, module) if name in adapted else parameters[name].astype(mx.float32)
                array = np.array(value)
                yield name, as_bfloat16(array) if kind == "BF16" else array

        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "model.safetensors", arrays(), shapes)
        write_json(folder / "config.json", {**config, "dtype": stored})

    def quantise(
        self,
        source: Path,
        target: Path,
        config: Mapping[str, Any],
        quantization: Quantization,
        dtype: str = "bfloat16",
        progress: Progress | None = None,
    ) -> None:
        quantise_folder(source, target, config, quantization, dtype, progress)

    def _build(
        self,
        folder: str,
        config: Gemma3Config,
        weights: Iterable[tuple[str, np.ndarray | Packed]],
        dtype: str | None,
        progress: Progress | None,
    ) -> ModelInfo:
        self.unload()
        chosen = dtype or self.device().dtypes[0]
        kind = _dtype(chosen)
        ensure_memory(
            f"{folder or 'the model'} in {chosen}",
            config.weight_bytes(ITEM_BYTES[chosen]),
            device.free(self._device),
        )
        # MLX is lazy: the zeros a module starts with are never made, since every parameter is replaced.
        model = Gemma3(config, kind)
        done, total = 0, config.parameter_count()
        modules, shapes = dict(model.named_modules()), config.parameter_shapes()
        for name, array in weights:
            if isinstance(array, Packed):
                module = modules[name.removesuffix(".weight")]
                module.pack(array, kind)
                mx.eval(module.parameters())
            else:
                value = array_of(array).astype(kind)
                model.update(tree_unflatten([(name, value)]))
                mx.eval(value)
            done += math.prod(shapes[name])
            if progress is not None:
                progress(done / total, name)
        # What was read is cached in blocks of the files' sizes, which nothing asks for again.
        device.release()
        model.freeze()
        self._model = model.eval()
        self._info = ModelInfo(folder, config, chosen, total)
        return self._info

    def _loaded(self) -> Gemma3:
        if self._model is None:
            raise UnsupportedError("no model is loaded: load one first")
        return self._model

    def _whole(self) -> Gemma3:
        model = self._loaded()
        if self._reduced:
            raise UnsupportedError("parts of the model are taken away: it can only be scored until they are back")
        return model

    def _started(self) -> training.Training:
        if self._training is None:
            raise UnsupportedError("no training was started: call start_training first")
        return self._training

    def _loaded_info(self) -> ModelInfo:
        if self._info is None:
            raise UnsupportedError("no model is loaded: load one first")
        return self._info


def _dtype(name: str) -> mx.Dtype:
    if name not in DTYPES:
        raise UnsupportedError(f"dtype {name!r} is not offered: Gemma-3 runs in {' or '.join(DTYPES)}")
    return DTYPES[name]
