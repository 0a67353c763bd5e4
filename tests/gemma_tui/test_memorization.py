"""Measuring what models have memorised: what is known beforehand, going on after a break, checkpoints, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import TEXTS, write_rows

from engines.base import Engine
from engines.checkpoints import read_arrays, write_arrays
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.events import Control
from gemma_tui.studies.memorization import meter, scores
from gemma_tui.studies.memorization.meter import STUDY, record_memorization, resume_memorization
from gemma_tui.studies.memorization.plan import MemorizationPlan
from gemma_tui.studies.memorization.results import Measured, memorization_figure, read_measured
from gemma_tui.studies.memorization.strips import distribution
from gemma_tui.studies.recording import Recorded, record_training
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.tokenizer import Tokenizer, train_tokenizer

Plan = Callable[..., TrainingPlan]
Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]

LORA = {"method": "lora"}
RELORA = {"method": "relora", "warm_start": 2, "reset_every": 2, "restart_warmup": 1}
"""The first checkpoint is of full-rank training."""

SHOWN = str.maketrans({"▁": " ", "⏎": "\n"})
"""Back from how a token is shown."""


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Four texts to be known by heart, one of them twice, and two that are not."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [*TEXTS[:4], TEXTS[0]])
    write_rows(folder / "valid.jsonl", TEXTS[20:22])
    return str(folder)


@pytest.fixture
def measured_plan(tiny: str, data: str) -> MemorizationPlan:
    return MemorizationPlan(tiny, data, batch_size=2)


def done(recorded: Recorded, store: RunStore) -> Measured:
    events = list(recorded.events)
    assert events[-1].values["status"] == "done"
    return read_measured(store, recorded.run)


def measured(engine: Engine, plan: MemorizationPlan, store: RunStore) -> Measured:
    return done(record_memorization(engine, plan, Control(), store), store)


def trained(engine: Engine, plan: TrainingPlan, store: RunStore) -> str:
    recorded = record_training(engine, plan, Control(), store)
    assert list(recorded.events)[-1].values["status"] == "done"
    return recorded.run.run_id


def copied(name: str, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> str:
    """A model in the data folder like ``tiny``, with other weights."""
    target = paths.models() / name
    shutil.copytree(paths.models() / "tiny", target, dirs_exist_ok=True)
    write_arrays(target / "model.safetensors", change(read_arrays(target / "model.safetensors")))
    return name


def zeros(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.zeros_like(array) for name, array in weights.items()}


def doubled(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: 2 * array for name, array in weights.items()}


def test_a_model_that_knows_nothing_has_no_bits(
    engine: Engine, measured_plan: MemorizationPlan, store: RunStore, tokenizer: Tokenizer
) -> None:
    found = measured(engine, replace(measured_plan, model=copied("uniform", zeros)), store).summaries[-1]
    assert found["against"] == "uniform code"
    for part in (found["train"], found["held_out"]):
        assert part["loss"] == pytest.approx(np.log(tokenizer.size), abs=1e-5)
        assert part["signed_against_uniform"] == pytest.approx(0, abs=1e-3 * part["tokens"])
        assert "clipped" not in part
    assert found["gap"] == pytest.approx(0, abs=1e-5)


def test_what_is_known_by_heart_has_all_of_its_bits(
    engine: Engine, measured_plan: MemorizationPlan, store: RunStore, plan: Plan, data: str, tokenizer: Tokenizer
) -> None:
    by_heart = {"method": "full", "steps": 60, "batch_size": 4, "sequence_length": 64, "evaluate_every": 0}
    run = trained(engine, plan(data=data, schedule="constant", **by_heart), store)
    found = measured(engine, replace(measured_plan, model=run), store)
    train, held = (found.summaries[-1][name] for name in ("train", "held_out"))
    assert (train["sequences"], held["sequences"]) == (4, 2)
    assert found.facts["reference"] == "tiny"
    whole = train["reference_loss"] * train["tokens"] / np.log(2)
    assert 0.97 * whole < train["clipped"] < whole
    assert train["clipped"] == train["signed"]
    assert 0 < train["clipped"] - train["mixture"] <= 4
    assert held["bits_per_token"] < 0.9 * train["bits_per_token"], "held-out texts are of the same kind"
    config = json.loads((paths.models() / "tiny" / "config.json").read_text())
    every = found.facts["parameters"]["every"]
    assert found.facts["parameters"]["trainable"] == every
    assert train["per_parameter"] == train["per_trainable_parameter"] == pytest.approx(train["clipped"] / every)
    rest = every - config["vocab_size"] * config["hidden_size"]
    assert train["per_parameter_without_embeddings"] == pytest.approx(train["clipped"] / rest)
    against = measured(engine, replace(measured_plan, model=run, reference=copied("uniform", zeros)), store)
    best = against.summaries[-1]["train"]
    assert 0.97 < best["clipped"] / (best["tokens"] * np.log2(tokenizer.size)) < 1


def test_scores_are_kept_token_by_token(
    engine: Engine, measured_plan: MemorizationPlan, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "PART", 3)
    found = measured(engine, replace(measured_plan, reference=copied("doubled", doubled)), store)
    assert found.models == ["reference", "target"]
    assert len(found.sequences) == 6
    kept = found.scores("target")
    for window, row, scored in zip(found.sequences.windows, found.rows, kept, strict=True):
        alone = engine.token_scores(window.ids[None])
        for name in scores.FIELDS:
            np.testing.assert_allclose(getattr(scored, name), getattr(alone, name)[0], atol=1e-5, err_msg=name)
        assert row["target"] == pytest.approx(float(scored.log_probs.sum()), abs=1e-3)
        assert row["signed"] == pytest.approx((row["target"] - row["reference"]) / np.log(2), abs=1e-9)
    assert {row["set"] for row in found.rows} == {"train", "held_out"}
    assert [row["row"] for row in found.rows] == [0, 1, 2, 3, 0, 1]
    table = memorization_figure(found).tables[-1]
    assert len(table.rows) == 6


def test_the_tokens_that_the_bits_are_of_are_shown(
    engine: Engine, measured_plan: MemorizationPlan, store: RunStore
) -> None:
    """Against the kept scores, subtracted token by token; the tokens are those of the text."""
    found = measured(engine, replace(measured_plan, reference=copied("doubled", doubled)), store)
    figure = memorization_figure(found)
    order = sorted(range(4), key=lambda i: -found.rows[i]["signed"])
    target, reference = (found.scores(name) for name in ("target", "reference"))
    expected = [(target[i].log_probs.astype(float) - reference[i].log_probs) / np.log(2) for i in order]
    heat = figure.heats[0]
    assert "against doubled" in heat.title
    assert heat.rows == [f"row {i}" for i in order]
    assert heat.values.shape == (4, max(map(len, expected)))
    for shown, tokens, bits, i in zip(heat.values, figure.arrays["strip_tokens"], expected, order, strict=True):
        np.testing.assert_allclose(shown[: len(bits)], bits, atol=1e-9)
        assert np.isnan(shown[len(bits) :]).all()
        assert np.nansum(shown) == pytest.approx(found.rows[i]["signed"], abs=1e-6)
        assert "".join(tokens).translate(SHOWN) == TEXTS[i] + "<eos>"
    listed = next(table for table in figure.tables if table.kind == "strip").rows
    assert [row[-1] for row in listed] == pytest.approx(sorted(expected[0], reverse=True)[:20], abs=1e-9)
    _, place, after, token, _ = listed[0]
    assert place == int(np.argmax(expected[0])) + 1
    assert (after + token).translate(SHOWN) in TEXTS[order[0]] + "<eos>"


def test_only_what_the_loss_counts_has_bits(
    torch_engine: Engine, measured_plan: MemorizationPlan, store: RunStore, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": TEXTS[0], "completion": " ".join(TEXTS[1:5])}) + "\n")
    found = measured(torch_engine, replace(measured_plan, data=str(prompts), max_tokens=128, prompts="plain"), store)
    figure, counted = memorization_figure(found), found.sequences.windows[0].supervised[1:]
    assert not counted.all()
    np.testing.assert_array_equal(~np.isnan(figure.arrays["strip_bits"][0]), counted)
    assert np.nansum(figure.arrays["strip_bits"]) == pytest.approx(found.rows[0]["signed_against_uniform"], abs=1e-4)
    assert len(counted) > figure.heats[0].values.shape[1] == 64
    assert figure.heats[0].title.endswith("their first 64 tokens")


def test_both_sets_are_spread_over_the_same_bins() -> None:
    chart = distribution({"train": np.array([0.0, 10, 10, 20]), "held-out": np.array([-20.0, 0])}, "signed bits")
    train, held = chart.series
    np.testing.assert_allclose(train.x, [-40 / 3, 0, 40 / 3], atol=1e-9)
    np.testing.assert_array_equal(train.x, held.x)
    assert (list(train.y), list(held.y)) == ([0, 0.25, 0.75], [0.5, 0.5, 0])
    many = distribution({"train": np.arange(9000.0)}, "signed bits").series[0]
    np.testing.assert_allclose(many.y, np.full(20, 1 / 20), atol=1e-12)


def test_a_measurement_goes_on_where_it_was_stopped(
    torch_engine: Engine, measured_plan: MemorizationPlan, store: RunStore, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    monkeypatch.setattr(scores, "PART", 2)
    plan, control = replace(measured_plan, reference=copied("doubled", doubled)), Control()
    whole = measured(torch_engine, plan, store)
    recorded = record_memorization(torch_engine, plan, control, store)
    for event in recorded.events:
        if event.kind == "scored" and event.step == 8:
            control.stop.set()
    assert store.run(recorded.run.run_id).state == "stopped"
    with pytest.raises(GemmaTuiError, match="has no bits yet"):
        read_measured(store, recorded.run)
    shutil.rmtree(data)
    events = list(resume_memorization(torch_engine, recorded.run, Control(), store).events)
    assert [event.step for event in events if event.kind == "scored"] == [10, 12]
    assert [event.values["model"] for event in events if event.kind == "load"] == ["tiny"]
    resumed = read_measured(store, recorded.run)
    assert resumed.summaries == whole.summaries
    assert resumed.rows == whole.rows
    again = list(resume_memorization(torch_engine, recorded.run, Control(), store).events)
    assert [event.kind for event in again if event.kind in ("load", "scored", STUDY)] == [STUDY]


def test_a_model_that_changed_meanwhile_is_refused(
    torch_engine: Engine, measured_plan: MemorizationPlan, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "PART", 2)
    plan, control = replace(measured_plan, model=copied("other", doubled)), Control()
    recorded = record_memorization(torch_engine, plan, control, store)
    for event in recorded.events:
        if event.kind == "scored":
            control.stop.set()
    copied("other", zeros)
    with pytest.raises(GemmaTuiError, match="other has changed"):
        list(resume_memorization(torch_engine, recorded.run, Control(), store).events)
    assert store.run(recorded.run.run_id).state == "failed"


@pytest.mark.parametrize("values", [LORA, RELORA], ids=["lora", "relora"])
def test_the_checkpoints_of_a_run_are_followed(
    torch_engine: Engine,
    measured_plan: MemorizationPlan,
    store: RunStore,
    plan: Plan,
    data: str,
    values: dict[str, Any],
) -> None:
    run = trained(
        torch_engine,
        plan(data=data, steps=6, save_every=2, keep=9, evaluate_every=0, batch_size=4, **values),
        store,
    )
    found = measured(torch_engine, replace(measured_plan, model=run, checkpoints=True), store)
    assert [row["checkpoint"] for row in found.summaries] == [0, 2, 4, 6]
    assert found.models == ["reference", "step-00000002", "step-00000004", "step-00000006"]
    assert found.summaries[0]["train"]["clipped"] == 0
    assert found.summaries[-1]["train"]["signed"] != found.summaries[-2]["train"]["signed"]
    result = measured(torch_engine, replace(measured_plan, model=run), store).summaries[-1]
    assert found.summaries[-1]["train"]["signed"] == pytest.approx(result["train"]["signed"], abs=1e-2)
    figure = memorization_figure(found)
    moved = next(table for table in figure.tables if table.kind == "checkpoint")
    assert [row[0] for row in moved.rows] == [0, 2, 4, 6]
    assert any("memoris" in note and "step" in note for note in figure.notes)
    for summary, bits in zip(found.summaries, (0.0, 5.0, 9.0, 9.0), strict=True):
        summary["train"]["clipped"], summary["held_out"]["loss"] = bits, abs(bits - 5) + 1
    bits, loss = memorization_figure(found).charts[:2]
    assert (bits.series[-1].label, list(bits.series[-1].x)) == ("over at 4", [4.0, 4.0])
    assert (loss.series[-1].label, list(loss.series[-1].x)) == ("lowest at 2", [2.0, 2.0])
    assert [chart.x_label for chart in figure.charts] == [
        *["training step"] * 2,
        "signed bits of a sequence",
        "false positives",
    ]


def test_new_weights_have_no_reference_of_their_own(
    torch_engine: Engine, measured_plan: MemorizationPlan, store: RunStore, plan: Plan, data: str
) -> None:
    fresh = plan(data=data, method="full", fresh=True, steps=1, evaluate_every=0)
    found = measured(torch_engine, replace(measured_plan, model=trained(torch_engine, fresh, store)), store)
    assert found.facts["reference"] is None
    notes = memorization_figure(found).notes
    assert "uniform code" in notes[0]
    assert notes[1].startswith("warning: without a reference bits are against log2 V a token"), "also where it is read"


def test_what_cannot_be_measured_is_refused_before_a_run_is_made(
    torch_engine: Engine, measured_plan: MemorizationPlan, store: RunStore, tmp_path: Path
) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", ["", ""])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": TEXTS[0], "completion": "no"}) + "\n")
    other = paths.models() / "other"
    shutil.copytree(paths.models() / "tiny", other)
    train_tokenizer([text.upper() for text in TEXTS], 450).backend.save(str(other / "tokenizer.json"))
    refusals: list[tuple[dict[str, Any], type[GemmaTuiError], str]] = [
        ({"data": str(empty)}, GemmaTuiError, "holds no text: name a file with some$"),
        ({"data": str(prompts), "max_tokens": 8}, GemmaTuiError, "whose supervised part"),
        ({"held_out": str(empty)}, GemmaTuiError, "holds no text"),
        (
            {"held_out": str(Path(measured_plan.data) / "train.jsonl")},
            GemmaTuiError,
            "no text but what the training set has",
        ),
        ({"reference": "other"}, UsageError, "another vocabulary"),
        ({"reference": "tiny"}, UsageError, "against itself"),
        ({"reference": "nobody"}, GemmaTuiError, "no model 'nobody'"),
        ({"checkpoints": True}, GemmaTuiError, "no run 'tiny'"),
        ({"checkpoints": True, "dtype": "float32"}, UsageError, "leave --dtype out"),
    ]
    long = write_rows(tmp_path / "long.jsonl", [" ".join(TEXTS)])
    refusals.append(({"data": str(long), "max_tokens": 300}, UsageError, "context of 256"))
    for values, kind, words in refusals:
        with pytest.raises(kind, match=words):
            record_memorization(torch_engine, replace(measured_plan, **values), Control(), store)
    assert store.runs() == []
    run = store.create("x", "heads", "torch", {}, "", 1)
    with pytest.raises(UsageError, match="is no measurement"):
        resume_memorization(torch_engine, run, Control(), store)


def test_a_model_without_numbers_is_refused(
    torch_engine: Engine, measured_plan: MemorizationPlan, store: RunStore
) -> None:
    broken = copied("broken", lambda weights: {name: array * np.float32(np.nan) for name, array in weights.items()})
    for values in ({"model": broken}, {"reference": broken}):
        recorded = record_memorization(torch_engine, replace(measured_plan, **values), Control(), store)
        with pytest.raises(GemmaTuiError, match="broken gives probabilities that are no numbers"):
            list(recorded.events)


def test_what_a_person_should_know_is_told(
    torch_engine: Engine, measured_plan: MemorizationPlan, store: RunStore, plan: Plan, tmp_path: Path
) -> None:
    other = write_rows(tmp_path / "other.jsonl", TEXTS[:3])
    run = trained(torch_engine, plan(data=str(other), method="lora", steps=1, evaluate_every=0), store)
    only = str(Path(measured_plan.data) / "train.jsonl")
    measurement = meter.prepare(replace(measured_plan, model=run, data=only, prompts="plain"), store)
    told = " ".join(meter.warnings(measurement))
    assert "nothing held out" in told
    assert f"trained on {other}" in told
    assert "--prompts turns" in told
    assert "log2 V" in " ".join(meter.warnings(meter.prepare(measured_plan, store)))


def test_the_command_measures_and_prints(command: Commands, spoken: Any, tiny: str, data: str) -> None:
    words = ("memorization", tiny, "--data", data, "--engine", "torch", "--rows", "3")
    code, rows, errors = command(*words)
    assert (code, errors) == (0, "")
    kinds = [row["kind"] for row in rows]
    assert kinds[0] == "run"
    assert kinds[-1] == "end"
    found = next(row for row in rows if row["kind"] == "memorization")
    assert found["train"]["sequences"] == 3
    assert len([row for row in rows if row["kind"] == "sequence"]) == 5
    assert rows[-1] == {"kind": "end", "status": "done", "run": "memorization-1"}
    code, text, _ = spoken("runs", "resume", "memorization-1")
    assert code == 0
    assert "signed bits against the uniform code" in text
    assert "kept as memorization-1" in text
    code, text, _ = spoken(*words)
    assert "train: 3 sequences of 5 rows" in text
    assert "1 are there before" in text


def test_the_command_refuses_with_one_line(command: Commands, tiny: str, data: str) -> None:
    code, rows, errors = command("memorization", tiny)
    assert (code, rows[-1]["status"]) == (2, "failed")
    assert "--data is needed" in errors
    code, rows, errors = command("memorization", tiny, "--data", f"{data}/nothing.jsonl")
    assert (code, errors.count("\n")) == (1, 1)
