"""Scores that tell members of the training data from other texts, all presented as "higher = member".

They use what one teacher-forced pass says of each predicted token, in nats: ``log_probs`` is ln p(x_i | x_<i), and
"mean" is over the predicted tokens, n of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from gemma_tui.errors import UsageError

SHARE = 0.2
"""Min-K % takes this share of the tokens, as the published code does."""

MIN_ERRORS = 2
"""EZ-MIA needs as many wrong predictions."""

TINY_DEVIATION = 1e-12
"""Keeps Min-K %++ finite where a distribution is one-hot or uniform: 0 at its mean, instead of 0/0."""

HIGHER, LOWER = "higher = member", "lower = member"


@dataclass(frozen=True)
class Evidence:
    """What the attacks need of one sequence. Arrays have one entry per predicted token, ``<bos>`` not among them.

    Attributes:
        text: as it was tokenised; zlib compresses its UTF-8.
        log_probs: ln p of the token that is there, nats.
        means: Σ_v p_v ln p_v, the mean of ln p under p.
        deviations: standard deviation of ln p under p.
        best: whether the token is the most probable one.
        reference: ``log_probs`` of a model that was not trained on the text.
        conditional: ``log_probs`` after a prefix of texts that are no members.

    Raises:
        UsageError: the arrays do not fit together, are empty, or not finite.
    """

    text: str
    log_probs: np.ndarray
    means: np.ndarray
    deviations: np.ndarray
    best: np.ndarray
    reference: np.ndarray | None = None
    conditional: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Refuse what would give a NaN later."""
        tokens = self.log_probs.shape
        if len(tokens) != 1 or not tokens[0]:
            raise UsageError("the sequence has no predicted token: give one of at least one token after <bos>")
        for name in ("log_probs", "means", "deviations", "best", "reference", "conditional"):
            values = getattr(self, name)
            if values is None:
                continue
            if values.shape != tokens:
                raise UsageError(f"{name} has shape {values.shape}, not {tokens}: give one value per predicted token")
            if not np.isfinite(values).all():
                raise UsageError(f"{name} has values that are not finite: check the model's logits")


Score = Callable[[Evidence], float]


@dataclass(frozen=True)
class Attack:
    """A score with where it comes from and which way it points.

    Attributes:
        name: as it is typed.
        label: as it is shown.
        formula: of what ``score`` returns.
        source: paper, and the code whose numbers it equals up to the sign.
        convention: which way the published code points.
        score: higher = member.
        needs: the optional field of ``Evidence`` that it uses, if any.
        note: where it departs from the published code.
    """

    name: str
    label: str
    formula: str
    source: str
    convention: str
    score: Score
    needs: str = ""
    note: str = ""

    def lacks(self, evidence: Evidence) -> str | None:
        """Why the score cannot be had of this evidence; None if it can."""
        if not self.needs or getattr(evidence, self.needs) is not None:
            return None
        return f"{self.label} needs {LACKING[self.needs]}"


LACKING = {
    "reference": "a reference model: give the base of a tuned model, or another one",
    "conditional": "a prefix of texts that are no members: give some",
}


def loss(evidence: Evidence) -> float:
    """Mean ln p, nats per token: minus the loss (Yeom et al., arXiv:1709.01604)."""
    return _mean(evidence.log_probs)


def zlib_ratio_loss(evidence: Evidence) -> float:
    """Mean ln p over the bytes of the text compressed by zlib (Carlini et al., arXiv:2012.07805)."""
    return loss(evidence) / len(zlib.compress(evidence.text.encode("utf-8", "surrogatepass")))


def min_k(evidence: Evidence, share: float = SHARE) -> float:
    """Mean of the int(n·share) lowest ln p, of at least one (Shi et al., arXiv:2310.16789)."""
    return _lowest_mean(evidence.log_probs, share)


def min_k_plus(evidence: Evidence, share: float = SHARE) -> float:
    """As ``min_k``, of (ln p − μ)/σ, the mean and deviation of ln p under p (Zhang et al., arXiv:2404.02936)."""
    deviations = np.maximum(evidence.deviations.astype(np.float64), TINY_DEVIATION)
    return _lowest_mean((evidence.log_probs.astype(np.float64) - evidence.means) / deviations, share)


def reference(evidence: Evidence) -> float:
    """Mean of ln p − ln p_reference, nats per token (Carlini et al., arXiv:2012.07805).

    Raises:
        UsageError: there is no reference.
    """
    return _mean(_shifts(evidence))


def recall(evidence: Evidence) -> float:
    """Mean ln p after a prefix of non-members over mean ln p without (ReCaLL, Xie et al., arXiv:2406.15968).

    The prefix costs members more. 1 if both are certain; infinite if only the prefix makes the text uncertain.

    Raises:
        UsageError: there are no conditional log-probabilities.
    """
    if evidence.conditional is None:
        raise UsageError(f"ReCaLL needs {LACKING['conditional']}")
    alone, after = loss(evidence), _mean(evidence.conditional)
    if alone == 0:
        return 1.0 if after == 0 else np.inf
    return after / alone


