"""Training a model, as a study: a plan, and a loop that yields what happens."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from engines.base import LINEARS, Engine, LoRASettings, OptimizerSettings, TrainingSettings
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.hub.models import Model, copy_tokenizer, resolve
from gemma_tui.studies.data import (
    Splits,
    evaluation_batches,
    pack,
    read_splits,
    supervised_tokens,
    training_batches,
    warnings,
)
from gemma_tui.studies.events import Control, Event
from gemma_tui.studies.plan import option
from gemma_tui.studies.schedules import SCHEDULES, learning_rate
from gemma_tui.studies.turns import PROMPT_FORMS
from gemma_tui.tokenizer import read_tokenizer

METHODS = ("lora", "full")
DEFAULT_RATES = {"lora": 2e-4, "full": 2e-5}
MAX_SKIPPED = 10
SAVE_SHARE = 0.05
LORA = ("lora",)


@dataclass(frozen=True)
class TrainingPlan:
    """What a training run is. Every field is an option of ``gemma-tui train`` and a line of the form."""

    model: str = option("", "model: a name, a folder, a hub id or a run", required=True, group="What")
    data: str = option(
        "",
        "text: .jsonl or .txt, a folder with train and valid, or hf:REPO; several with commas",
        required=True,
        group="What",
    )
    method: str = option("lora", "what is trained", choices=METHODS, group="What")
    name: str = option("", "name of the run; empty takes the method", group="What")
    group: str = option("", "name shared by runs that are compared; empty for none", group="What")
    fresh: bool = option(False, "start from new weights of the model's shape", group="What")
    steps: int = option(100, "optimizer steps", low=1, high=10_000_000, group="Budget")
    batch_size: int = option(4, "windows in a micro-batch", low=1, high=4096, group="Budget")
    accumulate: int = option(1, "micro-batches in a step", low=1, high=4096, group="Budget")
    sequence_length: int = option(256, "tokens in a window", unit="tokens", low=8, high=131_072, group="Budget")
    packing: bool = option(False, "put short rows side by side in one window", group="Data")
    prompts: str = option("turns", "how prompt and completion are written", choices=PROMPT_FORMS, group="Data")
    learning_rate: float | None = option(
        None, "peak learning rate", low=0, high=10, open_means="2e-4 for lora, 2e-5 for full", group="Optimizer"
    )
    schedule: str = option("cosine", "learning rate after the warm-up", choices=SCHEDULES, group="Optimizer")
    warmup: int | None = option(
        None, "steps of linear warm-up", unit="steps", low=0, open_means="3 % of the steps", group="Optimizer"
    )
    final_ratio: float = option(0.1, "last learning rate, as a share of the peak", low=0, high=1, group="Optimizer")
    weight_decay: float = option(0.0, "decoupled weight decay of matrices", low=0, high=10, group="Optimizer")
    beta2: float = option(0.999, "AdamW's memory of squared gradients", low=0, high=0.999999, group="Optimizer")
    clip: float = option(1.0, "bound of the gradient norm; 0 for none", low=0, high=1e6, group="Optimizer")
    rank: int = option(8, "rank of the adapters", low=1, high=4096, group="LoRA", methods=LORA)
    alpha: float = option(16.0, "adapters are scaled by alpha / rank", low=0, high=1e6, group="LoRA", methods=LORA)
    dropout: float = option(0.0, "dropout before the adapters", low=0, high=0.99, group="LoRA", methods=LORA)
    targets: str = option(",".join(LINEARS), "adapted linears, with commas between", group="LoRA", methods=LORA)
    evaluate_every: int = option(20, "steps between evaluations; 0 for none", low=0, group="Watching")
    evaluate_batches: int = option(8, "micro-batches per evaluation; 0 for all", low=0, group="Watching")
    save_every: int | None = option(
        None, "steps between saves", low=1, group="Watching", open_means="as often as takes 5 % of the time at most"
    )
    seed: int = option(0, "seed of the adapters, the order of the data and dropout", low=0, high=2**31, group="Machine")
    dtype: str | None = option(
        None,
        "dtype of frozen weights and activations",
        choices=("float32", "bfloat16"),
        open_means="float32 on a CPU, bfloat16 elsewhere",
        group="Machine",
    )
    save_dtype: str | None = option(
        None,
        "dtype of a fully trained model on disk",
        choices=("float32", "bfloat16"),
        open_means="the dtype it was loaded in",
        group="Machine",
        methods=("full",),
    )
    checkpoint_activations: bool = option(
        False, "compute activations again in the backward pass: less memory, more time", group="Machine"
    )

    @property
    def peak_rate(self) -> float:
        """The learning rate after the warm-up."""
        return DEFAULT_RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def warmup_steps(self) -> int:
        """Steps until the peak."""
        return round(0.03 * self.steps) if self.warmup is None else self.warmup

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first being 1."""
        return learning_rate(step, self.peak_rate, self.steps, self.warmup_steps, self.schedule, self.final_ratio)


