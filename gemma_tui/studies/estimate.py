"""The memory of a training run before it starts: from the model's shape and the settings alone.

Parameters, gradients and the optimizer are counted one by one. Activations follow what the layers of
``engines/torch/model.py`` keep for the way back, and the workspace is a bound. On a CPU, the program itself (some
hundred MB) comes on top.

What the allocator of a CPU's process keeps of freed blocks is measured, not derived.

Gradients grow while activations go; both are counted in full, as they are there together once several micro-batches
make a step. So one micro-batch of full training needs up to a quarter less.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from engines.adapters import target_modules
from engines.base import DeviceInfo
from engines.cache import PREFILL
from engines.gemma3 import Gemma3Config
from engines.training import OptimizerSettings, TrainingSettings, vocabulary_tile
from gemma_tui.hub.fit import band

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
ALLOCATOR = {"torch": (0.45, 8_000_000), "mlx": (0.45, 2_000_000)}
"""Of what comes and goes, the share that a CPU's process holds beyond it since freed blocks do not fit the next ones,
and the bytes it holds in any case; measured with nano and the 270M (``tests/benchmarks/memory.py``)."""
SCORES_COPIES = 3
"""Of attention that is not fused: scores, what a mask leaves of them, and weights."""
LOGITS_COPIES = 3
"""Of the last position: the logits in the model's dtype and in float32, and their softmax."""
EMBEDDING = "model.embed_tokens.weight"
PARTS = (
    "weights", "masters", "trainables", "gradients", "optimizer", "renewed", "activations", "casts", "logits",
    "workspace", "kept",
)  # fmt: skip

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training run by use, and what is there for it.

    Attributes:
        weights: all parameters in the dtype the model is loaded in.
        masters: what float32 adds to those that are trained or merged into.
        trainables: adapters, or the two vectors of each rank-1 update.
        gradients: of everything that has one, when the way back ends.
        optimizer: its state, and the buffers of error feedback and momentum.
        renewed: what MLX, whose arrays never change, makes anew beside the old: parameters and clipped gradients in a
            step, and the gradients of another micro-batch.
        activations: what one micro-batch keeps for the way back.
        casts: copies of float32 matrices in the dtype of the activations, kept as long.
        logits: the tile of the vocabulary that is in hand.
        workspace: the largest temporaries: of one layer's way back, or of the largest matrix that is trained.
        kept: what the allocator of a CPU does not give back; see ``ALLOCATOR``.
        available: of the device, for a model and its training.
        ratio: measured over estimated in earlier runs; see ``remembered``.
    """

    weights: int
    masters: int
    trainables: int
    gradients: int
    optimizer: int
    renewed: int
    activations: int
    casts: int
    logits: int
    workspace: int
    kept: int
    available: int
    ratio: float = 1.0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by use, before the ratio."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def total(self) -> int:
        """Bytes in all, by the experience of earlier runs."""
        return round(self.ratio * sum(self.parts.values()))

    @property
    def share(self) -> float:
        """Of what is available."""
        return self.total / max(1, self.available)

    @property
    def verdict(self) -> str:
        """``fits``, ``tight`` or ``too large``."""
        return band(self.total, self.available)

    @property
    def text(self) -> str:
        """One line: the verdict, the total and its parts, the largest first; what is under 1 % is left out."""
        whole = sum(self.parts.values())
        ordered = sorted(self.parts.items(), key=lambda part: -part[1])
        shown = ", ".join(f"{name} {_size(count)}" for name, count in ordered if count >= 0.01 * whole)
        learned = f", times {self.ratio:.2f} as earlier runs measured" if self.ratio != 1 else ""
        need = f"about {_size(self.total)} of {_size(self.available)} ({self.share:.0%})"
        return f"{self.verdict}: {need}; {shown}{learned}"


def estimate(
    config: Gemma3Config,
    settings: TrainingSettings,
    rows: int,
    sequence_length: int,
    dtype: str,
    device: DeviceInfo,
    accumulate: int = 1,
    ratio: float = 1.0,
) -> Estimate:
    """What a training run will need at its peak.

    Args:
        rows, sequence_length: of one micro-batch; a masked copy of a row counts as a row.
        dtype: what the model is loaded in and computes in, ``float32`` or ``bfloat16``, whatever its file has.
        device: where it will run, and what is there.
        accumulate: micro-batches in a step; rank-1 updates form their gradients where there are several.
        ratio: what ``remembered`` makes of earlier runs.
    """
    item, parts = ITEM_BYTES[dtype], _parts(config, settings)
    tokens = rows * sequence_length
    rank1 = settings.rank1 if settings.lora is None else None
    formed = rank1 is not None and (rank1.buffered or accumulate > 1)
    layers = 1 if settings.checkpoint_activations else config.num_hidden_layers
    scores = 2 * item * config.num_attention_heads * sequence_length if _stores_attention(device) else 0
    layer = _layer_bytes(config, settings, parts, item) + scores
    inputs = item * config.hidden_size * config.num_hidden_layers if settings.checkpoint_activations else 0
    masks = 0 if sequence_length <= config.sliding_window else item * sequence_length**2 * _locals(config)
    gradients = 4 * (_count(parts.trained) + _count(parts.merged if formed else parts.vectors))
    renewed = 8 * _count(parts.trained) + (gradients if accumulate > 1 else 0)
    float32 = _linear_count(parts.float32)
    largest = max(map(math.prod, ((parts.merged if formed else {}) | parts.rest).values()), default=0)
    activations = tokens * (layers * layer + inputs + _ends(config, parts, item)) + masks
    logits = 4 * tokens * min(vocabulary_tile(tokens), config.vocab_size)
    workspace = max(tokens * max(5 * item * config.intermediate_size, scores), 4 * largest)
    return Estimate(
        weights=config.weight_bytes(item),
        masters=(4 - item) * _count(parts.float32),
        trainables=4 * _count(parts.adapters),
        gradients=gradients,
        optimizer=_optimizer_bytes(config, settings),
        renewed=renewed if device.engine == "mlx" else 0,
        activations=activations,
        casts=0 if item == 4 else item * float32 * layers // config.num_hidden_layers,
        logits=logits,
        workspace=workspace,
        kept=_kept(device, activations + logits + workspace),
        available=device.memory_total,
        ratio=ratio,
    )


def inference_bytes(config: Gemma3Config, length: int, batch: int, dtype: str, device: DeviceInfo) -> int:
    """What reading ``length`` tokens and decoding after them needs at its peak.

    Keys and values by layer type, with the room that a cache has for more, the temporaries of the layer in hand for as
    many tokens as are read at a time, and logits of the last position with their softmax.
    """
    item, rows = ITEM_BYTES[dtype], batch * min(length, PREFILL)
    d, f, q = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    layer = item * max(3 * f + 2 * d, 4 * q + 2 * d) + 4 * 2 * max(d, q)
    stored = config.num_attention_heads * length * SCORES_COPIES * item if _stores_attention(device) else 0
    return (
        config.weight_bytes(item) + config.cache_bytes(length, item, batch) + rows * (layer + stored)
        + LOGITS_COPIES * 4 * batch * config.vocab_size + _mask_bytes(config, length, item) + _kept(device)
    )  # fmt: skip


def _mask_bytes(config: Gemma3Config, length: int, item: int) -> int:
    """Masks of the tokens that are read at a time, and what attention makes of them.

    The first ones that are read need none on global layers. What a mask is made from is gone before a layer begins.
    """
    rows, near = min(length, PREFILL), min(length, PREFILL + config.sliding_window)
    local = rows * near if length > config.sliding_window else 0
    later = max(0, min(PREFILL, length - PREFILL)) * length
    return (local + later) * (1 + item)


def _kept(device: DeviceInfo, passing: int = 0) -> int:
    """What a CPU's process holds beyond what is in use, where ``passing`` bytes come and go."""
    if device.device != "cpu":
        return 0
    share, least = ALLOCATOR[device.engine]
    return round(share * passing) + least


