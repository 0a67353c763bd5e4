"""What forward passes cost on this machine, measured, beside what the roofline says of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engines.base import Engine, Sampling
from engines.blocks import BlockDecoding
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config
from engines.peak import Peak
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.studies.plan import option
from gemma_tui.studies.roofline import (
    CORRECTED,
    FORMS,
    H100,
    PAPER,
    PRINTED,
    Machine,
    gain,
    shape_of,
    slowdown,
    speed_up,
)

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
FEWER = 4.0
"""Times fewer passes that speed-ups are told for, as in the paper's table 4."""

PASSES = 12
"""Passes that are timed at most, and tokens that are written at least, so that a width is seen several times."""

LONG_CACHE = 65_536
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class RooflinePlan:
    """What is timed; every field is an option of ``gemma-tui roofline``."""

    cached: int = option(256, "tokens in the cache when passes are timed", unit="tokens", low=1, high=131_072)
    batch_size: int = option(1, "rows side by side", low=1, high=4096)
    rounds: int = option(3, "times that every width is timed; the fastest pass counts", low=1, high=1000)
    seed: int = option(0, "seed of the tokens in the cache", low=0, high=2**31)


@dataclass
class PassTimes:
    """What was measured so far.

    Attributes:
        peak: what the device does at best, in ``dtype``.
        fastest: seconds of the fastest pass of each width; a width that was not seen is not there.
    """

    plan: RooflinePlan
    config: Gemma3Config
    device: str
    dtype: str
    peak: Peak
    fastest: dict[int, float]


def time_passes(engine: Engine, plan: RooflinePlan, found: list[PassTimes]) -> Iterator[float]:
    """Time passes of every width on the loaded model; yields the share done. ``found`` gets the one result at once.

    A pass is timed as decoding makes it: the tokens of a block that is open after its first pass, against a cache that
    holds the text before it. The head is computed for what is open, which is all but the first few of them.

    Raises:
        UnsupportedError: no model is loaded.
        UsageError: the cache and the widest block are longer than the model's context.
    """
    info = engine.model()
    if info is None:
        raise UnsupportedError("no model is loaded: load one first")
    context, widest = info.config.max_position_embeddings, WIDTHS[-1]
    if plan.cached + widest > context:
        raise UsageError(
            f"cached: {plan.cached:,} tokens and a block of {widest} are more than the context of {context:,}: lower "
            "--cached"
        )
    device = engine.device()
    times = PassTimes(plan, info.config, f"{device.engine} on {device.device}", info.dtype, engine.peak(info.dtype), {})
    found.append(times)
    ids = np.random.default_rng(plan.seed).integers(0, info.config.vocab_size, (plan.batch_size, plan.cached))
    for turn in range(plan.rounds):
        for number, width in enumerate(WIDTHS, 1):
            seen = _timed(engine, ids.tolist(), width)
            if seen:
                times.fastest[width] = min(times.fastest.get(width, seen[0]), *seen)
            yield (turn + number / len(WIDTHS)) / plan.rounds


def _timed(engine: Engine, prompts: list[list[int]], width: int) -> list[float]:
    """Seconds of the passes of one width; that of the prompt, and those that read a block before, are wider."""
    times, began = [], time.perf_counter()
    for said in engine.decode(prompts, Sampling(max(PASSES, width)), BlockDecoding(width, gamma=0.0)):
        now = time.perf_counter()
        if said.width == width:
            times.append(now - began)
        if len(times) == PASSES:
            break
        began = time.perf_counter()
    return times


def roofline_figure(times: PassTimes) -> Figure:
    """Measured passes beside both forms of the roofline, for this machine and this model, and the paper's own."""
    plan, peak = times.plan, times.peak
    machine = Machine(peak.flops, peak.flops, peak.bandwidth)
    shape = shape_of(times.config, ITEM_BYTES[times.dtype])
    measured = {width: seconds / times.fastest[1] for width, seconds in times.fastest.items()}
    predicted = {
        form: {k: slowdown(machine, shape, k, plan.cached, plan.batch_size, form) for k in WIDTHS} for form in FORMS
    }
    lines = [Series("measured", list(measured), list(measured.values()))]
    lines += [Series(form, list(line), list(line.values())) for form, line in predicted.items()]
    rows = [
        (k, None if k not in times.fastest else 1000 * times.fastest[k], measured.get(k), predicted[CORRECTED][k],
         predicted[PRINTED][k])
        for k in WIDTHS
    ]  # fmt: skip
    blocks = [k for k in WIDTHS if k >= 2 * FEWER and 2 * k <= WIDTHS[-1]]
    gains = [
        (k, _measured_gain(times, k), *(
            speed_up(machine, shape, k, FEWER, plan.cached, plan.batch_size, form) for form in (CORRECTED, PRINTED)
        ))
        for k in blocks
    ]  # fmt: skip
    paper = [
        (
            k,
            *(
                slowdown(H100, PAPER, k, cached, 1, form)
                for cached in (16, LONG_CACHE)
                for form in (CORRECTED, PRINTED)
            ),
        )
        for k in WIDTHS
    ]
    notes = [
        f"{times.device}, {times.dtype}: {peak.flops / 1e9:,.1f} GFLOP/s in a product of matrices, "
        f"{peak.bandwidth / 1e9:,.1f} GB/s in a copy; passes with {plan.cached:,} tokens in the cache, "
        f"{plan.batch_size:,} side by side, the fastest of {plan.rounds:,} rounds",
        "corrected: the roofline of arXiv:2509.04185 with the model's true shapes, its windows and its head; printed: "
        "as in the paper's listing, whose MLP is hidden times too wide and whose keys are too narrow",
        f"speed-up: of blocks that take {FEWER:g} times fewer passes, over next-token decoding",
        f"H100: the paper's machine and layer, with 16 and {LONG_CACHE:,} cached tokens, corrected and printed",
    ]
    tables = [
        Table("pass", ("tokens", "ms", "measured", CORRECTED, PRINTED), rows),
        Table("speed_up", ("block", "measured", CORRECTED, PRINTED), gains),
        Table("h100", ("tokens", "16", "16 printed", "65536", "65536 printed"), paper),
    ]
    charts = [LineChart("time of a pass, in those of one token", lines, "tokens in the pass")]
    facts = {"plan": dict(vars(plan)), "device": times.device, "dtype": times.dtype, **vars(peak)}
    arrays = {"widths": np.array(list(times.fastest)), "seconds": np.array(list(times.fastest.values()))}
    return Figure("roofline of decoding in blocks", notes, charts=charts, tables=tables, arrays=arrays, facts=facts)


def _measured_gain(times: PassTimes, block: int) -> float | None:
    one, double, rest = (times.fastest.get(width) for width in (1, 2 * block, block))
    if one is None or double is None or rest is None:
        return None
    return gain(block, FEWER, one, double, rest)