def settings(plan: TrainingPlan) -> TrainingSettings:
    """What the engine needs of a plan.

    Raises:
        UsageError: a target is no linear of Gemma-3, or adapters are wanted on weights that will be gone.
    """
    if plan.fresh and plan.method == "lora":
        raise UsageError("fresh: adapters on new weights, which are kept nowhere, are of no use; take --method full")
    targets = tuple(t.strip() for t in plan.targets.split(",") if t.strip())
    unknown = [t for t in targets if t not in LINEARS]
    if unknown or not targets:
        raise UsageError(f"targets: {', '.join(unknown) or 'none'}; choose from {', '.join(LINEARS)}")
    return TrainingSettings(
        lora=LoRASettings(plan.rank, plan.alpha, plan.dropout, targets) if plan.method == "lora" else None,
        seed=plan.seed,
        optimizer=OptimizerSettings(betas=(0.9, plan.beta2), weight_decay=plan.weight_decay),
        clip=plan.clip,
        checkpoint_activations=plan.checkpoint_activations,
    )


def train(engine: Engine, plan: TrainingPlan, folder: Path, control: Control) -> Iterator[Event]:
    """Train and save, yielding every fact on the way; runs on the engine's thread.

    Args:
        folder: where the adapter (``adapter/``) or the model (``model/``) is saved.
        control: ``stop`` ends after the step in hand and saves; ``pause`` waits between steps.

    Raises:
        EngineError: the model, the data or the plan is not usable, or the loss is not finite for too long.
    """
    chosen = settings(plan)
    model = resolve(plan.model)
    yield Event("load", values={"model": model.name})
    _open_model(engine, model, plan)
    splits = _read_data(plan, model)
    trainable = engine.start_training(chosen)
    yield Event("start", values=_facts(engine, plan, model, splits, trainable))
    for text in warnings(splits, model.folder):
        yield Event("warning", values={"text": text})

    batches = training_batches(splits.train, plan.batch_size, plan.seed)
    saver = _Saver(engine, plan, model, folder)
    tokens, skipped, busy, step = 0, 0, 0.0, 0
    for step in range(1, plan.steps + 1):
        yield from _wait_while_paused(control, step - 1)
        if control.stop.is_set():
            step -= 1
            break
        began = time.perf_counter()
        rate = plan.rate(step)
        result = engine.train_step([next(batches) for _ in range(plan.accumulate)], rate)
        seconds = time.perf_counter() - began
        tokens, busy = tokens + result.tokens, busy + seconds
        yield Event(
            "step",
            step,
            {
                "loss": result.loss,
                "learning_rate": rate,
                "grad_norm": result.grad_norm,
                "tokens_per_second": result.tokens / seconds,
                "memory": engine.memory(),
                "tokens": tokens,
                "seconds": busy,
            },
        )
        skipped = 0 if result.applied else skipped + 1
        if not result.applied:
            yield Event("warning", step, {"text": "the gradient was not finite: step left out"})
        if skipped == MAX_SKIPPED:
            raise GemmaTuiError(f"{MAX_SKIPPED} gradients in a row were not finite: lower the learning rate")
        last = step == plan.steps
        if plan.evaluate_every and (step % plan.evaluate_every == 0 or last) and splits.valid:
            yield Event("evaluation", step, _evaluate(engine, plan, splits, control))
        if plan.save_every and step % plan.save_every == 0 and not last:
            yield Event("checkpoint", step, {"path": str(saver.save())})
        elif not plan.save_every and saver.cheap():
            saver.save()
    yield Event("checkpoint", step, {"path": str(saver.save())})
    engine.stop_training()


