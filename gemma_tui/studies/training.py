"""Training a model, as a study: a plan, and a loop that yields what happens."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from engines.base import Engine
from engines.memory import is_out_of_memory
from engines.training import Batch, StepResult, TrainingSettings
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.hub.models import Model, copy_tokenizer, resolve
from gemma_tui.hub.set_blocks import SetBlocks, write_set_blocks
from gemma_tui.runs import checkpoints
from gemma_tui.studies.data import (
    Splits,
    evaluation_windows,
    make_batch,
    pack,
    plain_batch,
    read_splits,
    supervised_tokens,
    training_batches,
    warnings,
)
from gemma_tui.studies.diagnosis import Diagnoses, UpdateFacts, gradient_row, matrices_of, measured_decrease, update_row
from gemma_tui.studies.estimate import checkpoint_bytes, estimate
from gemma_tui.studies.events import Control, Event, Pace, wait_while_paused
from gemma_tui.studies.memorization.watch import Watch, watch_of
from gemma_tui.studies.methods import after_step
from gemma_tui.studies.peak_memory import PeakMemory, count_from_here
from gemma_tui.studies.set_blocks import batch_maker, check_mask, forgotten, watching
from gemma_tui.studies.training_plan import BLOCKWISE, WHOLE, TrainingPlan, plan_config, settings
from gemma_tui.tokenizer import read_tokenizer

MAX_SKIPPED = 10
SAVE_SHARE = 0.05


def train(
    engine: Engine, plan: TrainingPlan, folder: Path, control: Control, memory_ratio: float = 1.0
) -> Iterator[Event]:
    """Train and save, yielding every fact on the way; runs on the engine's thread.

    Where the folder holds checkpoints of this plan, training goes on from the newest that is whole.

    Args:
        folder: where checkpoints and the adapter (``adapter/``) or the model (``model/``) are saved.
        control: ``stop`` ends after the step in hand and saves; ``pause`` waits between steps.
        memory_ratio: what runs like this one took, over what was estimated.

    Raises:
        EngineError: the model, the data or the plan is not usable, the disk is full, or the loss is not finite for too
            long.
    """
    chosen = settings(plan)
    model = resolve(plan.model)
    yield Event("load", values={"model": model.name})
    peak = count_from_here(engine, open_model(engine, model, plan))
    splits = _read_data(plan, model)
    check_mask(plan, splits, plan_config(plan, model).vocab_size)
    checkpoints.sweep(folder / "checkpoints")
    checkpoints.hold_ballast(folder / "checkpoints")
    found = checkpoints.latest(folder / "checkpoints")
    at = Progress(**found.checkpoint.state) if found.checkpoint else Progress()
    trainable = engine.start_training(settings_at(plan, at.step))
    watch = _watch(plan, model, splits, folder, at)
    facts = _facts(engine, plan, model, splits, trainable, memory_ratio)
    yield Event("start", values=facts | (watch.facts if watch else {}))
    told = (
        *found.problems,
        *warnings(splits, model.folder),
        *forgotten(plan, model),
        *(watch.warnings if watch else ()),
    )
    yield from (Event("warning", at.step, {"text": text}) for text in told)
    if watch is not None:
        yield from watch.begin(engine, control, at.step, trainable)
        at.measuring = watch.seconds
    if found.checkpoint is not None:
        engine.load_state(found.checkpoint.path)
        yield Event("resumed", at.step, {"path": str(found.checkpoint.path)})

    make = batch_maker(plan) if plan.method in BLOCKWISE else plain_batch
    batches = training_batches(splits.train, plan.batch_size, plan.seed, at.step * plan.accumulate, make)
    saver, diagnoses = _Saver(engine, plan, model, folder), Diagnoses(matrices_of(plan_config(plan, model)), at.turn)
    while at.step < plan.steps:
        yield from wait_while_paused(control, at.step)
        if control.stop.is_set():
            break
        if at.step and at.step == plan.full_rank_steps:
            engine.stop_training()
            trainable = engine.start_training(chosen)
        at.step += 1
        began, rate = time.perf_counter(), plan.rate(at.step)
        observe = plan.diagnose_every > 0 and at.step % plan.diagnose_every == 0
        micro = [next(batches) for _ in range(plan.accumulate)]
        result, warned = _step(engine, micro, rate, observe, at)
        seconds = time.perf_counter() - began
        merged = after_step(engine, plan, at.step, observe)
        at.tokens, at.seconds = at.tokens + result.tokens, at.seconds + time.perf_counter() - began
        yield Event("step", at.step, _measures(peak, at, result, rate, seconds))
        yield from (Event("warning", at.step, {"text": text}) for text in warned)
        if merged is not None:
            yield merged
        if observe:
            yield from _diagnose(engine, diagnoses, micro, result, at.step)
            at.turn = diagnoses.turn
        at.skipped = 0 if result.applied else at.skipped + 1
        if not result.applied:
            yield Event("warning", at.step, {"text": "the gradient was not finite: step left out"})
        if at.skipped == MAX_SKIPPED:
            first = (at.step - 1) * plan.accumulate
            raise GemmaTuiError(
                f"{MAX_SKIPPED} gradients in a row were not finite, the last in micro-batch {first}: "
                "lower the learning rate"
            )
        if watch is not None and watch.due(at.step):
            yield from _look(watch, engine, control, at, trainable)
        last = at.step == plan.steps
        if plan.evaluate_every and (at.step % plan.evaluate_every == 0 or last) and splits.valid:
            values = yield from _evaluate(engine, plan, splits, control, at.step)
            if values is None:
                break
            yield Event("evaluation", at.step, values)
            if at.better(values["valid_loss"]) and (plan.keep_best or plan.patience):
                yield Event("best", at.step, {"path": str(saver.result("best"))})
            if plan.patience and at.stale >= plan.patience:
                yield Event("early_stop", at.step, {"best": at.best})
                break
        if plan.save_every and at.step % plan.save_every == 0 and not last:
            yield _saved(engine, saver, at)
        elif not plan.save_every and saver.cheap():
            saver.save(at)
    if watch is not None and at.step and watch.last != at.step and not control.stop.is_set():
        yield from _look(watch, engine, control, at, trainable)
    if plan.diagnose_every and at.step and not control.stop.is_set():
        yield from _last_look(engine, diagnoses, control, at.step)
    yield _saved(engine, saver, at)
    engine.stop_training()


@dataclass
class Progress:
    """Where a run is; kept with each checkpoint.

    Attributes:
        step: optimizer steps taken.
        tokens: supervised tokens seen.
        seconds: spent in steps.
        skipped: steps left out in a row.
        best: the lowest validation loss, nats.
        stale: evaluations since then.
        halvings: how often the micro-batch was halved for want of memory.
        turn: the matrix whose spectrum is next.
        measuring: seconds spent on measuring memorised bits.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    best: float | None = None
    stale: int = 0
    halvings: int = 0
    turn: int = 0
    measuring: float = 0.0

    def better(self, loss: float) -> bool:
        """Take an evaluation in; whether it is the best so far."""
        if self.best is None or loss < self.best:
            self.best, self.stale = loss, 0
            return True
        self.stale += 1
        return False


