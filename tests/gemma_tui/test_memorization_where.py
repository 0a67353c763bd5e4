"""Which parts hold what was memorised: parts whose absence is another model, going on after a break, refusals."""

from __future__ import annotations

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
from engines.gemma3 import read_config
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.figure import Figure
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.events import Control
from gemma_tui.studies.memorization.held import changes, where_figure
from gemma_tui.studies.memorization.meter import record_memorization
from gemma_tui.studies.memorization.parts import parts_of
from gemma_tui.studies.memorization.plan import MemorizationPlan
from gemma_tui.studies.memorization.results import read_measured
from gemma_tui.studies.memorization.where import (
    Chosen,
    WherePlan,
    choose,
    kept_parts,
    prepare,
    record_where,
    resume_where,
)
from gemma_tui.studies.recording import record_training
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.studies.turns import Window

Plan = Callable[..., TrainingPlan]
Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]
MLP = "model.layers.1.post_feedforward_layernorm.weight"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture
def measured_plan(tiny: str, tmp_path: Path) -> MemorizationPlan:
    """Six texts and three that are held out."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.jsonl", TEXTS[:6])
    write_rows(folder / "valid.jsonl", TEXTS[20:23])
    return MemorizationPlan(tiny, str(folder))


def measure(engine: Engine, plan: MemorizationPlan, store: RunStore) -> str:
    recorded = record_memorization(engine, plan, Control(), store)
    assert list(recorded.events)[-1].values["status"] == "done"
    return recorded.run.run_id


def found(engine: Engine, plan: WherePlan, store: RunStore) -> tuple[Run, Figure, dict[str, dict[str, Any]]]:
    """The run, its figure, and the rows of its table by part."""
    recorded = record_where(engine, plan, Control(), store)
    assert list(recorded.events)[-1].values["status"] == "done"
    figure = where_figure(store, recorded.run)
    (table,) = figure.tables
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    return recorded.run, figure, {row["part"]: row for row in rows}


def lesser(name: str, change: Callable[[dict[str, np.ndarray]], None]) -> str:
    """A model like ``tiny`` that lacks something."""
    target = paths.models() / name
    shutil.copytree(paths.models() / "tiny", target)
    weights = read_arrays(target / "model.safetensors")
    change(weights)
    write_arrays(target / "model.safetensors", weights)
    return name


def no_mlp(weights: dict[str, np.ndarray]) -> None:
    weights[MLP] = np.full_like(weights[MLP], -1)  # the norm's gain is 1 + w


def no_head(weights: dict[str, np.ndarray]) -> None:
    weights[O_PROJ] = weights[O_PROJ].copy()
    weights[O_PROJ][:, 16:] = 0  # the second of two heads of 16


@pytest.mark.parametrize(
    ("change", "where", "part"), [(no_mlp, "layers", "L1 mlp"), (no_head, "heads,layers", "L0.H1")], ids=["mlp", "head"]
)
def test_a_part_that_is_all_the_reference_lacks_holds_all_bits(
    engine: Engine,
    measured_plan: MemorizationPlan,
    store: RunStore,
    change: Callable[[dict[str, np.ndarray]], None],
    where: str,
    part: str,
) -> None:
    """Without it the target is the reference, of training and of held-out rows."""
    measurement = measure(engine, replace(measured_plan, reference=lesser("lesser", change)), store)
    measured = read_measured(store, store.run(measurement))
    _, figure, rows = found(engine, WherePlan(measurement, where, most=4, batch_size=3), store)
    assert len(rows) == (4 if where == "layers" else 8)
    best = sorted((row for row in measured.rows if row["set"] == "train"), key=lambda row: -row["signed"])[:4]
    held = [row for row in measured.rows if row["set"] == "held_out"]
    row, bits = rows[part], sum(one["signed"] for one in best)
    assert abs(bits) > 1e-3
    assert row["signed_change"] == pytest.approx(-bits, abs=2e-3)
    assert row["clipped_change"] == pytest.approx(-sum(one["clipped"] for one in best), abs=2e-3)
    loss = sum(one["target"] - one["reference"] for one in best) / sum(one["tokens"] for one in best)
    other = sum(one["target"] - one["reference"] for one in held) / sum(one["tokens"] for one in held)
    assert row["loss_change"] == pytest.approx(loss, abs=1e-5)
    assert row["held_out_loss_change"] == pytest.approx(other, abs=1e-5)
    heat = figure.heats[0 if where == "layers" else 1]
    place = (1, 1) if where == "layers" else (0, 1)
    assert heat.values[place] == pytest.approx(bits, abs=2e-3)


def test_without_all_adapters_a_run_holds_nothing(
    engine: Engine, measured_plan: MemorizationPlan, store: RunStore, plan: Plan
) -> None:
    """All are of one kind here, so that kind is all that training changed."""
    lora = plan(
        data=measured_plan.data, method="lora", targets="down_proj", steps=12, batch_size=6, learning_rate=0.02,
        schedule="constant", evaluate_every=0, sequence_length=64,
    )  # fmt: skip
    trained = record_training(engine, lora, Control(), store)
    list(trained.events)
    measurement = measure(engine, replace(measured_plan, model=trained.run.run_id), store)
    _, figure, rows = found(engine, WherePlan(measurement, "adapters"), store)
    assert set(rows) == {f"L{i} down_proj" for i in (0, 1)} | {f"adapters of {x}" for x in ("L0", "L1", "down_proj")}
    bits = read_measured(store, store.run(measurement)).summaries[-1]["train"]["signed"]
    assert bits > 10
    assert rows["adapters of down_proj"]["signed_change"] == pytest.approx(-bits, rel=1e-4)
    assert rows["L0 down_proj"]["signed_change"] == rows["adapters of L0"]["signed_change"] < -1
    assert figure.tables[0].rows[0][0] == "adapters of down_proj", "most is lost without them"
    (heat,) = figure.heats
    assert heat.columns[-1] == "down_proj"
    assert np.isfinite(heat.values[:, -1]).all()
    assert np.isnan(heat.values[:, :-1]).all()


def test_changes_are_those_of_the_definition() -> None:
    windows = [Window(np.arange(n + 1, dtype=np.int32), np.ones(n + 1, bool)) for n in (4, 4, 2)]
    chosen = Chosen([0, 1, 2], windows, 2, np.array([-8.0, -4.0, -3.0]) * np.log(2))
    intact, without = (np.array(x) * np.log(2) for x in ([-2.0, -3.0, -3.0], [-6.0, -7.0, -4.0]))
    row = changes(chosen, intact, without)
    assert row["signed_change"] == pytest.approx(-8)  # 6 + 1 bits to 2 - 3
    assert row["clipped_change"] == pytest.approx(-5)  # 6 + 1 bits to 2 + 0
    assert row["loss_change"] == pytest.approx(np.log(2))
    assert row["held_out_loss_change"] == pytest.approx(0.5 * np.log(2))
    assert row["ratio"] == pytest.approx(2)
    assert changes(chosen, intact, intact)["ratio"] is None
    alone = changes(Chosen([0, 1], windows[:2], 2, chosen.reference[:2]), intact[:2], without[:2])
    assert (alone["held_out_loss_change"], alone["ratio"]) == (None, None)


def test_a_study_goes_on_where_it_was_stopped(
    torch_engine: Engine, measured_plan: MemorizationPlan, store: RunStore
) -> None:
    measurement = measure(torch_engine, measured_plan, store)
    plan, control = WherePlan(measurement, "layers,heads"), Control()
    whole, figure, _ = found(torch_engine, plan, store)
    recorded = record_where(torch_engine, plan, control, store)
    for event in recorded.events:
        if event.kind == "part" and event.step == 3:
            control.stop.set()
    assert store.run(recorded.run.run_id).state == "stopped"
    again = list(resume_where(torch_engine, recorded.run, Control(), store).events)
    assert [event.step for event in again if event.kind == "part"] == list(range(4, 10))
    resumed, kept = kept_parts(store, recorded.run), kept_parts(store, whole)
    assert list(resumed) == list(kept)
    assert all(np.array_equal(resumed[name], kept[name]) for name in kept)
    assert where_figure(store, recorded.run).tables[0].rows == figure.tables[0].rows
    more = list(resume_where(torch_engine, recorded.run, Control(), store).events)
    assert not [event for event in more if event.kind in ("load", "part")]
    other = paths.models() / lesser("lesser", no_mlp)
    shutil.copy(other / "model.safetensors", paths.models() / "tiny")
    with pytest.raises(GemmaTuiError, match="tiny has changed"):
        list(record_where(torch_engine, plan, Control(), store).events)


def test_the_sequences_with_most_bits_are_chosen(
    torch_engine: Engine, measured_plan: MemorizationPlan, store: RunStore
) -> None:
    measured = read_measured(store, store.run(measure(torch_engine, measured_plan, store)))
    chosen = choose(measured, WherePlan(measured.run.run_id, "layers", most=2))
    bits = [row["signed_against_uniform"] for row in measured.rows]
    assert chosen.numbers[:2] == sorted(range(6), key=lambda i: -bits[i])[:2]
    assert len(set(chosen.numbers[2:])) == 2
    assert set(chosen.numbers[2:]) <= {6, 7, 8}
    assert chosen.trained == 2


def test_every_part_is_named_once(tiny: str) -> None:
    config = read_config(paths.models() / tiny)
    names = [f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("self_attn.q_proj", "mlp.up_proj")]
    parts = parts_of(["layers", "heads", "adapters"], config, names)
    assert len({part.name for part in parts}) == len(parts) == 1 + 4 + 4 + 4 + 2 + 2
    assert parts[-1].removal.adapters == (names[1], names[3])


def test_what_cannot_be_done_is_refused_before_a_run_is_made(
    torch_engine: Engine, measured_plan: MemorizationPlan, store: RunStore, plan: Plan
) -> None:
    measurement = measure(torch_engine, measured_plan, store)
    other = store.create("x", "heads", "torch", {}, "", 1)
    refusals: list[tuple[WherePlan, type[GemmaTuiError], str]] = [
        (WherePlan(measurement, "layers,tails"), UsageError, "'tails' is not there"),
        (WherePlan(measurement, "adapters"), UsageError, "has no adapters"),
        (WherePlan(other.run_id, "layers"), UsageError, "is no measurement"),
        (WherePlan("tiny", "layers"), GemmaTuiError, "no run 'tiny'"),
    ]
    for wanted, kind, words in refusals:
        with pytest.raises(kind, match=words):
            record_where(torch_engine, wanted, Control(), store)
    assert len(store.runs()) == 2
    with pytest.raises(UsageError, match="does not tell which parts"):
        resume_where(torch_engine, other, Control(), store)
    assert prepare(WherePlan(measurement, "heads"), store).parts[1].name == "L0.H0"


def test_the_command_tells_the_cost_prints_and_writes(
    command: Commands, spoken: Any, tiny: str, measured_plan: MemorizationPlan, tmp_path: Path
) -> None:
    assert command("memorization", tiny, "--data", measured_plan.data, "--engine", "torch")[0] == 0
    words = ("memorization", "memorization-1", "--where", "layers", "--most", "2", "--engine", "torch")
    code, rows, errors = command(*words)
    assert (code, errors) == (0, "")
    start = next(row for row in rows if row["kind"] == "start")
    assert (start["parts"], start["passes"], start["sequences"]) == (4, 5, {"train": 2, "held_out": 2})
    assert len([row for row in rows if row["kind"] == "part"]) == 4
    assert rows[-1] == {"kind": "end", "status": "done", "run": "where-1"}
    notes = next(row for row in rows if row["kind"] == "figure")["notes"]
    assert any(note.startswith("warning: the measurement has no reference") for note in notes)
    code, rows, _ = command(*words, "--csv", str(tmp_path / "parts.csv"), "--svg", str(tmp_path / "parts.svg"))
    assert (code, [row["path"] for row in rows if row["kind"] == "written"]) == (
        0, [str(tmp_path / "parts.svg"), str(tmp_path / "parts.csv")],
    )  # fmt: skip
    assert "L1 mlp" in (tmp_path / "parts.csv").read_text()
    for run, kind in (("memorization-1", "sequence"), ("where-1", "part")):
        for group in ("capacity", "runs"):
            code, rows, _ = command(group, "show", run, "--csv", str(tmp_path / f"{group}-{run}.csv"))
            assert code == 0
            assert kind in {row["kind"] for row in rows}
            assert (tmp_path / f"{group}-{run}.csv").stat().st_size
    code, text, _ = spoken("runs", "resume", "where-1")
    assert code == 0
    assert "4 parts, each taken away once: 5 passes of tiny" in text
    assert "held_out_loss_change" in text
    for wrong, words_of_it in ((("--rows", "3"), "--rows: measure with it"), (("--where", "x"), "'x' is not there")):
        code, rows, errors = command(*words[:4], *wrong)
        assert (code, rows[-1]["status"], errors.count("\n")) == (2, "failed", 1)
        assert words_of_it in errors
    code, _, errors = command("memorization", tiny, "--data", measured_plan.data, "--most", "3")
    assert code == 2
    assert "--most: it goes with --where" in errors
