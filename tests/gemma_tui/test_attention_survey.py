"""Heads over many texts: intervals by their formula, going on after a break, and the checkpoints of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.base import Engine
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.attention.heads import METRICS, head_metrics
from gemma_tui.studies.attention.reading import read_tokens
from gemma_tui.studies.attention.survey import (
    HeadStudyPlan,
    read_study,
    record_heads,
    resume_heads,
    study_figure,
)
from gemma_tui.studies.events import Control, Event
from gemma_tui.studies.intervals import interval, t95
from gemma_tui.studies.recording import record_training
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.tokenizer import read_tokenizer

NANO = paths.assets() / "gemma-3-nano"
TEXTS = ("The sea was calm that morning.", "A dog ran over the hill.", "Nobody knew the old song any more.")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunStore]:
    monkeypatch.setenv("GEMMA_TUI_HOME", str(tmp_path / "home"))
    store = RunStore()
    yield store
    store.close()


@pytest.fixture
def plan(tmp_path: Path) -> HeadStudyPlan:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return HeadStudyPlan("nano", str(path), rows=3, length=16)


def test_the_interval_is_students() -> None:
    values = np.random.default_rng(0).normal(3, 2, (40, 2, 3))
    values[5:, 1, 2] = np.nan
    mean, half = interval(values)
    assert np.allclose(mean, np.nanmean(values, 0))
    assert half[0, 0] == pytest.approx(2.0227 * values[:, 0, 0].std(ddof=1) / np.sqrt(40), rel=1e-4)
    assert half[1, 2] == pytest.approx(2.776 * values[:5, 1, 2].std(ddof=1) / np.sqrt(5))
    assert np.isnan(interval(values[:1])[1]).all(), "one text has no interval"


def test_the_quantiles_are_those_of_students_t() -> None:
    first, second = math.tan(0.475 * math.pi), 0.95 * math.sqrt(2 / (1 - 0.95**2))
    known = {1: first, 2: second, 3: 3.182, 4: 2.776, 10: 2.228, 29: 2.045, 30: 2.042, 31: 2.0395, 40: 2.0211,
             60: 2.0003, 120: 1.9799, 10**6: 1.96}  # fmt: skip
    np.testing.assert_allclose(t95(np.array(list(known))), list(known.values()), rtol=2e-4)
    assert np.isnan(t95(np.array([0, -1]))).all()


def test_means_are_those_of_the_texts_one_by_one(engine: Engine, plan: HeadStudyPlan, store: RunStore) -> None:
    recorded = record_heads(engine, plan, Control(), store)
    events = list(recorded.events)
    assert [event.kind for event in events] == ["run", "start", "heads", "heads", "heads", "end"]
    study = read_study(store, recorded.run)
    assert sorted(study.texts) == sorted(TEXTS)
    tokenizer = read_tokenizer(NANO)
    ids = tokenizer.encode(study.texts[1])[:16]
    reading = read_tokens(engine, tokenizer, [*ids, 1][:16])
    config = reading.inspection.config
    expected = head_metrics([reading.statistics(layer) for layer in range(config.num_hidden_layers)], config)
    for name in METRICS:
        assert np.allclose(study.values[name][1], expected[name], atol=1e-6, equal_nan=True), name
    figure = study_figure(study, "previous")
    assert np.allclose(figure.heats[0].values, study.values["previous"].mean(0))
    first = figure.tables[0].rows[0]
    layer, head = (int(part[1:]) for part in first[0].split("."))
    assert first[2] == pytest.approx(study.values["previous"].mean(0).max())
    assert first[4].split(" | ")[0] == study.texts[int(study.values["previous"][:, layer, head].argmax())]


def test_a_study_goes_on_after_the_last_text(torch_engine: Engine, plan: HeadStudyPlan, store: RunStore) -> None:
    control = Control()
    recorded = record_heads(torch_engine, plan, control, store)
    for event in recorded.events:
        if event.kind == "heads":
            control.stop.set()
    assert len(read_study(store, recorded.run).texts) == 1
    assert store.run(recorded.run.run_id).state == "stopped"
    resumed = resume_heads(torch_engine, recorded.run, Control(), store)
    assert [event.step for event in resumed.events if event.kind == "heads"] == [2, 3]
    whole = record_heads(torch_engine, plan, Control(), store)
    assert list(whole.events)
    for name, values in read_study(store, whole.run).values.items():
        assert np.array_equal(values, read_study(store, recorded.run).values[name], equal_nan=True)


def trained(engine: Engine, plan: TrainingPlan, store: RunStore) -> str:
    recorded = record_training(engine, plan, Control(), store)
    events: list[Event] = list(recorded.events)
    assert events[-1].values["status"] == "done"
    return recorded.run.run_id


def test_the_checkpoints_of_a_run_are_followed(torch_engine: Engine, plan: HeadStudyPlan, store: RunStore) -> None:
    run = trained(
        torch_engine,
        TrainingPlan(
            model="nano", data=plan.study, method="lora", steps=4, batch_size=1, sequence_length=16, save_every=2,
            keep=5, learning_rate=0.05, evaluate_every=0,
        ),
        store,
    )  # fmt: skip
    recorded = record_heads(torch_engine, replace(plan, over=run, rows=2), Control(), store)
    assert len([event for event in recorded.events if event.kind == "heads"]) == 4
    study = read_study(store, recorded.run)
    assert study.steps == [2, 2, 4, 4]
    assert study.texts[:2] == study.texts[2:]
    assert not np.allclose(study.values["entropy"][:2], study.values["entropy"][2:], atol=1e-4)
    figure = study_figure(study, "entropy")
    moved = figure.tables[0]
    assert list(moved.columns[2:]) == ["at step 2", "at step 4", "change"]
    assert [abs(row[4]) for row in moved.rows] == sorted((abs(row[4]) for row in moved.rows), reverse=True)
    assert {line.label for line in figure.charts[0].series} == {"local", "global"}
    assert recorded.run.steps == 4
    with pytest.raises(UsageError, match="is no training run"):
        record_heads(torch_engine, replace(plan, over=recorded.run.run_id), Control(), store)


def test_what_cannot_be_studied_is_refused(torch_engine: Engine, plan: HeadStudyPlan, store: RunStore,
                                           tmp_path: Path) -> None:  # fmt: skip
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(GemmaTuiError):
        list(record_heads(torch_engine, replace(plan, study=str(tmp_path / "empty.jsonl")), Control(), store).events)
    run = store.create("heads", "heads", "torch", {}, "", 3)
    with pytest.raises(GemmaTuiError, match="has looked at no text yet"):
        read_study(store, run)
