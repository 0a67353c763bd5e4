"""Rows to the sequences that are scored: the beginning of each row, each once."""

from __future__ import annotations

import zipfile
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.checkpoints import replacing
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.rows import Row, RowSplits, read_sources
from gemma_tui.studies.data import VALID_SHARE, counted_windows
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.studies.turns import Window, render, texts
from gemma_tui.tokenizer import Tokenizer

FILE = "sequences.npz"
TRAIN, HELD_OUT = "train", "held_out"


@dataclass
class Counts:
    """What became of the rows of one set.

    Attributes:
        empty: left out because there is no text in them.
        cut: rows that lost their end.
        masked: left out because nothing that the loss counts is left after cutting.
        repeated: left out because the same sequence was there before, after cutting.
        shared: held-out ones left out because the training set has them too.
        drawn: sequences that are scored.
    """

    rows: int = 0
    empty: int = 0
    cut: int = 0
    masked: int = 0
    repeated: int = 0
    shared: int = 0
    drawn: int = 0


@dataclass(frozen=True, eq=False)
class Sequences:
    """The training set's sequences and, after them, the held-out ones.

    Attributes:
        windows: ``<bos>`` and at most ``max_tokens`` ids; bits and losses count the supervised ones.
        rows: int ``[n]``, the number of the row each comes from, in its set, from 0 on.
        trained: how many are of the training set.
    """

    windows: list[Window]
    rows: np.ndarray
    trained: int

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.windows)

    @property
    def sets(self) -> dict[str, range]:
        """Which sequences are of which set; a set without any is not there."""
        found = {TRAIN: range(self.trained), HELD_OUT: range(self.trained, len(self))}
        return {name: numbers for name, numbers in found.items() if numbers}

    @property
    def by_length(self) -> np.ndarray:
        """The numbers of the sequences, the shortest first, so that a batch needs little padding."""
        return np.argsort([len(window) for window in self.windows], kind="stable")

    def largest(self) -> int:
        """The largest token id."""
        return max(int(window.ids.max()) for window in self.windows)

    def write(self, folder: Path) -> None:
        """Keep them, so that a run goes on with the same ones whatever becomes of the data.

        Raises:
            EngineError: the disk is full or not writable.
        """
        with replacing(folder / FILE) as file:
            np.savez(
                file,
                ids=np.concatenate([window.ids for window in self.windows]),
                supervised=np.concatenate([window.supervised for window in self.windows]),
                lengths=np.array([len(window) for window in self.windows]),
                rows=self.rows,
                trained=np.array(self.trained),
            )


def read_sequences(folder: Path) -> Sequences:
    """What ``write`` kept.

    Raises:
        GemmaTuiError: the file is missing or broken.
    """
    kept = read_kept(folder / FILE, ("ids", "supervised", "lengths", "rows", "trained"))
    cuts = kept["lengths"].cumsum()[:-1]
    ids, supervised = np.split(kept["ids"], cuts), np.split(kept["supervised"], cuts)
    windows = [Window(i, s) for i, s in zip(ids, supervised, strict=True)]
    return Sequences(windows, kept["rows"], int(kept["trained"]))


def read_kept(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz`` of a run's folder.

    Raises:
        GemmaTuiError: the file is missing or broken.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            return {name: kept[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise GemmaTuiError(f"{path} is missing or broken: start the measurement again") from None


def make_sequences(
    rows: Sequence[Row], tokenizer: Tokenizer, max_tokens: int, prompts: str, known: Container[bytes] = frozenset()
) -> tuple[dict[bytes, tuple[int, Window]], Counts]:
    """The different sequences of a set with the numbers of their rows, and what became of the rows.

    Args:
        known: sequences that are of another set.
    """
    found: dict[bytes, tuple[int, Window]] = {}
    counts = Counts(rows=len(rows))
    for number, row in enumerate(rows):
        if not any(texts(row)):
            counts.empty += 1
            continue
        whole = render(row, tokenizer, prompts)
        window = Window(whole.ids[: max_tokens + 1], whole.supervised[: max_tokens + 1])
        counts.cut += len(window) < len(whole)
        key = window.ids.tobytes() + window.supervised.tobytes()
        if not window.supervised.any():
            counts.masked += 1
        elif key in known:
            counts.shared += 1
        elif key in found:
            counts.repeated += 1
        else:
            found[key] = (number, window)
    return found, counts


def draw(found: dict[bytes, tuple[int, Window]], limit: int, seed: int) -> list[tuple[int, Window]]:
    """At most ``limit`` of a set's sequences, chosen by the seed, in their order; 0 for all."""
    every = list(found.values())
    if not 0 < limit < len(every):
        return every
    chosen = np.random.default_rng(seed).permutation(len(every))[:limit]
    return [every[i] for i in sorted(chosen)]


def measured_rows(
    data: str, held_out: str, tokenizer: Tokenizer, trained: TrainingPlan | None
) -> tuple[Sequence[Row], Sequence[Row]]:
    """The rows a model was trained on, and rows it was not trained on, which may be none.

    Args:
        trained: how the model was trained, if that is known. Training on data without validation rows keeps its last
            windows for validation, and the rows of these are no training rows.

    Raises:
        GemmaTuiError: as ``read_sources``.
    """
    splits = read_sources(data)
    if held_out:
        named = read_sources(held_out)
        return _trained_rows(splits, tokenizer, data, trained)[0], [*named.train, *named.valid, *named.test]
    return _trained_rows(splits, tokenizer, data, trained)


def _trained_rows(
    splits: RowSplits, tokenizer: Tokenizer, data: str, trained: TrainingPlan | None
) -> tuple[Sequence[Row], Sequence[Row]]:
    """A row of which one part was trained on and another was not is in neither."""
    if trained is None or trained.data != data or splits.valid:
        return splits.train, splits.valid
    ends = np.cumsum([_windows(row, tokenizer, trained) for row in splits.train])
    if not len(ends) or ends[-1] < 2:
        return splits.train, []
    first = int(ends[-1]) - max(1, int(ends[-1] * VALID_SHARE))  # as training data is split
    begins = np.concatenate(([0], ends[:-1]))
    train = [row for row, end in zip(splits.train, ends, strict=True) if end <= first]
    held = [row for row, begin in zip(splits.train, begins, strict=True) if begin >= first]
    return train, held


def _windows(row: Row, tokenizer: Tokenizer, trained: TrainingPlan) -> int:
    return len(counted_windows([row], tokenizer, trained.sequence_length, trained.prompts)[0])


def check_vocabulary(target: Tokenizer, reference: Tokenizer, name: str) -> None:
    """Refuse a reference that numbers tokens otherwise: its likelihoods would be of other texts.

    Raises:
        UsageError: the vocabularies differ.
    """
    ours, theirs = target.vocabulary(), reference.vocabulary()
    if ours != theirs:
        other = sum(ours.get(token) != number for token, number in theirs.items())
        raise UsageError(
            f"{name} has another vocabulary ({other:,} of its {len(theirs):,} tokens are not the target's), so bits "
            "cannot be compared: take a reference with the same tokenizer"
        )
