"""The contract both engines keep.

Everything that crosses it is numpy or plain Python: token ids are int32 arrays, probabilities are float32
arrays, names are Hugging Face parameter names. Tensors never leave an engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engines.blocks import BlockDecoding, DecodingPass, Noise
from engines.edits import Edit
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config, Quantization
from engines.inspection import Inspection
from engines.networks import Networks, NetworkShape, NetworkTraining
from engines.peak import Peak
from engines.removal import Removal

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
    """How a token is chosen. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 keep every token.

    Attributes:
        min_p: tokens less probable than this share of the most probable one are left out (arXiv:2407.01082).
        repetition_penalty: what logits of tokens that were seen are divided by, or multiplied where they are negative
            (CTRL, arXiv:1909.05858, section 4.1); 1 for none.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether it is the most probable token, as the model gives it."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def check_scored(self) -> None:
        """Whether the probability of a token under the scheme can be told.

        Raises:
            UnsupportedError: it depends on more than the ``top_k`` tokens.
        """
        if self.top_p < 1 or self.min_p > 0:
            raise UnsupportedError("the probability of a token is told without a nucleus: leave top_p at 1, min_p at 0")
        if self.repetition_penalty != 1:
            raise UnsupportedError("the probability of a token is told without a repetition penalty: leave it at 1")


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What a model makes of each token of a text but the first; p is the distribution it predicts there.

    Attributes:
        log_probs: float32, ln p of the token.
        means: float32, the mean of ln p under p, that is minus the entropy; nats.
        deviations: float32, the standard deviation of ln p under p.
        best: bool, whether the token is the one that greedy decoding takes; of equals the lowest id.
        sampled: float32, ln of the probability with which a decoding scheme draws the token, -inf where it cannot;
            None where no scheme was given.
    """

    log_probs: np.ndarray
    means: np.ndarray
    deviations: np.ndarray
    best: np.ndarray
    sampled: np.ndarray | None = None


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        tokens: int32 ``[batch, length]``, padded on the right.
        labels: int32 ``[batch, length]``; ``labels[b, t]`` is the token to be predicted *at* position t, that is
            ``tokens[b, t + 1]``, or ``IGNORED``.
        segments: int32 ``[batch, length]``, the number of the document each token belongs to, where several are packed
            into a row; no token sees another document, and positions start at 0 with each. None: a row is one document.
        noise: the masked copy of set-block-decoding training, which goes through the model beside the rows.
    """

    tokens: np.ndarray
    labels: np.ndarray
    segments: np.ndarray | None = None
    noise: Noise | None = None

    def split(self, parts: int) -> list[Batch]:
        """The rows in at most so many batches; those without a supervised token are left out."""

        def piece(rows: np.ndarray) -> Batch:
            segments = None if self.segments is None else self.segments[rows]
            noise = self.noise and replace(self.noise, tokens=self.noise.tokens[rows], labels=self.noise.labels[rows])
            return Batch(self.tokens[rows], self.labels[rows], segments, noise)

        pieces = map(piece, np.array_split(np.arange(len(self.tokens)), min(parts, len(self.tokens))))
        return [batch for batch in pieces if batch.supervised]

    @property
    def supervised(self) -> int:
        """Number of positions that count in the loss."""
        return int((self.labels != IGNORED).sum())

    def noised(self) -> Noise:
        """The masked copy.

        Raises:
            UnsupportedError: there is none.
        """
        if self.noise is None:
            raise UnsupportedError("the batch has no masked copy")
        return self.noise

    @property
    def masked(self) -> int:
        """Number of masked tokens that count in the loss."""
        if self.noise is None or self.noise.masked_weight == 0:
            return 0
        return int((self.noise.labels != IGNORED).sum())


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of a layer, by the last part of their names."""


@dataclass(frozen=True)
class LoRASettings:
    """Low-rank adapters: ``W + scale * B @ A`` on the ``targets`` of some layers (Hu et al., arXiv:2106.09685).

    Attributes:
        layers: the layers that have adapters; None for all.
        rslora: scale by alpha / √rank instead of alpha / rank (Kalajdzievski, arXiv:2312.03732).
        dora: train the length of each row beside its direction (Liu et al., arXiv:2402.09353).
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEARS
    layers: tuple[int, ...] | None = None
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


