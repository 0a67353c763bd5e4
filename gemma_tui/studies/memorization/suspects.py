"""Membership of a measurement: every attack that its scores support, and the baseline that has no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engines.base import TokenScores
from gemma_tui.errors import UsageError
from gemma_tui.studies.memorization.extras import Extra
from gemma_tui.studies.memorization.membership import Attack, Evidence, attacks
from gemma_tui.studies.memorization.roc import Interval, Separation, separation
from gemma_tui.studies.memorization.sequences import HELD_OUT, Sequences
from gemma_tui.studies.memorization.shift import shift_baseline
from gemma_tui.studies.turns import Window
from gemma_tui.tokenizer import Tokenizer

RECALL = "recall"
SHOTS = 5
"""Held-out sequences before a text; the published ReCaLL takes 1 to 12 (arXiv:2406.15968)."""

FEW = 30
"""Of fewer sequences of a set the interval of an AUC says little."""


def recall_extra(sequences: Sequences, context: int, seed: int) -> Extra:
    """Every sequence but some held-out ones, with these before it: what ReCaLL scores.

    Args:
        context: tokens that the model can read.

    Raises:
        UsageError: nothing is held out that could be spared, or the context is too short.
    """
    held = sequences.sets.get(HELD_OUT, range(0))
    if len(held) < 2:
        raise UsageError("recall: --recall needs two held-out sequences or more: name some with --held-out")
    longest = max(map(len, sequences.windows))
    order = [held[i] for i in np.random.default_rng([seed, 2]).permutation(len(held))]
    shots: list[int] = []
    room = context - longest
    for number in order[: min(SHOTS, len(held) // 2)]:
        if len(sequences.windows[number]) - 1 > room:
            break
        room -= len(sequences.windows[number]) - 1
        shots.append(number)
    shots.sort()
    if not shots:
        raise UsageError(f"recall: no prefix fits into the context of {context:,} tokens: lower --max-tokens")
    prefix = np.concatenate([sequences.windows[number].ids[1:] for number in shots])
    numbers = [number for number in range(len(sequences)) if number not in set(shots)]
    windows = [_after(prefix, sequences.windows[number]) for number in numbers]
    kept = Sequences(windows, np.array(numbers), sequences.trained)
    return Extra(RECALL, kept, facts={"shots": shots, "prefix_tokens": len(prefix)})


def _after(prefix: np.ndarray, window: Window) -> Window:
    ids = np.concatenate([window.ids[:1], prefix, window.ids[1:]])
    return Window(ids, np.concatenate([np.zeros(len(prefix) + 1, bool), window.supervised[1:]]))


def text_of(window: Window, tokenizer: Tokenizer) -> str:
    """What is scored of a sequence."""
    return tokenizer.decode(window.ids[window.supervised].tolist())


def evidence(
    sequences: Sequences,
    tokenizer: Tokenizer,
    target: Sequence[TokenScores],
    reference: Sequence[TokenScores] | None,
    recall: Extra | None,
    conditional: Sequence[TokenScores] | None,
) -> tuple[list[Evidence], list[Evidence]]:
    """What the attacks need of each training sequence and of each held-out one that is in no prefix."""
    after: dict[int, np.ndarray] = {}
    if recall is not None and conditional is not None:
        for number, window, scored in zip(recall.sequences.rows, recall.sequences.windows, conditional, strict=True):
            after[int(number)] = scored.log_probs[window.supervised[1:]]
    left_out = set(recall.facts["shots"]) if recall is not None else set()
    found: tuple[list[Evidence], list[Evidence]] = ([], [])
    for number, window in enumerate(sequences.windows):
        if number in left_out:
            continue
        counted, scored = window.supervised[1:], target[number]
        found[number >= sequences.trained].append(
            Evidence(
                text_of(window, tokenizer),
                scored.log_probs[counted],
                scored.means[counted],
                scored.deviations[counted],
                scored.best[counted],
                None if reference is None else reference[number].log_probs[counted],
                after.get(number),
            )
        )
    return found


def membership_steps(
    members: Sequence[Evidence], others: Sequence[Evidence], seed: int
) -> Iterator[tuple[str, dict[str, Any], Separation | None]]:
    """Each attack in turn, then ``baseline``: its name, what is told of it (JSON), and how it separates the sets."""
    for attack in attacks():
        lacking = attack.lacks(members[0]) or attack.lacks(others[0])
        if lacking:
            yield attack.name, {"label": attack.label, "lacks": lacking}, None
            continue
        mine, theirs = (np.array([attack.score(one) for one in kind]) for kind in (members, others))
        split = separation(mine, theirs, seed=seed)
        yield attack.name, _told(attack, split), split
    yield "baseline", _baseline([one.text for one in members], [one.text for one in others], seed), None


def _told(attack: Attack, split: Separation) -> dict[str, Any]:
    return {
        "label": attack.label,
        "formula": attack.formula,
        "published": attack.convention,
        "source": attack.source,
        "note": attack.note,
        "auc": _interval(split.auc),
        "rates": [{"fpr": r.false_positives, "tpr": r.value, "reason": r.reason} for r in split.rates],
        "best_f1": split.f1.value,
        "best_balanced_accuracy": split.balanced_accuracy.value,
    }


def _baseline(members: Sequence[str], others: Sequence[str], seed: int) -> dict[str, Any]:
    try:
        found = shift_baseline(members, others, seed=seed)
    except UsageError as error:
        return {"lacks": str(error)}
    parts = {"text": found.auc, **found.parts}
    return {"warning": found.warning, "parts": {name: _interval(part) for name, part in parts.items()}}


def _interval(interval: Interval) -> list[float]:
    return [interval.value, interval.low, interval.high]


def set_facts(members: Sequence[Evidence], others: Sequence[Evidence], recall: Extra | None) -> dict[str, Any]:
    """Sizes and lengths of both sets."""
    lengths = [[len(one.log_probs) for one in kind] for kind in (members, others)]
    return {
        "members": len(members),
        "others": len(others),
        "members_tokens": float(np.mean(lengths[0])),
        "others_tokens": float(np.mean(lengths[1])),
        "shots": len(recall.facts["shots"]) if recall else 0,
        "prefix_tokens": recall.facts["prefix_tokens"] if recall else 0,
    }
