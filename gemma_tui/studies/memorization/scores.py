"""What a model makes of every token of every sequence, kept part by part in the run's folder.

A part is there whole or not at all, so a measurement that was broken off goes on with the first that is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import Engine, Sampling, TokenScores
from engines.checkpoints import replacing, write_json
from gemma_tui.errors import GemmaTuiError
from gemma_tui.studies.data import PADDING
from gemma_tui.studies.memorization.sequences import Sequences, read_kept
from gemma_tui.studies.turns import Window
from gemma_tui.tokenizer import PAD

PART = 128
"""Sequences of a part."""

SCORES = "scores"
"""The folder of what was scored."""

IDENTITY = "model.json"
FIELDS = ("log_probs", "means", "deviations", "best")


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one model.

    Attributes:
        folder: of the parts, and of what tells which model they are of.
        sampling: the decoding scheme of ``sampled``, which is there only with one.
    """

    folder: Path
    sequences: Sequences
    sampling: Sampling | None = None

    @property
    def parts(self) -> list[np.ndarray]:
        """The numbers of the sequences of each part, of rising length."""
        order = self.sequences.by_length
        return [order[start : start + PART] for start in range(0, len(order), PART)]

    def has(self, part: int) -> bool:
        """Whether a part was kept."""
        return self._path(part).is_file()

    @property
    def whole(self) -> bool:
        """Whether every part was kept."""
        return all(map(self.has, range(len(self.parts))))

    def claim(self, name: str, digest: str) -> None:
        """Tell which model the parts are of.

        Raises:
            GemmaTuiError: there are parts of another model.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / IDENTITY
        if not path.is_file():
            write_json(path, {"name": name, "digest": digest})
        try:
            known = json.loads(path.read_text(encoding="utf-8")).get("digest")
        except (OSError, ValueError, AttributeError):
            raise GemmaTuiError(f"{path} is broken: start the measurement again") from None
        if known != digest:
            raise GemmaTuiError(f"{name} has changed since it first scored sequences: start the measurement again")

    def keep(self, part: int, scored: list[TokenScores]) -> None:
        """Keep the scores of a part's sequences, in its order.

        Raises:
            EngineError: the disk is full or not writable.
        """
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(s, name) for s in scored]) for name in fields(self.sampling)
        }
        with replacing(self._path(part)) as file:
            np.savez(file, **arrays)

    def read(self) -> list[TokenScores]:
        """The scores of every sequence: arrays of one entry for each of its tokens but ``<bos>``.

        Raises:
            GemmaTuiError: a part is missing or broken.
        """
        found: dict[int, TokenScores] = {}
        for part, numbers in enumerate(self.parts):
            found |= zip(numbers.tolist(), self._read(part, numbers), strict=True)
        return [found[number] for number in range(len(self.sequences))]

    def log_likelihoods(self) -> np.ndarray:
        """ln p of each sequence, of its supervised tokens, float64 ``[n]``.

        Raises:
            GemmaTuiError: a part is missing or broken.
        """
        found = np.zeros(len(self.sequences))
        for part, numbers in enumerate(self.parts):
            for number, scored in zip(numbers, self._read(part, numbers), strict=True):
                counted = self.sequences.windows[number].supervised[1:]
                found[number] = scored.log_probs[counted].sum(dtype=np.float64)
        return found

    def _read(self, part: int, numbers: np.ndarray) -> Iterator[TokenScores]:
        path = self._path(part)
        cuts = np.cumsum([len(self.sequences.windows[number]) - 1 for number in numbers])
        arrays = list(read_kept(path, fields(self.sampling)).values())
        if any(array.shape != (cuts[-1],) for array in arrays):
            raise GemmaTuiError(f"{path} is of other sequences: start the measurement again")
        for pieces in zip(*(np.split(array, cuts[:-1]) for array in arrays), strict=True):
            yield TokenScores(*pieces)

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.npz"


def fields(sampling: Sampling | None) -> tuple[str, ...]:
    """What is kept of each token."""
    return FIELDS if sampling is None else (*FIELDS, "sampled")


def score(engine: Engine, windows: list[Window], sampling: Sampling | None = None) -> list[TokenScores]:
    """The scores of a batch of sequences, without their padding."""
    longest = max(len(window) for window in windows) - 1
    tokens = np.full((len(windows), 1 + -(-longest // PADDING) * PADDING), PAD, np.int32)
    for row, window in enumerate(windows):
        tokens[row, : len(window)] = window.ids
    found = engine.token_scores(tokens, sampling)
    return [
        TokenScores(*(getattr(found, name)[row, : len(window) - 1] for name in fields(sampling)))
        for row, window in enumerate(windows)
    ]
