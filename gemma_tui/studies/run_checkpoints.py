"""The checkpoints of a training run, as models that other studies look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engines.base import Engine
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.hub.models import Model, resolve
from gemma_tui.runs import checkpoints
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.training import open_model, settings_at
from gemma_tui.studies.training_plan import TrainingPlan, plan_of


@dataclass(frozen=True)
class RunCheckpoint:
    """A whole checkpoint of a run, and the step it was kept at."""

    run: Run
    path: Path
    step: int

    @property
    def plan(self) -> TrainingPlan:
        """How the run was trained."""
        return plan_of(self.run.plan)


def kept_checkpoints(store: RunStore, name: str) -> list[RunCheckpoint]:
    """The whole checkpoints of a training run, the oldest first.

    Raises:
        GemmaTuiError: there is no such run, it is no training run, or it has none.
    """
    run = store.run(name)
    if run.study != "training":
        raise UsageError(f"{run.run_id} is no training run: name one that is")
    found = [RunCheckpoint(run, path, step) for path, step in checkpoints.whole(run.folder / "checkpoints")]
    if not found:
        raise GemmaTuiError(f"{run.run_id} has no checkpoint: train with --keep N and --save-every M")
    return found


def training_run(store: RunStore, model: Model) -> Run | None:
    """The training run that a model is the result of, if the store knows it."""
    if model.source != "run":
        return None
    try:
        run = store.run(model.name)
    except GemmaTuiError:  # its folder is there, but not the run
        return None
    return run if run.run_id == model.name and run.study == "training" else None


def load_checkpoint(engine: Engine, checkpoint: RunCheckpoint) -> Model:
    """Load what a run had made at a checkpoint; returns the model it started from.

    Raises:
        EngineError: that model is gone, or the checkpoint is damaged.
    """
    plan = checkpoint.plan
    model = resolve(plan.model)
    open_model(engine, model, plan)
    engine.start_training(settings_at(plan, checkpoint.step))
    engine.load_state(checkpoint.path)
    return model