def evaluate(engine: Engine, splits: Splits, batch_size: int, limit: int, control: Control) -> float:
    """Mean loss on the validation windows, nats per token; ends early when asked to stop."""
    total, tokens = 0.0, 0
    for batch in evaluation_batches(splits.valid, batch_size, limit):
        total, tokens = total + engine.loss(batch), tokens + batch.supervised
        if control.stop.is_set():
            break
    return total / tokens


def _evaluate(engine: Engine, plan: TrainingPlan, splits: Splits, control: Control) -> dict[str, float]:
    began = time.perf_counter()
    loss = evaluate(engine, splits, plan.batch_size, plan.evaluate_batches, control)
    return {"valid_loss": loss, "perplexity": math.exp(min(loss, 700)), "seconds": time.perf_counter() - began}


def _open_model(engine: Engine, model: Model, plan: TrainingPlan) -> None:
    """A run starts from the files, never from what an earlier run left on the loaded model."""
    dtype = plan.dtype
    if model.adapter is not None and plan.method == "lora":
        raise UsageError(f"{model.name} is an adapter, and one is kept: start from its base, or take --method full")
    if plan.fresh:
        engine.initialise(model.config(), plan.seed, dtype)
        return
    engine.load(model.folder, dtype)
    if model.adapter is not None:
        engine.load_adapter(model.adapter)


def _read_data(plan: TrainingPlan, model: Model) -> Splits:
    splits = read_splits(plan.data, read_tokenizer(model.folder), plan.sequence_length, plan.prompts)
    if not plan.packing:
        return splits
    train, valid = (pack(windows, plan.sequence_length, plan.seed) for windows in (splits.train, splits.valid))
    return replace(splits, train=train, valid=valid)


def _wait_while_paused(control: Control, step: int) -> Iterator[Event]:
    if not control.pause.is_set():
        return
    yield Event("pause", step)
    while control.pause.is_set() and not control.stop.wait(0.1):
        yield Event("waiting", step)
    yield Event("resume", step)


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

    def save(self) -> Path:
        """Write the adapter, or the whole model; returns its folder."""
        began = time.monotonic()
        if self.plan.method == "lora":
            target = self.folder / "adapter"
            self.engine.save_adapter(target, str(self.model.folder))
        else:
            target = self.folder / "model"
            self.engine.save_model(target, self.model.config().to_dict(), self.plan.save_dtype)
            copy_tokenizer(self.model.folder, target)
        self.ended = time.monotonic()
        self.cost = self.ended - began
        return target


def _facts(engine: Engine, plan: TrainingPlan, model: Model, splits: Splits, trainable: int) -> dict[str, object]:
    device = engine.device()
    info = engine.model()
    return {
        "model": model.name,
        "engine": device.engine,
        "device": device.device,
        "version": device.version,
        "dtype": info.dtype if info else "",
        "steps": plan.steps,
        "parameters": info.parameters if info else 0,
        "trainable": trainable,
        "train_windows": len(splits.train),
        "valid_windows": len(splits.valid),
        "train_tokens": supervised_tokens(splits.train),
        "train_rows": splits.train_counts.rows,
        "rows_split": splits.train_counts.split,
        "rows_truncated": splits.train_counts.truncated,
        "rows_left_out": splits.train_counts.masked + splits.train_counts.empty,
    }