RANK1_MODES = ("power", "sketch")


@dataclass(frozen=True)
class Rank1Settings:
    """A fresh rank-1 update per matrix, ``W - eta * f * u vᵀ``, found from the true gradient G.

    Attributes:
        mode: ``power`` takes v near the leading right singular vector of G, by power iteration from the v before
            (PowerSGD, arXiv:1905.13727); ``sketch`` draws v at random (Flora, arXiv:2402.03293). u is G v.
        iterations: power iterations per update.
        error_feedback: what an update leaves of the gradient is added to the next (arXiv:1901.09847). Takes a buffer
            of the size of the matrix, as momentum does; gradients are clipped before they enter it.
        momentum: share of the buffer that is kept from step to step; 0 for none.
        normalised: f = √(out / in) instead of f = ‖G v‖ (Dion, arXiv:2504.05295, algorithm 1).
        rate: eta as a multiple of the learning rate, which the optimizer of the rest has.
    """

    mode: str = "power"
    targets: tuple[str, ...] = LINEARS
    layers: tuple[int, ...] | None = None
    iterations: int = 1
    error_feedback: bool = False
    momentum: float = 0.0
    normalised: bool = False
    rate: float = 1.0

    @property
    def buffered(self) -> bool:
        """Whether every matrix has a buffer of its size."""
        return self.error_feedback or self.momentum > 0


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer of everything that has a gradient of its own; the learning rate comes with each step.

    Attributes:
        name: ``adamw`` (decoupled, bias-corrected; arXiv:1711.05101), ``sgd``, ``adafactor`` (arXiv:1804.04235) or
            ``muon`` (orthogonalised momentum for matrices, AdamW for the rest).
        weight_decay: decoupled, of matrices only.
        momentum: of SGD and Muon.
    """

    name: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.9


@dataclass(frozen=True)
class TrainingSettings:
    """What an engine must know to take steps.

    Attributes:
        lora: adapters are trained and the rest is frozen; None trains every parameter, unless ``rank1`` is set.
        rank1: the target matrices change by rank-1 updates and the rest is frozen.
        rest: what is no target (embeddings, norms, other layers) is trained as well, at full rank.
        merging: adapters will be merged, so the weights of their matrices are kept in float32.
        clip: bound of the global gradient norm; 0 leaves it alone.
    """

    lora: LoRASettings | None = None
    rank1: Rank1Settings | None = None
    rest: bool = False
    merging: bool = False
    seed: int = 0
    optimizer: OptimizerSettings = OptimizerSettings()
    clip: float = 1.0
    checkpoint_activations: bool = False

    def check(self) -> None:
        """Whether they go together.

        Raises:
            UnsupportedError: they do not.
        """
        if self.lora is not None and self.rank1 is not None:
            raise UnsupportedError("a matrix has adapters or rank-1 updates, not both: choose one")
        if self.lora is not None and self.lora.dora and self.merging:
            raise UnsupportedError("dora cannot be merged at every few steps: take plain adapters")
        if self.rank1 is not None and self.rank1.mode not in RANK1_MODES:
            raise UnsupportedError(f"mode {self.rank1.mode[:40]!r} is not there: choose {' or '.join(RANK1_MODES)}")


@dataclass(frozen=True)
class GradientFacts:
    """The gradient G of one matrix, of the first micro-batch of a step.

    Attributes:
        norm: ‖G‖, Frobenius.
        sigma: its largest singular value, from power iteration.
        drift_u, drift_v: |cos| between its leading singular vectors and those of the observation before; None at the
            first.
    """

    norm: float
    sigma: float
    drift_u: float | None = None
    drift_v: float | None = None


@dataclass(frozen=True)
class Merge:
    """What one merge of the adapters into the weights did.

    Attributes:
        changed: share of the weights that differ after it, in the dtype the model computes in; None if not counted.
        norm: Frobenius norm of all that was merged.
    """

    norm: float
    changed: float | None = None


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: mean negative log-likelihood over the supervised tokens, nats.
        tokens: supervised tokens in the step.
        grad_norm: global L2 norm of the gradient before clipping; of rank-1 updates without a buffer, which use no
            more of the gradient than they find, the norm of that.
        applied: False when the gradient was not finite and the step was left out.
        gradients: of a step that was observed, the gradient of each matrix of a layer.
        predicted: of a step that was observed, the decrease of the objective to first order, nats: that of ``loss``,
            or with a masked copy of the weighted sum of both sides over the supervised tokens.
        masked_loss: mean negative log-likelihood over the masked tokens, nats; None where none was masked.
    """

    loss: float
    tokens: int
    grad_norm: float
    applied: bool
    gradients: Mapping[str, GradientFacts] | None = None
    predicted: float | None = None
    masked_loss: float | None = None