def _step(engine: Engine, micro: list[Batch], rate: float, observe: bool, at: Progress) -> tuple[StepResult, list[str]]:
    """A step; where memory runs out the micro-batches are halved, and what was done is told."""
    warned: list[str] = []
    while True:
        parts = [part for batch in micro for part in batch.split(2**at.halvings)]
        try:
            return engine.train_step(parts, rate, observe), warned
        except Exception as error:
            if not is_out_of_memory(error) or max(len(part.tokens) for part in parts) == 1:
                raise
            at.halvings += 1
            warned.append(f"out of memory: micro-batches are halved, and {2**at.halvings} times as many make a step")


def _measures(peak: PeakMemory, at: Progress, result: StepResult, rate: float, seconds: float) -> dict[str, float]:
    masked = {} if result.masked_loss is None else {"masked_loss": result.masked_loss}
    return masked | {
        "loss": result.loss,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "tokens_per_second": result.tokens / seconds,
        "memory": peak.engine.memory(),
        "peak_memory": peak.nbytes,
        "tokens": at.tokens,
        "seconds": at.seconds,
    }


def _diagnose(
    engine: Engine, diagnoses: Diagnoses, micro: list[Batch], result: StepResult, step: int
) -> Iterator[Event]:
    """What a step that was observed tells, and the spectra there is time for."""
    began = time.perf_counter()
    fresh = diagnoses.look(engine)
    row = {
        **gradient_row(result.gradients or {}),
        **update_row(diagnoses.updates),
        "predicted": result.predicted,
        "measured": measured_decrease(engine, micro, result),
    }
    yield Event("diagnosis", step, {**row, "diagnosis_seconds": time.perf_counter() - began})
    gradients = {name: asdict(facts) for name, facts in (result.gradients or {}).items()}
    yield Event("matrices", step, {"gradients": gradients, "updates": {n: asdict(f) for n, f in fresh.items()}})


