"""A model, or a run's result, from its name onto an engine."""

from __future__ import annotations

from engines.base import Engine, Progress
from gemma_tui.hub import models


def load(engine: Engine, name: str, dtype: str | None = None, progress: Progress | None = None) -> models.Model:
    """Load what a name stands for, with its adapter if it has one.

    Args:
        dtype: of the weights; None takes the device's default.

    Raises:
        EngineError: it is not there or not usable.
    """
    model = models.resolve(name, progress)
    engine.load(model.folder, dtype, progress)
    if model.adapter is not None:
        engine.load_adapter(model.adapter)
    return model
