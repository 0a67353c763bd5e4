from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gemma_tui.studies.schedules import SCHEDULES, learning_rate
from gemma_tui.studies.training_plan import TrainingPlan


def rates(schedule: str, steps: int = 100, warmup: int = 10, final: float = 0.1) -> list[float]:
    return [learning_rate(step, 2.0, steps, warmup, schedule, final) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    assert rates(schedule)[:10] == pytest.approx([2.0 * step / 10 for step in range(1, 11)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_rate_never_exceeds_the_peak_nor_starts_at_zero(schedule: str) -> None:
    first, *rest = rates(schedule, warmup=0)
    assert 1.98 < first <= 2.0
    assert max(rest) <= first


def test_constant_stays_at_the_peak() -> None:
    assert set(rates("constant")[9:]) == {2.0}


def test_cosine_ends_at_its_share_of_the_peak_and_is_halfway_in_the_middle() -> None:
    found = rates("cosine")
    assert found[-1] == pytest.approx(0.2)
    assert found[54] == pytest.approx((2.0 + 0.2) / 2)
    assert found[31] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * 22 / 90)) / 2)


@given(st.integers(1, 300), st.integers(0, 400), st.floats(0, 1), st.sampled_from(SCHEDULES))
def test_a_rate_is_within_zero_and_the_peak_and_only_falls_after_the_warm_up(
    steps: int, warmup: int, final: float, schedule: str
) -> None:
    found = rates(schedule, steps, warmup, final)
    assert all(0 <= rate <= 2.0 + 1e-12 for rate in found)
    after = found[max(0, warmup - 1) :]
    assert all(b <= a + 1e-12 for a, b in pairwise(after))


# A warm-up as long as ReLoRA's 100 steps between restarts would meet the restart, where the rate is zero.
@given(st.integers(1, 3000), st.integers(0, 99), st.integers(1, 200), st.sampled_from(SCHEDULES))
@example(2, 3, 1, "cosine")
@example(100, 99, 1, "jagged")
def test_the_rates_of_a_plan_are_those_of_its_steps_with_both_ends_and_the_peak(
    steps: int, warmup: int, points: int, schedule: str
) -> None:
    plan = TrainingPlan(method="relora", steps=steps, warmup=warmup, schedule=schedule, learning_rate=2.0)
    found, rates = plan.rates(points)
    assert rates == [plan.rate(step) for step in found]
    assert len(found) <= points + 1
    assert found[0] == 1
    assert points == 1 or found[-1] == steps
    assert found == sorted(set(found))
    assert max(rates) == max(map(plan.rate, range(1, steps + 1)))
