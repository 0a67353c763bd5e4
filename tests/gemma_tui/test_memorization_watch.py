"""Memorised bits measured while a run trains: their numbers, what they leave alone, going on, and what is told."""

from __future__ import annotations

import csv
import math
import re
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import TEXTS, write_rows

from engines.base import Engine
from engines.training import IGNORED
from gemma_tui.errors import UsageError
from gemma_tui.hub.models import resolve
from gemma_tui.runs.comparison import Comparison
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies import events as events_module
from gemma_tui.studies.data import pack, read_splits, trained_windows, training_batches, unpacked
from gemma_tui.studies.events import Control, Event, passing
from gemma_tui.studies.memorization.history import marks
from gemma_tui.studies.memorization.sequences import read_sequences
from gemma_tui.studies.memorization.watch import FOLDER, START
from gemma_tui.studies.queueing import check
from gemma_tui.studies.recording import Recorded, record_training, resume_training
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.tokenizer import Tokenizer

Plan = Callable[..., TrainingPlan]
Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]
TIMES = ("memorization_seconds", "memorization_share")


def finished(engine: Engine, plan: TrainingPlan, store: RunStore) -> tuple[Run, list[Event]]:
    recorded = record_training(engine, plan, Control(), store)
    return recorded.run, list(recorded.events)


def losses(events: list[Event]) -> list[float]:
    return [event.values["loss"] for event in events if event.kind == "step"]


def measured(store: RunStore, run: Run) -> dict[int, dict[str, float]]:
    """By step, what was measured, without what it took."""
    rows = [row for row in store.metrics(run.run_id) if row.kind == "memorized"]
    assert len({row.step for row in rows}) == len(rows)
    return {row.step: {k: v for k, v in row.values.items() if k not in TIMES} for row in rows}


def stopped_when(recorded: Recorded, control: Control, when: Callable[[Event], bool]) -> list[Event]:
    found = []
    for event in recorded.events:
        found.append(event)
        if when(event):
            control.stop.set()
    return found


def log_likelihoods(engine: Engine, name: str, windows: list[np.ndarray]) -> np.ndarray:
    """Of whole texts, read from disk, one by one."""
    engine.load(resolve(name).folder, "float32")
    return np.array([engine.log_probs(ids[None])[0].sum(dtype=np.float64) for ids in windows])


DROPPING = {"method": "lora", "dropout": 0.3, "batch_size": 1}
MERGING = {"method": "relora", "dropout": 0.3, "warm_start": 2, "reset_every": 2, "restart_warmup": 1}


@pytest.mark.parametrize("method", [DROPPING, MERGING], ids=["lora", "relora"])
def test_measuring_changes_no_bit_of_the_training(
    engine: Engine, plan: Plan, store: RunStore, method: dict[str, Any]
) -> None:
    without = finished(engine, plan(steps=6, **method), store)[1]
    run, events = finished(engine, plan(steps=6, **method, memorization_every=2, memorization_rows=5), store)
    assert losses(events) == losses(without)
    assert list(measured(store, run)) == [0, 2, 4, 6]


@pytest.mark.parametrize("method", [DROPPING, MERGING], ids=["lora", "relora"])
@pytest.mark.parametrize("lost", [False, True], ids=["kept", "lost"])
def test_a_run_that_goes_on_has_the_same_losses_and_bits(
    engine: Engine, plan: Plan, store: RunStore, method: dict[str, Any], lost: bool
) -> None:
    chosen = plan(steps=6, **method, memorization_every=2, memorization_rows=5)
    through, events = finished(engine, chosen, store)
    control = Control()
    recorded = record_training(engine, chosen, control, store)
    begun = stopped_when(recorded, control, lambda e: (e.kind, e.step) == ("step", 3))
    if lost:
        shutil.rmtree(recorded.run.folder / FOLDER)
    again = list(resume_training(engine, store.run(recorded.run.run_id), Control(), store).events)
    assert losses([*begun, *again]) == losses(events)
    assert measured(store, recorded.run) == measured(store, through)
    shares = [e.values["memorization_share"] for e in [*begun, *again] if e.kind == "memorized" and e.step]
    assert all(0 < share < 1 for share in shares)


