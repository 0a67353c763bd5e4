"""What the methods do as a study: schedules, merges, diagnoses, going on, ending early."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.base import Engine
from engines.gemma3 import read_config
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.runs import checkpoints
from gemma_tui.runs.store import RunStore
from gemma_tui.studies import diagnosis
from gemma_tui.studies.diagnosis import effective_rank, singular_values, stable_rank
from gemma_tui.studies.events import Control, Event
from gemma_tui.studies.recording import record_training, resume_training
from gemma_tui.studies.schedules import jagged, learning_rate
from gemma_tui.studies.training_plan import TrainingPlan, chosen_layers, settings

Plan = Callable[..., TrainingPlan]
RELORA: dict[str, Any] = {"method": "relora", "reset_every": 4, "restart_warmup": 1}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "dropout": 0.2},
    "dora": {"method": "dora"},
    "full": {"method": "full", "optimizer": "sgd"},
    "relora": {**RELORA, "rest": True, "warm_start": 3, "prune": "random"},
    "power": {"method": "rank1", "error_feedback": True, "update_momentum": 0.5},
    "sketch": {"method": "rank1", "mode": "sketch", "merge_every": 3},
    "alternate": {"method": "rank1", "mode": "alternate", "merge_every": 2, "optimizer": "muon"},
}
GOLDEN = {
    0: 0.0, 250: 0.5, 500: 1.0, 2500: 0.976841, 4999: 0.886878, 5000: 0.0, 5001: 0.00882, 5050: 0.440989,
    5100: 0.881979, 7500: 0.742912, 9999: 0.568192, 10000: 0.0, 10050: 0.280437, 10100: 0.560874, 15100: 0.233086,
    19999: 0.1,
}  # fmt: skip


def events_of(engine: Engine, plan: TrainingPlan, store: RunStore) -> list[Event]:
    return list(record_training(engine, plan, Control(), store).events)


def of_kind(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event.kind == kind]


def losses(events: list[Event]) -> dict[int, str]:
    """Losses to the last bit, by step."""
    return {e.step: float(e.values["loss"]).hex() for e in of_kind(events, "step")}


def test_the_jagged_cosine_is_the_reference_s() -> None:
    for step, share in GOLDEN.items():
        assert jagged(step, 20_000, 500, 5000, 100, 0.1) == pytest.approx(share, abs=1e-6)


def test_the_linear_schedule_ends_at_its_ratio() -> None:
    rates = [learning_rate(step, 2.0, 10, 2, "linear", 0.25) for step in range(1, 11)]
    assert rates[:2] == [1.0, 2.0]
    assert rates[-1] == pytest.approx(0.5)
    assert np.diff(rates[1:]) == pytest.approx(-1.5 / 8)


def test_a_warm_start_takes_half_the_rate_and_the_restarts_begin_after_it(plan: Plan) -> None:
    chosen = plan(**RELORA, warm_start=5, steps=25, warmup=2)
    assert chosen.rate(1) == chosen.peak_rate / 4
    assert [chosen.rate(s) for s in (2, 5)] == [chosen.peak_rate / 2] * 2
    assert chosen.rate(7) == chosen.peak_rate
    assert [step for step in range(1, 26) if chosen.rate(step) == 0] == [9, 13, 17, 21, 25]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "full", "schedule": "jagged"}, "relora"),
        ({**RELORA, "reset_every": 2, "warmup": 3}, "reset_every"),
        ({**RELORA, "restart_warmup": 4}, "reset_every"),
        ({**RELORA, "warm_start": 3, "steps": 3}, "warm_start"),
        ({"layers": "0-"}, "layers"),
        ({"layers": "a"}, "layers"),
        ({"layers": "99999999"}, "layers"),
        ({"method": "dora", "fresh": True}, "fresh"),
    ],
)
def test_options_that_do_not_go_together_are_refused(plan: Plan, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        settings(plan(**values))


def test_layers_are_written_as_ranges() -> None:
    assert chosen_layers(" 0-2, 5") == (0, 1, 2, 5)
    assert chosen_layers("") is None


def test_relora_merges_where_the_rate_is_zero_and_prunes(engine: Engine, plan: Plan, store: RunStore) -> None:
    events = events_of(engine, plan(**RELORA, steps=9, merge_every=2, prune_ratio=0.75), store)
    merges = of_kind(events, "merge")
    assert [e.step for e in merges] == [2, 4, 6, 8]
    assert ["pruned" in e.values for e in merges] == [False, True, False, True]
    assert all(0.7 <= e.values["pruned"] <= 0.8 for e in merges[1::2])
    assert merges[0].values["merged"] > 0
    assert 0 < merges[0].values["changed"] <= 1
    assert next(e for e in of_kind(events, "step") if e.step == 4).values["learning_rate"] == 0


@pytest.mark.parametrize("mode", ["power", "sketch", "alternate"])
def test_the_rank_of_the_update_grows_by_one_with_each_merge(
    engine: Engine, plan: Plan, store: RunStore, mode: str
) -> None:
    # Far from convergence the directions differ, so that the rank is the number of merges.
    events_of(engine, plan(method="rank1", mode=mode, merge_every=2, steps=6, clip=0.0, learning_rate=0.05), store)
    ranks = {name: np.linalg.matrix_rank(delta, tol=1e-6) for name, delta, _ in engine.updates()}
    assert max(ranks.values()) <= 3
    assert np.mean(list(ranks.values())) > 1.5


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_killed_goes_on_bit_for_bit(
    engine: Engine, plan: Plan, store: RunStore, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = plan(**METHODS[method], steps=8, save_every=1, evaluate_every=3, accumulate=2, batch_size=1)
    whole = record_training(engine, chosen, Control(), store)
    straight = losses(list(whole.events))
    recorded = record_training(engine, chosen, Control(), store)
    for event in recorded.events:
        if event.kind == "step" and event.step == 6:
            break  # as a kill would: what comes after a step is not done
    recorded.events.close()
    assert store.run(recorded.run.run_id).state == "failed"
    again = list(resume_training(engine, store.run(recorded.run.run_id), Control(), store).events)
    resumed = losses(again)
    assert min(resumed) == 6
    assert resumed == {step: straight[step] for step in resumed}
    metrics = store.metrics(recorded.run.run_id)
    rows = [row for row in metrics if row.kind == "step"]
    assert [row.step for row in rows] == list(range(1, 9))
    assert [row.step for row in metrics if row.kind == "evaluation"] == [3, 6, 8]
    assert [e.values["tokens"] for e in of_kind(again, "step")][-1] == rows[-1].values["tokens"]
    assert store.run(recorded.run.run_id).state == "done"
    files = [paths.runs() / r.run.run_id for r in (whole, recorded)]
    name = "model/model.safetensors" if (files[0] / "model").is_dir() else "adapter/adapter_model.safetensors"
    assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()


def test_a_kill_at_the_end_of_the_warm_start_is_gone_on_from(engine: Engine, plan: Plan, store: RunStore) -> None:
    chosen = plan(**METHODS["relora"], steps=6, save_every=1)
    straight = losses(events_of(engine, chosen, store))
    recorded = record_training(engine, chosen, Control(), store)
    for event in recorded.events:
        if event.kind == "step" and event.step == chosen.warm_start + 1:
            break
    recorded.events.close()
    again = list(resume_training(engine, store.run(recorded.run.run_id), Control(), store).events)
    assert [e.step for e in of_kind(again, "resumed")] == [chosen.warm_start]
    assert losses(again) == {step: loss for step, loss in straight.items() if step > chosen.warm_start}


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(engine: Engine, plan: Plan, store: RunStore) -> None:
    run = record_training(engine, plan(steps=4, save_every=1), Control(), store)
    straight = losses(list(run.events))
    folder = paths.runs() / run.run.run_id / "checkpoints"
    newest = sorted(folder.glob("step-*"))[-1]
    (newest / "parameters.safetensors").write_bytes(b"nothing")
    store.set_state(run.run.run_id, "failed")
    events = list(resume_training(engine, store.run(run.run.run_id), Control(), store).events)
    assert any("parameters.safetensors" in e.values["text"] for e in of_kind(events, "warning"))
    assert losses(events) == {4: straight[4]}


def test_a_run_that_is_complete_or_another_s_is_not_resumed(engine: Engine, plan: Plan, store: RunStore) -> None:
    run = record_training(engine, plan(steps=2), Control(), store)
    list(run.events)
    with pytest.raises(UsageError, match="all of its 2 steps"):
        resume_training(engine, store.run(run.run.run_id), Control(), store)
    other = store.create("other", "training", "elsewhere", {**vars(plan())}, "", 3)
    store.set_state(other.run_id, "failed")
    with pytest.raises(UsageError, match="--engine elsewhere"):
        resume_training(engine, store.run(other.run_id), Control(), store)


def test_a_full_disk_ends_the_run_with_its_last_checkpoint(
    engine: Engine, plan: Plan, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = record_training(engine, plan(steps=5, save_every=2), Control(), store)
    write = checkpoints.write

    def full(folder: Path, step: int, *rest: Any) -> Any:
        if step > 2:
            raise GemmaTuiError(f"{folder}: the checkpoint does not fit, 0 MB are free; free some space, then resume")
        return write(folder, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "write", full)
        with pytest.raises(GemmaTuiError, match="does not fit"):
            list(run.events)
    failed = store.run(run.run.run_id)
    assert failed.state == "failed"
    assert "does not fit" in failed.error
    assert [e.step for e in of_kind(list(resume_training(engine, failed, Control(), store).events), "resumed")] == [2]


def test_diagnoses_tell_of_every_matrix(engine: Engine, plan: Plan, store: RunStore) -> None:
    chosen = plan(steps=4, diagnose_every=2, method="rank1", learning_rate=1e-3, batch_size=1)
    events = events_of(engine, chosen, store)
    found = of_kind(events, "diagnosis")
    assert [e.step for e in found] == [2, 4, 4]
    first, second, last = (e.values for e in found)
    for row in (first, second):
        assert 0 < row["rank1_energy"] <= 1
        assert row["gradient_stable_rank"] >= 1
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.1, abs=2e-5)
    assert first["drift"] is None or 0 <= first["drift"] <= 1
    assert last["effective_rank"] >= 1
    matrices = of_kind(events, "matrices")
    names = {name for e in matrices for name in e.values["updates"]}
    assert len(names) == 14
    assert set(matrices[0].values["gradients"]) == names
    assert set(matrices[-1].values["updates"]) == names
    assert [row.kind for row in store.metrics(store.runs(1)[0].run_id)].count("diagnosis") == 3


def test_the_matrices_turns_go_on_with_a_run(
    engine: Engine, plan: Plan, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "SHARE", 0.0)  # one at each diagnosis
    control = Control()
    chosen = plan(steps=5, diagnose_every=1, evaluate_every=0)
    run = record_training(engine, chosen, control, store)
    for event in run.events:
        if (event.kind, event.step) == ("matrices", 3):
            control.stop.set()
    events = resume_training(engine, store.run(run.run.run_id), Control(), store).events
    looked = [next(iter(e.values["updates"])) for e in events if e.kind == "matrices" and e.values["gradients"]]
    assert looked == diagnosis.matrices_of(read_config(paths.models() / "tiny"))[3:5]


def test_ranks_have_their_closed_forms() -> None:
    generator = np.random.default_rng(0)
    u, v = (np.linalg.qr(generator.standard_normal((n, 4)))[0] for n in (12, 9))
    flat = (u @ v.T).astype(np.float32)
    values = singular_values(flat)
    assert values[:4] == pytest.approx(1, abs=1e-5)
    assert effective_rank(values[:4]) == pytest.approx(4, rel=1e-5)
    assert stable_rank(values) == pytest.approx(4, rel=1e-5)
    assert effective_rank(np.zeros(3)) == 0
    weights = np.array([0.7, 0.2, 0.1])
    assert effective_rank(3 * weights) == pytest.approx(math.exp(-(weights * np.log(weights)).sum()))
    wide = generator.standard_normal((5, 40)).astype(np.float32)
    assert singular_values(wide) == pytest.approx(np.linalg.svd(wide, compute_uv=False), rel=1e-4)
    assert singular_values(wide.T) == pytest.approx(singular_values(wide), rel=1e-5)


def test_the_estimate_learns_from_runs_that_were_alike(engine: Engine, plan: Plan, store: RunStore) -> None:
    def estimated(**values: Any) -> str:
        return str(of_kind(events_of(engine, plan(steps=1, **values), store), "start")[0].values["estimated"])

    assert "as earlier runs measured" not in estimated()
    assert "as earlier runs measured" in estimated()
    assert "as earlier runs measured" not in estimated(batch_size=1)


def test_patience_ends_a_run_and_the_best_is_kept(engine: Engine, plan: Plan, store: RunStore) -> None:
    chosen = plan(steps=40, evaluate_every=1, patience=2, method="full", optimizer="sgd", learning_rate=30.0, clip=0.0)
    events = events_of(engine, chosen, store)
    valid = [e.values["valid_loss"] for e in of_kind(events, "evaluation")]
    assert len(valid) < 40
    assert len(of_kind(events, "early_stop")) == 1
    assert min(valid) == pytest.approx(valid[-3])
    assert (paths.runs() / store.runs(1)[0].run_id / "best" / "model" / "model.safetensors").is_file()
    assert store.runs(1)[0].state == "done"


def test_out_of_memory_halves_the_micro_batch_and_the_loss_stays(
    engine: Engine, plan: Plan, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = plan(steps=3, batch_size=4)
    straight = [float.fromhex(loss) for loss in losses(events_of(engine, chosen, store)).values()]
    step = type(engine).train_step

    def short(self: Engine, batches: Any, rate: float, observe: bool = False) -> Any:
        if max(len(batch.tokens) for batch in batches) > 1:
            raise MemoryError
        return step(self, batches, rate, observe)

    monkeypatch.setattr(type(engine), "train_step", short)
    events = events_of(engine, chosen, store)
    assert [e.values["text"].split(":")[0] for e in of_kind(events, "warning")] == ["out of memory"] * 2
    halved = [float.fromhex(loss) for loss in losses(events).values()]
    assert halved == pytest.approx(straight, rel=1e-4)


def test_a_stopped_run_goes_on_where_it_was(engine: Engine, plan: Plan, store: RunStore) -> None:
    control = Control()
    run = record_training(engine, plan(steps=6), control, store)
    for event in run.events:
        if event.kind == "step" and event.step == 3:
            control.stop.set()
    assert store.run(run.run.run_id).state == "stopped"
    events = list(resume_training(engine, store.run(run.run.run_id), Control(), store).events)
    steps = [e.step for e in of_kind(events, "step")]
    assert steps == [4, 5, 6]
    assert all(b - a == 1 for a, b in pairwise(steps))
