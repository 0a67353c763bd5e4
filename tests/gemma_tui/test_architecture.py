"""The same plan with other layers: windows and patterns of new weights, from the plan to the saved model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import TEXTS

from engines.base import DeviceInfo, Engine
from engines.gemma3 import GLOBAL, LOCAL, Gemma3Config, parse_config, read_config
from gemma_tui import paths
from gemma_tui.hub.models import Model, resolve
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.attention.looking import look, open_desk
from gemma_tui.studies.attention.plan import AttentionPlan
from gemma_tui.studies.attention.survey import HeadStudyPlan, study_heads
from gemma_tui.studies.estimate import estimate
from gemma_tui.studies.events import Control
from gemma_tui.studies.forecast import forecast
from gemma_tui.studies.plan import build
from gemma_tui.studies.recording import record_training, resume_training
from gemma_tui.studies.training_plan import TrainingPlan, plan_config, settings
from gemma_tui.tokenizer import Tokenizer

Plan = Callable[..., TrainingPlan]
Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]
FRESH = {"fresh": True, "method": "full", "dtype": "float32", "steps": 2, "evaluate_every": 0}
LAYERS = {0: (LOCAL, LOCAL), 1: (GLOBAL, GLOBAL), 2: (LOCAL, GLOBAL), 3: (LOCAL, LOCAL)}
"""By how many layers one is global, of two."""


def trained(engine: Engine, plan: TrainingPlan, store: RunStore) -> str:
    recorded = record_training(engine, plan, Control(), store)
    assert list(recorded.events)[-1].values["status"] == "done"
    return recorded.run.run_id


def without_layer_types(folder: Path, target: Path) -> Path:
    """A copy whose config tells the layers by their period only."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    raw = json.loads((folder / "config.json").read_text())
    del raw["layer_types"]
    (target / "config.json").write_text(json.dumps(raw))
    return target


