"""How memorising goes with training: where it stops to grow, and until when the model generalises better."""

from __future__ import annotations

from collections.abc import Sequence

SMALL = 0.01
"""The share of the largest that growth from one checkpoint to the next falls under where memorising is over."""


def settled(steps: Sequence[int], bits: Sequence[float]) -> int | None:
    """The first step after which no checkpoint adds as much as ``SMALL`` of the largest bits.

    None while the last one still does, or where there are no two.
    """
    if len(steps) < 2 or max(bits) <= 0:
        return None
    least = SMALL * max(bits)
    grown = [i for i in range(1, len(steps)) if bits[i] - bits[i - 1] >= least]
    last = grown[-1] if grown else 0
    return None if last == len(steps) - 1 else steps[last]


def best(steps: Sequence[int], losses: Sequence[float]) -> int:
    """The first step of the lowest held-out loss."""
    return steps[min(range(len(steps)), key=lambda i: losses[i])]


def told(steps: Sequence[int], bits: Sequence[float], held_out: Sequence[float] | None) -> list[str]:
    """Sentences for a person, with the rules they follow.

    Args:
        bits: of the training set, at each step.
        held_out: the held-out loss at each, nats per token.
    """
    if len(steps) < 2:
        return ["one checkpoint tells nothing of growth: train with --keep N and --save-every M"]
    end = settled(steps, bits)
    if max(bits) <= 0:
        found = ["nothing is memorised at any checkpoint"]
    elif end is None:
        found = [f"memorising goes on at step {steps[-1]}: the last checkpoint adds {SMALL:.0%} of the bits or more"]
    else:
        found = [f"memorising is over at step {end}: no later checkpoint adds {SMALL:.0%} of the most bits"]
    if held_out is not None:
        low = best(steps, held_out)
        found.append(
            f"the held-out loss still falls at step {low}, the last"
            if low == steps[-1]
            else f"the held-out loss is lowest at step {low}: what is learned after it does not generalise"
        )
    return found