def _last_look(engine: Engine, diagnoses: Diagnoses, control: Control, step: int) -> Iterator[Event]:
    """The spectra of all matrices at the end, or of those that there was time for before a stop."""
    began, fresh, count = time.perf_counter(), dict[str, UpdateFacts](), len(diagnoses.matrices)
    pace = Pace("diagnosing", step, count, count)
    yield pace.now()
    while len(fresh) < count and not (fresh and control.stop.is_set()):
        fresh |= diagnoses.one(engine)
        yield from pace.advance()
    # Means over all, some of them older where it was stopped.
    row = {**update_row(diagnoses.updates), "diagnosis_seconds": time.perf_counter() - began}
    yield Event("diagnosis", step, row)
    yield Event("matrices", step, {"gradients": {}, "updates": {n: asdict(f) for n, f in fresh.items()}})


def _watch(plan: TrainingPlan, model: Model, splits: Splits, folder: Path, at: Progress) -> Watch | None:
    """What measures memorised bits, if the plan asks for it."""
    if not plan.memorization_every:
        return None
    return watch_of(plan, splits, model.config().vocab_size, folder, at.measuring)


def _look(watch: Watch, engine: Engine, control: Control, at: Progress, trainable: int) -> Iterator[Event]:
    yield from watch.look(engine, control, at.step, trainable, at.seconds)
    at.measuring = watch.seconds


def _saved(engine: Engine, saver: _Saver, at: Progress) -> Event:
    path = saver.save(at)
    return Event("checkpoint", at.step, {"path": str(path), "optimizer_bytes": engine.optimizer_bytes()})


def settings_at(plan: TrainingPlan, step: int) -> TrainingSettings:
    """The settings that the checkpoint of a step was made with; that of a warm start's last is still full-rank."""
    chosen = settings(plan)
    if 0 < plan.full_rank_steps >= step:
        return replace(chosen, lora=None, rank1=None, rest=False, merging=False)
    return chosen


def evaluate(
    engine: Engine, splits: Splits, batch_size: int, limit: int, control: Control, step: int = 0
) -> Generator[Event, None, float | None]:
    """Tell how far it is; returns the mean loss on the validation windows, nats per token.

    The windows come by length, so that the mean over some of them means nothing: there is none after a stop.
    """
    chosen = evaluation_windows(splits.valid, batch_size, limit)
    weights = [sum(len(window) for window in windows) for windows in chosen]
    pace, total, tokens = Pace("evaluating", step, len(chosen), sum(weights)), 0.0, 0
    yield pace.now()
    for windows, weight in zip(chosen, weights, strict=True):
        if control.stop.is_set():
            return None
        batch = make_batch(windows)
        total, tokens = total + engine.loss(batch), tokens + batch.supervised
        yield from pace.advance(weight)
    return total / tokens


def _evaluate(
    engine: Engine, plan: TrainingPlan, splits: Splits, control: Control, step: int
) -> Generator[Event, None, dict[str, float] | None]:
    began = time.perf_counter()
    loss = yield from evaluate(engine, splits, plan.batch_size, plan.evaluate_batches, control, step)
    if loss is None:
        return None
    found = {"valid_loss": loss, "perplexity": math.exp(min(loss, 700))}
    if (watched := watching(plan, splits.valid)) is not None:
        pace = Pace("measuring", step, watched.parts, watched.parts)
        for measures in watched.measures(engine):
            found |= measures
            yield from pace.advance()
            if control.stop.is_set():
                break
    return found | {"seconds": time.perf_counter() - began}


