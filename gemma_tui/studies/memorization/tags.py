"""What a sequence is like before any model sees it, so that "memorised" does not only mean "predictable".

What is repeated in the data, fills a template or compresses well is given back by models that learned no text by heart.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_tui.errors import UsageError

NGRAM = 13
"""Tokens of a run that is taken as copied if another sequence has it too, the length used for GPT-3's overlaps
(Brown et al., arXiv:2005.14165, appendix C)."""

NEAR = 0.5
"""Share of runs found elsewhere from which a sequence is a near duplicate."""

TEMPLATE_SEQUENCES = 4
"""Sequences that must have a run before it counts as a template."""

TEMPLATE = 0.5
"""Share of runs in templates, or repeated within the sequence, from which it is called one."""

REPEATED_NGRAM = 3
"""Tokens of the runs whose repetition within a sequence is measured."""

COMPRESSIBLE = 0.3
"""zlib ratio below which a text is mostly repetition; plain English has 0.8 at 200 characters and 0.6 at 1,000."""

WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|[^\w\s]")


@dataclass(frozen=True)
class Tags:
    """What is known of one sequence among the others.

    Attributes:
        zlib_ratio: compressed over plain bytes.
        copies: sequences with exactly these tokens, itself among them.
        overlap: share of its runs of tokens that another sequence has too.
        templated: share of its runs that three others have too.
        repetition: share of its runs of 3 tokens that it had before.
        tf_idf: how rare its words are in the data, nats per word.
    """

    zlib_ratio: float
    copies: int
    overlap: float
    templated: float
    repetition: float
    tf_idf: float

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the sequence may be predictable without having been learned by heart; empty if nothing speaks for it."""
        tests = (
            ("duplicate", self.copies > 1),
            ("near duplicate", self.copies == 1 and self.overlap >= NEAR),
            ("template", self.templated >= TEMPLATE or self.repetition >= TEMPLATE),
            ("compressible", self.zlib_ratio < COMPRESSIBLE),
        )
        return tuple(name for name, holds in tests if holds)


def tag(texts: Sequence[str], tokens: Sequence[Sequence[int]]) -> list[Tags]:
    """The tags of each sequence among all of them.

    Args:
        texts: as they were tokenised.
        tokens: ids of each, without ``<bos>``.

    Raises:
        UsageError: there is not one list of ids for each text.
    """
    if len(texts) != len(tokens):
        raise UsageError(f"there are {len(texts)} texts and {len(tokens)} lists of tokens: give one for each")
    copies, spread = exact_copies(tokens), run_spread(tokens)
    rarity = tf_idf([words(text) for text in texts])
    return [
        Tags(
            zlib_ratio(text), copies[number], _share(spread[number] >= 2),
            _share(spread[number] >= TEMPLATE_SEQUENCES), repetition(tokens[number]), float(rarity[number]),
        )
        for number, text in enumerate(texts)
    ]  # fmt: skip


def words(text: str) -> list[str]:
    """Words, numbers and marks in lower case; letters of scripts that write no spaces one by one."""
    return WORDS.findall(text.lower())


def zlib_ratio(text: str) -> float:
    """Bytes after zlib over bytes of UTF-8: above 1 for very short texts, which pay for the header; 1 for none."""
    plain = text.encode("utf-8", "surrogatepass")
    return len(zlib.compress(plain)) / len(plain) if plain else 1.0


def exact_copies(tokens: Sequence[Sequence[int]]) -> list[int]:
    """How many sequences are the same as each, itself among them."""
    keys = [_key(ids) for ids in tokens]
    counts = Counter(keys)
    return [counts[key] for key in keys]


def run_spread(tokens: Sequence[Sequence[int]], length: int = NGRAM) -> list[np.ndarray]:
    """For each run of tokens of each sequence, how many sequences have it, itself among them.

    Runs are of ``length`` tokens, or of the whole sequence where that is shorter; a short one is sought within the
    long ones too. Time and memory grow with the tokens, not with the pairs of sequences.
    """
    sizes = {min(length, len(ids)) for ids in tokens} - {0}
    counts = {size: Counter(run for ids in tokens for run in set(_runs(ids, size))) for size in sizes}
    return [
        np.array([counts[size][run] for run in _runs(ids, size)], np.int64)
        for ids, size in ((ids, min(length, len(ids))) for ids in tokens)
    ]


def repetition(tokens: Sequence[int], length: int = REPEATED_NGRAM) -> float:
    """Share of the runs of ``length`` tokens that the sequence had before: 1 − distinct/all; 0 if it is too short."""
    runs = _runs(tokens, length)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def tf_idf(documents: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """(1/|d|) Σ_{w in d} ln(|D|/tf(w, D)) of each document, as Morris et al., arXiv:2505.24832, rank rare texts.

    |D| is the number of documents and tf(w, D) how often the word is in all of them, so words of more than one
    occurrence per document count negative. 0 for an empty document.
    """
    counts = Counter(word for document in documents for word in document)
    rarity = {word: math.log(len(documents) / count) for word, count in counts.items()}
    return np.array([math.fsum(rarity[word] for word in document) / max(1, len(document)) for document in documents])


def _key(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, np.int64).tobytes()


def _runs(ids: Sequence[int], length: int) -> list[bytes]:
    """Each run of ``length`` tokens as bytes, which hash fast; none of an empty sequence."""
    if not 0 < length <= len(ids):
        return []
    buffer, width = _key(ids), np.dtype(np.int64).itemsize
    return [buffer[at * width : (at + length) * width] for at in range(len(ids) - length + 1)]


def _share(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else 0.0
