"""The roofline against the paper's tables 3 and 4 (arXiv:2509.04185), and what is timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engines.base import DeviceInfo, Engine, ModelInfo
from engines.gemma3 import Gemma3Config, Quantization
from engines.peak import Peak
from gemma_tui.errors import UsageError
from gemma_tui.studies import pass_times
from gemma_tui.studies.pass_times import WIDTHS, PassTimes, RooflinePlan, roofline_figure, time_passes
from gemma_tui.studies.roofline import (
    CORRECTED,
    H100,
    PAPER,
    PRINTED,
    Machine,
    seconds,
    shape_of,
    slowdown,
    speed_up,
)

PLACES = 5e-4
"""The tables have three decimals."""


@pytest.mark.parametrize(
    ("batch", "widths", "expected"),
    [
        (1, WIDTHS, [1, 1.000, 1.001, 1.002, 1.004, 1.008, 1.015]),
        (8, (16, 32, 64), [1.029, 1.060, 1.903]),
        (16, (16, 32, 64), [1.058, 1.899, 3.799]),
    ],
)
def test_the_printed_listing_gives_the_papers_slowdowns(
    batch: int, widths: tuple[int, ...], expected: list[float]
) -> None:
    found = [slowdown(H100, PAPER, k, 16, batch, PRINTED) for k in widths]
    assert found == pytest.approx(expected, abs=PLACES)


@pytest.mark.parametrize(
    ("batch", "cached", "form", "expected"),
    [
        (1, 16, PRINTED, [3.989, 3.982, 3.966, 3.936]),
        (8, 16, PRINTED, [3.916, 3.857, 3.431, 1.978]),
        (1, 65536, CORRECTED, [3.989, 3.982, 3.783, 2.743]),
    ],
)
def test_both_forms_give_the_known_speed_ups(batch: int, cached: int, form: str, expected: list[float]) -> None:
    found = [speed_up(H100, PAPER, k, 4, cached, batch, form) for k in (8, 16, 32, 64)]
    assert found == pytest.approx(expected, abs=PLACES)


def test_with_the_true_shapes_a_long_cache_slows_long_blocks() -> None:
    assert slowdown(H100, PAPER, 64, 65536) == pytest.approx(1.406, abs=PLACES)
    assert slowdown(H100, PAPER, 64, 65536, form=PRINTED) == pytest.approx(1.016, abs=PLACES)


def test_packed_weights_move_fewer_bytes(four_to_one: Gemma3Config) -> None:
    """What 4 bits and a bias and a scale of 16 bits for 64 of them take."""
    wide = replace(four_to_one, hidden_size=256, intermediate_size=512)
    machine, plain = Machine(1e30, 1e30, 1.0), seconds(Machine(1e30, 1e30, 1.0), shape_of(wide, 2), 1, 1)
    packed = seconds(machine, shape_of(replace(wide, quantization=Quantization(4)), 2), 1, 1)
    assert packed / plain == pytest.approx((4 / 8 + 2 * 2 / 64) / 2, rel=0.05)


def test_a_gemma_has_windows_three_matrices_and_a_head(four_to_one: Gemma3Config) -> None:
    shape = shape_of(four_to_one, 4)
    # Where only traffic counts, a pass of one token takes the bytes of all matrices and keys, and some activations.
    machine = Machine(1e30, 1e30, 1.0)
    weights = four_to_one.parameter_count() - sum(
        int(np.prod(s)) for name, s in four_to_one.parameter_shapes().items() if "norm" in name
    )
    window, kv = four_to_one.sliding_window, 2 * four_to_one.num_key_value_heads * four_to_one.head_dim
    keys = kv * sum(window if w else 1000 for w in shape.windows)
    moved = seconds(machine, shape, 1, 1000) / 4
    assert 0 < moved - weights - keys < 0.1 * weights
    # Where only arithmetic counts, it is two operations for each weight, and attention.
    slow = Machine(1.0, 1e30, 1e30)
    assert seconds(slow, shape, 3, 1000, batch=2) == pytest.approx(6 * 2 * weights)
    assert len(shape.windows) == four_to_one.num_hidden_layers


class Clocked:
    """An engine whose passes take as many seconds as a list says, by a clock of its own."""

    def __init__(self, config: Gemma3Config) -> None:
        self.config, self.now = config, 0.0

    def model(self) -> ModelInfo:
        return ModelInfo("", self.config, "float32", 1)

    def device(self) -> DeviceInfo:
        return DeviceInfo("torch", "cpu", "0", ("float32",), 0)

    def peak(self, dtype: str) -> Peak:
        return Peak(1e9, 1e9)

    def decode(self, prompts: Any, sampling: Any, blocks: Any) -> Iterator[Any]:
        class Said:
            width = blocks.block

        for number in range(sampling.max_tokens):
            # The first reads the prompt; every third one is of the width of a first pass; one is slow.
            Said.width = blocks.block + (0 if number % 3 else blocks.block)
            self.now += 0.001 if number == 0 or number % 3 == 0 else blocks.block + (number == 1)
            yield Said


def test_passes_of_their_own_width_are_timed_and_the_fastest_counts(
    four_to_one: Gemma3Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, found = Clocked(four_to_one), list[PassTimes]()
    monkeypatch.setattr(pass_times.time, "perf_counter", lambda: engine.now)
    shares = list(time_passes(engine, RooflinePlan(rounds=2), found))  # type: ignore[arg-type]
    assert found[0].fastest == pytest.approx({width: width for width in WIDTHS})
    assert shares == sorted(shares)
    assert shares[-1] == 1
    rows = {table.kind: table.rows for table in roofline_figure(found[0]).tables}
    assert [row[2] for row in rows["pass"]] == pytest.approx(list(WIDTHS))
    # A pass of 2k takes 2k, and there are k/4 of them: k / (2k + (k/4 - 1) k).
    assert [row[1] for row in rows["speed_up"]] == pytest.approx([1 / (2 + k / 4 - 1) for k in (8, 16, 32)])


def test_every_width_is_timed_on_a_model(engine: Engine, prepared_model: Any) -> None:
    engine.load(prepared_model)
    found: list[PassTimes] = []
    list(time_passes(engine, RooflinePlan(cached=20, batch_size=2, rounds=1), found))
    assert list(found[0].fastest) == list(WIDTHS)


def test_a_cache_longer_than_the_context_is_refused(torch_engine: Engine, prepared_model: Any) -> None:
    torch_engine.load(prepared_model)
    with pytest.raises(UsageError, match="cached"):
        list(time_passes(torch_engine, RooflinePlan(cached=193), []))