def test_bits_are_those_of_the_models_before_and_after(
    engine: Engine, plan: Plan, store: RunStore, corpus: Path, tokenizer: Tokenizer
) -> None:
    chosen = plan(method="full", dtype="float32", memorization_every=10, memorization_rows=0, sequence_length=64)
    run, _ = finished(engine, chosen, store)
    splits = read_splits(str(corpus), tokenizer, 64)
    trained_on = []
    for batch in islice(training_batches(splits.train, 2, seed=0), 3):
        for row, labels in zip(batch.tokens, batch.labels, strict=True):
            trained_on.append(np.append(row[:1], labels[labels != IGNORED]))
    held = [window.ids for window in splits.valid]
    before, after = (log_likelihoods(engine, name, [*trained_on, *held]) for name in ("tiny", run.run_id))
    found = measured(store, run)
    assert list(found) == [0, 3]
    gained, tokens = (after - before) / math.log(2), np.array([len(ids) - 1 for ids in (*trained_on, *held)])
    train, rest = slice(6), slice(6, None)
    parameters = next(e for e in store.events(run.run_id) if e.kind == "start").values["trainable"]
    assert found[3] == pytest.approx({
        "memorized_bits": np.maximum(gained[train], 0).sum(),
        "memorized_signed_bits": gained[train].sum(),
        "memorized_loss": -after[train].sum() / tokens[train].sum(),
        "memorized_bits_per_parameter": np.maximum(gained[train], 0).sum() / parameters,
        "memorized_signed_bits_per_parameter": gained[train].sum() / parameters,
        "held_out_bits": np.maximum(gained[rest], 0).sum(),
        "held_out_signed_bits": gained[rest].sum(),
        "held_out_loss": -after[rest].sum() / tokens[rest].sum(),
        "generalisation": (before[rest].sum() - after[rest].sum()) / -tokens[rest].sum(),
    }, rel=1e-4)  # fmt: skip
    assert found[0]["memorized_bits"] == found[0]["held_out_signed_bits"] == found[0]["generalisation"] == 0
    assert found[0]["held_out_loss"] == pytest.approx(-before[rest].sum() / tokens[rest].sum(), rel=1e-5)


def test_new_weights_are_held_against_the_uniform_code(
    engine: Engine, plan: Plan, store: RunStore, tokenizer: Tokenizer
) -> None:
    chosen = plan(method="full", fresh=True, memorization_every=3, memorization_rows=4)
    run, events = finished(engine, chosen, store)
    start = next(e.values for e in events if e.kind == "start")
    assert start["memorization_reference"] == "uniform code"
    assert (start["memorization_train"], start["memorization_held_out"]) == (4, 4)
    sequences = read_sequences(run.folder / FOLDER)
    tokens = sum(len(window) - 1 for window in sequences.windows[: sequences.trained])
    for row in measured(store, run).values():
        spent = row["memorized_loss"] * tokens / math.log(2)
        assert row["memorized_signed_bits"] == pytest.approx(tokens * math.log2(tokenizer.size) - spent)
    assert measured(store, run)[0]["generalisation"] == 0


def test_the_seed_draws_the_sequences(torch_engine: Engine, plan: Plan, store: RunStore) -> None:
    found = []
    for seed in (1, 1, 2):
        chosen = plan(memorization_every=5, memorization_rows=3, seed=seed, steps=1, batch_size=16)
        sequences = read_sequences(finished(torch_engine, chosen, store)[0].folder / FOLDER)
        assert (sequences.trained, len(sequences)) == (3, 6)
        found.append([window.ids.tobytes() for window in sequences.windows])
    assert found[0] == found[1] != found[2]


def test_without_validation_rows_only_training_bits_are_told(
    torch_engine: Engine, plan: Plan, store: RunStore, tmp_path: Path
) -> None:
    folder = tmp_path / "same"
    folder.mkdir()
    for name in ("train", "valid"):
        write_rows(folder / f"{name}.jsonl", TEXTS[:3])
    run, events = finished(torch_engine, plan(data=str(folder), memorization_every=2), store)
    assert any("without held-out ones" in e.values.get("text", "") for e in events if e.kind == "warning")
    assert not {key for row in measured(store, run).values() for key in row if "held_out" in key}


def test_windows_that_the_run_does_not_come_to_are_not_measured(corpus: Path, tokenizer: Tokenizer) -> None:
    windows = read_splits(str(corpus), tokenizer, 32).train
    for size, count in ((2, 3), (3, 9), (3, 50), (1000, 1)):
        seen = {window.ids.tobytes() for window in trained_windows(windows, size, 5, count)}
        batches = islice(training_batches(windows, size, 5), count)
        rows = {
            np.append(r[:1], lab[lab != IGNORED]).tobytes()
            for b in batches
            for r, lab in zip(b.tokens, b.labels, strict=True)
        }
        assert seen == rows


def test_what_was_packed_comes_apart_again(corpus: Path, tokenizer: Tokenizer) -> None:
    windows = read_splits(str(corpus), tokenizer, 32).train
    apart = [window for packed in pack(windows, 128, 0) for window in unpacked(packed)]
    assert sorted(w.ids.tobytes() for w in apart) == sorted(w.ids.tobytes() for w in windows)
    assert all(window.segments is None and window.supervised[1:].all() for window in apart)


