"""What a training step takes and what it tells: batches, methods, optimizers and their results, on both engines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from engines.blocks import Noise
from engines.errors import UnsupportedError

IGNORED = -100
"""The label of a position that is not supervised."""

LOGITS_BYTES = 8 << 20
"""Logits are made for as many tokens of the vocabulary at a time as fit in this; all of them would be gigabytes."""


def vocabulary_tile(positions: int) -> int:
    """Tokens of the vocabulary for which logits of so many positions are made at a time, in float32."""
    return max(1, LOGITS_BYTES // (4 * max(1, positions)))


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
