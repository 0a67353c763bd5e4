"""Every study that is a run: how it is begun, gone on with, and shown. Each is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.base import Engine
    from gemma_tui.figure import Figure
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


def figure_of(run: Run, store: RunStore) -> Figure | None:
    """What a run has found so far; None of a training run, which has metrics in place of a figure.

    Raises:
        EngineError: it has found nothing yet, or what it was made from is gone.
    """
    match run.study:
        case "heads":
            from gemma_tui.studies.attention.plan import AttentionPlan
            from gemma_tui.studies.attention.survey import read_study, study_figure

            return study_figure(read_study(store, run), AttentionPlan().metric)
        case "capacity":
            from gemma_tui.studies.capacity.results import read_sweep, sweep_figure

            return sweep_figure(read_sweep(store, run))
        case "memorization":
            from gemma_tui.studies.memorization.results import memorization_figure, read_measured

            return memorization_figure(read_measured(store, run))
        case "where":
            from gemma_tui.studies.memorization.held import where_figure

            return where_figure(store, run)
        case "curve":
            from gemma_tui.studies.curve.results import curve_figure, read_curve

            return curve_figure(read_curve(store, run))
        case "bench":
            from gemma_tui.studies.bench.results import read_bench

            return read_bench(store, run)
    return None
