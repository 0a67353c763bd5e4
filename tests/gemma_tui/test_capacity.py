"""Capacity sweeps: the arithmetic of bits, the course of a cell, sweeps that are broken off, resumed and added to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.base import Engine
from engines.errors import EngineError
from engines.networks import NetworkShape
from gemma_tui.errors import UsageError
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.capacity import sweep as sweeping
from gemma_tui.studies.capacity.measures import expected_bits, memorised_bits, plateau, summary
from gemma_tui.studies.capacity.plan import CapacityPlan, MoreCells, cells_of, with_preset
from gemma_tui.studies.capacity.results import Sweep, read_sweep, sweep_figure
from gemma_tui.studies.capacity.sweep import (
    FLAT,
    LEARNED,
    Course,
    evaluate,
    record_capacity,
    resume_capacity,
    stacks,
    strings_of,
)
from gemma_tui.studies.events import Control, Event

Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]

TINY = CapacityPlan(
    width="8", heads=1, vocab=16, length=4, sizes="4,8,30", steps=24, batch_size=8, evaluate_every=6, learning_rate=0.03
)
WORDS = ("--width", "8", "--heads", "1", "--vocab", "16", "--length", "4", "--steps", "12", "--batch-size", "8")


def done(recorded: Any) -> list[Event]:
    events = list(recorded.events)
    assert events[-1].values["status"] == "done"
    return events


def cells(found: Sweep) -> dict[str, dict[str, Any]]:
    """What is kept of each cell, but how long it took."""
    return {name: {k: v for k, v in cell.items() if k != "seconds"} for name, cell in found.cells.items()}


def test_a_uniform_network_holds_nothing_and_a_perfect_one_everything() -> None:
    n, s, v = 10, 64, 2048
    none = memorised_bits(np.full(n, (s - 1) * math.log(v)), v, s)
    assert none.strict == pytest.approx(0, abs=1e-9)
    assert none.paper == pytest.approx(0, abs=1e-9)
    every = memorised_bits(np.zeros(n), v, s)
    assert every.strict == pytest.approx(n * 63 * 11)
    assert every.paper == pytest.approx(n * 64 * 11) == n * 704


@pytest.mark.parametrize(("length", "percent"), [(4, 4.28), (8, 1.83), (16, 0.86), (32, 0.41)])
def test_the_papers_count_explains_its_reliability_table(length: int, percent: float) -> None:
    """A network that knows all strings still cannot tell the second token where several begin alike."""
    n, v = 4096, 2048
    rng, ambiguous = np.random.default_rng(0), []
    for _ in range(20):
        starts = Counter(rng.integers(0, v, n).tolist())
        ambiguous.append(sum(k * math.log(k) for k in starts.values()) / n)
    losses = np.full(n, np.mean(ambiguous))
    error = 1 - memorised_bits(losses, v, length).paper / (n * length * math.log2(v))
    assert 100 * error == pytest.approx(percent, abs=0.02)


def test_the_plateau_is_the_largest_mean_with_its_interval() -> None:
    found = plateau([10, 10, 20, 20, 40, 40], [5.0, 7.0, 9.0, 11.0, 8.0, 8.0])
    assert (found.sequences, found.bits) == (20, 10.0)
    assert found.half == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2)), "Student's t with one degree"
    assert summary(3, [4.0]).half is None


def test_what_is_expected_is_the_data_or_the_capacity() -> None:
    assert expected_bits(10, 64, 2048, 80_352, 3.6) == 7040
    assert expected_bits(10_000, 64, 2048, 80_352, 3.6) == pytest.approx(3.6 * 80_352)


def test_cells_of_one_shape_and_batch_are_trained_together() -> None:
    plan = replace(TINY, width="8,16", seeds=2)
    every = cells_of(plan)
    assert len(every) == 2 * 3 * 2
    found = stacks(every, plan)
    assert sorted(c.name for stack in found for c in stack) == sorted(c.name for c in every)
    for stack in found:
        assert len({(c.shape, min(plan.batch_size, c.sequences)) for c in stack}) == 1
    assert {len(stack) for stack in found} == {2, 4}


def test_no_stack_is_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "MOST_NETWORKS", 3)
    assert [len(stack) for stack in stacks(cells_of(replace(TINY, sizes="8", seeds=7)), TINY)] == [3, 3, 1]
    monkeypatch.setattr(sweeping, "STACK_BYTES", 4 * cells_of(TINY)[0].shape.parameter_count())
    assert [len(stack) for stack in stacks(cells_of(replace(TINY, sizes="8", seeds=2)), TINY)] == [1, 1]


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    plan = replace(TINY, steps=100, warmup=0.1, cooldown=0.4, learning_rate=1.0)
    course = Course.of(cells_of(plan)[0])
    rates = [course.rate(step, plan) for step in range(101)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert set(rates[9:61]) == {1.0}
    assert rates[80] == pytest.approx(0.5)
    assert rates[100] == 0
    assert not course.ended(99, plan)
    assert course.ended(100, plan)


@pytest.mark.parametrize(("cooldown", "rates"), [(0.0, [1, 1, 1, 1, 0]), (1.0, [1, 0.75, 0.5, 0.25, 0])])
def test_the_rate_may_fall_at_once_or_never(
    torch_engine: Engine, store: RunStore, cooldown: float, rates: list[float]
) -> None:
    plan = replace(TINY, sizes="4", steps=4, warmup=0.0, cooldown=cooldown, learning_rate=1.0, evaluate_every=1)
    course = Course.of(cells_of(plan)[0])
    assert [course.rate(step, plan) for step in range(5)] == pytest.approx(rates)
    done(record_capacity(torch_engine, replace(plan, learning_rate=0.01), Control(), store))


def test_the_rate_falls_sooner_where_bits_grow_no_more() -> None:
    plan = replace(TINY, steps=1000, warmup=0.01, cooldown=0.5, learning_rate=1.0, flat=0.01)
    course = Course.of(cells_of(plan)[0])
    for step, bits in enumerate((10, 11, 12, 12.05, 12.06, 12.06, 12.06), 1):
        course.observe(100 * step - 50, bits, plan)
    assert course.falling is None
    course.observe(420, 12.07, plan)
    assert (course.falling, course.why) == (420, FLAT)
    assert course.rate(419, plan) == 1.0
    assert course.rate(630, plan) == pytest.approx(0.5)
    assert course.end(plan) == 840


def test_an_epoch_has_every_string_once_and_hangs_on_the_seed_alone() -> None:
    cell = cells_of(replace(TINY, sizes="30"))[0]
    first, second = Course.of(cell), Course.of(cell)
    seen = np.concatenate([first.batch(step, 10) for step in range(3)])
    assert sorted(map(tuple, seen)) == sorted(map(tuple, first.strings))
    assert second.batch(4, 10).tolist() == first.batch(4, 10).tolist() != first.batch(1, 10).tolist()


def test_fewer_strings_are_the_first_of_more() -> None:
    assert strings_of(50, 6, 4, 3).tolist() == strings_of(50, 6, 9, 3)[:4].tolist()
    assert strings_of(50, 6, 4, 3).tolist() != strings_of(50, 6, 4, 4).tolist()


def test_sets_of_different_sizes_are_scored_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "SCORED", 4)
    shape = NetworkShape("gpt2", 1, 8, 1, 16, 4)
    stack, alone = engine.networks(shape, (1, 2), sweeping.training_of(TINY)), []
    sets = [strings_of(16, 4, 3, 0), strings_of(16, 4, 10, 1)]
    for i, strings in enumerate(sets):
        one = engine.networks(shape, (i + 1,), sweeping.training_of(TINY))
        alone.append(one.losses(strings[None])[0])
    for found, expected in zip(evaluate(stack, sets), alone, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_sweep_tells_what_every_cell_holds(engine: Engine, store: RunStore) -> None:
    recorded = record_capacity(engine, replace(TINY, seeds=2), Control(), store)
    done(recorded)
    found = read_sweep(store, recorded.run)
    assert len(found.cells) == 6
    for name, cell in found.cells.items():
        assert cell["steps"] == 24
        assert cell["bits"] == pytest.approx(found.traces[name][1][-1])
        assert cell["bits_paper"] == pytest.approx(cell["bits"] * 4 / 3)
        strict = cell["sequences"] * 3 * 4
        assert cell["bits"] == pytest.approx(strict - cell["loss"] * cell["sequences"] * 3 / math.log(2))
        assert cell["bits"] <= strict
    assert found.cells["1x8 N=4 seed 0"]["bits"] > 0.5 * 48
    assert found.cells["1x8 N=4 seed 0"]["held_out_loss"] > math.log(16)
    assert store.run(recorded.run.run_id).step == 6
    figure = sweep_figure(found)
    assert any("the largest of several means" in note for note in figure.notes)
    model, every = figure.tables
    assert model.rows[0][2] == 30 or model.rows[0][2] == 8
    assert [row[1] for row in every.rows] == ["done"] * 6
    held = figure.charts[0].series
    assert [line.label for line in held][:4] == ["1x8", "1x8 plateau", "1x8 - 95 %", "1x8 + 95 %"]
    assert (list(held[1].x), list(held[1].y)) == ([4 * 16, 30 * 16], [max(held[0].y)] * 2), "of its smallest to largest"
    assert not any(chart.log_x for chart in figure.charts), "4 to 30 strings, 6 to 24 steps"
    descent = next(chart for chart in figure.charts if chart.title.startswith("held-out"))
    assert list(descent.series[0].x) == sorted({c["data_bits"] / (3.6 * c["parameters"]) for c in found.cells.values()})
    of_four = [c["held_out_loss"] for c in found.cells.values() if c["sequences"] == 4]
    assert descent.series[0].y[0] == pytest.approx(np.mean(of_four) / math.log(2))
    assert list(descent.series[-1].x) == [1.0, 1.0]
    assert not list(recorded.run.folder.glob("stack*"))


def test_a_cell_that_knows_its_data_is_done_early(torch_engine: Engine, store: RunStore) -> None:
    recorded = record_capacity(torch_engine, replace(TINY, sizes="2", steps=2000, batch_size=2), Control(), store)
    done(recorded)
    (cell,) = read_sweep(store, recorded.run).cells.values()
    assert cell["why"] == LEARNED
    assert cell["steps"] < 2000
    assert cell["bits"] >= 0.9995 * 2 * 3 * 4


def test_axes_that_span_a_decade_are_logarithmic() -> None:
    wide, long = replace(TINY, sizes="4,40"), replace(TINY, steps=60)
    assert [chart.log_x for chart in sweep_figure(Sweep(wide)).charts] == [True, False, False, True]
    assert [chart.log_x for chart in sweep_figure(Sweep(long)).charts] == [False, True, True, False]
    expected = sweep_figure(Sweep(wide)).charts[0].series[-1]
    assert (min(expected.x), max(expected.x)) == (4 * 16, 40 * 16)


def test_a_cell_tells_how_long_it_still_takes(
    torch_engine: Engine, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, evaluated, control = [0.0], sweeping.evaluate, Control()

    def slow(*arguments: Any) -> Any:
        clock[0] += 12  # an evaluation after six steps
        return evaluated(*arguments)

    monkeypatch.setattr(sweeping, "evaluate", slow)
    monkeypatch.setattr(sweeping, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    recorded = record_capacity(torch_engine, replace(TINY, sizes="8,30"), control, store)
    for event in recorded.events:
        if event.kind == sweeping.TRACE:
            states = [row[:3] for row in sweep_figure(read_sweep(store, recorded.run)).tables[1].rows]
            assert states == [("1x8 N=8 seed 0", "training", 36.0), ("1x8 N=30 seed 0", "training", 36.0)]
            control.stop.set()
    states = [row[:3] for row in sweep_figure(read_sweep(store, recorded.run)).tables[1].rows]
    assert states == [("1x8 N=8 seed 0", "stopped", None), ("1x8 N=30 seed 0", "stopped", None)]


def test_seconds_are_those_of_work_alone_before_a_break_and_after(
    torch_engine: Engine, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, evaluated, control = [0.0], sweeping.evaluate, Control()

    def slow(*arguments: Any) -> Any:
        clock[0] += 12
        return evaluated(*arguments)

    monkeypatch.setattr(sweeping, "evaluate", slow)
    monkeypatch.setattr(sweeping, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    recorded = record_capacity(torch_engine, replace(TINY, sizes="30"), control, store)
    left = []
    for event in recorded.events:
        if event.kind == sweeping.TRACE:
            (cell,) = event.values["cells"].values()
            left.append(cell[-1])
            (control.pause if len(left) == 1 else control.stop).set()
        elif event.kind == "pause":
            clock[0] += 1000
            control.pause.clear()
    assert left == [36.0, 24.0], "12 s for six of 24 steps, with and without a pause"
    clock[0] += 1000
    done(resume_capacity(torch_engine, store.run(recorded.run.run_id), Control(), store))
    (found,) = read_sweep(store, recorded.run).cells.values()
    assert found["seconds"] == 5 * 12, "an evaluation of each six steps, and of the strings held out"


def stopped_and_resumed(engine: Engine, plan: CapacityPlan, store: RunStore, after: int) -> Sweep:
    control = Control()
    recorded = record_capacity(engine, plan, control, store)
    for number, _ in enumerate(recorded.events):
        if number >= after:
            control.stop.set()
    assert store.run(recorded.run.run_id).state == "stopped"
    before = set(read_sweep(store, recorded.run).cells)
    again = resume_capacity(engine, store.run(recorded.run.run_id), Control(), store)
    trained = {event.values["name"] for event in done(again) if event.kind == "cell"}
    assert not trained & before
    return read_sweep(store, store.run(recorded.run.run_id))


@pytest.mark.parametrize("after", [2, 3, 4, 5])
def test_a_sweep_that_was_stopped_ends_as_if_it_had_not_been(engine: Engine, store: RunStore, after: int) -> None:
    plan = replace(TINY, seeds=2, steps=18)
    whole = record_capacity(engine, plan, Control(), store)
    done(whole)
    expected = read_sweep(store, whole.run)
    found = stopped_and_resumed(engine, plan, store, after)
    assert cells(found) == cells(expected)
    assert found.traces == expected.traces


def test_a_sweep_that_was_killed_goes_on_from_its_last_save(
    torch_engine: Engine, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = record_capacity(torch_engine, TINY, Control(), store)
    done(whole)
    monkeypatch.setattr(sweeping, "SAVE_SECONDS", 0.0)
    killed = record_capacity(torch_engine, TINY, Control(), store)
    for number, _ in enumerate(killed.events):
        if number == 3:
            break
    killed.events.close()  # as a kill between two saves: nothing is saved on the way out
    again = resume_capacity(torch_engine, store.run(killed.run.run_id), Control(), store)
    done(again)
    assert cells(read_sweep(store, store.run(killed.run.run_id))) == cells(read_sweep(store, whole.run))


def test_cells_are_added_to_a_sweep(torch_engine: Engine, store: RunStore) -> None:
    recorded = record_capacity(torch_engine, TINY, Control(), store)
    done(recorded)
    before = cells(read_sweep(store, recorded.run))
    name = recorded.run.run_id
    more = resume_capacity(torch_engine, store.run(name), Control(), store, MoreCells(name, "5", 2))
    assert sum(event.kind == "cell" for event in done(more)) == 5
    run = store.run(recorded.run.run_id)
    assert (run.step, run.steps, run.plan["seeds"]) == (8, 8, 2)
    after = cells(read_sweep(store, run))
    assert {name: after[name] for name in before} == before
    assert "--seeds 2" in run.command
    with pytest.raises(UsageError, match="all of its 8 cells"):
        resume_capacity(torch_engine, run, Control(), store)
    with pytest.raises(UsageError, match="has 2 already"):
        resume_capacity(torch_engine, run, Control(), store, MoreCells(name, seeds=1))
    with pytest.raises(UsageError, match="adds nothing: give --sizes"):
        resume_capacity(torch_engine, run, Control(), store, MoreCells(name))
    with pytest.raises(UsageError, match="all of its 8 cells"):
        resume_capacity(torch_engine, run, Control(), store, MoreCells(name, "4,30", 2))


def test_a_sweep_stays_on_its_engine(both_engines: tuple[Engine, Engine], store: RunStore) -> None:
    torch, mlx = both_engines
    control = Control()
    control.stop.set()
    recorded = record_capacity(torch, TINY, control, store)
    list(recorded.events)
    with pytest.raises(UsageError, match="--engine torch"):
        resume_capacity(mlx, store.run(recorded.run.run_id), Control(), store)


def test_both_engines_hold_nearly_the_same(both_engines: tuple[Engine, Engine], store: RunStore) -> None:
    held = []
    for engine in both_engines:
        recorded = record_capacity(engine, replace(TINY, sizes="30"), Control(), store)
        done(recorded)
        held.append(read_sweep(store, recorded.run).cells["1x8 N=30 seed 0"]["bits"])
    assert held[0] == pytest.approx(held[1], rel=0.01)


def test_presets_are_plans(torch_engine: Engine) -> None:
    for name in ("quick", "smallest"):
        plan = CapacityPlan(**with_preset(name, {"seeds": 3}))
        assert plan.seeds == 3
        assert cells_of(plan)
    with pytest.raises(UsageError, match="quick"):
        with_preset("huge", {})


def test_the_command_tells_and_writes_it(command: Commands, tmp_path: Path) -> None:
    target = tmp_path / "sweep.csv"
    code, rows, _ = command("capacity", "sweep", "--sizes", "4,8", *WORDS, "--csv", str(target), "--json")
    assert code == 0
    assert rows[-1] == {"kind": "end", "status": "done", "run": "capacity-1"}
    assert {row["name"] for row in rows if row["kind"] == "cell" and "name" in row} == {
        "1x8 N=4 seed 0", "1x8 N=8 seed 0",
    }  # fmt: skip
    assert "1x8 N=8 seed 0" in target.read_text()
    code, rows, _ = command("capacity", "show", "capacity-1", "--json")
    assert code == 0
    written = target.read_text()
    target.unlink()
    assert command("runs", "show", "capacity-1", "--csv", str(target))[0] == 0
    assert target.read_text() == written
    assert any(row["kind"] == "model" and row["model"] == "1x8" for row in rows)
    assert command("runs", "list")[0] == command("runs", "show", "capacity-1")[0] == 0
    code, rows, _ = command("capacity", "sweep", "--add", "capacity-1", "--sizes", "6", "--json")
    assert code == 0
    assert [row["name"] for row in rows if row["kind"] == "cell" and "name" in row] == ["1x8 N=6 seed 0"]
    code, _, error = command("capacity", "sweep", "--add", "capacity-1", "--json")
    assert (code, error.count("\n")) == (2, 1)
    assert "adds nothing: give --sizes" in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sizes", "4,x"), "'x' is no whole number"),
        (("--sizes", "0"), "not from 1"),
        (("--sizes", ""), "no whole number"),
        (("--width", "9", "--heads", "2"), "no multiple of 2 heads"),
        (("--arch", "llama"), "gpt2 | gemma3"),
        (("--preset", "huge"), "quick | smallest"),
        (("--sizes", "4", "--seeds", "1000", "--width", "8,16,24,32,40,48,56,64,72,80,88"), "11,000 cells"),
        (("--sizes", "9000000", "--length", "4096", "--width", "16384", "--vocab", "65536"), "fewer strings"),
        (("--add", "capacity-1", "--sizes", "4"), "capacity-1"),
        (("--add", "capacity-1", "--steps", "4"), "--sizes and --seeds alone"),
    ],
)
def test_bad_grids_are_refused_before_anything_starts(
    command: Commands, store: RunStore, words: tuple[str, ...], said: str
) -> None:
    code, rows, error = command("capacity", "sweep", *words, "--json")
    assert code in (1, 2)
    assert said in error
    assert error.count("\n") == 1
    assert rows[-1]["status"] == "failed"
    assert not store.runs()


def test_a_grid_that_does_not_fit_the_disk_is_refused(
    torch_engine: Engine, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(EngineError, match=r"needs [0-9.]+ [KM]B of disk, and 10 B are free"):
        record_capacity(torch_engine, TINY, Control(), store)