def checkpoint_bytes(config: Gemma3Config, settings: TrainingSettings) -> int:
    """Bytes of a checkpoint once the optimizer has a state: all that steps and merges change, in float32."""
    parts = _parts(config, settings)
    return 4 * (_count(parts.float32) + _count(parts.adapters)) + _optimizer_bytes(config, settings)


def remembered(runs: Iterable[tuple[float, float]]) -> float:
    """Measured over estimated, the median of earlier runs; 1 without any.

    Args:
        runs: ``(estimated, measured)`` bytes, of one engine on one device and of a like size; those that are not
            positive numbers are passed over.
    """
    ratios = [measured / estimated for estimated, measured in runs if _positive(estimated) and _positive(measured)]
    return statistics.median(ratios) if ratios else 1.0


@dataclass(frozen=True)
class _Parts:
    """Shapes by name.

    Attributes:
        adapted: ``(out, in)`` of the linears that have adapters or rank-1 updates.
        factors: adapters with a gradient and an optimizer of their own.
        vectors: v and b of the rank-1 updates, which no optimizer sees.
        merged: matrices that are float32, since updates go into them.
        rest: parameters that are trained at full rank.
    """

    adapted: dict[str, tuple[int, int]]
    factors: Shapes
    vectors: Shapes
    merged: Shapes
    rest: Shapes

    @property
    def trained(self) -> Shapes:
        """What the optimizer updates."""
        return self.factors | self.rest

    @property
    def adapters(self) -> Shapes:
        """What is there beside the model's own parameters."""
        return self.factors | self.vectors

    @property
    def float32(self) -> Shapes:
        """Parameters of the model that are kept in float32, whatever it was loaded in."""
        return self.merged | self.rest


