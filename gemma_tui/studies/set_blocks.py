"""Set block decoding in training: masked copies of windows, and what is measured of them (arXiv:2509.04185)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from engines.base import Engine, Sampling
from engines.blocks import BlockDecoding, Noise
from engines.training import IGNORED, Batch
from gemma_tui.errors import UsageError
from gemma_tui.hub.models import Model
from gemma_tui.hub.set_blocks import set_blocks_of
from gemma_tui.studies.data import PADDING, Splits, evaluation_windows, make_batch
from gemma_tui.studies.generation import STOP_IDS, check_mask_id
from gemma_tui.studies.training_plan import BLOCKWISE, WHOLE, TrainingPlan
from gemma_tui.studies.turns import Window
from gemma_tui.tokenizer import PAD

RATES = (0.25, 0.5, 1.0)
"""Masking rates that the masked loss is told at."""
EVALUATED = 2
"""Micro-batches that it is measured on, for each block size and rate."""
WATCHED, WATCHED_TOKENS, WATCHED_GAMMA = 4, 32, 0.1
"""Held-out prompts that are decoded at every evaluation, tokens for each, and the bound on their entropy, nats."""

BLOCK, RATE, MEASURED = 0, 1, 2
"""What a generator draws for, so that no two draw alike."""


def batch_maker(plan: TrainingPlan) -> Callable[[Sequence[Window], int], Batch]:
    """What makes the micro-batch of some windows, given its number from 0 on; the same on both engines and on resuming.

    The block size is drawn once for a step, uniformly from 2 to ``max_block``, the masking rate once for a row,
    uniformly from 0 to 1. Where masked tokens weigh nothing, the rows are those of plain training and have no copy.
    """

    def make(windows: Sequence[Window], number: int) -> Batch:
        if plan.masked_weight == 0:
            nothing = np.empty((len(windows), 0), np.int32)
            noise = Noise(nothing, nothing, plan.max_block, plan.next_token_weight, 0.0)
            return replace(make_batch(windows), noise=noise)
        step = number // plan.accumulate
        block = int(np.random.default_rng([plan.seed, BLOCK, step]).integers(2, plan.max_block + 1))
        generator = np.random.default_rng([plan.seed, RATE, number])
        rates = generator.random(len(windows))
        return masked_batch(windows, plan, block, rates, generator)

    return make


def masked_batch(
    windows: Sequence[Window], plan: TrainingPlan, block: int, rates: np.ndarray, generator: np.random.Generator
) -> Batch:
    """Whole windows, and copies in which supervised tokens are masked, each with the probability of its row.

    What is left of a row after its last whole block is in no copy, unless ``fill_blocks`` repeats the token that ends
    it up to the end of the block.
    """
    longest = max(map(len, windows))
    length = -(-longest // PADDING) * PADDING
    if plan.fill_blocks:
        length = max(length, -(-longest // block) * block)
    shape = len(windows), length
    tokens, copy, labels = (np.full(shape, fill, np.int32) for fill in (PAD, PAD, IGNORED))
    maskable = np.zeros(shape, bool)
    for row, window in enumerate(windows):
        count = len(window)
        tokens[row, :count] = copy[row, :count] = window.ids
        labels[row, : count - 1] = np.where(window.supervised[1:], window.ids[1:], IGNORED)
        maskable[row, :count] = window.supervised
        whole = count // block * block
        if plan.fill_blocks and (ends := _end(window)) is not None:
            whole = -(-ends // block) * block
            copy[row, ends:whole] = window.ids[ends - 1]
            maskable[row, ends:whole] = True
        maskable[row, whole:] = False
    masked = maskable & (generator.random(shape) < rates[:, None])
    copied = length // block * block
    noise = Noise(
        np.where(masked, plan.mask_token, copy).astype(np.int32)[:, :copied],
        np.where(masked, copy, IGNORED).astype(np.int32)[:, :copied],
        block,
        plan.next_token_weight,
        plan.masked_weight,
    )
    return Batch(tokens, labels, noise=noise)


def _end(window: Window) -> int | None:
    """How many tokens there are up to and with the one that ends what is learnt; None where a window was cut."""
    last = int(np.flatnonzero(window.supervised)[-1])
    return last + 1 if window.ids[last] in STOP_IDS else None


@dataclass(frozen=True)
class Watching:
    """What an evaluation measures beside the loss of the next token: the same masks and prompts every time."""

    plan: TrainingPlan
    windows: Sequence[Window]

    @property
    def blocks(self) -> list[int]:
        """Block sizes that the masked loss is told for."""
        return sorted({min(4, self.plan.max_block), self.plan.max_block})

    @property
    def parts(self) -> int:
        """How many measures there are, at most."""
        return len(self.blocks) * len(RATES) + 2

    def measures(self, engine: Engine) -> Iterator[dict[str, float]]:
        """One by one: the masked loss of each block size and rate, nats, their mean, and tokens per pass.

        The first are named like ``masked_loss_16_50``, for blocks of 16 and half of the tokens masked.
        """
        plan, losses = self.plan, []
        for block in self.blocks:
            for rate in RATES:
                if (loss := self._masked_loss(engine, block, rate)) is not None:
                    losses.append(loss)
                    yield {f"masked_loss_{block}_{round(100 * rate)}": loss}
        if losses:
            yield {"masked_valid_loss": sum(losses) / len(losses)}
        yield {"tokens_per_pass": tokens_per_pass(engine, self._prompts(), plan)}

    def _masked_loss(self, engine: Engine, block: int, rate: float) -> float | None:
        generator = np.random.default_rng([self.plan.seed, MEASURED, block, round(100 * rate)])
        total, count = 0.0, 0
        for windows in evaluation_windows(self.windows, self.plan.batch_size, EVALUATED):
            batch = masked_batch(windows, self.plan, block, np.full(len(windows), rate), generator)
            masked = int((batch.noised().labels != IGNORED).sum())
            total, count = total + (engine.masked_loss(batch) if masked else 0.0), count + masked
        return total / count if count else None

    def _prompts(self) -> list[list[int]]:
        """What comes before the first token to be learnt; of a text its first half."""
        step = max(1, len(self.windows) // WATCHED)
        found = []
        for window in self.windows[::step][:WATCHED]:
            first = int(np.argmax(window.supervised))
            found.append(window.ids[: first if first > 1 else -(-len(window) // 2)].tolist())
        return found


def tokens_per_pass(engine: Engine, prompts: Sequence[Sequence[int]], plan: TrainingPlan) -> float:
    """Tokens that greedy block decoding writes in a forward pass; a pass over several prompts is one of each."""
    sampling = Sampling(WATCHED_TOKENS, stop_ids=STOP_IDS)
    blocks = BlockDecoding(plan.max_block, WATCHED_GAMMA, mask=plan.mask_token)
    passes, lengths, ends = 0, np.zeros(len(prompts), int), np.full(len(prompts), WATCHED_TOKENS)
    for said in engine.decode(prompts, sampling, blocks):
        passes += len(np.unique(said.rows))
        rows, places, tokens = (some[said.decided] for some in (said.rows, said.places, said.tokens))
        stops = np.isin(tokens, sampling.stop_ids)
        np.maximum.at(lengths, rows, places + 1)
        np.minimum.at(ends, rows[stops], places[stops] + 1)
    return float(np.minimum(lengths, ends).sum()) / passes


def check_mask(plan: TrainingPlan, splits: Splits, vocabulary: int) -> None:
    """Refuse a mask token that the model has not, or that the data hold, since decoding never writes it.

    Raises:
        UsageError: it is one of these.
    """
    if plan.method not in BLOCKWISE:
        return
    check_mask_id(plan.mask_token, vocabulary)
    if any((window.ids == plan.mask_token).any() for window in (*splits.train, *splits.valid)):
        raise UsageError(
            f"mask_token: the data hold token {plan.mask_token}, which could never be written then: leave "
            "--mask-token out"
        )


def forgotten(plan: TrainingPlan, model: Model) -> list[str]:
    """A line for a person where a run leaves nothing of what a model was trained for blocks with; else none.

    Raises:
        GemmaTuiError: what the model was trained with cannot be read.
    """
    trained = None if plan.fresh else set_blocks_of(model)
    if trained is None or (plan.masked and plan.mask_token == trained.mask_token):
        return []
    if plan.masked:
        return [
            f"{model.name} was trained with mask token {trained.mask_token}, and learns {plan.mask_token} in its "
            f"place: --mask-token {trained.mask_token} goes on with it"
        ]
    both = "sbd" if plan.method in WHOLE else "sbd-lora"
    return [
        f"{model.name} was trained for blocks of {trained.max_block} tokens, and this run trains on next tokens alone: "
        f"its result does not count as trained for blocks; --method {both} trains on both"
    ]


def watching(plan: TrainingPlan, windows: Sequence[Window]) -> Watching | None:
    """What evaluations of a plan measure beside the next token's loss, if its method trains on masked copies."""
    return Watching(plan, windows) if plan.method in BLOCKWISE and windows else None
