"""Whether the texts alone tell members from others: the baseline that has no model.

Where it does, an attack on the model may only have learned what kind of text the members are (Das et al.,
arXiv:2406.16201, where such baselines beat published attacks on eight data sets; arXiv:2408.05968).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_tui.errors import UsageError
from gemma_tui.studies.memorization.roc import Interval, auc_interval
from gemma_tui.studies.memorization.tags import words, zlib_ratio

FOLDS = 5

MIN_TEXTS = 10
"""Distinct texts of each kind that a baseline needs."""

WARN_ABOVE = 0.55
"""Lower end of the interval of AUC from which the baseline warns: attacks on sets without a shift rarely get further
(Duan et al., arXiv:2402.07841, find them near chance), so a shift of this size could be all that an attack found."""

MIN_DOCUMENTS = 2
"""Texts that must have a word before it is counted: a word of one text says nothing about another."""

VARIANCE_FLOOR = 1e-9


@dataclass(frozen=True)
class Baseline:
    """How well text alone separates members from others, each text scored by a classifier that did not see it.

    The intervals are over the texts that were scored; that other folds would have given other classifiers is not in
    them.

    Attributes:
        auc: of all features together.
        parts: of the words, the length and the zlib ratio alone.
        warning: one line, empty if nothing separates the sets.
    """

    auc: Interval
    parts: dict[str, Interval]
    warning: str


def shift_baseline(
    members: Sequence[str], others: Sequence[str], folds: int = FOLDS, resamples: int = 1000, seed: int = 0
) -> Baseline:
    """AUC of a cross-validated naive Bayes on words, length and zlib ratio, with bootstrap intervals.

    Words are a multinomial with one pseudo-count, ln of the characters and the zlib ratio a normal distribution for
    each kind; log-odds add up. Copies of a text are in one fold, so that none is recognised by itself. Parts of one
    document are not kept together: what they share is a shift that an attack sees as well.

    Raises:
        UsageError: there are fewer than 10 distinct texts of a kind, or fewer than two folds.
    """
    if folds < 2 or min(len(set(members)), len(set(others))) < MIN_TEXTS:
        raise UsageError(f"the baseline without a model needs two folds, and {MIN_TEXTS} distinct texts of each kind")
    parts = held_out_scores(members, others, folds, seed)
    count = len(members)
    intervals = {name: auc_interval(scores[:count], scores[count:], resamples, seed) for name, scores in parts.items()}
    together = sum(parts.values(), np.zeros(count + len(others)))
    whole = auc_interval(together[:count], together[count:], resamples, seed)
    return Baseline(whole, intervals, _warning({"text": whole, **intervals}))


def held_out_scores(
    members: Sequence[str], others: Sequence[str], folds: int = FOLDS, seed: int = 0
) -> dict[str, np.ndarray]:
    """Log-odds of membership of each text, members first, by classifiers trained without its fold."""
    texts = [*members, *others]
    member = np.arange(len(texts)) < len(members)
    fold = _folds(members, others, folds, seed)
    bag = _Bag(texts)
    numbers = {
        "length": np.log1p([len(text) for text in texts]),
        "zlib ratio": np.array([zlib_ratio(text) for text in texts]),
    }
    scores = {name: np.zeros(len(texts)) for name in ("words", *numbers)}
    for left_out in range(folds):
        seen, test = fold != left_out, fold == left_out
        scores["words"][test] = bag.log_odds(seen & member, seen & ~member)[test]
        for name, values in numbers.items():
            scores[name][test] = _normal_log_odds(values, seen & member, seen & ~member)[test]
    return scores


class _Bag:
    """How often each word is in each text, in coordinates."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        documents = Counter(word for count in counts for word in count)
        known = {word: at for at, word in enumerate(w for w, n in documents.items() if n >= MIN_DOCUMENTS)}
        triples = [(row, known[w], n) for row, count in enumerate(counts) for w, n in count.items() if w in known]
        self.rows, self.columns, self.counts = np.array(triples, np.int64).reshape(-1, 3).T
        self.texts, self.words = len(texts), len(known)

    def log_odds(self, members: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Of every text, Σ count·(ln θ_member − ln θ_other); θ from the texts chosen, with one pseudo-count."""
        weights = self._log_shares(members) - self._log_shares(others)
        return np.bincount(self.rows, self.counts * weights[self.columns], self.texts)

    def _log_shares(self, chosen: np.ndarray) -> np.ndarray:
        totals = np.bincount(self.columns, self.counts * chosen[self.rows], self.words) + 1.0
        shares: np.ndarray = np.log(totals) - np.log(totals.sum())
        return shares


def _normal_log_odds(values: np.ndarray, members: np.ndarray, others: np.ndarray) -> np.ndarray:
    return _normal(values, values[members]) - _normal(values, values[others])


def _normal(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """ln of the normal density fitted to ``seen``, without the constant."""
    variance = seen.var() + VARIANCE_FLOOR
    density: np.ndarray = -0.5 * ((values - seen.mean()) ** 2 / variance + np.log(variance))
    return density


def _folds(members: Sequence[str], others: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """The fold of each text: each kind spread evenly, copies of a text together."""
    generator = np.random.default_rng(seed)
    fold: dict[str, int] = {}
    for texts in (members, others):
        fresh = [text for text in dict.fromkeys(texts) if text not in fold]
        order = generator.permutation(len(fresh)).tolist()
        fold.update((fresh[at], place % folds) for place, at in enumerate(order))
    return np.array([fold[text] for text in (*members, *others)])


def _warning(intervals: dict[str, Interval]) -> str:
    name, worst = max(intervals.items(), key=lambda item: item[1].low)
    if worst.low <= WARN_ABOVE:
        return ""
    means = "" if name == "text" else f" by its {name}"
    return (
        f"text alone{means} tells members from non-members without any model: AUC {worst.value:.2f} "
        f"({worst.low:.2f} to {worst.high:.2f}), so an attack's AUC may be the difference of the texts"
    )
