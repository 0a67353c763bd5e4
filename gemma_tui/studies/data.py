"""Rows to windows, and windows to micro-batches.

Every window starts with ``<bos>``, as Gemma expects. Text is cut into windows of at most ``sequence_length`` tokens;
a conversation that is longer loses its end, since its later turns mean nothing without the earlier ones. No window
crosses from one row into another; packing puts whole windows side by side, and the engines keep them apart.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engines.training import IGNORED, Batch
from gemma_tui.errors import GemmaTuiError
from gemma_tui.rows import Row, RowSplits, TextRow, read_sources
from gemma_tui.studies.turns import Window, in_turns, render, texts
from gemma_tui.templates import template_difference
from gemma_tui.tokenizer import BOS, PAD, Tokenizer

PADDING = 32
"""Lengths are padded to multiples of this, so that few shapes occur: MLX and MPS keep a graph for each."""

POOL = 16
"""Batches are sorted by length within pools of this many, so that little padding is needed and order stays random."""

VALID_SHARE = 0.05

NO_DOCUMENT = -1
"""The segment of padding in a packed row."""


@dataclass
class Counts:
    """What became of the rows of one split.

    Attributes:
        lengths: tokens of each row that is not empty, ``<bos>`` not counted, before anything is cut.
        split: rows of text cut into several windows.
        truncated: conversations and prompts that lost their end.
        masked: rows left out because nothing of them is supervised once they are cut.
        empty: rows left out because there is no text in them.
        spelled: rows that spell a control token, such as ``<end_of_turn>``, in their text.
        turns: rows in Gemma's turns.
    """

    rows: int = 0
    characters: int = 0
    split: int = 0
    truncated: int = 0
    masked: int = 0
    empty: int = 0
    spelled: int = 0
    turns: int = 0
    lengths: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Splits:
    """Windows for training and for validation, and what became of the rows they came from.

    Attributes:
        held_out: whether the validation windows were taken from the training rows.
    """

    train: list[Window]
    valid: list[Window]
    train_counts: Counts
    valid_counts: Counts
    held_out: bool

    @property
    def train_characters(self) -> int:
        """Characters of the training rows."""
        return self.train_counts.characters

    @property
    def valid_characters(self) -> int:
        """Characters of the validation rows; 0 if they were held out of the training rows."""
        return self.valid_counts.characters


def read_splits(sources: str, tokenizer: Tokenizer, sequence_length: int, prompts: str = "turns") -> Splits:
    """Windows for training and validation from files, folders with ``train`` and ``valid``, or ``hf:REPO``.

    Args:
        sources: one, or several with commas between.
        prompts: how a prompt and its completion are written; see ``render``.

    Without validation rows the last 5 % of the training windows are held out.

    Raises:
        GemmaTuiError: files are missing, unreadable or hold nothing to train on, or a row is broken.
    """
    return make_splits(read_sources(sources), sources, tokenizer, sequence_length, prompts)


def make_splits(
    rows: RowSplits, sources: str, tokenizer: Tokenizer, sequence_length: int, prompts: str = "turns"
) -> Splits:
    """As ``read_splits``, of rows that were read; ``sources`` is named in the error.

    Raises:
        GemmaTuiError: there is nothing to train on.
    """
    train, train_counts = counted_windows(rows.train, tokenizer, sequence_length, prompts)
    valid, valid_counts = counted_windows(rows.valid, tokenizer, sequence_length, prompts)
    held_out = not valid and len(train) > 1
    if held_out:
        held = max(1, int(len(train) * VALID_SHARE))
        train, valid = train[: len(train) - held], train[len(train) - held :]
    if not train:
        masked = f" that fits into {sequence_length} tokens" if train_counts.masked else ""
        raise GemmaTuiError(f"{sources} holds no text to train on{masked}: name a file with some")
    return Splits(train, valid, train_counts, valid_counts, held_out)


def windows(rows: Sequence[Row], tokenizer: Tokenizer, length: int, prompts: str = "turns") -> list[Window]:
    """Windows of at most ``length + 1`` ids; rows without anything to learn are left out."""
    return counted_windows(rows, tokenizer, length, prompts)[0]


def counted_windows(
    rows: Sequence[Row], tokenizer: Tokenizer, length: int, prompts: str = "turns"
) -> tuple[list[Window], Counts]:
    """Windows, and what became of the rows."""
    found: list[Window] = []
    counts = Counts(rows=len(rows))
    for row in rows:
        pieces = texts(row)
        counts.characters += sum(map(len, pieces))
        counts.spelled += any(tokenizer.spelled(piece) for piece in pieces)
        counts.turns += in_turns(row, prompts)
        if not any(pieces):
            counts.empty += 1
            continue
        whole = render(row, tokenizer, prompts)
        counts.lengths.append(len(whole) - 1)
        parts = _parts(row, whole, length)
        kept = [part for part in parts if part.supervised.any()]
        counts.masked += not kept
        counts.split += len(parts) > 1
        counts.truncated += sum(map(len, parts)) < len(whole)
        found += kept
    return found, counts


def _parts(row: Row, whole: Window, length: int) -> list[Window]:
    """The windows of a row. Those of a text are of nearly equal length, so that no short rest makes a noisy step."""
    if not isinstance(row, TextRow):
        return [Window(whole.ids[: length + 1], whole.supervised[: length + 1])]
    cut = np.array_split(whole.ids[1:], -(-(len(whole) - 1) // length))
    parts = [np.concatenate(([np.int32(BOS)], part)) for part in cut]
    return [Window(ids, np.arange(len(ids)) > 0) for ids in parts]


def warnings(splits: Splits, folder: Path) -> list[str]:
    """One line for each thing a person should know of the data before a run.

    Args:
        folder: of the model, whose own chat template may write turns differently.
    """
    counts = (splits.train_counts, splits.valid_counts)
    masked, spelled = (sum(getattr(c, name) for c in counts) for name in ("masked", "spelled"))
    found = []
    if masked:
        found.append(f"rows left out because their supervised part lies beyond sequence_length: {masked}")
    if spelled:
        found.append(
            f"rows that spell control tokens such as <end_of_turn>, which stay plain text: {spelled}; "
            "write turns as messages rows"
        )
    if any(c.turns for c in counts) and (difference := template_difference(folder)):
        found.append(difference)
    return found


def pack(sequences: Sequence[Window], length: int, seed: int) -> list[Window]:
    """Windows put side by side in rows of at most ``length + 1`` ids, by best fit, the longest first.

    The order of windows of one length is drawn from the seed. At most one row is less than half full.
    """
    drawn = np.random.default_rng([seed, len(sequences)]).permutation(len(sequences))
    rows: list[list[Window]] = []
    room: list[tuple[int, int]] = []  # what is left in each open row, sorted, with its number
    for index in sorted(drawn.tolist(), key=lambda i: -len(sequences[i])):
        window = sequences[index]
        place = bisect_left(room, (len(window), -1))
        if place < len(room):
            left, number = room.pop(place)
            rows[number].append(window)
        else:
            left, number = length + 1, len(rows)
            rows.append([window])
        insort(room, (left - len(window), number))
    return [_packed(row) for row in rows]


def _packed(row: Sequence[Window]) -> Window:
    """One window; the last token of a document predicts nothing, since a ``<bos>`` is never supervised."""
    return Window(
        np.concatenate([window.ids for window in row]),
        np.concatenate([window.supervised for window in row]),
        np.repeat(np.arange(len(row), dtype=np.int32), [len(window) for window in row]),
    )


def unpacked(window: Window) -> list[Window]:
    """The windows that were packed into one; itself where none were."""
    if window.segments is None:
        return [window]
    cuts = np.flatnonzero(np.diff(window.segments)) + 1
    pieces = zip(np.split(window.ids, cuts), np.split(window.supervised, cuts), strict=True)
    return [Window(ids, supervised) for ids, supervised in pieces]


def supervised_tokens(sequences: Sequence[Window]) -> int:
    """How many tokens the loss counts."""
    return sum(int(window.supervised.sum()) for window in sequences)


def make_batch(sequences: Sequence[Window]) -> Batch:
    """Pad windows on the right to one length; every supervised id is a label."""
    longest = max(len(s) for s in sequences) - 1
    length = -(-longest // PADDING) * PADDING
    shape = len(sequences), length
    tokens, labels = np.full(shape, PAD, np.int32), np.full(shape, IGNORED, np.int32)
    segments = np.full(shape, NO_DOCUMENT, np.int32)
    for row, window in enumerate(sequences):
        count = len(window) - 1
        tokens[row, :count] = window.ids[:-1]
        labels[row, :count] = np.where(window.supervised[1:], window.ids[1:], IGNORED)
        segments[row, :count] = 0 if window.segments is None else window.segments[:-1]
    packed = any(window.segments is not None for window in sequences)
    return Batch(tokens, labels, segments if packed else None)


def plain_batch(windows: Sequence[Window], number: int) -> Batch:
    """``make_batch``, whichever micro-batch it is."""
    return make_batch(windows)


def training_batches(
    sequences: Sequence[Window],
    size: int,
    seed: int,
    start: int = 0,
    make: Callable[[Sequence[Window], int], Batch] = plain_batch,
) -> Iterator[Batch]:
    """Endless micro-batches; the order depends on the seed and the epoch alone, so any position can be gone back to.

    Args:
        start: how many micro-batches to leave out at the beginning; none of them is made.
        make: the micro-batch of some windows, given its number from 0 on.
    """
    size = min(size, len(sequences))
    per_epoch = len(sequences) // size
    lengths = [len(s) for s in sequences]
    position = start
    while True:
        epoch, first = divmod(position, per_epoch)
        order = _epoch_order(lengths, size, per_epoch, seed, epoch)
        for index in range(first, per_epoch):
            yield make([sequences[i] for i in order[index]], position)
            position += 1


def trained_windows(sequences: Sequence[Window], size: int, seed: int, batches: int) -> list[Window]:
    """The windows that the first so many of ``training_batches`` come to, in their order."""
    size = min(size, len(sequences))
    per_epoch = len(sequences) // size
    lengths, seen, epoch = [len(s) for s in sequences], set[int](), 0
    while batches > 0 and len(seen) < len(sequences):
        seen.update(_epoch_order(lengths, size, per_epoch, seed, epoch)[:batches].reshape(-1).tolist())
        batches, epoch = batches - per_epoch, epoch + 1
    return [sequences[i] for i in sorted(seen)]


def evaluation_windows(sequences: Sequence[Window], size: int, limit: int) -> list[list[Window]]:
    """The windows of at most ``limit`` micro-batches (0 for all), spread evenly over the sequences, always the same."""
    step = max(1, len(sequences) // (limit * size)) if limit else 1
    chosen = sorted(sequences[::step], key=len)
    found = [chosen[first : first + size] for first in range(0, len(chosen), size)]
    return found[:limit] if limit else found


def evaluation_batches(sequences: Sequence[Window], size: int, limit: int) -> Iterator[Batch]:
    """The micro-batches of ``evaluation_windows``."""
    return map(make_batch, evaluation_windows(sequences, size, limit))


def _epoch_order(lengths: Sequence[int], size: int, per_epoch: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))[: per_epoch * size]
    for start in range(0, len(order), size * POOL):
        pool = order[start : start + size * POOL]
        order[start : start + size * POOL] = sorted(pool, key=lambda i: lengths[i])
    return generator.permutation(order.reshape(per_epoch, size))