def test_a_measurement_tells_how_far_it_is_and_stops_between_batches(
    engine: Engine, plan: Plan, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "PACE_SECONDS", 0.0)
    chosen, control = plan(memorization_every=2, memorization_rows=2, evaluate_every=0), Control()
    recorded = record_training(engine, chosen, control, store)
    events = stopped_when(recorded, control, lambda e: (e.kind, e.step, e.values.get("done")) == ("measuring", 2, 1))
    told = [e for e in events if e.kind == "measuring"]
    assert [passing(e).split(",")[0] for e in told] == [f"measuring {n}/2" for n in (0, 1, 2, 0, 1)]
    assert [e.kind for e in events[-2:]] == ["checkpoint", "end"]
    assert list(measured(store, recorded.run)) == [0]
    assert "measuring" not in {row.kind for row in store.events(recorded.run.run_id)}
    list(resume_training(engine, store.run(recorded.run.run_id), Control(), store).events)
    assert list(measured(store, recorded.run)) == [0, 3]


def test_a_stop_before_the_reference_is_whole_leaves_none(engine: Engine, plan: Plan, store: RunStore) -> None:
    control = Control()
    recorded = record_training(engine, plan(memorization_every=2, memorization_rows=4), control, store)
    stopped_when(recorded, control, lambda e: e.kind == "measuring")
    assert measured(store, recorded.run) == {}
    assert not (recorded.run.folder / FOLDER / START).exists()
    list(resume_training(engine, store.run(recorded.run.run_id), Control(), store).events)
    assert list(measured(store, recorded.run)) == [0, 2, 3]


def test_an_early_end_is_measured_too(torch_engine: Engine, plan: Plan, store: RunStore) -> None:
    chosen = plan(steps=50, learning_rate=0.0, patience=2, evaluate_every=1, memorization_every=40, memorization_rows=2)
    run, _ = finished(torch_engine, chosen, store)
    assert list(measured(store, run)) == [0, 3]


def test_rows_without_measurements_are_refused(plan: Plan) -> None:
    check(plan(memorization_every=1, memorization_rows=3))
    with pytest.raises(UsageError, match="memorization_rows: nothing is measured without --memorization-every"):
        check(plan(memorization_rows=3))


def test_the_command_line_and_the_store_tell_of_it(
    tiny: str, corpus: Path, command: Commands, spoken: Callable[..., tuple[int, str, str]], tmp_path: Path,
    store: RunStore,
) -> None:  # fmt: skip
    options = ["--model", tiny, "--data", str(corpus), "--steps", "3", "--batch-size", "2", "--sequence-length", "32"]
    options += ["--memorization-every", "2", "--memorization-rows", "3", "--engine", "torch", "--learning-rate", "0.01"]
    code, out, err = spoken("train", *options)
    assert (code, err) == (0, "")
    assert "memorised bits of 3 sequences that are trained on and 3 held-out ones, against the model at step 0" in out
    assert out.count("       memorised bits ") == 3
    assert "memorising goes on at step 3: the last measurement adds 1%" in out
    _, shown, _ = spoken("runs", "show", "lora-1")
    assert re.search(r"step +bits +signed +per trained +held-out bits +loss +decrease", shown)
    assert "memorising goes on at step 3" in shown
    _, rows, _ = command("runs", "show", "lora-1")
    assert [row["step"] for row in rows if row["kind"] == "memorized"] == [0, 2, 3]
    path = tmp_path / "run.csv"
    command("runs", "export", "lora-1", "--format", "csv", "--output", str(path))
    with path.open() as file:
        bits = [(row["step"], float(row["metric.memorized_bits"])) for row in csv.DictReader(file)
                if row["kind"] == "memorized"]  # fmt: skip
    assert [step for step, _ in bits] == ["0", "2", "3"]
    assert bits[0][1] == 0 < bits[2][1]
    comparison = Comparison([store.run("lora-1")])
    comparison.read_all(store)
    assert "memorized_bits" in comparison.measures()
    assert comparison.runs[0].result(1).memorized_bits == bits[2][1]
    _, x, y, _ = comparison.lines("memorized_bits", "tokens", 1)[0]
    assert x[0] == 0
    assert y.tolist() == [value for _, value in bits]


def test_a_chart_marks_where_memorising_is_over_and_where_the_held_out_loss_is_lowest() -> None:
    steps = [0, 10, 20, 30, 40]
    assert marks(steps, [0, 5, 9, 9, 9.01], [4, 3, 2, 2.5, 3]) == (20, 20)
    assert marks(steps, [0, 5, 9, 10, 12], [4, 3, 2, 1, 0.5]) == (None, None)
    assert marks(steps, [0, 5, 9, math.nan, 9], []) == (20, None)
    assert marks([0], [0], [4]) == (None, None)
    assert marks([0], [math.nan], [math.nan]) == (None, None)
