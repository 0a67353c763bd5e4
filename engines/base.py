"""The contract both engines keep.

Everything that crosses it is numpy or plain Python: token ids are int32 arrays, probabilities are float32
arrays, names are Hugging Face parameter names. Tensors never leave an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engines.gemma3 import Gemma3Config

IGNORED = -100
"""The label of a position that is not supervised."""

Progress = Callable[[float, str], None]
"""Called with the share done (0 to 1) and a few words about what is being done."""


@dataclass(frozen=True)
class DeviceInfo:
    """Where an engine computes, and with what."""

    engine: str
    device: str
    version: str
    dtypes: tuple[str, ...]
    """Dtypes of the weights this device can hold, the default first."""
    memory_total: int
    """Bytes that a model and its training may use on this device."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        tokens: int32 ``[batch, length]``, padded on the right.
        labels: int32 ``[batch, length]``; ``labels[b, t]`` is the token to be predicted *at* position t, that is
            ``tokens[b, t + 1]``, or ``IGNORED``.
    """

    tokens: np.ndarray
    labels: np.ndarray

    @property
    def supervised(self) -> int:
        """Number of positions that count in the loss."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class LoRASettings:
    """Low-rank adapters: ``W + alpha / rank * B @ A`` on every layer's ``targets`` (Hu et al., arXiv:2106.09685)."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TrainingSettings:
    """What an engine must know to take steps; the learning rate comes with each step.

    ``lora`` None trains every parameter. AdamW is decoupled (Loshchilov & Hutter, arXiv:1711.05101) with bias
    correction. ``clip`` bounds the global gradient norm; 0 leaves it alone.
    """

    lora: LoRASettings | None
    seed: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    checkpoint_activations: bool = False


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: mean negative log-likelihood over the supervised tokens, nats.
        tokens: supervised tokens in the step.
        grad_norm: global L2 norm of the gradient before clipping.
        applied: False when the gradient was not finite and the step was left out.
    """

    loss: float
    tokens: int
    grad_norm: float
    applied: bool


@dataclass(frozen=True)
class ModelInfo:
    """The model an engine holds."""

    folder: str
    config: Gemma3Config
    dtype: str
    parameters: int
    adapter: str | None = None


@dataclass(frozen=True)
class Capabilities:
    """Options an engine refuses, each with the reason; whatever is not named is honoured."""

    refused: Mapping[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """One model on one device. Every method is called on the thread that made the engine."""

    name: str

    def device(self) -> DeviceInfo:
        """Where this engine computes."""

    def capabilities(self) -> Capabilities:
        """What this engine refuses, and why."""

    def memory(self) -> int:
        """Bytes in use now: by the device's allocator, on a CPU by the process."""

    def model(self) -> ModelInfo | None:
        """The loaded model, if there is one."""

    def load(self, folder: Path, dtype: str | None = None, progress: Progress | None = None) -> ModelInfo:
        """Load a model from a folder in the Hugging Face layout.

        Args:
            dtype: ``"float32"`` or ``"bfloat16"``; None takes the device's default.

        Raises:
            CheckpointError: the files are missing, broken or hostile.
            UnsupportedError: the config asks for something this program does not compute.
        """

    def initialise(self, config: Gemma3Config, seed: int, dtype: str | None = None) -> ModelInfo:
        """Make a model with fresh weights, equal on both engines for one seed."""

    def unload(self) -> None:
        """Free the model, its adapters and its optimizer."""

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Next-token logits for int32 ``[batch, length]``: float32 ``[batch, length, vocabulary]``."""

    def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """``log p(tokens[:, t + 1] | tokens[:, :t + 1])`` in nats: float32 ``[batch, length - 1]``."""

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Yield new tokens one by one; ends at ``max_tokens`` or after a stop id, which is yielded too."""

    def start_training(self, settings: TrainingSettings) -> int:
        """Prepare the loaded model and an optimizer; returns the number of trainable parameters."""

    def train_step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over micro-batches, weighted by their supervised tokens."""

    def loss(self, batch: Batch) -> float:
        """Sum of negative log-likelihoods over the supervised tokens of a batch, nats; no gradient, no dropout."""

    def stop_training(self) -> None:
        """Drop the optimizer; adapters stay on the model."""

    def save_adapter(self, folder: Path, base: str) -> None:
        """Write the adapters in PEFT layout, with those for mlx-lm beside them.

        Args:
            base: what ``base_model_name_or_path`` names.
        """

    def load_adapter(self, folder: Path) -> None:
        """Put adapters in PEFT layout on the loaded model."""

    def save_model(self, folder: Path, config: Mapping[str, Any], dtype: str | None = None) -> None:
        """Write all weights, adapters merged in float32, as ``model.safetensors`` with the given ``config.json``.

        Args:
            dtype: of the file; None takes the one the model was loaded in.
        """
