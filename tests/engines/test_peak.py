"""What a device does at best."""

from __future__ import annotations

import numpy as np
import pytest

from engines import peak as probe
from engines.base import Engine
from engines.errors import UnsupportedError


def test_the_fastest_of_several_repetitions_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now, left = 0.0, [9.0, 0.5, 0.25, 0.5, 9.0, 4.0, 2.0, 4.0]

    def run() -> None:
        nonlocal now
        now += left.pop(0)

    monkeypatch.setattr(probe.time, "perf_counter", lambda: now)
    # The first of each warms up and counts for nothing.
    found = probe.peak(10, run, run)
    assert found.flops == 2 * 10**3 / 0.25
    assert found.bandwidth == 2 * probe.COPIED / 2.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_numbers_are_seen(engine: Engine, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SECONDS", 0.0)
    monkeypatch.setitem(probe.SIDE, "cpu", 64)
    found = engine.peak(dtype)
    assert np.isfinite([found.flops, found.bandwidth]).all()
    assert min(found.flops, found.bandwidth) > 1e6


def test_another_dtype_is_refused(engine: Engine) -> None:
    with pytest.raises(UnsupportedError, match="float16"):
        engine.peak("float16")
