"""A look at the data before a run: what there is, what is cut or left out, and what the loss will count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma_tui.rows import read_sources
from gemma_tui.studies.data import Counts, Splits, counted_windows, make_splits, pack, supervised_tokens, warnings
from gemma_tui.studies.plan import option
from gemma_tui.studies.turns import PROMPT_FORMS, Window
from gemma_tui.tokenizer import Tokenizer


@dataclass(frozen=True)
class SurveyPlan:
    """What is looked at. Every field but ``rows`` is an option of training too."""

    data: str = option(
        "", "text: .jsonl or .txt, a folder with train, valid and test, or hf:REPO; several with commas", required=True
    )
    sequence_length: int = option(256, "tokens in a window", unit="tokens", low=8, high=131_072)
    packing: bool = option(False, "put short rows side by side in one window")
    prompts: str = option("turns", "how prompt and completion are written", choices=PROMPT_FORMS)
    seed: int = option(0, "seed of the order", low=0, high=2**31)
    rows: int = option(3, "rows to show as tokens", low=0, high=1000)


@dataclass(frozen=True)
class SplitSurvey:
    """One split.

    Attributes:
        rows: as they were read; 0 for validation windows that are held out of the training rows.
        windows: what is left of them, of at most ``sequence_length`` tokens.
        tokens: to be predicted or to be seen, without ``<bos>``.
        supervised: tokens the loss counts.
        packed: rows of several windows each, if they are packed.
        counts: rows that were cut, left out or spell control tokens.
    """

    name: str
    rows: int
    windows: int
    tokens: int
    supervised: int
    packed: int | None
    counts: Counts


@dataclass(frozen=True)
class Bin:
    """A bar of a histogram: how many rows have ``low`` to ``high`` tokens, ends included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True)
class Survey:
    """What a person should see before a run.

    Attributes:
        lengths: how long the rows are, before anything is cut; training, validation and test together.
        shared: validation windows that are also training windows.
        repeated: training windows that are there once already.
        held_out: whether the validation windows were taken from the training rows.
        warnings: one line each.
        examples: the first training windows.
    """

    splits: tuple[SplitSurvey, ...]
    lengths: tuple[Bin, ...]
    shared: int
    repeated: int
    held_out: bool
    warnings: tuple[str, ...]
    examples: tuple[Window, ...]


def survey(plan: SurveyPlan, tokenizer: Tokenizer, folder: Path) -> Survey:
    """Read and tokenise all of the data.

    Args:
        folder: of the model, for its chat template.

    Raises:
        GemmaTuiError: as ``read_splits``.
    """
    rows = read_sources(plan.data)
    splits = make_splits(rows, plan.data, tokenizer, plan.sequence_length, plan.prompts)
    test, test_counts = counted_windows(rows.test, tokenizer, plan.sequence_length, plan.prompts)
    found = [
        _split("train", splits.train, splits.train_counts, plan),
        _split("valid", splits.valid, splits.valid_counts, plan),
    ]
    if test_counts.rows:
        found.append(_split("test", test, test_counts, plan))
    known = {window.ids.tobytes() for window in splits.train}
    shared = sum(window.ids.tobytes() in known for window in splits.valid)
    return Survey(
        splits=tuple(found),
        lengths=histogram([n for split in found for n in split.counts.lengths]),
        shared=shared,
        repeated=len(splits.train) - len(known),
        held_out=splits.held_out,
        warnings=(*warnings(splits, folder), *_doubles(shared, splits)),
        examples=tuple(splits.train[: plan.rows]),
    )


def histogram(lengths: Sequence[int]) -> tuple[Bin, ...]:
    """Bars that double in width: 1, 2 to 3, 4 to 7 and so on, from the shortest to the longest."""
    if not lengths:
        return ()
    powers = np.frexp(np.array(lengths, np.float64))[1] - 1
    rows = np.bincount(powers)
    return tuple(Bin(2**p, 2 ** (p + 1) - 1, int(rows[p])) for p in range(int(powers.min()), len(rows)))


def _split(name: str, windows: list[Window], counts: Counts, plan: SurveyPlan) -> SplitSurvey:
    return SplitSurvey(
        name=name,
        rows=counts.rows,
        windows=len(windows),
        tokens=sum(len(window) - 1 for window in windows),
        supervised=supervised_tokens(windows),
        packed=len(pack(windows, plan.sequence_length, plan.seed)) if plan.packing else None,
        counts=counts,
    )


def _doubles(shared: int, splits: Splits) -> list[str]:
    text = f"{shared} of {len(splits.valid)} validation windows are training windows too: their loss is no test"
    return [text] if shared else []
