"""What a restart does to adapters and to the optimizer's state, for both engines."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engines.errors import UnsupportedError

PRUNINGS = ("magnitude", "random", "reset")
RESETS = ("fresh", "direction", "keep")


def pruned(array: np.ndarray, how: str, ratio: float, generator: np.random.Generator) -> np.ndarray:
    """A copy with entries set to zero (ReLoRA, arXiv:2307.05695, section 3).

    ``magnitude`` zeroes exactly the ``ratio`` smallest, so that ties cost no more than their share; ``random`` zeroes
    each with probability ``ratio``; ``reset`` zeroes all.

    Raises:
        UnsupportedError: ``how`` is none of them.
    """
    kept = array.copy()
    match how:
        case "reset":
            kept[...] = 0
        case "random":
            kept[generator.random(array.shape) < ratio] = 0
        case "magnitude":
            count = int(ratio * array.size)
            if count:
                kept.reshape(-1)[np.argpartition(np.abs(array).reshape(-1), count - 1)[:count]] = 0
        case _:
            raise UnsupportedError(f"pruning {how[:40]!r} is not there: choose {', '.join(PRUNINGS)}")
    return kept


def pruned_state(
    arrays: Mapping[str, np.ndarray], moments: tuple[str, str], how: str, ratio: float, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """The optimizer's state of one parameter, each array pruned by itself.

    A first moment m is zero as well where its second one v is. Left alone, it would make a step of m / epsilon, since
    after a restart B is zero and the gradient of A is, too: v stays zero while m does not.

    Args:
        moments: the names of m and v, if the state has them.
    """
    kept = {name: pruned(array, how, ratio, generator) for name, array in arrays.items()}
    first, second = (kept.get(name) for name in moments)
    if first is not None and second is not None:
        first[second == 0] = 0
    return kept


def check_reset(reset: str, rank: int) -> None:
    """Whether adapters of this rank can be reset so.

    Raises:
        UnsupportedError: they cannot.
    """
    if reset not in RESETS or (reset == "direction" and rank != 1):
        raise UnsupportedError(f"reset {reset[:40]!r} is not there for rank {rank}: choose {', '.join(RESETS)}")
