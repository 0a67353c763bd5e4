"""Learning-rate schedules: plain functions of the step."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "constant")


def learning_rate(step: int, peak: float, steps: int, warmup: int, schedule: str, final_ratio: float) -> float:
    """The rate of a step, the first being 1.

    Linear warm-up reaches ``peak`` at step ``warmup``; after it ``cosine`` falls to ``final_ratio * peak`` at the last
    step (Loshchilov & Hutter, arXiv:1608.03983, without restarts) and ``constant`` stays.
    """
    if step <= warmup:
        return peak * step / max(1, warmup)
    if schedule == "constant":
        return peak
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * share)))
