"""What a method trains, and what those that merge do after a step."""

from __future__ import annotations

from engines.base import Engine
from engines.training import LoRASettings, Rank1Settings, TrainingSettings
from gemma_tui.studies.events import Event
from gemma_tui.studies.training_plan import MERGING, TrainingPlan


def usual_settings(method: str, rank: int = 8) -> TrainingSettings:
    """What ``lora``, ``relora``, ``rank1`` or ``full`` trains where a plan says nothing else.

    Args:
        rank: of adapters.

    Raises:
        ValueError: it is none of these.
    """
    match method:
        case "lora" | "relora":
            return TrainingSettings(LoRASettings(rank, 2.0 * rank), merging=method == "relora")
        case "rank1":
            return TrainingSettings(rank1=Rank1Settings())
        case "full":
            return TrainingSettings()
    raise ValueError(method)


def after_step(engine: Engine, plan: TrainingPlan, step: int, count: bool) -> Event | None:
    """Merge and restart where the plan says so.

    ReLoRA (arXiv:2307.05695, algorithm 1) merges when its rate has fallen to zero, draws A again and prunes the
    optimizer's state; rank-1 updates are merged and found anew.

    Args:
        count: whether the share of the weights that a merge changed is counted.
    """
    step -= plan.full_rank_steps
    if plan.method not in MERGING or step < 1:
        return None
    values: dict[str, float] = {}
    if step % plan.merge_interval == 0:
        merge = engine.merge(_reset(plan), plan.seed + step, count or plan.method == "relora")
        values |= {"merged": merge.norm}
        if merge.changed is not None:
            values |= {"changed": merge.changed}
        if plan.method == "rank1" and plan.mode == "alternate":
            engine.prune_optimizer("reset", 1.0, plan.seed)
    if plan.method == "relora" and step % plan.reset_every == 0:
        values |= {"pruned": engine.prune_optimizer(plan.prune, plan.prune_ratio, plan.seed + step)}
    told = plan.method == "relora" or count
    return Event("merge", step + plan.full_rank_steps, values) if values and told else None


def _reset(plan: TrainingPlan) -> str:
    if plan.method == "relora":
        return "fresh"
    return "direction" if plan.mode == "alternate" else "keep"
