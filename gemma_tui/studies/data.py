"""Text rows to micro-batches.

Each row is cut into windows of at most ``sequence_length`` tokens. Every window starts with ``<bos>``, as Gemma
expects, and the last of a row ends with ``<eos>``; no window crosses from one row into another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engines.base import IGNORED, Batch
from gemma_tui.errors import GemmaTuiError
from gemma_tui.rows import read_sources
from gemma_tui.tokenizer import BOS, EOS, PAD, Tokenizer

PADDING = 32
"""Lengths are padded to multiples of this, so that few shapes occur: MLX and MPS keep a graph for each."""

POOL = 16
"""Batches are sorted by length within pools of this many, so that little padding is needed and order stays random."""

VALID_SHARE = 0.05


@dataclass(frozen=True)
class Splits:
    """Windows of token ids, ``<bos>`` first, and how many characters they came from."""

    train: list[np.ndarray]
    valid: list[np.ndarray]
    train_characters: int
    valid_characters: int


def read_splits(sources: str, tokenizer: Tokenizer, sequence_length: int) -> Splits:
    """Windows for training and validation from ``.txt`` or ``.jsonl`` files, or folders with ``train`` and ``valid``.

    Args:
        sources: one path, or several with commas between.

    Without validation rows the last 5 % of the training windows are held out.

    Raises:
        GemmaTuiError: files are missing, unreadable or empty, or a row has no ``text``.
    """
    train_rows, valid_rows = read_sources(sources)
    train = windows(train_rows, tokenizer, sequence_length)
    valid = windows(valid_rows, tokenizer, sequence_length)
    if not valid:
        held = max(1, int(len(train) * VALID_SHARE)) if len(train) > 1 else 0
        train, valid = train[: len(train) - held], train[len(train) - held :]
    if not train:
        raise GemmaTuiError(f"{sources} holds no text to train on: name a file with some")
    return Splits(train, valid, sum(map(len, train_rows)), sum(map(len, valid_rows)))


def windows(rows: Sequence[str], tokenizer: Tokenizer, length: int) -> list[np.ndarray]:
    """int32 arrays of at most ``length + 1`` ids: a window's last id is only predicted.

    A row that is too long is cut into windows of nearly equal length, so that no short rest makes a noisy step.
    """
    found = []
    for row in rows:
        ids = [*tokenizer.encode(row, bos=False), EOS]
        if len(ids) > 1:
            parts = np.array_split(np.array(ids, np.int32), -(-len(ids) // length))
            found += [np.concatenate(([np.int32(BOS)], part)) for part in parts]
    return found


def make_batch(sequences: Sequence[np.ndarray]) -> Batch:
    """Pad windows on the right to one length; every id but ``<bos>`` is a label."""
    longest = max(len(s) for s in sequences) - 1
    length = -(-longest // PADDING) * PADDING
    tokens = np.full((len(sequences), length), PAD, np.int32)
    labels = np.full((len(sequences), length), IGNORED, np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence) - 1] = sequence[:-1]
        labels[row, : len(sequence) - 1] = sequence[1:]
    return Batch(tokens, labels)


def training_batches(sequences: Sequence[np.ndarray], size: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """Endless micro-batches; the order depends on the seed and the epoch alone, so any position can be gone back to.

    Args:
        start: how many micro-batches to leave out at the beginning.
    """
    size = min(size, len(sequences))
    per_epoch = len(sequences) // size
    position = start
    while True:
        epoch, first = divmod(position, per_epoch)
        order = _epoch_order([len(s) for s in sequences], size, per_epoch, seed, epoch)
        for index in range(first, per_epoch):
            yield make_batch([sequences[i] for i in order[index]])
            position += 1


def evaluation_batches(sequences: Sequence[np.ndarray], size: int, limit: int) -> Iterator[Batch]:
    """At most ``limit`` micro-batches (0 for all), spread evenly over the sequences, always the same."""
    step = max(1, len(sequences) // (limit * size)) if limit else 1
    chosen = sorted(sequences[::step], key=len)
    count = -(-len(chosen) // size)
    for index in range(min(count, limit) if limit else count):
        yield make_batch(chosen[index * size : (index + 1) * size])


def _epoch_order(lengths: Sequence[int], size: int, per_epoch: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))[: per_epoch * size]
    for start in range(0, len(order), size * POOL):
        pool = order[start : start + size * POOL]
        order[start : start + size * POOL] = sorted(pool, key=lambda i: lengths[i])
    return generator.permutation(order.reshape(per_epoch, size))
