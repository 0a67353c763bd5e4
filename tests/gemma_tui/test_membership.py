"""Membership scores against the published formulas on fixed logits; AUC against counting pairs; the text baseline."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tui.errors import UsageError
from gemma_tui.studies.memorization import membership, roc
from gemma_tui.studies.memorization.membership import HIGHER, LOWER, Evidence, attacks
from gemma_tui.studies.memorization.shift import held_out_scores, shift_baseline

TEXT = "the model saw this sentence, and this sentence again"
SHARES = (0.1, 0.2, 0.29, 0.5, 1.0)


def logits_of(tokens: int, seed: int, vocabulary: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    return logits, torch.randint(vocabulary, (tokens,), generator=generator)


def gathered(logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].numpy()


def evidence_of(tokens: int, seed: int = 0) -> Evidence:
    logits, targets = logits_of(tokens, seed)
    p, log_p = logits.softmax(-1), logits.log_softmax(-1)
    mean = (p * log_p).sum(-1)
    deviation = (p * (log_p - mean[:, None]) ** 2).sum(-1).sqrt()
    others = [gathered(logits_of(tokens, seed + extra)[0], targets) for extra in (100, 200)]
    best = (logits.argmax(-1) == targets).numpy()
    return Evidence(TEXT, gathered(logits, targets), mean.numpy(), deviation.numpy(), best, *others)


def made(shifts: list[float], best: list[bool]) -> Evidence:
    log_probs = np.full(len(shifts), -1.0)
    ones = np.ones(len(shifts))
    return Evidence(TEXT, log_probs, -ones, ones, np.array(best), log_probs - np.array(shifts))


def scores(evidence: Evidence, share: float = 0.2) -> dict[str, float]:
    return {attack.name: attack.score(evidence) for attack in attacks(share)}


@pytest.mark.parametrize("tokens", [10, 37, 64])
@pytest.mark.parametrize("share", SHARES)
def test_scores_equal_mimir_with_its_sign_turned(tokens: int, share: float) -> None:
    """mimir: lower = member; LOSS is the mean negative ln p, the rest as its attacks take it from lists of ln p."""
    evidence = evidence_of(tokens)
    listed = evidence.log_probs.tolist()
    mimir_loss = -sum(listed) / tokens
    lowest = sorted(listed)[: int(tokens * share)]
    reference_loss = -sum(evidence.reference.tolist()) / tokens  # type: ignore[union-attr]
    conditional_ll = sum(evidence.conditional.tolist()) / tokens  # type: ignore[union-attr]
    mimir = {
        "loss": mimir_loss,
        "zlib": mimir_loss / len(zlib.compress(bytes(TEXT, "utf-8"))),
        "min-k": -sum(lowest) / len(lowest),
        "reference": mimir_loss - reference_loss,
        "recall": conditional_ll / mimir_loss,
    }
    found = scores(evidence, share)
    assert {name: -found[name] for name in mimir} == pytest.approx(mimir, abs=1e-9)


@pytest.mark.parametrize("share", SHARES)
def test_scores_equal_mink_plus_plus(share: float) -> None:
    """mink++: higher = member, with the variance as E[(ln p)²] − (E[ln p])²."""
    evidence = evidence_of(37)
    logits, targets = logits_of(37, 0)
    p, log_p = logits.softmax(-1), logits.log_softmax(-1)
    mu = (p * log_p).sum(-1)
    sigma = ((p * log_p.square()).sum(-1) - mu.square()).sqrt()
    token = log_p.gather(-1, targets[:, None])[:, 0]
    count = int(37 * share)
    found = scores(evidence, share)
    assert found["min-k++"] == pytest.approx(float(((token - mu) / sigma).sort()[0][:count].mean()), abs=1e-9)
    assert found["min-k"] == pytest.approx(float(token.sort()[0][:count].mean()), abs=1e-9)
    assert found["loss"] == pytest.approx(float(token.mean()), abs=1e-9)
    assert found["zlib"] == pytest.approx(float(token.mean()) / len(zlib.compress(TEXT.encode())), abs=1e-9)


def test_short_texts_use_their_least_likely_token() -> None:
    evidence = evidence_of(4)
    assert int(4 * 0.2) == 0, "the published code takes the mean of nothing"
    assert membership.min_k(evidence) == evidence.log_probs.min()
    assert membership.min_k_plus(evidence) == pytest.approx(
        ((evidence.log_probs - evidence.means) / evidence.deviations).min(), abs=1e-12
    )
    assert all(math.isfinite(score) for score in scores(evidence_of(1)).values())


def test_ties_and_flat_distributions_are_finite() -> None:
    uniform = np.full(10, -math.log(16))
    flat = Evidence(TEXT, uniform, uniform, np.zeros(10), np.zeros(10, bool))
    assert membership.min_k_plus(flat) == 0
    assert membership.min_k(flat) == pytest.approx(-math.log(16), abs=1e-12)
    certain = Evidence(TEXT, np.zeros(10), np.zeros(10), np.zeros(10), np.ones(10, bool), None, np.zeros(10))
    assert (membership.min_k_plus(certain), membership.recall(certain)) == (0, 1)


def test_published_error_zone_counts_wrong_predictions_but_the_first() -> None:
    shifts, best = [9.0, 2.0, -1.0, 5.0, -3.0, 0.0], [False, False, False, True, False, False]
    # Without the first and the right one: up 2, down 1 + 3.
    assert membership.error_zone(made(shifts, best)) == pytest.approx(2 / 4, abs=1e-12)
    assert membership.error_zone_repaired(made(shifts, best)) == pytest.approx(2 / 6, abs=1e-12)


def test_repaired_error_zone_ranks_the_surest_members_highest() -> None:
    wrong = [False] * 5
    surer, sure = made([0.0, 2.0, 2.0, 2.0, 2.0], wrong), made([0.0, 1.0, 1.0, 0.0, 1.0], wrong)
    likely, unlikely = made([0.0, 9.0, 9.0, 9.0, -0.1], wrong), made([0.0, 1.0, -3.0, 1.0, -4.0], wrong)
    order = [surer, sure, likely, unlikely]
    assert [membership.error_zone(evidence) for evidence in order[:2]] == [0, 0], "the published score's quirk"
    repaired = [membership.error_zone_repaired(evidence) for evidence in order]
    assert repaired == sorted(repaired, reverse=True)
    assert len(set(repaired)) == 4
    assert membership.error_zone_repaired(made([0.0] * 5, wrong)) == 0.5
    few = made([0.0, 2.0, 1.0, -1.0, 5.0], [False, True, True, False, True])
    assert membership.error_zone(few) == 0
    assert membership.error_zone_repaired(few) == pytest.approx(8 / 9, abs=1e-12)


def test_repaired_error_zone_keeps_the_published_order() -> None:
    cases = [evidence_of(40, seed) for seed in range(30)]
    published = [membership.error_zone(evidence) for evidence in cases]
    assert min(published) > 0
    assert np.array_equal(np.argsort(published), np.argsort([membership.error_zone_repaired(case) for case in cases]))


def test_every_attack_says_where_it_comes_from_and_what_it_lacks() -> None:
    bare = Evidence(TEXT, np.full(3, -1.0), np.full(3, -2.0), np.ones(3), np.zeros(3, bool))
    for attack in attacks():
        assert attack.convention in (HIGHER, LOWER)
        assert "arXiv:" in attack.source
        assert (attack.lacks(bare) is None) == (attack.needs == "")
        assert attack.lacks(evidence_of(5)) is None
        if attack.needs:
            with pytest.raises(UsageError, match="needs"):
                attack.score(bare)
    with pytest.raises(UsageError, match="share"):
        attacks(0)


def test_evidence_that_does_not_fit_is_refused() -> None:
    three, flags = np.full(3, -1.0), np.zeros(3, bool)
    with pytest.raises(UsageError, match="no predicted token"):
        Evidence(TEXT, np.array([]), np.array([]), np.array([]), np.array([], bool))
    with pytest.raises(UsageError, match=r"reference has shape \(2,\)"):
        Evidence(TEXT, three, three, three, flags, np.zeros(2))
    with pytest.raises(UsageError, match="not finite"):
        Evidence(TEXT, np.array([-1, np.nan, -1]), three, three, flags)


def pairs_auc(members: np.ndarray, others: np.ndarray) -> float:
    return float(np.mean([(m > o) + (m == o) / 2 for m in members for o in others]))


@settings(max_examples=50)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=15), st.lists(st.integers(0, 6), min_size=1, max_size=15))
def test_auc_counts_pairs_and_is_the_area_under_the_curve(mine: list[int], theirs: list[int]) -> None:
    members, others = np.array(mine, float), np.array(theirs, float)
    expected = pairs_auc(members, others)
    assert roc.auc(members, others) == pytest.approx(expected, abs=1e-12)
    curve = roc.roc_curve(members, others)
    assert np.trapezoid(curve.true_positives, curve.false_positives) == pytest.approx(expected, abs=1e-12)
    for at, threshold in enumerate(curve.thresholds):
        assert curve.true_positives[at] == np.mean(members >= threshold)
        assert curve.false_positives[at] == np.mean(others >= threshold)
    thresholds = [math.inf, *set(mine + theirs)]
    accuracy = max((np.mean(members >= t) + np.mean(others < t)) / 2 for t in thresholds)
    assert roc.best_balanced_accuracy(curve).value == pytest.approx(accuracy, abs=1e-12)
    found = roc.best_f1(curve, len(mine), len(theirs))
    f1 = [2 * sum(members >= t) / (sum(members >= t) + sum(others >= t) + len(mine)) for t in thresholds]
    assert found.value == pytest.approx(max(f1), abs=1e-12)
    assert f1[thresholds.index(found.threshold)] == pytest.approx(max(f1), abs=1e-12)


def test_interval_is_that_of_texts_drawn_again() -> None:
    generator = np.random.default_rng(3)
    members, others = generator.normal(0.8, 1, 60).round(1), generator.normal(0, 1, 90).round(1)
    found = roc.auc_interval(members, others, 4000, seed=1)
    drawn = [pairs_auc_fast(generator.choice(members, 60), generator.choice(others, 90)) for _ in range(4000)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)
    assert found.low < found.value < found.high
    assert found == roc.auc_interval(members, others, 4000, seed=1)
    assert found != roc.auc_interval(members, others, 4000, seed=2)


def pairs_auc_fast(members: np.ndarray, others: np.ndarray) -> float:
    differences = members[:, None] - others
    return float((differences > 0).mean() + (differences == 0).mean() / 2)


def test_interval_does_not_depend_on_how_much_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    members, others = np.arange(40.0), np.arange(-5.0, 30.0)
    whole = roc.auc_interval(members, others, 100)
    monkeypatch.setattr(roc, "CELLS", 500)
    parts = roc.auc_interval(members, others, 100)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=0.06)
    assert parts.value == whole.value


def test_shuffled_labels_give_one_half() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for seed in range(40):
        values = generator.permutation(np.concatenate([generator.normal(1, 1, 100), generator.normal(0, 1, 100)]))
        found = roc.auc_interval(values[:100], values[100:], 300, seed)
        inside += found.low <= 0.5 <= found.high
    assert inside >= 34, "95 % intervals hold 1/2 about 38 times of 40"


def test_rates_are_stated_only_where_non_members_suffice() -> None:
    others, members = np.arange(1000.0), np.array([989.0, 990.0, 999.5, 10.0])
    found = roc.separation(members, others, 50)
    tenth, hundredth = found.rates
    assert tenth.value is None
    assert "10,000 are needed for 0.1 %" in tenth.reason
    # At 1 %, ten others are mistaken: those from 990 on.
    assert hundredth.value == 0.5
    assert not hundredth.reason
    assert roc.separation(members, others[:999], 50).rates[1].value is None
    many = np.arange(10_000.0)
    assert roc.separation(np.array([9990.0, 9989.0]), many, 50).rates[0].value == 0.5
    assert roc.separation(np.array([5.0, 5.0]), np.full(1000, 5.0), 50).rates[1].value == 0, "ties are mistaken"


def test_scores_that_are_not_there_are_refused() -> None:
    with pytest.raises(UsageError, match="non-members"):
        roc.separation(np.ones(3), np.array([]))
    with pytest.raises(UsageError, match="not numbers"):
        roc.auc(np.array([np.nan]), np.ones(2))


WORDS = [f"w{number}" for number in range(60)]


def sentences(count: int, seed: int, extra: str = "", words: int = 30) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join([*generator.choice(WORDS, words), *([extra] if extra else [])]) for _ in range(count)]


def test_baseline_is_silent_on_one_kind_of_text() -> None:
    found = [shift_baseline(sentences(60, 2 * seed), sentences(60, 2 * seed + 1), resamples=100) for seed in range(8)]
    assert np.mean([baseline.auc.value for baseline in found]) == pytest.approx(0.5, abs=0.06)
    assert sum(bool(baseline.warning) for baseline in found) <= 1


def test_baseline_does_not_warn_of_chance() -> None:
    found = [shift_baseline(sentences(20, 2 * seed), sentences(20, 2 * seed + 1), resamples=100) for seed in range(8)]
    intervals = [[baseline.auc, *baseline.parts.values()] for baseline in found]
    assert [bool(one.warning) for one in found] == [any(part.low > 0.55 for part in parts) for parts in intervals]
    chance = [one for one, parts in zip(found, intervals, strict=True) if any(part.value > 0.57 for part in parts)]
    assert any(not one.warning for one in chance), "high by chance, and the interval says so"


def test_baseline_warns_of_words_and_of_length() -> None:
    by_word = shift_baseline(sentences(40, 0, "2023"), sentences(40, 1, "2024"))
    assert by_word.parts["words"].low > 0.9
    assert by_word.warning.startswith("text alone")
    by_length = shift_baseline(sentences(40, 0), sentences(40, 1, words=40))
    assert by_length.parts["length"].value > 0.95
    assert by_length.warning
    assert by_length == shift_baseline(sentences(40, 0), sentences(40, 1, words=40)), "it is deterministic"


def test_baseline_knows_no_text_by_itself() -> None:
    """Each text has a word of its own, and a copy: only a classifier that saw the copy could tell them apart."""
    mine, theirs = ([f"{kind}{number} text" for number in range(40)] * 2 for kind in ("a", "b"))
    assert shift_baseline(mine, theirs, resamples=50).parts["words"].value == pytest.approx(0.5, abs=0.15)


def test_words_are_scored_as_the_multinomial_says() -> None:
    members, others = ["x x y", "x z", "x y"], ["y z", "z z y", "z x"]
    scored = held_out_scores(members, others, folds=3, seed=0)["words"]
    texts = [text.split() for text in members + others]
    # Of each possible pair of other texts left in, one must give the score: the fold is of one text of each kind.
    for at, text in enumerate(texts):
        options = []
        for partner in (3, 4, 5) if at < 3 else (0, 1, 2):
            left = [number for number in range(6) if number not in (at, partner)]
            counts = [
                {w: 1 + sum(texts[n].count(w) for n in left if (n < 3) == kind) for w in "xyz"}
                for kind in (True, False)
            ]
            shares = [{w: math.log(c / sum(count.values())) for w, c in count.items()} for count in counts]
            options.append(sum(shares[0][w] - shares[1][w] for w in text))
        assert min(abs(scored[at] - option) for option in options) < 1e-12


def test_baseline_needs_texts() -> None:
    with pytest.raises(UsageError, match="10 distinct texts"):
        shift_baseline(["a"] * 50, sentences(20, 0))