def _parts(config: Gemma3Config, settings: TrainingSettings) -> _Parts:
    lora, rank1 = settings.lora, settings.rank1
    chosen = lora or rank1
    adapted = target_modules(config, chosen.targets, chosen.layers) if chosen else {}
    factors: Shapes = {}
    vectors: Shapes = {}
    for name, (out, inner) in adapted.items():
        if lora:
            factors |= {f"{name}.A": (lora.rank, inner), f"{name}.B": (out, lora.rank)}
            factors |= {f"{name}.m": (out,)} if lora.dora else {}
        else:
            vectors |= {f"{name}.A": (1, inner), f"{name}.B": (out, 1)}
    weights: Shapes = {f"{name}.weight": shape for name, shape in adapted.items()}
    merged = weights if lora is None or settings.merging else {}
    rest = config.parameter_shapes() if settings.rest or chosen is None else {}
    return _Parts(adapted, factors, vectors, merged, {n: s for n, s in rest.items() if n not in weights})


def _optimizer_bytes(config: Gemma3Config, settings: TrainingSettings) -> int:
    parts, rank1 = _parts(config, settings), settings.rank1
    buffers = settings.lora is None and rank1 is not None and rank1.buffered
    states = sum(_state_count(name, shape, settings.optimizer) for name, shape in parts.trained.items())
    return 4 * (states + (_count(parts.merged) if buffers else 0))


def _state_count(name: str, shape: tuple[int, ...], optimizer: OptimizerSettings) -> int:
    """Numbers an optimizer keeps for one parameter, without its step counter."""
    count, matrix = math.prod(shape), len(shape) == 2
    match optimizer.name:
        case "sgd":
            return count if optimizer.momentum else 0
        case "adafactor":  # a row and a column in place of a matrix (arXiv:1804.04235, algorithm 4)
            return sum(shape) if matrix else count
        case "muon" if matrix and name != EMBEDDING:
            return count
    return 2 * count


def _layer_bytes(config: Gemma3Config, settings: TrainingSettings, parts: _Parts, item: int) -> int:
    """What a layer keeps for the way back, per token; adapted linears are spread over all layers."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    q, kv = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # Norms work on a float32 copy of their input, and keep what came of it where their gain is trained.
    norms = 4 * (4 * d + q + kv) * (2 if parts.rest else 1)
    # Two normed inputs; rotated queries and keys, values, attention's output; gate and up, of which the rest of the MLP
    # is computed again.
    kept = item * (2 * d + 2 * q + 2 * kv + 2 * f)
    sums = 4 * (4 + 2 * heads + config.num_key_value_heads)
    return norms + kept + sums + _adapter_bytes(config, settings, parts, item)


def _stores_attention(device: DeviceInfo) -> bool:
    """Whether attention need not be fused there: its scores and weights are made, and in training kept layer by layer.

    In training MLX decides so on all its devices, and torch on MPS; for reading, which may be fused, it is a bound.
    """
    return device.engine == "mlx" or device.device == "mps"


def _adapter_bytes(config: Gemma3Config, settings: TrainingSettings, parts: _Parts, item: int) -> int:
    """What the adapters of a layer keep per token: x Aᵀ; the noise of dropout and what it left; DoRA's ``V x``."""
    if settings.lora is None:
        return 0
    # down_proj is computed again, with its adapter.
    shapes = [shape for name, shape in parts.adapted.items() if not name.endswith("down_proj")]
    dropped = sum(2 * inner for _, inner in shapes) if settings.lora.dropout else 0
    dora = sum(out for out, _ in shapes) if settings.lora.dora else 0
    return item * (settings.lora.rank * len(shapes) + dropped + dora) // config.num_hidden_layers


def _ends(config: Gemma3Config, parts: _Parts, item: int) -> int:
    """Per token: the last norm, its output, and the head's gradient with the float32 sum it is made of."""
    return config.hidden_size * (4 * (2 if parts.rest else 1) + 3 * item + 4)


def _linear_count(shapes: Shapes) -> int:
    """Parameters of those that are linears of a layer."""
    return sum(math.prod(s) for name, s in shapes.items() if len(s) == 2 and name != EMBEDDING)


def _locals(config: Gemma3Config) -> int:
    return config.num_hidden_layers - len(config.global_layers)


def _count(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def _positive(number: float) -> bool:
    return math.isfinite(number) and number > 0


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
