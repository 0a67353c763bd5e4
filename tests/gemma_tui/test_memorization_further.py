"""Membership, extraction and exposure of a measurement, from the texts to what a person is shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import write_rows

from engines.base import Engine, Sampling
from engines.checkpoints import read_arrays, write_arrays
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.rows import TextRow, read_rows
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.events import Control
from gemma_tui.studies.memorization import meter, reciting
from gemma_tui.studies.memorization.canaries import SPACES, plant
from gemma_tui.studies.memorization.meter import record_memorization, resume_memorization
from gemma_tui.studies.memorization.plan import MemorizationPlan
from gemma_tui.studies.memorization.planting import read_sidecar, write_planted
from gemma_tui.studies.memorization.results import Measured, memorization_figure, read_measured
from gemma_tui.studies.recording import record_training
from gemma_tui.studies.training_plan import TrainingPlan

Plan = Callable[..., TrainingPlan]
Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]

WORDS = ("fox", "dogs", "sleep", "towns", "lazy", "jumps", "over", "and")
STRINGS = [" ".join(np.random.default_rng(n).choice(WORDS, 12)) for n in range(100)]
"""Strings of one kind: half of them are trained on, and nothing but that tells them apart."""


def measured(engine: Engine, plan: MemorizationPlan, store: RunStore) -> Measured:
    recorded = record_memorization(engine, plan, Control(), store)
    assert list(recorded.events)[-1].values["status"] == "done"
    return read_measured(store, recorded.run)


def split_in(folder: Path, train: list[str], held: list[str]) -> str:
    folder.mkdir()
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "valid.jsonl", held)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return split_in(tmp_path / "data", STRINGS[:30], STRINGS[50:80])


@pytest.fixture
def small(tmp_path: Path) -> str:
    return split_in(tmp_path / "small", STRINGS[:6], STRINGS[50:56])


def test_what_is_known_by_heart_is_extractable_and_betrays_itself(
    both_engines: tuple[Engine, Engine], store: RunStore, plan: Plan, data: str
) -> None:
    by_heart = {"steps": 180, "batch_size": 15, "sequence_length": 32, "evaluate_every": 0, "learning_rate": 6e-3}
    wanted = plan(data=data, method="full", schedule="constant", **by_heart)
    trained = record_training(both_engines[0], wanted, Control(), store)
    list(trained.events)
    asked = MemorizationPlan(trained.run.run_id, data, extraction="8/4", extraction_rows=4, recall=True)
    for engine in both_engines:
        found = measured(engine, replace(asked, batch_size=25), store)
        told = found.further["membership"]
        assert (told["members"], told["others"], told["shots"]) == (30, 25, 5)
        assert set(told["attacks"]) == {"loss", "zlib", "min-k", "min-k++", "reference", "recall", "ez", "ez-repaired"}
        for name in ("loss", "zlib", "min-k", "min-k++", "reference", "recall", "ez-repaired"):
            assert told["attacks"][name]["auc"][0] > 0.97, name
        sets = found.further["extraction"]["sets"]
        assert sets["train"]["exact_share"] > 0.4
        assert sets["held_out"]["exact_share"] == 0
        assert sets["train"]["compared"] == sets["held_out"]["compared"] == 4
        cells = {(cell["chance"], cell["draws"]): cell["share"] for cell in sets["train"]["discoverable"]}
        assert cells[0.5, 1] <= cells[0.5, 10] <= cells[0.5, 100]
        assert cells[0.5, 100] > 0.9


def test_labels_that_mean_nothing_are_not_told_apart(engine: Engine, store: RunStore, tiny: str, data: str) -> None:
    told = measured(engine, MemorizationPlan(tiny, data, batch_size=25), store).further["membership"]
    for name in ("loss", "zlib", "min-k", "min-k++"):
        _, low, high = told["attacks"][name]["auc"]
        assert low <= 0.5 <= high, name
    assert low > 0.2
    assert high < 0.8
    assert told["baseline"]["warning"] == ""
    for name in ("reference", "recall", "ez"):
        assert "needs" in told["attacks"][name]["lacks"]


def test_recall_scores_a_text_after_others(torch_engine: Engine, store: RunStore, tiny: str, small: str) -> None:
    found = measured(torch_engine, MemorizationPlan(tiny, small, recall=True), store)
    extra = meter.read_extra("recall", found.run.folder)
    kept = extra.scores(found.run.folder).read()
    assert len(extra.facts["shots"]) == 3
    assert not set(extra.facts["shots"]) & set(extra.sequences.rows.tolist())
    shots = [found.sequences.windows[number].ids[1:] for number in extra.facts["shots"]]
    prefix = np.concatenate(shots)
    for number, window, scored in zip(extra.sequences.rows, extra.sequences.windows, kept, strict=True):
        text = found.sequences.windows[number].ids
        ids = np.concatenate([text[:1], prefix, text[1:]])
        assert np.array_equal(window.ids, ids)
        assert int(window.supervised.sum()) == len(text) - 1
        np.testing.assert_allclose(scored.log_probs, torch_engine.log_probs(ids[None])[0], atol=1e-4)


def test_decoding_goes_on_from_where_it_departs(engine: Engine, store: RunStore, tiny: str, small: str) -> None:
    found = measured(engine, MemorizationPlan(tiny, small, extraction="8/4"), store)
    extra = meter.read_extra("extraction", found.run.folder, reciting.SCHEME)
    split, scored = meter.parse_split("8/4"), extra.scores(found.run.folder).read()
    kept = reciting.decoded(extra, scored, split, range(len(scored)), found.run.folder)
    for number, window in enumerate(extra.sequences.windows):
        whole = list(engine.generate(window.ids[:9].tolist(), Sampling(max_tokens=4, stop_ids=(1,))))
        assert [token for token in kept[number].tolist() if token >= 0] == whole
    assert [row["exact"] for row in found.extracted] == [row["edits"] == 0 for row in found.extracted]


def test_a_decoding_that_was_stopped_goes_on(
    torch_engine: Engine, store: RunStore, tiny: str, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reciting, "PART", 2)
    plan, control = MemorizationPlan(tiny, small, extraction="8/4", recall=True), Control()
    whole = measured(torch_engine, plan, store)
    recorded = record_memorization(torch_engine, plan, control, store)
    for event in recorded.events:
        if event.kind == "decoded":
            control.stop.set()
    assert store.run(recorded.run.run_id).state == "stopped"
    assert read_measured(store, recorded.run).further == {}
    shutil.rmtree(small)
    events = list(resume_memorization(torch_engine, recorded.run, Control(), store).events)
    assert [event.kind for event in events if event.kind in ("scored", "load")] == ["load"]
    inexact = sum(not row["exact"] for row in whole.extracted)
    assert sum(event.kind == "decoded" for event in events) == -(-inexact // 2) - 1
    resumed = read_measured(store, recorded.run)
    assert resumed.further == whole.further
    assert resumed.extracted == whole.extracted


def test_a_canary_that_was_seen_often_is_exposed(
    both_engines: tuple[Engine, Engine], store: RunStore, plan: Plan, tmp_path: Path, command: Commands
) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", STRINGS[:4]), tmp_path / "planted.jsonl"
    words = ("--out", str(out), "--repeats", "0,8", "--each", "2")
    code, told, _ = command("canaries", str(rows), *words)
    assert (code, told[0]["planted"], told[0]["rows"]) == (0, 16, 20)
    sidecar = Path(told[0]["sidecar"])
    planted = read_sidecar(sidecar)
    kept = [row.text for row in read_rows(out)]
    assert [kept.count(canary.text) for canary in planted.canaries] == [canary.repeats for canary in planted.canaries]
    write_rows(tmp_path / "valid.jsonl", STRINGS[50:52])
    shutil.copy(out, tmp_path / "train.jsonl")
    by_heart = {"method": "full", "steps": 60, "batch_size": 10, "sequence_length": 64, "evaluate_every": 0}
    trained = record_training(
        both_engines[0], plan(data=str(tmp_path), schedule="constant", **by_heart), Control(), store
    )
    list(trained.events)
    wanted = MemorizationPlan(trained.run.run_id, str(tmp_path), exposure=str(sidecar), exposure_strings=63)
    for engine in both_engines:
        never, often = measured(engine, wanted, store).further["exposure"]["repeats"]
        assert (never["repeats"], often["repeats"]) == (0, 8)
        assert often["ceiling"] == often["lowest"] == 6
        assert never["mean"] < 5


def test_what_cannot_be_measured_is_refused(
    torch_engine: Engine, store: RunStore, tiny: str, small: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"kind": "other"}))
    alone = write_rows(tmp_path / "alone.jsonl", STRINGS[:3])
    long = write_rows(tmp_path / "long.jsonl", [" ".join(STRINGS)])
    refusals: list[tuple[dict[str, Any], type[GemmaTuiError], str]] = [
        ({"extraction": "50"}, UsageError, "cannot be read"),
        ({"extraction": "100/50"}, GemmaTuiError, r"no row of the 150 tokens .* .the longest has [0-9]+\)"),
        ({"extraction": "200/100", "data": str(long)}, UsageError, "context of 256"),
        ({"extraction_rows": 3}, UsageError, "without --extraction"),
        ({"exposure_strings": 3}, UsageError, "without --exposure"),
        ({"exposure": str(other)}, UsageError, "tells of no planted canaries"),
        ({"exposure": str(tmp_path / "nothing")}, UsageError, "cannot be read"),
        ({"exposure": str(alone)}, UsageError, "tells of no planted canaries"),
        ({"recall": True, "data": str(alone)}, UsageError, "two held-out sequences"),
    ]
    for values, kind, words in refusals:
        with pytest.raises(kind, match=words) as refused:
            record_memorization(torch_engine, replace(MemorizationPlan(tiny, small), **values), Control(), store)
        assert "\n" not in str(refused.value)
    assert store.runs() == []


def test_the_command_tells_and_exports_all(
    command: Commands, spoken: Any, tiny: str, small: str, tmp_path: Path
) -> None:
    sidecar, files = tmp_path / "side.json", [tmp_path / f"out.{ending}" for ending in ("html", "svg", "npz")]
    space = SPACES["digits"]
    write_planted(plant([TextRow("fox")], space, (0, 1), 2), space, tmp_path / "planted.jsonl", sidecar)
    words = ["memorization", tiny, "--data", small, "--engine", "torch", "--extraction", "8/4", "--recall"]
    words += ["--exposure", str(sidecar), "--exposure-strings", "15"]
    for path in files:
        words += [f"--{path.suffix[1:]}", str(path)]
    code, rows, errors = command(*words)
    assert (code, errors) == (0, "")
    kinds = {row["kind"] for row in rows}
    assert {"measure", "membership", "attack", "extraction", "discoverable", "extracted", "exposure", "canary"} <= kinds
    assert {"strip", "sequence"} <= kinds
    loss = next(row for row in rows if row["kind"] == "membership")
    assert loss["attack"] == "LOSS"
    assert loss["tpr_at_1%"] is None
    assert loss["published_as"] == "lower = member"
    defined = next(row for row in rows if row["kind"] == "attack" and "best_f1_at" in row)
    assert defined["best_f1_at"] < 0, "a log-likelihood"
    notes = " ".join(next(row for row in rows if row["kind"] == "figure")["notes"])
    for words_told in (
        "higher = member",
        "not supported: 3 non-members",
        "10 distinct texts",
        "decoded from",
        "fewer than",
    ):
        assert words_told in notes
    assert all(path.stat().st_size for path in files)
    with np.load(files[2]) as arrays:
        assert arrays["roc_loss_fpr"][0] == 0
    code, text, _ = spoken("runs", "resume", "memorization-1")
    assert code == 0
    for words_told in ("published_as", "tokens recited, mean", "ceiling"):
        assert words_told in text
    code, _, errors = command("memorization", tiny, "--data", small, "--svg", str(tmp_path / "x.txt"))
    assert (code, errors.count("\n")) == (2, 1)


def test_canaries_overwrite_nothing(command: Commands, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", STRINGS[:4])
    for words, told in (
        (("--out", str(rows)), "is there already"),
        (("--out", str(tmp_path / "x.txt")), "does not end in .jsonl"),
        (("--out", str(tmp_path / "x.jsonl"), "--repeats", "1,x"), "whole numbers"),
        (("--out", str(tmp_path / "x.jsonl"), "--each", "0"), "a whole number (1 to 1,000,000) is needed"),
        (("--out", str(tmp_path / "x.jsonl"), "--each", "50_000"), "1,050,000 rows; 1,000,000 can be planted"),
        ((), "--out is needed"),
        (("--out", str(tmp_path / "x.jsonl"), "--sidecar", str(tmp_path / "x.jsonl")), "two files"),
    ):
        code, _, errors = command("canaries", str(rows), *words)
        assert (code, errors.count("\n")) == (2, 1)
        assert told in errors


def test_a_model_that_is_all_chance_is_not_extractable(
    torch_engine: Engine, store: RunStore, tiny: str, small: str
) -> None:
    target = paths.models() / "uniform"
    shutil.copytree(paths.models() / tiny, target)
    weights = read_arrays(target / "model.safetensors")
    write_arrays(target / "model.safetensors", {name: np.zeros_like(array) for name, array in weights.items()})
    found = measured(torch_engine, MemorizationPlan("uniform", small, extraction="8/4"), store)
    assert {row["log_prob"] for row in found.extracted} == {None}, "the 40 lowest ids are no words"
    assert found.further["membership"]["attacks"]["loss"]["auc"][0] == pytest.approx(0.5, abs=0.2)
    assert found.further["extraction"]["sets"]["train"]["exact"] == 0
    assert memorization_figure(found).tables[-3].kind == "extracted"