def error_zone(evidence: Evidence) -> float:
    """Σ positive Δ / Σ |negative Δ| where the prediction is wrong, Δ = ln p − ln p_reference (arXiv:2601.12104).

    As the published code: the first predicted token is left out, and the score is 0 with fewer than two wrong
    predictions or without a negative Δ. So the surest members get the lowest score.

    Raises:
        UsageError: there is no reference.
    """
    # One wrong prediction is either up or down, and 0 in both cases.
    up, down = _up_and_down(_shifts(evidence)[1:][~evidence.best[1:]])
    return up / down if down else 0.0


def error_zone_repaired(evidence: Evidence) -> float:
    """``error_zone`` with a place for the surest members.

    - With a negative Δ: up/(up + down), in [0, 1), in the order of the published ratio.
    - Without, but with a positive one: 1 + m/(1 + m), m the mean Δ; above all others, in order of the rise.
    - Without either (no Δ, or all 0): 1/2, which says nothing.
    - With fewer than two wrong predictions: of all predictions but the first instead.

    Raises:
        UsageError: there is no reference.
    """
    shifts, wrong = _shifts(evidence)[1:], ~evidence.best[1:]
    if wrong.sum() >= MIN_ERRORS:
        shifts = shifts[wrong]
    up, down = _up_and_down(shifts)
    if down > 0:
        return up / (up + down)
    mean = up / max(1, len(shifts))
    return 1.0 + mean / (1.0 + mean) if up > 0 else 0.5


def attacks(share: float = SHARE) -> tuple[Attack, ...]:
    """All scores; ``share`` of the tokens is what Min-K % and Min-K %++ take.

    Raises:
        UsageError: ``share`` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise UsageError(f"the share of Min-K % is {share:g}: give one above 0 and at most 1")
    k, short = f"{100 * share:g} %", "texts with int(n·k) = 0 use one token; the published code gives NaN"
    flat = "a deviation of 0 is taken as 1e-12; the published code divides by 0"
    ratio, shift = "Σ positive Δ / Σ |negative Δ| at wrong predictions", "Δ = ln p − ln p_ref"
    repaired = "no negative Δ ranks highest, by the mean Δ; fewer than 2 wrong predictions: all tokens but the first"
    carlini, ez = "Carlini et al. 2021, arXiv:2012.07805; mimir", "EZ-MIA, arXiv:2601.12104; ez-mia"
    return (
        Attack("loss", "LOSS", "mean ln p", "Yeom et al. 2018, arXiv:1709.01604; mimir, mink++", LOWER, loss),
        Attack("zlib", "zlib", "mean ln p / zlib bytes", f"{carlini}, mink++", LOWER, zlib_ratio_loss),
        Attack(
            "min-k", "Min-K %", f"mean of the lowest {k} of ln p", "Shi et al. 2023, arXiv:2310.16789; mimir, mink++",
            LOWER, partial(min_k, share=share), note=short,
        ),
        Attack(
            "min-k++", "Min-K %++", f"mean of the lowest {k} of (ln p − μ)/σ",
            "Zhang et al. 2024, arXiv:2404.02936; mink++, mimir", HIGHER, partial(min_k_plus, share=share),
            note=f"{short}; {flat}",
        ),
        Attack("reference", "reference", "mean (ln p − ln p_ref)", carlini, LOWER, reference, "reference"),
        Attack(
            "recall", "ReCaLL", "mean ln p after a non-member prefix / mean ln p",
            "Xie et al. 2024, arXiv:2406.15968; mimir (its sign: minus the ratio)", HIGHER, recall, "conditional",
        ),
        Attack(
            "ez", "EZ-MIA", f"{ratio}, {shift}", ez, HIGHER, error_zone, "reference",
            "as published: 0 without a negative Δ or with fewer than 2 wrong predictions",
        ),
        Attack(
            "ez-repaired", "EZ-MIA repaired", f"up/(up + down) of {ratio}, {shift}", f"after {ez}", HIGHER,
            error_zone_repaired, "reference", repaired,
        ),
    )  # fmt: skip


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64))


def _lowest_mean(values: np.ndarray, share: float) -> float:
    return _mean(np.sort(values)[: max(1, int(len(values) * share))])


def _shifts(evidence: Evidence) -> np.ndarray:
    if evidence.reference is None:
        raise UsageError(f"the score needs {LACKING['reference']}")
    shifts: np.ndarray = evidence.log_probs.astype(np.float64) - evidence.reference
    return shifts


def _up_and_down(shifts: np.ndarray) -> tuple[float, float]:
    return float(shifts[shifts > 0].sum()), float(-shifts[shifts < 0].sum())
