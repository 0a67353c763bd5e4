"""Heads over many texts: means with confidence intervals, the texts a head shows most on, and how training moves both.

Every text is one event of a run, so a study that was broken off goes on with the text after.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from engines.base import Engine
from engines.gemma3 import Gemma3Config, parse_config
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.rows import read_sources
from gemma_tui.runs.store import Row, Run, RunStore
from gemma_tui.studies.attention.heads import METRICS, check_metric, grid, head_metrics, head_name
from gemma_tui.studies.attention.reading import read_tokens
from gemma_tui.studies.data import windows
from gemma_tui.studies.events import Control, Event, wait_while_paused
from gemma_tui.studies.intervals import interval
from gemma_tui.studies.loading import load
from gemma_tui.studies.plan import command, option
from gemma_tui.studies.recording import Recorded, kept_plan, recorded
from gemma_tui.studies.run_checkpoints import RunCheckpoint, kept_checkpoints, load_checkpoint
from gemma_tui.text import one_line
from gemma_tui.tokenizer import Tokenizer, read_tokenizer

STUDY = "heads"
TOP = 3
SHOWN = 60


@dataclass(frozen=True)
class HeadStudyPlan:
    """Which texts are looked at; every field is an option of ``gemma-tui attention --study``."""

    model: str = option("nano", "model: a name, a folder, a hub id or a run")
    study: str = option("", "texts: .jsonl or .txt, a folder with train and valid, or hf:REPO", required=True)
    rows: int = option(64, "texts that are looked at", low=1, high=1_000_000)
    length: int = option(512, "tokens of a text at most", unit="tokens", low=2, high=131_072)
    seed: int = option(0, "seed of the choice of texts", low=0, high=2**31)
    over: str = option("", "a run, at each checkpoint that is kept of it, in place of the model")
    name: str = option("", "name of the run; empty for heads")


def record_heads(engine: Engine, plan: HeadStudyPlan, control: Control, store: RunStore) -> Recorded:
    """Register a study of heads and make its recorded events; nothing is computed before they are asked for."""
    words = command(("attention", plan.model, "--engine", engine.name), replace(plan, model=HeadStudyPlan.model))
    steps = plan.rows * (len(_checkpoints(plan.over)) if plan.over else 1)
    run = store.create(plan.name or STUDY, STUDY, engine.name, asdict(plan), words, steps)
    return Recorded(run, recorded(store, run, lambda _: study_heads(engine, plan, control), control))


def resume_heads(engine: Engine, run: Run, control: Control, store: RunStore) -> Recorded:
    """Go on with a study after the last text it has.

    Raises:
        UsageError: it is another study, or was begun on another engine.
        GemmaTuiError: another process computes it.
    """
    plan, done = plan_of(run), texts_of(store, run)
    if run.engine != engine.name:
        raise UsageError(f"{run.run_id} was computed with {run.engine}: go on with it there, not with {engine.name}")
    run = store.adopt(run.run_id)
    return Recorded(run, recorded(store, run, lambda _: study_heads(engine, plan, control, done), control))


def texts_of(store: RunStore, run: Run) -> int:
    """How many texts a study has looked at."""
    return sum(event.kind == STUDY for event in store.events(run.run_id, limit=1_000_000))


def plan_of(run: Run) -> HeadStudyPlan:
    """The plan a run was started with.

    Raises:
        UsageError: the run is another study.
    """
    return kept_plan(HeadStudyPlan, run, STUDY, "study of heads")


def study_heads(engine: Engine, plan: HeadStudyPlan, control: Control, done: int = 0) -> Iterator[Event]:
    """Look at one text after the other, yielding the metrics of all heads; runs on the engine's thread.

    Args:
        done: texts that were looked at before.

    Raises:
        GemmaTuiError: there are no texts, or a run has no checkpoints.
    """
    stages = _checkpoints(plan.over) if plan.over else [None]
    count = 0
    for stage in stages:
        tokenizer = _open(engine, plan, stage)
        texts = _texts(plan, tokenizer)
        if count == 0:
            info = engine.model()
            assert info is not None
            facts = {"texts": len(texts), "checkpoints": len(stages) if plan.over else 0, "dtype": info.dtype}
            yield Event("start", done, {**facts, "config": info.config.to_dict()})
        for number, ids in enumerate(texts):
            count += 1
            if count <= done:
                continue
            yield from wait_while_paused(control, count)
            if control.stop.is_set():
                return
            yield Event(STUDY, count, _looked(engine, tokenizer, ids, number, stage))


@dataclass(frozen=True, eq=False)
class HeadStudy:
    """What a study found.

    Attributes:
        values: for each metric float64 ``[texts, layers, heads]``.
        texts: how each text begins.
        steps: the training step of each, or 0 where no run was followed.
    """

    config: Gemma3Config
    values: dict[str, np.ndarray]
    texts: list[str]
    steps: list[int]


def read_study(store: RunStore, run: Run) -> HeadStudy:
    """What a study has found so far.

    Raises:
        GemmaTuiError: nothing yet.
    """
    return study_of(run.run_id, store.events(run.run_id, limit=1_000_000))


def study_of(run_id: str, every: Sequence[Row]) -> HeadStudy:
    """What a study's events tell.

    Raises:
        GemmaTuiError: nothing yet.
    """
    events = [event for event in every if event.kind == STUDY]
    if not events:
        raise GemmaTuiError(f"{run_id} has looked at no text yet: `gemma-tui runs resume {run_id}`")
    values = {name: np.array([event.values["metrics"][name] for event in events], dtype=np.float64) for name in METRICS}
    texts = [str(event.values["text"]) for event in events]
    shape = next(event.values["config"] for event in every if event.kind == "start")
    return HeadStudy(
        parse_config(shape, run_id), values, texts, [int(event.values["checkpoint"] or 0) for event in events]
    )


def study_figure(study: HeadStudy, metric: str) -> Figure:
    """Means with confidence intervals, and the texts each head shows the metric most on."""
    check_metric(metric)
    config, values = study.config, study.values[metric]
    mean, half = interval(values)
    rows = []
    for layer, head in np.argwhere(np.isfinite(mean))[np.argsort(-mean[np.isfinite(mean)], kind="stable")]:
        order = np.argsort(-np.nan_to_num(values[:, layer, head], nan=-np.inf), kind="stable")[:TOP]
        kind = "local" if config.is_local(int(layer)) else "global"
        best = " | ".join(study.texts[i] for i in order)
        rows.append((head_name(layer, head), kind, float(mean[layer, head]), float(half[layer, head]), best))
    columns = ("head", "layer", metric, "± 95 %", f"texts with the most {metric}")
    charts, moved = history(study, metric) if len(set(study.steps)) > 1 else ([], [])
    return Figure(
        f"{metric} over {len(study.texts)} texts",
        notes=[f"{metric}: {METRICS[metric].meaning}; mean over texts, ± 95 % of Student's t"],
        heats=[grid(mean, config, f"mean {metric}", METRICS[metric].unit)],
        charts=charts,
        tables=[*moved, Table("head", columns, rows)],
        arrays=study.values,
        facts={"texts": len(study.texts), "metrics": {name: m.meaning for name, m in METRICS.items()}},
    )


def history(study: HeadStudy, metric: str) -> tuple[list[LineChart], list[Table]]:
    """How a metric goes with training: means of local and global layers, and the heads that moved most."""
    config, steps = study.config, np.array(study.steps)
    known = sorted(set(study.steps))
    means = np.stack([interval(study.values[metric][steps == step])[0] for step in known])
    local = np.array([config.is_local(layer) for layer in range(means.shape[1])])
    x = [float(step) for step in known]
    series = [
        Series(kind, x, [_mean(stage[chosen]) for stage in means])
        for kind, chosen in (("local", local), ("global", ~local))
        if chosen.any()
    ]
    change = means[-1] - means[0]
    order = np.argsort(-np.abs(np.nan_to_num(change)), axis=None, kind="stable")
    rows = [
        (head_name(*place), "local" if local[place[0]] else "global", *(float(m[place]) for m in (means[0], means[-1])),
         float(change[place]))
        for place in (tuple(int(i) for i in np.unravel_index(index, change.shape)) for index in order)
    ]  # fmt: skip
    chart = LineChart(f"{metric}, mean over heads", series, "training step")
    columns = ("head", "layer", f"at step {known[0]}", f"at step {known[-1]}", "change")
    return [chart], [Table("moved", columns, rows)]


def _mean(values: np.ndarray) -> float | None:
    found = values[np.isfinite(values)]
    return float(found.mean()) if found.size else None


def _checkpoints(name: str) -> list[RunCheckpoint]:
    with closing(RunStore()) as store:
        return kept_checkpoints(store, name)


def _open(engine: Engine, plan: HeadStudyPlan, stage: RunCheckpoint | None) -> Tokenizer:
    model = load(engine, plan.model) if stage is None else load_checkpoint(engine, stage)
    return read_tokenizer(model.folder)


def _texts(plan: HeadStudyPlan, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids of the texts, chosen by the seed, ``<bos>`` first."""
    rows = read_sources(plan.study)
    every = [*rows.valid, *rows.train]
    order = np.random.default_rng(plan.seed).permutation(len(every))[: plan.rows]
    found = [window.ids for window in windows([every[i] for i in sorted(order)], tokenizer, plan.length - 1)]
    if not found:
        raise GemmaTuiError(f"{plan.study} holds no text: name a file with some")
    return found[: plan.rows]


def _looked(
    engine: Engine, tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, number: int,
    stage: RunCheckpoint | None,
) -> dict[str, Any]:  # fmt: skip
    """The event of one text."""
    began = time.perf_counter()
    reading = read_tokens(engine, tokenizer, [int(i) for i in ids])
    config = reading.inspection.config
    metrics = head_metrics([reading.statistics(layer) for layer in range(config.num_hidden_layers)], config)
    return {
        "text": one_line(tokenizer.decode([int(i) for i in ids[:SHOWN]]), SHOWN),
        "number": number,
        "tokens": len(ids),
        "checkpoint": stage.step if stage else None,
        "seconds": time.perf_counter() - began,
        "metrics": {name: _numbers(found) for name, found in metrics.items()},
    }


def _numbers(found: np.ndarray) -> list[list[float | None]]:
    """For JSON, which has no NaN."""
    return [[round(float(value), 7) if np.isfinite(value) else None for value in row] for row in found]
