"""Learning-rate schedules: plain functions of the step, as shares of the peak."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "jagged", "linear", "constant")


def learning_rate(step: int, peak: float, steps: int, warmup: int, schedule: str, final_ratio: float) -> float:
    """The rate of a step, the first being 1.

    Linear warm-up reaches ``peak`` at step ``warmup``; after it ``cosine`` falls to ``final_ratio * peak`` at the last
    step (Loshchilov & Hutter, arXiv:1608.03983, without restarts), ``linear`` falls as far in a line, and ``constant``
    stays.
    """
    if step <= warmup:
        return peak * step / max(1, warmup)
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - (1 - final_ratio) * share)
        case _:
            return peak * cosine(share, final_ratio)


def jagged(step: int, steps: int, warmup: int, restart_every: int, restart_warmup: int, final_ratio: float) -> float:
    """ReLoRA's cosine with restarts (arXiv:2307.05695, section 3), as a share of the peak.

    Every ``restart_every`` steps the rate is 0, and it rises in ``restart_warmup`` steps to where the cosine is then.
    """
    if step < warmup:
        return step / max(1, warmup)
    place = step % restart_every
    if place < restart_warmup and step >= restart_every:
        end = step - place + restart_warmup
        return place / restart_warmup * cosine((end - warmup) / max(1, steps - warmup), final_ratio)
    return cosine((step - warmup) / max(1, steps - warmup), final_ratio)


def cosine(share: float, final_ratio: float) -> float:
    """Half a cosine from 1 at share 0 to ``final_ratio`` at share 1."""
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * share))