def open_model(engine: Engine, model: Model, plan: TrainingPlan) -> int:
    """Load what a plan trains: a run starts from the files, never from what an earlier run left on the loaded model.

    Returns:
        The bytes that were in use without any model.
    """
    dtype = plan.dtype
    if model.adapter is not None and plan.method in ("lora", "dora", "sbd-lora"):
        raise UsageError(f"{model.name} is an adapter, and one is kept: start from its base, or take --method full")
    engine.unload()
    before = engine.memory()
    if plan.fresh:
        engine.initialise(plan_config(plan, model), plan.seed, dtype)
        return before
    engine.load(model.folder, dtype)
    if model.adapter is not None:
        engine.load_adapter(model.adapter)
    return before


def _read_data(plan: TrainingPlan, model: Model) -> Splits:
    splits = read_splits(plan.data, read_tokenizer(model.folder), plan.sequence_length, plan.prompts)
    if not plan.packing:
        return splits
    train, valid = (pack(windows, plan.sequence_length, plan.seed) for windows in (splits.train, splits.valid))
    return replace(splits, train=train, valid=valid)


@dataclass
class _Saver:
    """Saves what a run trained, and knows when that is cheap: slow steps are kept one by one, quick ones together."""

    engine: Engine
    plan: TrainingPlan
    model: Model
    folder: Path
    ended: float = field(default_factory=time.monotonic)
    cost: float = 0.1

    def cheap(self) -> bool:
        """Whether saving now keeps all saving under its share of the time."""
        return time.monotonic() - self.ended > self.cost / SAVE_SHARE

    def save(self, at: Progress) -> Path:
        """Write a checkpoint and what the run has made so far; returns the folder of the latter."""
        began = time.monotonic()
        folder, keep = self.folder / "checkpoints", self.plan.keep
        needed = checkpoint_bytes(plan_config(self.plan, self.model), settings(self.plan))
        checkpoints.write(folder, at.step, self.engine.save_state, asdict(at), keep, needed)
        target = self.result()
        self.ended = time.monotonic()
        self.cost = self.ended - began
        return target

    def result(self, under: str = "") -> Path:
        """Write the adapter, or the whole model; returns its folder."""
        if self.plan.method in WHOLE:
            target = self.folder / under / "model"
            self.engine.save_model(target, plan_config(self.plan, self.model).to_dict(), self.plan.save_dtype)
            copy_tokenizer(self.model.folder, target)
        else:
            target = self.folder / under / "adapter"
            self.engine.save_adapter(target, str(self.model.folder))
        if self.plan.masked:
            write_set_blocks(target, SetBlocks(self.plan.mask_token, self.plan.max_block))
        return target


def _facts(
    engine: Engine, plan: TrainingPlan, model: Model, splits: Splits, trainable: int, memory_ratio: float
) -> dict[str, object]:
    device = engine.device()
    info = engine.model()
    config = plan_config(plan, model)
    guess = estimate(
        config, settings(plan), plan.rows, plan.sequence_length, info.dtype if info else "float32", device,
        plan.accumulate, memory_ratio,
    )  # fmt: skip
    return {
        "model": model.name,
        "engine": device.engine,
        "device": device.device,
        "version": device.version,
        "dtype": info.dtype if info else "",
        "steps": plan.steps,
        "parameters": info.parameters if info else 0,
        "trainable": trainable,
        "estimate": sum(guess.parts.values()),
        "estimated": guess.text,
        "global_layers": [i for i in range(config.num_hidden_layers) if not config.is_local(i)],
        "window": config.sliding_window,
        "train_windows": len(splits.train),
        "valid_windows": len(splits.valid),
        "train_tokens": supervised_tokens(splits.train),
        "train_rows": splits.train_counts.rows,
        "rows_split": splits.train_counts.split,
        "rows_truncated": splits.train_counts.truncated,
        "rows_left_out": splits.train_counts.masked + splits.train_counts.empty,
    }
