from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import TEXTS, write_rows

from engines.base import Engine
from engines.errors import EngineError
from engines.gemma3 import read_config
from engines.training import StepResult
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.hub.models import resolve
from gemma_tui.runs.comparison import Comparison
from gemma_tui.runs.store import RunStore
from gemma_tui.studies import events as events_module
from gemma_tui.studies import recording
from gemma_tui.studies.data import Splits, read_splits, training_batches
from gemma_tui.studies.events import Control, Event, passing
from gemma_tui.studies.plan import options
from gemma_tui.studies.queueing import method_variations
from gemma_tui.studies.recording import Recorded, record_training
from gemma_tui.studies.training import evaluate
from gemma_tui.studies.training_plan import METHODS, OPTIMIZERS, TrainingPlan
from gemma_tui.tokenizer import Tokenizer

Plan = Callable[..., TrainingPlan]
RESULT = {
    "lora": "adapter", "dora": "adapter", "full": "model", "relora": "model", "rank1": "model", "sbd": "model",
    "sbd-lora": "adapter",
}  # fmt: skip


def finished(engine: Engine, plan: TrainingPlan, store: RunStore) -> tuple[str, list[Event]]:
    """The run's name and all its events."""
    recorded = record_training(engine, plan, Control(), store)
    return recorded.run.run_id, list(recorded.events)


def evaluated(engine: Engine, splits: Splits, size: int) -> float:
    """The loss on all validation windows."""
    events = evaluate(engine, splits, size, 0, Control())
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


def losses(events: list[Event]) -> list[float]:
    return [event.values["loss"] for event in events if event.kind == "step"]


def loaded_logits(engine: Engine, name: str, tokens: np.ndarray) -> np.ndarray:
    """Logits of what a name means, read from disk."""
    model = resolve(name)
    engine.load(model.folder, "float32")
    if model.adapter is not None:
        engine.load_adapter(model.adapter)
    return engine.logits(tokens)


@pytest.fixture
def prompt(tokenizer: Tokenizer) -> np.ndarray:
    return np.array([tokenizer.encode(TEXTS[0])], np.int32)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_tells_what_happens_in_order_and_the_store_keeps_it(
    engine: Engine, plan: Plan, store: RunStore, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(events_module, "PACE_SECONDS", math.inf)  # how far a slow evaluation is comes in between
    run_id, events = finished(engine, plan(method=method), store)
    training = ["step", "step", "evaluating", "evaluation", "step", "evaluating", "evaluation"]
    assert [e.kind for e in events] == ["run", "load", "start", *training, "checkpoint", "end"]
    assert [e.step for e in events] == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3]
    assert [(row.kind, row.step, row.values) for row in store.metrics(run_id)] == [
        (e.kind, e.step, e.values) for e in events if e.kind in ("step", "evaluation")
    ]
    assert [row.kind for row in store.events(run_id)] == ["load", "start", "checkpoint"]
    run = store.run(run_id)
    assert (run.state, run.step, run.steps, run.engine) == ("done", 3, 3, engine.name)
    assert events[-1].values == {"status": "done", "run": run_id}
    json.dumps([e.row() for e in events], allow_nan=False)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_heeds_the_options_that_the_form_shows_for_it_and_no_others(
    engine: Engine, plan: Plan, store: RunStore, optimizer: str
) -> None:
    def after_two_updates(**values: float) -> float:
        small = plan(method="full", optimizer=optimizer, evaluate_every=0, **values)
        return losses(finished(engine, small, store)[1])[-1]

    usual = after_two_updates()
    for o in options(TrainingPlan):
        if o.optimizers:
            assert (after_two_updates(**{o.name: 0.5}) != usual) is o.honoured({"optimizer": optimizer}), o.name


def test_the_four_methods_fill_a_table_of_results(engine: Engine, plan: Plan, store: RunStore) -> None:
    runs = [finished(engine, varied, store)[0] for varied in method_variations(plan(steps=4, memorization_every=4))]
    comparison = Comparison([store.run(run) for run in runs])
    comparison.read_all(store)
    for compared in comparison.runs:
        missing = [name for name, value in asdict(compared.result(1)).items() if value is None]
        assert not missing, compared.run.run_id
    ranks = [compared.result(1).effective_rank for compared in comparison.runs]
    assert all(rank is not None and rank > 0 for rank in ranks)


