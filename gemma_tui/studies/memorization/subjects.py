"""The models of a measurement: what is measured, a result or the checkpoints of a run, and what it is held against."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from engines.base import Engine
from engines.gemma3 import Gemma3Config
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.hub.identity import model_digest
from gemma_tui.hub.models import Model, resolve
from gemma_tui.runs.checkpoints import MANIFEST
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.memorization.bits import Parameters
from gemma_tui.studies.memorization.plan import MemorizationPlan
from gemma_tui.studies.run_checkpoints import RunCheckpoint, kept_checkpoints, load_checkpoint, training_run
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.studies.training_plan import plan_of as training_plan_of

REFERENCE, TARGET = "reference", "target"


@dataclass(frozen=True)
class Subject:
    """A model that scores the sequences.

    Attributes:
        key: the folder of its scores.
        model: what is loaded; of a checkpoint the model that training began with.
        step: of a checkpoint.
    """

    key: str
    model: Model
    checkpoint: RunCheckpoint | None = None

    @property
    def name(self) -> str:
        """For a person."""
        at = self.checkpoint
        return self.model.name if at is None else f"{at.run.run_id} at step {at.step}"

    @property
    def step(self) -> int | None:
        """The training step of a checkpoint."""
        return self.checkpoint.step if self.checkpoint else None

    def digest(self) -> str:
        """What the scores hang on: its files' contents.

        Raises:
            GemmaTuiError: a file cannot be read.
        """
        if self.checkpoint is None:
            return model_digest(self.model.folder, self.model.adapter)
        path = self.checkpoint.path / MANIFEST
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise GemmaTuiError(f"{path} cannot be read ({error.strerror}): the checkpoint is gone") from None

    def load(self, engine: Engine, dtype: str | None) -> None:
        """Bring it onto the engine.

        Raises:
            EngineError: it is gone or not usable.
        """
        if self.checkpoint is not None:
            load_checkpoint(engine, self.checkpoint)
            engine.stop_training()
            return
        engine.load(self.model.folder, dtype)
        if self.model.adapter is not None:
            engine.load_adapter(self.model.adapter)


@dataclass(frozen=True)
class Subjects:
    """All models of a measurement.

    Attributes:
        reference: None for the code that spends log2 V bits on every token.
        implied: whether the reference is what the target was trained from, rather than one that was named.
        trained: how the target was trained, if it is the result of a run.
        parameters: of the target.
        dtype: of the weights.
    """

    targets: list[Subject]
    reference: Subject | None
    implied: bool
    trained: TrainingPlan | None
    parameters: Parameters
    dtype: str | None

    @property
    def folder(self) -> Path:
        """Of the target's tokenizer."""
        return self.targets[0].model.folder

    @property
    def config(self) -> Gemma3Config:
        """Of the target."""
        return self.targets[0].model.config()


def subjects_of(plan: MemorizationPlan, store: RunStore) -> Subjects:
    """The models that a plan names.

    Raises:
        EngineError: one is not here, a run has no checkpoints, or the target is its own reference.
    """
    if plan.checkpoints and plan.dtype:
        raise UsageError("dtype: checkpoints are read in the dtype of their run: leave --dtype out")
    if plan.checkpoints:
        kept = kept_checkpoints(store, plan.model)
        run: Run | None = kept[0].run
        began = resolve(kept[0].plan.model)
        targets = [Subject(f"step-{at.step:08d}", began, at) for at in kept]
    else:
        model = resolve(plan.model)
        run = training_run(store, model)
        targets = [Subject(TARGET, model)]
    trained = training_plan_of(run.plan) if run else None
    reference = resolve(plan.reference) if plan.reference else _base(targets[0].model, trained)
    if reference is not None and not plan.checkpoints and _same(reference, targets[0].model):
        raise UsageError(f"{plan.model} would be held against itself: take another --reference")
    config = targets[0].model.config()
    return Subjects(
        targets,
        None if reference is None else Subject(REFERENCE, reference),
        not plan.reference,
        trained,
        Parameters(config.parameter_count(), config.parameter_count(embeddings=False), _trainable(store, run)),
        trained.dtype if plan.checkpoints and trained else plan.dtype,
    )


def _base(model: Model, trained: TrainingPlan | None) -> Model | None:
    """What a target was made from; nothing if its weights were fresh, or nobody knows."""
    if trained is not None:
        return None if trained.fresh else resolve(trained.model)
    if model.adapter is not None:
        return replace(model, name=f"the base of {model.name}", adapter=None, source="folder")
    return None


def _same(one: Model, other: Model) -> bool:
    return one.folder.resolve() == other.folder.resolve() and one.adapter == other.adapter


def _trainable(store: RunStore, run: Run | None) -> int | None:
    """As the run told when it began."""
    if run is None:
        return None
    told = [event.values.get("trainable") for event in store.events(run.run_id, limit=100) if event.kind == "start"]
    return told[0] if told and isinstance(told[0], int) else None
