"""Decoding rows in every way, as a study: what it writes, how sure the model is of it, and what it took.

Every batch of rows is decoded in all ways, one after the other, so that a machine whose speed drifts treats them
alike; it is one event of a run, so that a study that was broken off goes on with the batch after.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engines.base import Engine
from engines.blocks import BlockDecoding
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub.models import Model, resolve
from gemma_tui.rows import read_sources
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.curve.plan import CurvePlan, Way, command_of, ways_of
from gemma_tui.studies.curve.questions import Question, drawn, questions, rows_of
from gemma_tui.studies.events import Control, Event, Pace, wait_while_paused
from gemma_tui.studies.generation import AR, check_room, mask_of, warm
from gemma_tui.studies.loading import load
from gemma_tui.studies.plan import check_honoured
from gemma_tui.studies.recording import Recorded, check_engine, kept_plan, recorded
from gemma_tui.studies.run_checkpoints import training_run
from gemma_tui.studies.training_plan import plan_of as training_plan
from gemma_tui.studies.writing import Writing, agreement, parse_stops
from gemma_tui.text import one_line
from gemma_tui.tokenizer import Tokenizer, read_tokenizer

STUDY = "curve"
SHOWN = 80


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is to be done: the model, the ways, and the questions.

    Attributes:
        dropped: rows that ask nothing.
        prompts: how prompt and completion are written.
    """

    plan: CurvePlan
    model: Model
    tokenizer: Tokenizer
    ways: list[Way]
    mask: int
    questions: list[Question]
    dropped: int
    prompts: str
    warnings: list[str]

    def batches(self) -> Iterator[list[Question]]:
        """The questions that are decoded side by side."""
        size = self.plan.batch_size
        return (self.questions[start : start + size] for start in range(0, len(self.questions), size))


def record_curve(engine: Engine, plan: CurvePlan, control: Control, store: RunStore) -> Recorded:
    """Register a curve and make its recorded events; nothing is decoded before they are asked for.

    Raises:
        EngineError: the model or the data is not usable, or does not go with the plan; no run is made.
    """
    prepared = prepare(plan, store)
    words = command_of(plan, engine.name)
    run = store.create(plan.name or STUDY, STUDY, engine.name, asdict(plan), words, len(prepared.questions))
    return Recorded(run, recorded(store, run, lambda _: study_curve(engine, prepared, control), control))


def resume_curve(engine: Engine, run: Run, control: Control, store: RunStore) -> Recorded:
    """Go on with a curve after the last batch that was kept.

    Raises:
        UsageError: the run is another study or another engine's.
        GemmaTuiError: another process computes it, or what it needs is gone.
    """
    plan = plan_of(run)
    check_engine(run, engine)
    prepared = prepare(plan, store)
    if len(prepared.questions) != run.steps:
        raise GemmaTuiError(f"{plan.data} has changed since {run.run_id} began: start it again with `{run.command}`")
    run = store.adopt(run.run_id)
    return Recorded(run, recorded(store, run, lambda _: study_curve(engine, prepared, control, run.step), control))


def plan_of(run: Run) -> CurvePlan:
    """The plan a curve was started with.

    Raises:
        UsageError: the run is another study.
    """
    return kept_plan(CurvePlan, run, STUDY, "speed-quality curve")


def prepare(plan: CurvePlan, store: RunStore) -> Prepared:
    """Find the model and make the questions.

    Raises:
        EngineError: the model is not here, the data asks nothing, or the plan does not go with either.
    """
    check_honoured(plan)
    ways, model = ways_of(plan), resolve(plan.model)
    longest = max(way.block for way in ways)
    mask, warnings = (0, []) if plan.decoder == AR else mask_of(model, plan.mask_token, longest)
    tokenizer, run = read_tokenizer(model.folder), training_run(store, model)
    prompts = plan.prompts or (training_plan(run.plan).prompts if run else "turns")
    rows = rows_of(read_sources(plan.data))
    every = questions(rows, tokenizer, prompts, plan.prefix)
    if not every:
        raise GemmaTuiError(
            f"{plan.data} has no row of more than {plan.prefix} tokens: name other rows, or lower --prefix"
        )
    chosen = drawn(every, plan.limit, plan.seed)
    most = max(len(question.prompt) for question in chosen)
    check_room(model.config(), most, plan.max_tokens, BlockDecoding(longest, mask=mask))
    return Prepared(plan, model, tokenizer, ways, mask, chosen, len(rows) - len(every), prompts, warnings)


