"""Decoding, for both engines: which tokens go through a model, and which of its predictions stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engines.base import Sampling
from engines.blocks import BlockDecoding, DecodingPass, Predictions, sure
from engines.errors import UnsupportedError
from engines.sampling import choose


class Reader(Protocol):
    """A model that reads several texts side by side and keeps what it has read."""

    def read(self, tokens: np.ndarray, block: np.ndarray, wanted: np.ndarray, full: bool) -> Predictions:
        """What the model says of the places of a block, or of the next token where the block is empty.

        Args:
            tokens: int32 ``[rows, n]``, read causally after all before them, and kept.
            block: int32 ``[rows, k]`` after these; its places see each other, and nothing of it is kept.
            wanted: bool ``[rows, k]``, or ``[rows, 1]`` for the next token: predictions come in the order of
                ``wanted.nonzero()``.
            full: give the logits, too.
        """

    def keep(self, rows: np.ndarray) -> None:
        """Go on with some of the rows, given by their numbers."""


@dataclass
class Row:
    """One text in the making.

    Attributes:
        number: of its prompt.
        seen: token ids that are in it.
    """

    number: int
    seen: set[int]
    generator: np.random.Generator


def decode(
    reader: Reader, prompts: Sequence[Sequence[int]], sampling: Sampling, blocks: BlockDecoding
) -> Iterator[DecodingPass]:
    """See ``engines.base.Engine.decode``; blocks of one token are next-token decoding.

    The tokens of a block go through the model once more, causally, together with the next block (arXiv:2509.04185,
    algorithm 2).
    """
    rows = [Row(n, set(prompt), np.random.default_rng(sampling.seed + n)) for n, prompt in enumerate(prompts)]
    tokens = _aligned(prompts)
    for start in range(0, sampling.max_tokens, blocks.block):
        if not rows:
            return
        size = min(blocks.block, sampling.max_tokens - start)
        block = np.full((len(rows), size), blocks.mask, np.int32)
        open_ = np.ones(block.shape, bool)
        decided = np.zeros(block.shape, bool)
        while open_.any():
            of, at = open_.nonzero()
            said = reader.read(tokens, block if size > 1 else block[:, :0], open_, not sampling.plain)
            taken = _taken(said, of, blocks)
            chosen, probabilities = _chosen(said, of, taken, rows, sampling)
            block[of[taken], at[taken]] = chosen[taken]
            decided[of[taken], at[taken]] = True
            width = tokens.shape[1] + (size if size > 1 else 0)
            tokens = tokens[:, :0]
            # What comes after the first stop is nothing, so nobody waits for it.
            stops = decided & np.isin(block, sampling.stop_ids)
            open_ = ~decided & ~np.logical_or.accumulate(stops, axis=1)
            numbers = np.array([rows[r].number for r in of], np.int32)
            places = (start + at).astype(np.int32)
            yield DecodingPass(numbers, places, chosen, said.entropies, probabilities, taken, width)
        going = np.flatnonzero(~stops.any(axis=1))
        if going.size < len(rows):
            rows = [rows[r] for r in going]
            reader.keep(going)
        tokens = block[going]


def prompt_lengths(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Tokens in each prompt: int64 ``[rows]``.

    Raises:
        UnsupportedError: there is none, or one is empty.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    if not lengths.size or not lengths.all():
        raise UnsupportedError("a prompt has no tokens: give at least one")
    return lengths


def _aligned(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Prompts that end together: int32 ``[rows, longest]``, zeros before the shorter ones."""
    tokens = np.zeros((len(prompts), prompt_lengths(prompts).max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[row.size - len(prompt) :] = prompt
    return tokens


def _taken(said: Predictions, of: np.ndarray, blocks: BlockDecoding) -> np.ndarray:
    """Which predictions stay; each row has its own bound."""
    taken = np.zeros(of.shape, bool)
    for row in np.unique(of):
        here = of == row
        taken[here] = sure(said.at(here), blocks.gamma, blocks.order)
    return taken


def _chosen(
    said: Predictions, of: np.ndarray, taken: np.ndarray, rows: Sequence[Row], sampling: Sampling
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens, and their probabilities under the model; where a prediction does not stay the most probable one."""
    tokens, probabilities = said.best.copy(), said.tops.copy()
    if said.logits is None:
        return tokens, probabilities
    for i in np.flatnonzero(taken):
        row, logits = rows[of[i]], said.logits[i]
        tokens[i] = choose(logits, sampling, row.generator, row.seen)
        probabilities[i] = said.tops[i] * np.exp(logits[tokens[i]] - logits.max())
        row.seen.add(int(tokens[i]))
    return tokens, probabilities
