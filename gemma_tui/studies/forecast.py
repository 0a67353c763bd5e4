"""The memory that a plan will need, before an engine has the model."""

from __future__ import annotations

from contextlib import closing

from engines.base import DeviceInfo
from gemma_tui.hub.models import no_import, resolve
from gemma_tui.output import count_text
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.estimate import estimate, remembered
from gemma_tui.studies.recording import experience
from gemma_tui.studies.training_plan import TrainingPlan, plan_config, settings


def forecast(plan: TrainingPlan, engine: str, device: DeviceInfo | None) -> str:
    """What a run of the plan will need, by its model's config and by earlier runs that were alike, for a person.

    Args:
        device: of the engine; None while it is not known, and then the model's size is all that can be told.

    Raises:
        EngineError: the model is not here or still waits to be imported, the plan could not begin, or there is no run
            store.
    """
    config = plan_config(plan, resolve(plan.model, no_import))
    if device is None:
        parameters = count_text(config.parameter_count())
        return f"{parameters} parameters; what they need here is told once {engine} has begun"
    with closing(RunStore()) as store:
        ratio = remembered(experience(store, plan, engine))
    return estimate(
        config, settings(plan), plan.rows, plan.sequence_length, plan.dtype or device.dtypes[0], device,
        plan.accumulate, ratio,
    ).text  # fmt: skip