def study_curve(engine: Engine, prepared: Prepared, control: Control, done: int = 0) -> Iterator[Event]:
    """Decode every batch in every way; runs on the engine's thread.

    Args:
        done: rows that were decoded before.

    Raises:
        EngineError: the model is not usable.
    """
    plan = prepared.plan
    batches = list(prepared.batches())[-(-done // plan.batch_size) :]
    if not batches:
        return
    yield Event("load", done, {"model": plan.model})
    load(engine, plan.model, plan.dtype)
    yield Event("start", done, _facts(engine, prepared))
    yield from (Event("warning", done, {"text": text}) for text in prepared.warnings)
    pace = Pace("decoding", done, len(batches) * len(prepared.ways), len(batches) * len(prepared.ways))
    yield pace.now()
    widths = {way.block: way.blocks(plan.order, prepared.mask) for way in prepared.ways}
    warm(engine, [question.prompt for question in batches[0]], plan.sampling(), widths.values())
    for batch in batches:
        found: dict[str, dict[str, Any]] = {}
        baseline: list[Writing] = []
        for way in prepared.ways:
            yield from wait_while_paused(control, pace.step)
            texts, written, seconds = _decoded(engine, prepared, batch, way, control)
            if control.stop.is_set():
                return
            baseline = baseline or written
            found[way.key] = _told(batch, texts, written, baseline, seconds) | {
                "log_likelihoods": _log_likelihoods(engine, batch, written)
            }
            yield from pace.advance()
        pace.step += len(batch)
        values = {"rows": [question.row for question in batch], "ways": found, "memory": engine.memory()}
        yield Event(STUDY, pace.step, values)


def _decoded(
    engine: Engine, prepared: Prepared, batch: Sequence[Question], way: Way, control: Control
) -> tuple[list[str], list[Writing], float]:
    """What is written after each prompt, and the seconds that all of them took, reading them included."""
    plan, sampling = prepared.plan, prepared.plan.sampling()
    stops = parse_stops(plan.stop)
    written = [Writing(prepared.tokenizer, sampling.stop_ids, stops) for _ in batch]
    texts = [""] * len(batch)
    began = time.perf_counter()
    for said in engine.decode([q.prompt for q in batch], sampling, way.blocks(plan.order, prepared.mask)):
        for row in np.unique(said.rows):
            texts[row] += written[row].take(said, int(row))
        if control.stop.is_set() or all(writing.ended for writing in written):
            break
    seconds = time.perf_counter() - began
    return [text + writing.finish() for text, writing in zip(texts, written, strict=True)], written, seconds


def _told(
    batch: Sequence[Question],
    texts: Sequence[str],
    written: Sequence[Writing],
    baseline: Sequence[Writing],
    seconds: float,
) -> dict[str, Any]:
    """One list entry for each row, ready for JSON."""
    agreed = [agreement(one.tokens, other.tokens) for one, other in zip(written, baseline, strict=True)]
    return {
        "seconds": seconds,
        "tokens": [len(writing.tokens) for writing in written],
        "passes": [writing.passes for writing in written],
        "ended": [writing.ended for writing in written],
        "exact": [question.right(text) for question, text in zip(batch, texts, strict=True)],
        "compared": [one.compared for one in agreed],
        "equal": [one.equal for one in agreed],
        "first": [one.first for one in agreed],
        "texts": [one_line(text, SHOWN) for text in texts],
    }


def _log_likelihoods(engine: Engine, batch: Sequence[Question], written: Sequence[Writing]) -> list[float]:
    """ln p of all that was written after each prompt, under next-token prediction; nats."""
    whole = [[*question.prompt, *writing.tokens] for question, writing in zip(batch, written, strict=True)]
    tokens = np.zeros((len(whole), max(map(len, whole))), np.int32)
    for row, ids in zip(tokens, whole, strict=True):
        row[: len(ids)] = ids
    scores = engine.log_probs(tokens).astype(np.float64)
    if not np.isfinite(scores).all():
        raise GemmaTuiError("the model gives probabilities that are no numbers: its weights are broken")
    return [float(scores[i, len(q.prompt) - 1 : len(whole[i]) - 1].sum()) for i, q in enumerate(batch)]


def _facts(engine: Engine, prepared: Prepared) -> dict[str, Any]:
    info, device = engine.model(), engine.device()
    return {
        "model": prepared.plan.model,
        "engine": engine.name,
        "device": device.device,
        "dtype": info.dtype if info else None,
        "rows": len(prepared.questions),
        "dropped": prepared.dropped,
        "answers": sum(question.answer is not None for question in prepared.questions),
        "prompts": prepared.prompts,
        "mask_token": prepared.mask,
        "ways": [way.key for way in prepared.ways],
        "batch_size": prepared.plan.batch_size,
    }
