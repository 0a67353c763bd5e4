"""What an engine shows of one text's way through the model: attention, residual stream, lens, attribution, edits.

Everything that leaves an engine is numpy or plain Python, and small: statistics, rows, single heads, pooled maps. The
attention weights are made again, tile by tile, from the queries and keys that the layer itself used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engines.edits import Edit, Span
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config

TILE = 128
"""Queries whose weights are there at a time."""

ROW_SUMS = (
    "entropy", "first", "elsewhere", "reach", "previous", "duplicate", "induction", "beyond", "weighted_value",
)  # fmt: skip
"""The statistics of ``LayerStatistics`` that have one number per row of a tile, in the order engines make them."""


def no_tick() -> None:
    """Nothing breaks off."""


def spans(span: Span, size: int = TILE) -> Iterator[Span]:
    """A span of positions, so many at a time."""
    for start in range(*span, size):
        yield start, min(start + size, span[1])


def first_key(start: int, window: int | None) -> int:
    """The oldest key that a query at ``start`` sees."""
    return 0 if window is None else max(0, start - window + 1)


def check_base(tokens: np.ndarray, base: Inspection) -> None:
    """Refuse to share what was computed of another text, or with edits."""
    if not np.array_equal(base.tokens, tokens):
        raise UnsupportedError("the base is of another text: give the inspection of the same tokens")
    if base.edits:
        raise UnsupportedError("the base has edits of its own: give the inspection of the same tokens without any")


def check_tokens(config: Gemma3Config, tokens: np.ndarray) -> None:
    """Refuse an empty text, one beyond the context, and ids outside the vocabulary."""
    if tokens.ndim != 1 or not len(tokens):
        raise UnsupportedError("the text is empty: give at least one token")
    if len(tokens) > config.max_position_embeddings:
        raise UnsupportedError(
            f"the text has {len(tokens):,} tokens, more than the context of {config.max_position_embeddings:,}: cut it"
        )
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise UnsupportedError(f"the text has a token outside the vocabulary of {config.vocab_size:,}")


def check_ids(config: Gemma3Config, *tokens: np.ndarray) -> None:
    """Refuse no tokens, and ids outside the vocabulary."""
    if not all(len(ids) and ids.min() >= 0 and ids.max() < config.vocab_size for ids in tokens):
        raise UnsupportedError(
            f"tokens are missing or outside the vocabulary of {config.vocab_size:,}: name some in it"
        )


def check_circuit(config: Gemma3Config, tokens: np.ndarray, count: int, edits: Sequence[Edit]) -> None:
    """Refuse tokens or a count that are not there, and an edited text."""
    check_ids(config, tokens)
    if not 0 <= count <= config.vocab_size:
        raise UnsupportedError(f"{count} tokens cannot be listed: take 0 to {config.vocab_size:,}")
    if edits:
        raise UnsupportedError("circuits are those of the model itself: take the edits away")


def check_mass(rows: np.ndarray, length: int) -> None:
    """Refuse rows that are not of the first positions of a text."""
    if rows.ndim != 2 or not 1 <= rows.shape[1] <= length:
        raise UnsupportedError(f"rows {rows.shape} are not of the first positions of a text of {length:,} tokens")


@dataclass(frozen=True)
class LayerStatistics:
    """The attention of one layer, A ``[heads, T, T]``, in sums that need no more than a tile of it at a time.

    All are float32. Rows are queries q, columns are keys k.

    Attributes:
        entropy: ``[heads, T]``, -Σ_k A ln A, nats.
        first: ``[heads, T]``, the weight of position 0.
        elsewhere: ``[heads, T]``, the sum over k > 0.
        reach: ``[heads, T]``, Σ_{k > 0} A (q - k), tokens.
        previous: ``[heads, T]``, the weight of q - 1; 0 in the first row.
        duplicate: ``[heads, T]``, the sum over earlier k with the token of q.
        induction: ``[heads, T]``, the sum over k <= q whose token before is the token of q.
        beyond: ``[heads, T]``, the sum over q - k >= sliding_window; 0 on local layers.
        weighted_value: ``[heads, T]``, Σ_k A ‖v_k‖.
        received: ``[heads, T]``, Σ_q A of each key.
        by_distance: ``[heads, T]``, Σ_q A_{q, q-d} for d from 0 on.
        value_norm: ``[kv_heads, T]``, ‖v_k‖.
    """

    entropy: np.ndarray
    first: np.ndarray
    elsewhere: np.ndarray
    reach: np.ndarray
    previous: np.ndarray
    duplicate: np.ndarray
    induction: np.ndarray
    beyond: np.ndarray
    weighted_value: np.ndarray
    received: np.ndarray
    by_distance: np.ndarray
    value_norm: np.ndarray


@dataclass(frozen=True)
class ResidualFacts:
    """The residual stream h ``[T, hidden]`` before a layer, or after the last.

    Attributes:
        rms: float32 ``[T]``, √mean h².
        median: of \\|h\\| over all entries.
        largest: the three largest \\|h\\| with their positions and dimensions.
    """

    rms: np.ndarray
    median: float
    largest: tuple[tuple[float, int, int], ...]


@dataclass(frozen=True)
class LensRows:
    """The next-token distribution p_l that the final norm and the head make of a layer's residual stream.

    The norm's statistics are those of this stream. All have one entry per position.

    Attributes:
        top: int32, the most probable token, and ``probability`` float32.
        entropy: float32, of p_l, nats.
        kl: float32, KL(p_final ‖ p_l), nats.
        log_prob: float32, ln p_l(target).
        rank: int32, tokens that are more probable than the target.
    """

    top: np.ndarray
    probability: np.ndarray
    entropy: np.ndarray
    kl: np.ndarray
    log_prob: np.ndarray
    rank: np.ndarray


@dataclass(frozen=True)
class Attribution:
    """The parts of one logit, or of the difference of two, at one position; they sum to ``logit``.

    The scales of the norms are those of the run, held fixed, so the split is exact. Float32, in logits.

    Attributes:
        sources: ``[layers, heads, position + 1]``, what each head carries there from each token.
        mlps: ``[layers]``.
        embedding: of the token at the position.
        logit: as the model computes it.
    """

    sources: np.ndarray
    mlps: np.ndarray
    embedding: float
    logit: float

    @property
    def total(self) -> float:
        """The sum of the parts, in float64."""
        parts = (self.sources, self.mlps)
        return float(self.embedding + sum(part.sum(dtype=np.float64) for part in parts))


@dataclass(frozen=True)
class Circuit:
    """What each head of a layer adds to the logits when it attends to one bare token alone; ``[heads, tokens]`` first.

    The token's embedding goes through the layer's input norm, the value and output maps, and then through the
    post-attention norm and the final norm with the scales that these have at one position of the run. All are in
    logits less their mean over the vocabulary, which no probability depends on.

    Attributes:
        raised, lowered: int32 ``[heads, tokens, count]``, the most raised and lowered tokens, the farthest first.
        raised_by, lowered_by: float32, by how much.
        own: float32, of the token that is attended to.
        rank: int32, tokens that are raised more than that one.
        spread: float32, the standard deviation over the vocabulary.
    """

    raised: np.ndarray
    raised_by: np.ndarray
    lowered: np.ndarray
    lowered_by: np.ndarray
    own: np.ndarray
    rank: np.ndarray
    spread: np.ndarray


@dataclass(frozen=True)
class Effect:
    """What edits did to the predictions; an entry per position.

    Attributes:
        kl: float32, KL(base ‖ edited) of the next token, nats.
        base_log_prob, log_prob: float32, ln p(target), nats.
        base_logit, logit: float32, of the target.
        base_top, top: int32, the most probable token.
    """

    kl: np.ndarray
    base_log_prob: np.ndarray
    log_prob: np.ndarray
    base_logit: np.ndarray
    logit: np.ndarray
    base_top: np.ndarray
    top: np.ndarray


class Inspection(Protocol):
    """One text on the loaded model, computed layer by layer; it keeps the residual stream before each layer.

    Queries, keys and values are made again from that where they are wanted. Every method may compute the layers below
    the one it is asked for; ``advance`` does so in steps.

    Raises:
        UnsupportedError: a layer, head or position that is not there.
    """

    tokens: np.ndarray
    """int32 ``[T]``."""
    config: Gemma3Config
    edits: tuple[Edit, ...]
    tick: Callable[[], object]
    """Called before each tile of attention; what it raises breaks off what is computed, and can be begun again. One
    that shares another's streams begins with its tick."""

    def advance(self, layers: int) -> None:
        """Compute the residual stream after that many layers, if it is not known yet."""

    def statistics(self, layer: int) -> LayerStatistics:
        """All heads of a layer."""

    def attention(self, layer: int, head: int, queries: Span) -> np.ndarray:
        """Rows of one head, float32 ``[queries, T]``; exactly 0 where a key is not visible."""

    def queries_keys(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """q float32 ``[heads, T, head_dim]`` and k ``[kv_heads, T, head_dim]``, normalised and rotated."""

    def divergence(self, layer: int, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Jensen-Shannon divergence of each row from that of other queries and keys, float32 ``[heads, T]``, nats.

        Args:
            queries, keys: as ``queries_keys`` gives them, of a text of the same length.
        """

    def residual(self, layer: int) -> ResidualFacts:
        """The residual stream before a layer; the number of layers asks for that after the last."""

    def stream(self, layer: int, positions: Span) -> np.ndarray:
        """The residual stream itself, float32 ``[positions, hidden]``."""

    def head_outputs(self, layer: int, heads: Sequence[int], positions: Span) -> np.ndarray:
        """What heads give to ``o_proj``, float32 ``[heads, positions, head_dim]``."""

    def lens(self, positions: Span, targets: np.ndarray) -> Iterator[LensRows]:
        """The logit lens before each layer in turn, and after the last, where it is the model's own prediction.

        Holds the model's own prediction, float32 ``[positions, vocabulary]``.

        Args:
            targets: int32, a token per position.
        """

    def attribution(self, position: int, token: int, contrast: int | None = None) -> Attribution:
        """Where the logit of ``token`` after a position comes from, less that of ``contrast``."""

    def carried(self, layer: int, rows: np.ndarray) -> np.ndarray:
        """``rows · A`` with A the mean of the heads' weights, float32 ``[n, S]``.

        Args:
            rows: float32 ``[n, S]``, over the first S positions.
        """

    def circuit(self, layer: int, tokens: np.ndarray, position: int, count: int) -> Circuit:
        """The output-value circuit of every head, for bare tokens.

        Args:
            tokens: int32 ``[tokens]``, each attended to alone.
            position: where the scales of the post-attention norm and the final norm are taken from.
            count: tokens that are listed on either side.
        """

    def token_scores(self, layer: int, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Scores before the softmax between bare tokens at one place, where no rotation tells them apart.

        Args:
            queries, keys: int32, whose embeddings are the stream before the layer.

        Returns:
            float32 ``[heads, queries, keys]``.
        """

    def effect(self, base: Inspection, positions: Span, targets: np.ndarray) -> Effect:
        """How the predictions differ from those of ``base``, a text of the same length on the same model.

        Both keep their logits of the last positions asked for, float32 ``[64, vocabulary]`` at most, so that a base is
        not computed again for the next edit, nor an edited text for another target.
        """
