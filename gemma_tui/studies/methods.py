"""What the methods that merge do after a step."""

from __future__ import annotations

from engines.base import Engine
from gemma_tui.studies.events import Event
from gemma_tui.studies.training_plan import MERGING, TrainingPlan


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