def test_a_step_tells_the_rate_of_the_plan_and_how_many_tokens_it_saw(
    engine: Engine, plan: Plan, store: RunStore, corpus: Path, tokenizer: Tokenizer
) -> None:
    chosen = plan(steps=4, warmup=2, accumulate=2, seed=7)
    _, events = finished(engine, chosen, store)
    steps = [e.values for e in events if e.kind == "step"]
    assert [v["learning_rate"] for v in steps] == pytest.approx([0.005, 0.01, chosen.rate(3), 0.001])
    batches = list(islice(training_batches(read_splits(str(corpus), tokenizer, 32).train, 2, seed=7), 8))
    seen = np.cumsum([a.supervised + b.supervised for a, b in zip(batches[::2], batches[1::2], strict=True)])
    assert [v["tokens"] for v in steps] == seen.tolist()
    assert all(v["tokens_per_second"] > 0 and v["memory"] > 0 for v in steps)


def test_a_run_is_remembered_by_the_most_it_took_and_not_by_what_stands_between_its_steps(
    engine: Engine, plan: Plan, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocator that holds 300 bytes of others' throughout, and whose peak was higher before the run."""
    peaks = iter([9000, 800, 800, 1100, 2100, 1900])
    monkeypatch.setattr(engine, "memory", lambda: 300)
    monkeypatch.setattr(engine, "peak_memory", lambda reset=False: next(peaks))
    run_id, events = finished(engine, plan(steps=4), store)
    assert [e.values["peak_memory"] for e in events if e.kind == "step"] == [0, 800, 1800, 1600]
    told = next(e.values["estimate"] for e in events if e.kind == "start")
    assert list(recording.experience(store, plan(steps=9), engine.name)) == [(told, 1800)]
    assert not list(recording.experience(store, plan(steps=9), engine.name, run_id))
    assert not list(recording.experience(store, plan(rank=3), engine.name))


def test_runs_that_copy_other_rows_are_not_alike(engine: Engine, plan: Plan, store: RunStore) -> None:
    """Rows without masked copies are half as many."""
    finished(engine, plan(method="sbd", masked_weight=0.0), store)
    assert list(recording.experience(store, plan(method="sbd", masked_weight=0.0), engine.name))
    assert not list(recording.experience(store, plan(method="sbd"), engine.name))


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(engine: Engine, plan: Plan, store: RunStore, method: str) -> None:
    chosen = plan(method=method, steps=12, schedule="constant", evaluate_every=6, rank=8, alpha=64.0)
    _, events = finished(engine, chosen, store)
    found = losses(events)
    # Adapters on random weights learn slowly; what does not learn stays within 0.02.
    assert np.mean(found[-3:]) < np.mean(found[:3]) - 0.05
    valid = [e.values["valid_loss"] for e in events if e.kind == "evaluation"]
    assert valid[-1] < found[0]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_computes_what_was_trained(
    engine: Engine, plan: Plan, store: RunStore, prompt: np.ndarray, method: str
) -> None:
    run_id, _ = finished(engine, plan(method=method, dtype="float32"), store)
    trained = engine.logits(prompt)
    assert resolve(run_id).source == "run"
    assert (paths.runs() / run_id / RESULT[method]).is_dir()
    np.testing.assert_allclose(loaded_logits(engine, run_id, prompt), trained, atol=1e-5)
    assert np.abs(loaded_logits(engine, "tiny", prompt) - trained).max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_one_engine_reads_what_the_other_trained(
    both_engines: tuple[Engine, Engine], plan: Plan, store: RunStore, prompt: np.ndarray, method: str
) -> None:
    for trainer, reader in (both_engines, both_engines[::-1]):
        run_id, _ = finished(trainer, plan(method=method, dtype="float32"), store)
        np.testing.assert_allclose(loaded_logits(reader, run_id, prompt), trainer.logits(prompt), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_both_engines_train_alike(
    both_engines: tuple[Engine, Engine], plan: Plan, store: RunStore, method: str
) -> None:
    chosen = plan(method=method, steps=8, dtype="float32", accumulate=2, weight_decay=0.1)
    ours, theirs = (losses(finished(engine, chosen, store)[1]) for engine in both_engines)
    assert ours == pytest.approx(theirs, rel=0.01)


def test_a_run_is_the_same_for_a_seed_and_another_for_another(engine: Engine, plan: Plan, store: RunStore) -> None:
    first, again, other = (losses(finished(engine, plan(seed=seed), store)[1]) for seed in (1, 1, 2))
    assert first == pytest.approx(again, rel=1e-6)
    assert first != pytest.approx(other, rel=1e-6)


def test_the_evaluation_loss_is_the_mean_of_the_log_probabilities(
    engine: Engine, tiny: str, corpus: Path, tokenizer: Tokenizer
) -> None:
    engine.load(resolve(tiny).folder, "float32")
    splits = read_splits(str(corpus), tokenizer, 32)
    log_probs = np.concatenate([engine.log_probs(window.ids[None])[0] for window in splits.valid])
    for size in (1, 3):
        assert evaluated(engine, splits, size) == pytest.approx(-log_probs.mean(), rel=1e-5)


def test_an_evaluation_is_of_the_model_as_it_is_then(
    engine: Engine, plan: Plan, store: RunStore, corpus: Path, tokenizer: Tokenizer
) -> None:
    chosen = plan(method="full", dtype="float32", evaluate_batches=0)
    run_id, events = finished(engine, chosen, store)
    engine.load(resolve(run_id).folder, "float32")
    last = [e.values for e in events if e.kind == "evaluation"][-1]
    loss = evaluated(engine, read_splits(str(corpus), tokenizer, 32), 2)
    assert last["valid_loss"] == pytest.approx(loss, rel=1e-5)
    assert last["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)


def driven(recorded: Recorded, act: Callable[[Event], None]) -> list[Event]:
    """All events, after each of which ``act`` may steer the run."""
    found = []
    for event in recorded.events:
        found.append(event)
        act(event)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_stopped_saves_what_it_has(
    engine: Engine, plan: Plan, store: RunStore, prompt: np.ndarray, method: str
) -> None:
    control = Control()
    recorded = record_training(engine, plan(method=method, steps=1000, dtype="float32"), control, store)
    events = driven(recorded, lambda e: control.stop.set() if (e.kind, e.step) == ("step", 3) else None)
    assert [e.kind for e in events[-3:]] == ["step", "checkpoint", "end"]
    run = store.run(recorded.run.run_id)
    assert (run.state, run.step) == ("stopped", 3)
    trained = engine.logits(prompt)
    np.testing.assert_allclose(loaded_logits(engine, run.run_id, prompt), trained, atol=1e-5)


def test_a_run_stopped_before_its_first_step_leaves_what_it_began_with(
    engine: Engine, plan: Plan, store: RunStore, prompt: np.ndarray
) -> None:
    control = Control()
    control.stop.set()
    recorded = record_training(engine, plan(dtype="float32"), control, store)
    assert [e.kind for e in recorded.events] == ["run", "load", "start", "checkpoint", "end"]
    began = loaded_logits(engine, "tiny", prompt)
    np.testing.assert_allclose(loaded_logits(engine, recorded.run.run_id, prompt), began, atol=1e-6)


def test_a_pause_waits_between_steps_and_changes_no_number(engine: Engine, plan: Plan, store: RunStore) -> None:
    control, states = Control(), []

    def act(event: Event) -> None:
        if (event.kind, event.step) == ("step", 2):
            control.pause.set()
        if event.kind == "waiting":
            control.pause.clear()
        states.append((event.kind, store.run("lora-2").state))

    _, through = finished(engine, plan(), store)
    events = driven(record_training(engine, plan(), control, store), act)
    kinds = [e.kind for e in events]
    assert kinds[kinds.index("pause") :][:3] == ["pause", "waiting", "resume"]
    assert dict(states)["waiting"] == "paused"
    assert dict(states)["resume"] == "running"
    assert store.run("lora-2").state == "done"
    assert losses(events) == pytest.approx(losses(through), rel=1e-6)
    assert "waiting" not in {row.kind for row in store.events("lora-2")}


def test_a_paused_run_can_be_stopped(engine: Engine, plan: Plan, store: RunStore) -> None:
    control = Control()
    control.pause.set()
    recorded = record_training(engine, plan(), control, store)
    events = driven(recorded, lambda e: control.stop.set() if e.kind == "waiting" else None)
    assert [e.kind for e in events[-2:]] == ["checkpoint", "end"]
    assert store.run(recorded.run.run_id).state == "stopped"


def test_a_long_evaluation_tells_how_far_it_is(
    engine: Engine, plan: Plan, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "PACE_SECONDS", 0.0)
    told = [
        e for e in finished(engine, plan(steps=2, batch_size=1), store)[1] if e.kind in ("evaluating", "diagnosing")
    ]
    assert [e.values["done"] for e in told] == [0, 1, 2]
    assert {e.values["total"] for e in told} == {2}
    assert told[0].values["seconds_left"] is None
    assert told[1].values["seconds_left"] > told[2].values["seconds_left"] == pytest.approx(0, abs=1e-9)
    assert passing(told[0]) == "evaluating 0/2"
    assert re.fullmatch(r"evaluating 1/2, \d+ s left", passing(told[1]))
    kept = {row.kind for row in (*store.events("lora-1"), *store.metrics("lora-1"))}
    assert "evaluating" not in kept


def test_the_last_look_at_all_matrices_tells_how_far_it_is_and_stops(
    engine: Engine, plan: Plan, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "PACE_SECONDS", 0.0)
    control = Control()
    recorded = record_training(engine, plan(steps=2, diagnose_every=2), control, store)
    events = driven(recorded, lambda e: control.stop.set() if e.values.get("done") == 3 else None)
    told = [e for e in events if e.kind == "diagnosing"]
    assert [passing(e).split(",")[0] for e in told] == [f"diagnosing {n}/14" for n in range(4)]
    assert [e.kind for e in events[-4:]] == ["diagnosis", "matrices", "checkpoint", "end"]
    assert len(events[-3].values["updates"]) == 3


def test_an_evaluation_can_be_stopped_and_leaves_no_loss_of_a_part(
    engine: Engine, plan: Plan, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "PACE_SECONDS", 0.0)
    monkeypatch.setattr(recording, "REQUEST_SECONDS", 0.0)
    control, other = Control(), RunStore()

    def act(event: Event) -> None:
        if event.kind == "evaluating" and event.values["done"] == 1:
            other.request("lora-1", "stop")

    chosen = plan(batch_size=1, evaluate_batches=4, keep_best=True, diagnose_every=2)
    events = driven(record_training(engine, chosen, control, store), act)
    other.close()
    assert [e.kind for e in events if e.step == 2][-4:] == ["evaluating", "evaluating", "checkpoint", "end"]
    assert store.run("lora-1").state == "stopped"
    assert not (paths.runs() / "lora-1" / "best").exists()


@pytest.mark.parametrize("paused", [False, True])
def test_another_process_may_ask_a_run_to_stop(
    engine: Engine, plan: Plan, store: RunStore, monkeypatch: pytest.MonkeyPatch, paused: bool
) -> None:
    monkeypatch.setattr(recording, "REQUEST_SECONDS", 0.0)
    control, other = Control(), RunStore()
    if paused:
        control.pause.set()
    recorded = record_training(engine, plan(steps=1000), control, store)
    ask = "waiting" if paused else "step"
    events = driven(recorded, lambda e: other.request(recorded.run.run_id, "stop") if e.kind == ask else None)
    other.close()
    assert store.run(recorded.run.run_id).state == "stopped"
    assert [e.kind for e in events[-2:]] == ["checkpoint", "end"]
    assert len(events) < 20


def test_saves_come_as_often_as_asked(engine: Engine, plan: Plan, store: RunStore) -> None:
    _, events = finished(engine, plan(steps=5, save_every=2, evaluate_every=0), store)
    assert [(e.kind, e.step) for e in events if e.kind in ("checkpoint", "evaluation")] == [
        ("checkpoint", 2),
        ("checkpoint", 4),
        ("checkpoint", 5),
    ]


def test_an_early_save_is_whole_while_the_run_goes_on(
    engine: Engine, plan: Plan, store: RunStore, prompt: np.ndarray
) -> None:
    recorded = record_training(engine, plan(steps=4, save_every=2, dtype="float32"), Control(), store)
    next(e for e in recorded.events if e.kind == "checkpoint")
    early = engine.logits(prompt)
    np.testing.assert_allclose(loaded_logits(engine, recorded.run.run_id, prompt), early, atol=1e-5)


def broken_rows(folder: Path) -> str:
    path = write_rows(folder / "broken.jsonl", TEXTS[:2])
    path.write_text(path.read_text() + '{"prompt": "a"}\n')
    return str(path)


FAILURES: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "no data": (lambda folder: {"data": str(folder / "none.jsonl")}, "none.jsonl does not exist"),
    "a broken row": (
        lambda folder: {"data": broken_rows(folder)},
        r'broken.jsonl:3: the row has "prompt" but no "completion"',
    ),
    "no model": (lambda folder: {"model": "nothing-here"}, "no model 'nothing-here'"),
    "a model without a tokenizer": (lambda folder: {"model": without_tokenizer()}, "tokenizer.json is missing"),
    "the home of no one": (lambda folder: {"data": "~no-such-user/data.txt"}, "data.txt does not exist"),
}


def without_tokenizer() -> str:
    (paths.models() / "tiny" / "tokenizer.json").unlink()
    return "tiny"


@pytest.mark.parametrize("kind", FAILURES)
def test_a_run_that_fails_says_why_and_is_kept_as_failed(
    engine: Engine, plan: Plan, store: RunStore, tmp_path: Path, kind: str
) -> None:
    values, reason = FAILURES[kind]
    recorded = record_training(engine, plan(**values(tmp_path)), Control(), store)
    with pytest.raises(EngineError, match=reason):
        list(recorded.events)
    run = store.run(recorded.run.run_id)
    assert run.state == "failed"
    assert reason.replace("\\", "") in run.error


def test_an_error_of_any_kind_leaves_no_run_running(
    engine: Engine, plan: Plan, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "train_step", fail)
    recorded = record_training(engine, plan(), Control(), store)
    with pytest.raises(KeyboardInterrupt):
        list(recorded.events)
    assert store.run(recorded.run.run_id).state == "failed"


def test_gradients_that_stay_infinite_end_the_run(
    engine: Engine, plan: Plan, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "train_step", lambda *_: StepResult(float("nan"), 8, float("inf"), applied=False))
    recorded = record_training(engine, plan(steps=100), Control(), store)
    with pytest.raises(
        GemmaTuiError,
        match=r"10 gradients .* micro-batch 9: lower the learning rate",
    ):
        list(recorded.events)
    steps = [row for row in store.metrics(recorded.run.run_id) if row.kind == "step"]
    assert [row.values["loss"] for row in steps] == [None] * 10
    assert [e.kind for e in store.events(recorded.run.run_id)].count("warning") == 10


def test_a_single_infinite_gradient_is_a_warning(
    engine: Engine, plan: Plan, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, results = engine.train_step, iter([False, True, False])
    monkeypatch.setattr(engine, "train_step", lambda *given: replace(real(*given), applied=next(results)))
    run_id, _ = finished(engine, plan(), store)
    assert [e.step for e in store.events(run_id) if e.kind == "warning"] == [1, 3]
    assert store.run(run_id).state == "done"


def test_full_training_goes_on_from_an_adapter(engine: Engine, plan: Plan, store: RunStore, prompt: np.ndarray) -> None:
    first, _ = finished(engine, plan(dtype="float32"), store)
    adapted = engine.logits(prompt)
    still = plan(model=first, method="full", learning_rate=0.0, steps=1, dtype="float32")
    second, _ = finished(engine, still, store)
    np.testing.assert_allclose(loaded_logits(engine, second, prompt), adapted, atol=1e-5)


def test_an_adapter_on_an_adapter_is_refused_rather_than_dropped(engine: Engine, plan: Plan, store: RunStore) -> None:
    first, _ = finished(engine, plan(), store)
    with pytest.raises(UsageError, match=f"{first} is an adapter"):
        finished(engine, plan(model=first), store)


def test_a_fresh_run_begins_with_new_weights_of_its_seed(
    engine: Engine, plan: Plan, store: RunStore, prompt: np.ndarray
) -> None:
    still = plan(method="full", fresh=True, learning_rate=0.0, steps=1, seed=4, dtype="float32")
    run_id, _ = finished(engine, still, store)
    engine.initialise(read_config(paths.models() / "tiny"), 4, "float32")
    expected = engine.logits(prompt)
    np.testing.assert_allclose(loaded_logits(engine, run_id, prompt), expected, atol=1e-6)


def test_a_run_is_found_from_any_folder(
    engine: Engine, plan: Plan, store: RunStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(paths.models())
    run_id, _ = finished(engine, plan(model="./tiny"), store)
    monkeypatch.chdir(tmp_path)
    assert resolve(run_id).folder == (paths.models() / "tiny").resolve()