def transformers_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.Gemma3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return theirs(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parametrize("every", [None, *LAYERS])
@pytest.mark.parametrize("window", [None, 3])
def test_only_new_weights_get_the_layers_of_the_plan(tiny: str, every: int | None, window: int | None) -> None:
    model = resolve(tiny)
    usual = model.config()
    values = {"model": tiny, "data": "d", "method": "full", "window": window, "global_every": every}
    assert plan_config(build(TrainingPlan, values), model) == usual
    expected = replace(
        usual, sliding_window=window or usual.sliding_window, layer_types=LAYERS.get(every, usual.layer_types)
    )
    assert plan_config(build(TrainingPlan, values | {"fresh": True}), model) == expected


def test_every_sixth_layer_is_the_pattern_of_gemma_3(
    four_to_one: Gemma3Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "config", lambda _: replace(four_to_one, layer_types=(GLOBAL,) * 7))
    plan = TrainingPlan("m", "d", fresh=True, global_every=6)
    assert plan_config(plan, Model("m", Path(), "folder")) == four_to_one


@pytest.mark.parametrize("every", LAYERS)
def test_the_trained_model_has_the_layers_and_transformers_reads_them(
    engine: Engine, plan: Plan, store: RunStore, tokenizer: Tokenizer, tmp_path: Path, every: int
) -> None:
    run_id = trained(engine, plan(**FRESH, window=4, global_every=every), store)
    folder = resolve(run_id).folder
    config = read_config(folder)
    assert (config.sliding_window, config.layer_types) == (4, LAYERS[every])
    start = next(event.values for event in store.events(run_id) if event.kind == "start")
    assert (start["window"], start["global_layers"]) == (4, list(config.global_layers))
    other = without_layer_types(folder, tmp_path / "other")
    assert parse_config(json.loads((other / "config.json").read_text())) == config

    tokens = np.array([tokenizer.encode(TEXTS[0])], np.int32)
    assert tokens.shape[1] > 4
    engine.load(folder, "float32")
    ours = engine.logits(tokens)
    for read in (folder, other):
        np.testing.assert_allclose(transformers_logits(read, tokens), ours, atol=2e-5)


def test_layers_and_window_change_what_is_learnt(engine: Engine, plan: Plan, store: RunStore) -> None:
    losses = {}
    for values in ({}, {"window": 2}, {"global_every": 1}, {"window": 8}, {"global_every": 2}):
        run_id = trained(engine, plan(**FRESH, **values), store)
        losses[str(values)] = store.metrics(run_id)[-1].values["loss"]
    usual = losses.pop("{}")
    assert [loss == usual for loss in losses.values()] == [False, False, True, True], (
        "the model has 8, and every second"
    )


def test_a_run_goes_on_with_its_own_layers(engine: Engine, plan: Plan, store: RunStore) -> None:
    whole = plan(**{**FRESH, "steps": 4, "save_every": 2}, window=2, global_every=0)
    straight = store.metrics(trained(engine, whole, store))
    control = Control()
    recorded = record_training(engine, whole, control, store)
    for event in recorded.events:
        if event.kind == "step" and event.step == 2:
            control.stop.set()
    engine.unload()
    list(resume_training(engine, store.run(recorded.run.run_id), Control(), store).events)
    resumed = store.metrics(recorded.run.run_id)
    assert [row.values["loss"] for row in resumed] == [row.values["loss"] for row in straight]


def test_checkpoints_are_looked_into_with_their_layers(
    engine: Engine, plan: Plan, store: RunStore, corpus: Path
) -> None:
    run_id = trained(engine, plan(**FRESH, window=3, global_every=0), store)
    study = HeadStudyPlan(study=str(corpus), rows=1, length=12, over=run_id)
    start, *_ = study_heads(engine, study, Control())
    assert parse_config(start.values["config"]) == read_config(resolve(run_id).folder)
    info = engine.model()
    assert info is not None
    assert info.config.layer_types == (LOCAL, LOCAL)


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("view", ["heads", "local-global", "sinks", "types"])
def test_a_model_with_layers_of_one_kind_is_looked_into(
    engine: Engine, tiny: str, plan: Plan, store: RunStore, every: int, view: str
) -> None:
    run_id = trained(engine, plan(**{**FRESH, "steps": 1}, window=4, global_every=every), store)
    desk, looked = open_desk(engine, run_id), AttentionPlan(text=TEXTS[0], view=view, repeats=8)
    assert list(look(desk, looked))[-1] <= 1


def test_the_memory_is_that_of_the_plans_layers(tiny: str, plan: Plan) -> None:
    device = DeviceInfo("torch", "cpu", "", ("float32",), 10**12)
    values = {**FRESH, "sequence_length": 2048, "batch_size": 1}
    seen = []
    for every in (0, 1):
        made = plan(**values, window=4, global_every=every)
        config = plan_config(made, resolve(tiny))
        guess = estimate(config, settings(made), 1, 2048, "float32", device)
        assert forecast(made, "torch", device) == guess.text
        seen.append(guess)
    assert seen[0].activations > seen[1].activations, "masks of local layers"
    assert seen[0].text != seen[1].text


def test_without_fresh_a_command_refuses_them(command: Commands, tiny: str, corpus: Path) -> None:
    words = ("train", "--model", tiny, "--data", str(corpus), "--method", "full")
    for option in (("--window", "8"), ("--global-every", "2")):
        code, _, errors = command(*words, *option)
        assert (code, errors.count("\n")) == (2, 1)
        assert f"{option[0]} is for new weights: add --fresh" in errors
    assert not paths.runs().exists()


def test_a_sweep_queues_them(command: Commands, tiny: str, corpus: Path) -> None:
    words = ["sweep", "--group", "g", "--set", f"model={tiny}", "--set", f"data={corpus}", "--set", "method=full"]
    choices = ("--set", "global_every=1,2,0", "--set", "window=4,8")
    code, rows, _ = command(*words, "--set", "fresh=true", *choices)
    assert (code, rows[-1]["kind"]) == (0, "end")
    code, _, errors = command(*words, *choices)
    assert code == 2
    assert "add --fresh" in errors
