"""Every study that is a run: how it is begun, and gone on with. Each is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.base import Engine
    from gemma_tui.runs.store import Run, RunStore
    from gemma_tui.studies.events import Control
    from gemma_tui.studies.recording import Recorded


def begin(study: str, plan: Any, engine: Engine, control: Control, store: RunStore) -> Recorded:
    """Register a run of a plan, and make its events; nothing is computed before they are asked for.

    Raises:
        EngineError: the plan cannot be carried out.
        ValueError: there is no such study.
    """
    match study:
        case "training":
            from gemma_tui.studies.recording import record_training

            return record_training(engine, plan, control, store)
        case "heads":
            from gemma_tui.studies.attention.survey import record_heads

            return record_heads(engine, plan, control, store)
        case "capacity":
            from gemma_tui.studies.capacity.sweep import record_capacity

            return record_capacity(engine, plan, control, store)
        case "memorization":
            from gemma_tui.studies.memorization.meter import record_memorization

            return record_memorization(engine, plan, control, store)
        case "where":
            from gemma_tui.studies.memorization.where import record_where

            return record_where(engine, plan, control, store)
        case "curve":
            from gemma_tui.studies.curve.measure import record_curve

            return record_curve(engine, plan, control, store)
        case "bench":
            from gemma_tui.studies.bench.measuring import record_bench

            return record_bench(plan, control, store)
    raise ValueError(study)


def resume(run: Run, engine: Engine, control: Control, store: RunStore, more: Any = None) -> Recorded:
    """Take over a run that has ended before its last step, and make its events from there on.

    Args:
        more: ``MoreCells`` that a sweep over capacity gets.

    Raises:
        EngineError: there is nothing left to do, another process computes it, or its engine is another one.
        ValueError: there is no such study.
    """
    match run.study:
        case "training":
            from gemma_tui.studies.recording import resume_training

            return resume_training(engine, run, control, store)
        case "heads":
            from gemma_tui.studies.attention.survey import resume_heads

            return resume_heads(engine, run, control, store)
        case "capacity":
            from gemma_tui.studies.capacity.sweep import resume_capacity

            return resume_capacity(engine, run, control, store, more)
        case "memorization":
            from gemma_tui.studies.memorization.meter import resume_memorization

            return resume_memorization(engine, run, control, store)
        case "where":
            from gemma_tui.studies.memorization.where import resume_where

            return resume_where(engine, run, control, store)
        case "curve":
            from gemma_tui.studies.curve.measure import resume_curve

            return resume_curve(engine, run, control, store)
        case "bench":
            from gemma_tui.studies.bench.measuring import resume_bench

            return resume_bench(run, control, store)
    raise ValueError(run.study)