@dataclass(frozen=True)
class ModelInfo:
    """The model an engine holds.

    Attributes:
        adapter: the folder of the adapter that was put on it.
        trained: whether training was begun on it since it was loaded, so that it is no longer what the folder holds.
    """

    folder: str
    config: Gemma3Config
    dtype: str
    parameters: int
    adapter: str | None = None
    trained: bool = False


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

    def peak(self, dtype: str) -> Peak:
        """What the device does at best in a dtype, seen in a second or two; the model is left alone.

        Raises:
            UnsupportedError: the dtype is not offered.
        """

    def peak_memory(self, reset: bool = False) -> int:
        """The most bytes in use at once, counted as ``memory`` counts; of MPS what its allocator has taken.

        Args:
            reset: whether to count from now on afterwards. A CPU's process forgets its peak on Linux only.
        """

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

    def token_scores(self, tokens: np.ndarray, sampling: Sampling | None = None) -> TokenScores:
        """What the model makes of ``tokens[:, 1:]``, int32 ``[batch, length]``: arrays ``[batch, length - 1]``.

        Padding on the right changes nothing before it. The logits of all positions are never there at once.

        Args:
            sampling: the scheme of ``sampled``: temperature, then the ``top_k`` most probable tokens, of equals the
                lowest ids, whose probabilities are made to sum to one again.

        Raises:
            UnsupportedError: the scheme has a nucleus (``top_p``).
        """

    def inspect(self, tokens: np.ndarray, edits: Sequence[Edit] = (), base: Inspection | None = None) -> Inspection:
        """Look into how the model reads int32 ``[T]``; nothing is computed before it is asked for.

        Args:
            base: an inspection of the same tokens without edits, whose residual stream below the first edited layer is
                shared; the results are the same, bit for bit.

        After a training step or another load, ask for another: this one would go on with other weights.

        Raises:
            UnsupportedError: the text is empty or too long, an edit names what is not there, or ``base`` is of another
                text, model or engine, or edited.
        """

    def networks(self, shape: NetworkShape, seeds: Sequence[int], training: NetworkTraining) -> Networks:
        """Small networks with fresh weights, one for each seed, that are trained side by side; the model is left alone.

        Raises:
            UnsupportedError: the shape or the training names what is not there.
        """

    def adapters(self) -> tuple[str, ...]:
        """The linears that have adapters, like ``model.layers.0.self_attn.q_proj``."""

    def without(self, removal: Removal) -> AbstractContextManager[None]:
        """Let the model compute without some of its parts inside a ``with``; after it all is as before, bit for bit.

        The model can be scored and generate there. What looks into it, trains, writes or changes it is refused.

        Raises:
            UnsupportedError: a part is not there, or some are taken away already.
        """

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Yield new tokens one by one; ends at ``max_tokens`` or after a stop id, which is yielded too."""

    def decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, blocks: BlockDecoding | None = None
    ) -> Iterator[DecodingPass]:
        """Write after several prompts at once, and yield what each forward pass said.

        A prompt ends after ``max_tokens`` or a stop id with all before it decided; what comes after that is nothing.
        What is written after a prompt does not depend on the others where nothing is drawn. Keys and values are those
        of decided tokens, read causally, so that none is an approximation.

        Args:
            blocks: decide blocks of tokens together; None decides one token of each prompt a pass.

        Raises:
            UnsupportedError: a prompt is empty, or the blocks cannot be.
        """

    def start_training(self, settings: TrainingSettings) -> int:
        """Prepare the loaded model and an optimizer; returns the number of trainable parameters.

        Raises:
            UnsupportedError: the settings do not go together; a training that was started before goes on.
        """

    def train_step(self, batches: Sequence[Batch], learning_rate: float, observe: bool = False) -> StepResult:
        """One optimizer step over micro-batches, weighted by their supervised tokens.

        With noise the objective is the weighted sum of both sides, over the supervised tokens (arXiv:2509.04185,
        equation 13); a copy of which nothing counts is not computed.

        Args:
            observe: also form the gradients of the layers' matrices and tell what they are like.
        """

    def merge(self, reset: str, seed: int, count: bool = False) -> Merge:
        """Add the adapters to the float32 weights below them; the model computes the same function after it.

        Args:
            reset: what becomes of ``lora_A`` while ``lora_B`` turns zero: ``fresh`` draws it again, ``direction``
                takes the leading right singular vector of what was merged, ``keep`` leaves it.
            count: also tell the share of weights that changed.

        Raises:
            UnsupportedError: there is nothing to merge, or the weights are not kept in float32.
        """

    def prune_optimizer(self, how: str, ratio: float, seed: int) -> float:
        """Zero entries of the optimizer's state of the adapters; returns the share that is zero after it.

        Args:
            how: ``magnitude`` zeroes the ``ratio`` smallest of each tensor, ``random`` any, ``reset`` all. A first
                moment whose second one is zero is zeroed, too.
        """

    def updates(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, np.ndarray, float]]:
        """How the layers' matrices differ from those that were loaded.

        Args:
            names: of some linears, like ``model.layers.0.self_attn.q_proj``; None for all.

        Yields:
            The name, ``W - W_0`` float32 ``[out, in]`` with adapters counted in, and ``‖W_0‖``, Frobenius.
        """

    def save_state(self, folder: Path) -> list[Path]:
        """Write all that training goes on from: what is trained or merged into, the optimizer, the random state."""

    def load_state(self, folder: Path) -> None:
        """Take up training where ``save_state`` left it; ``start_training`` with the same settings came before.

        Raises:
            CheckpointError: the files are broken or of another training.
        """

    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state, of error-feedback buffers too."""

    def loss(self, batch: Batch) -> float:
        """Sum of negative log-likelihoods over the supervised tokens of a batch, nats; no gradient, no dropout."""

    def masked_loss(self, batch: Batch) -> float:
        """Sum of negative log-likelihoods over the masked tokens of a batch with noise, nats; as ``loss``."""

    def stop_training(self) -> None:
        """Drop the optimizer; adapters stay on the model."""

    def save_adapter(self, folder: Path, base: str) -> None:
        """Write the adapters in PEFT layout, with those for mlx-lm beside them.

        Args:
            base: what ``base_model_name_or_path`` names.
        """

    def load_adapter(self, folder: Path) -> None:
        """Put adapters, in PEFT's layout or mlx-lm's, on the loaded model."""

    def save_model(self, folder: Path, config: Mapping[str, Any], dtype: str | None = None) -> None:
        """Write all weights, adapters merged in float32, as ``model.safetensors`` with the given ``config.json``.

        Args:
            dtype: of the file; None takes the one the model was loaded in.
        """

    def quantise(
        self,
        source: Path,
        target: Path,
        config: Mapping[str, Any],
        quantization: Quantization,
        dtype: str = "bfloat16",
        progress: Progress | None = None,
    ) -> None:
        """Write a plain model in mlx-lm's quantised layout, one matrix at a time; the loaded model is left alone.

        Args:
            target: a folder that exists.
            config: what ``config.json`` says beside the quantisation.
            dtype: of scales, biases and norms.

        Raises:
            UnsupportedError: the engine computes with no such weights, or the model cannot be quantised so.
            CheckpointError: the files are broken, or the disk is full.
        """
