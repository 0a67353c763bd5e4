"""What a training run is: the plan, and what the engine needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engines.base import LINEARS, LoRASettings, OptimizerSettings, Rank1Settings, TrainingSettings
from engines.blocks import MASK
from engines.gemma3 import GLOBAL, LOCAL, Gemma3Config
from engines.pruning import PRUNINGS
from gemma_tui.errors import UsageError
from gemma_tui.studies.plan import build, option
from gemma_tui.studies.schedules import SCHEDULES, jagged, learning_rate
from gemma_tui.studies.turns import PROMPT_FORMS

if TYPE_CHECKING:
    from gemma_tui.hub.models import Model

METHODS = ("lora", "dora", "full", "relora", "rank1", "sbd", "sbd-lora")
MODES = ("power", "sketch", "alternate")
FOUND = ("power", "sketch")
"""Modes that find each update from the gradient; the other trains one factor at a time."""
OPTIMIZERS = ("adamw", "sgd", "adafactor", "muon")
DEFAULT_RATES = {"lora": 2e-4, "dora": 2e-4, "full": 2e-5, "relora": 4e-4, "rank1": 0.1, "sbd": 2e-5, "sbd-lora": 2e-4}
NORMALISED_RATE, ALTERNATE_RATE = 2e-3, 2e-3
ADAPTERS = ("lora", "dora", "relora", "sbd-lora")
TARGETED = ("lora", "dora", "relora", "rank1", "sbd-lora")
MAX_LAYER = 10_000
MERGING = ("relora", "rank1")
WHOLE = ("full", "relora", "rank1", "sbd")
"""Methods whose result is a whole model."""
BLOCKWISE = ("sbd", "sbd-lora")
"""Methods that train for set block decoding: every parameter, or adapters."""


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
    method: str = option("lora", "what is trained; sbd as full, sbd-lora as lora", choices=METHODS, group="What")
    name: str = option("", "name of the run; empty takes the method", group="What")
    group: str = option("", "name shared by runs that are compared; empty for none", group="What")
    fresh: bool = option(False, "start from new weights of the model's shape", group="What")
    window: int | None = option(
        None, "keys that a local layer sees", unit="tokens", low=1, high=1_000_000, open_means="the model's",
        group="What", fresh=True,
    )  # fmt: skip
    global_every: int | None = option(
        None, "every n-th layer is global; 0 for none, 1 for all", low=0, high=200, open_means="the model's",
        group="What", fresh=True,
    )  # fmt: skip
    steps: int = option(100, "optimizer steps", low=1, high=10_000_000, group="Budget")
    batch_size: int = option(4, "windows in a micro-batch", low=1, high=4096, group="Budget")
    accumulate: int = option(1, "micro-batches in a step", low=1, high=4096, group="Budget")
    sequence_length: int = option(256, "tokens in a window", unit="tokens", low=8, high=131_072, group="Budget")
    packing: bool = option(False, "put short rows side by side in one window", group="Data")
    prompts: str = option("turns", "how prompt and completion are written", choices=PROMPT_FORMS, group="Data")
    learning_rate: float | None = option(
        None,
        "peak learning rate",
        low=0,
        high=100,
        open_means="lora 2e-4, full 2e-5, relora 4e-4, rank1 0.1 or 2e-3",
        group="Optimizer",
    )
    schedule: str | None = option(
        None,
        "learning rate after the warm-up",
        choices=SCHEDULES,
        open_means="jagged for relora, else cosine",
        group="Optimizer",
    )
    optimizer: str = option("adamw", "what turns gradients into steps", choices=OPTIMIZERS, group="Optimizer")
    momentum: float = option(
        0.9, "momentum of sgd and muon", low=0, high=0.9999, group="Optimizer", optimizers=("sgd", "muon")
    )
    warmup: int | None = option(
        None, "steps of linear warm-up", unit="steps", low=0, open_means="3 % of the steps", group="Optimizer"
    )
    final_ratio: float = option(0.1, "last learning rate, as a share of the peak", low=0, high=1, group="Optimizer")
    weight_decay: float = option(0.0, "decoupled weight decay of matrices", low=0, high=10, group="Optimizer")
    beta2: float = option(
        0.999, "AdamW's memory of squared gradients, also of what muon leaves to it", low=0, high=0.999999,
        group="Optimizer", optimizers=("adamw", "muon"),
    )  # fmt: skip
    clip: float = option(1.0, "bound of the gradient norm; 0 for none", low=0, high=1e6, group="Optimizer")
    rank: int = option(8, "rank of the adapters", low=1, high=4096, group="LoRA", methods=ADAPTERS)
    alpha: float = option(16.0, "adapters are scaled by alpha / rank", low=0, high=1e6, group="LoRA", methods=ADAPTERS)
    rslora: bool = option(False, "scale by alpha / √rank instead", group="LoRA", methods=ADAPTERS)
    dropout: float = option(0.0, "dropout before the adapters", low=0, high=0.99, group="LoRA", methods=ADAPTERS)
    targets: str = option(",".join(LINEARS), "adapted linears, with commas between", group="LoRA", methods=TARGETED)
    layers: str = option("", "adapted layers, as 0-5,11; empty for all", group="LoRA", methods=TARGETED)
    rest: bool = option(
        False, "train embeddings, norms and other layers as well, at full rank", group="Merging", methods=MERGING
    )
    merge_every: int | None = option(
        None,
        "steps between merges",
        unit="steps",
        low=1,
        open_means="1 for rank1, reset_every for relora",
        group="Merging",
        methods=MERGING,
    )
    reset_every: int = option(
        100, "steps between restarts of optimizer and rate", unit="steps", low=1, group="Merging", methods=("relora",)
    )
    restart_warmup: int = option(
        10, "steps in which the rate rises again", unit="steps", low=1, group="Merging", methods=("relora",)
    )
    prune: str = option(
        "magnitude", "what a restart zeroes of the optimizer's state", choices=PRUNINGS, group="Merging",
        methods=("relora",),
    )  # fmt: skip
    prune_ratio: float = option(
        0.9, "share of the state that is zeroed", low=0, high=1, group="Merging", methods=("relora",)
    )
    warm_start: int = option(
        0, "full-rank steps before, at half the rate", unit="steps", low=0, group="Merging", methods=("relora",)
    )
    mode: str = option("power", "how a rank-1 update is found", choices=MODES, group="Rank 1", methods=("rank1",))
    iterations: int = option(
        1, "power iterations per update", low=1, high=100, group="Rank 1", methods=("rank1",), modes=("power",)
    )
    error_feedback: bool = option(
        False, "add to the next gradient what an update left of it", group="Rank 1", methods=("rank1",), modes=FOUND
    )
    update_momentum: float = option(
        0.0,
        "share of the gradient's buffer that is kept",
        low=0,
        high=0.9999,
        group="Rank 1",
        methods=("rank1",),
        modes=FOUND,
    )
    update_rate: float = option(
        1.0,
        "rate of rank-1 updates, times the learning rate",
        low=0,
        high=1e6,
        group="Rank 1",
        methods=("rank1",),
        modes=FOUND,
    )
    normalised: bool = option(
        False, "steps of one length instead of the gradient's", group="Rank 1", methods=("rank1",), modes=FOUND
    )
    max_block: int = option(
        16, "longest block; each step draws one from 2 on", unit="tokens", low=2, high=64, group="Blocks",
        methods=BLOCKWISE,
    )  # fmt: skip
    next_token_weight: float = option(
        1.0, "weight of predicting the next token", low=0, high=1000, group="Blocks", methods=BLOCKWISE
    )
    masked_weight: float = option(
        1.0, "weight of predicting masked tokens; 0 is plain training", low=0, high=1000, group="Blocks",
        methods=BLOCKWISE,
    )  # fmt: skip
    mask_token: int = option(
        MASK, "id that stands for a masked token", low=0, high=1_000_000, group="Blocks", methods=BLOCKWISE
    )
    fill_blocks: bool = option(
        False, "fill a row's last block with its end token, instead of leaving it out", group="Blocks",
        methods=BLOCKWISE,
    )  # fmt: skip
    evaluate_every: int = option(20, "steps between evaluations; 0 for none", low=0, group="Watching")
    evaluate_batches: int = option(8, "micro-batches per evaluation; 0 for all", low=0, group="Watching")
    save_every: int | None = option(
        None, "steps between saves", low=1, group="Watching", open_means="as often as takes 5 % of the time at most"
    )
    diagnose_every: int = option(0, "steps between looks at gradients and updates; 0 for none", low=0, group="Watching")
    memorization_every: int = option(
        0, "steps between measurements of memorised bits, also before the first step and after the last; 0 for none",
        low=0, group="Watching",
    )  # fmt: skip
    memorization_rows: int = option(
        64, "sequences that bits are measured of, of those trained on and of the held-out ones each; 0 for all",
        low=0, high=10_000_000, group="Watching",
    )  # fmt: skip
    patience: int = option(0, "evaluations without a better loss before the end; 0 for none", low=0, group="Watching")
    keep_best: bool = option(False, "also keep the result of the best evaluation", group="Watching")
    keep: int = option(2, "checkpoints that are kept", low=1, high=1000, group="Watching")
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
        methods=WHOLE,
    )
    checkpoint_activations: bool = option(
        False, "compute activations again in the backward pass: less memory, more time", group="Machine"
    )

    @property
    def peak_rate(self) -> float:
        """The learning rate after the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.method == "rank1" and self.mode == "alternate":
            return ALTERNATE_RATE
        if self.method == "rank1" and self.normalised:
            return NORMALISED_RATE
        return DEFAULT_RATES[self.method]

    @property
    def masked(self) -> bool:
        """Whether masked copies of the rows are trained on."""
        return self.method in BLOCKWISE and self.masked_weight > 0

    @property
    def rows(self) -> int:
        """Rows of a micro-batch that go through the model, masked copies included."""
        return 2 * self.batch_size if self.masked else self.batch_size

    @property
    def warmup_steps(self) -> int:
        """Steps until the peak."""
        return round(0.03 * self.steps) if self.warmup is None else self.warmup

    @property
    def shape(self) -> str:
        """The schedule."""
        return self.schedule or ("jagged" if self.method == "relora" else "cosine")

    @property
    def merge_interval(self) -> int:
        """Steps between merges."""
        return self.merge_every or (self.reset_every if self.method == "relora" else 1)

    @property
    def full_rank_steps(self) -> int:
        """Steps of the warm start."""
        return self.warm_start if self.method == "relora" else 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first being 1."""
        before = self.full_rank_steps
        if step <= before:  # the rule of thumb for ReLoRA is twice the rate of full-rank training
            return self.peak_rate / 2 * min(1.0, step / max(1, self.warmup_steps))
        step, steps = step - before, self.steps - before
        if self.shape != "jagged":
            return learning_rate(step, self.peak_rate, steps, self.warmup_steps, self.shape, self.final_ratio)
        share = jagged(step, steps, self.warmup_steps, self.reset_every, self.restart_warmup, self.final_ratio)
        return self.peak_rate * share

    def rates(self, points: int) -> tuple[list[int], list[float]]:
        """Steps from the first to the last and their rates: about ``points``, evenly spread, and where the peak is."""
        spread = {1 + round(i * (self.steps - 1) / max(1, points - 1)) for i in range(points)}
        peak = min(self.full_rank_steps + max(1, self.warmup_steps), self.steps)
        steps = sorted(spread | {peak})
        return steps, [self.rate(step) for step in steps]


def plan_of(values: Mapping[str, Any]) -> TrainingPlan:
    """The plan of a run as the run store has it.

    Raises:
        UsageError: another version wrote it.
    """
    return build(TrainingPlan, {key: value for key, value in values.items() if value is not None}, "the run's plan")


def plan_config(plan: TrainingPlan, model: Model) -> Gemma3Config:
    """The config of what a plan trains: the model's, with the window and the pattern of layers that new weights get.

    Raises:
        CheckpointError: the model's config is not usable.
    """
    config = model.config()
    if not plan.fresh:
        return config
    if plan.window is not None:
        config = replace(config, sliding_window=plan.window)
    if (every := plan.global_every) is None:
        return config
    layers = range(1, config.num_hidden_layers + 1)
    return replace(config, layer_types=tuple(GLOBAL if every and not i % every else LOCAL for i in layers))


def settings(plan: TrainingPlan) -> TrainingSettings:
    """What the engine needs of a plan.

    Raises:
        UsageError: a target is no linear of Gemma-3, options do not go together, or adapters are wanted on weights that
            will be gone.
    """
    if plan.fresh and plan.method in ("lora", "dora", "sbd-lora"):
        raise UsageError("fresh: adapters on new weights, which are kept nowhere, are of no use; take --method full")
    targets = tuple(t.strip() for t in plan.targets.split(",") if t.strip())
    unknown = [t for t in targets if t not in LINEARS]
    if unknown or not targets:
        raise UsageError(f"targets: {', '.join(unknown) or 'none'}; choose from {', '.join(LINEARS)}")
    if plan.method in BLOCKWISE:
        _check_blocks(plan)
    if plan.shape == "jagged":
        _check_restarts(plan)
    optimizer = OptimizerSettings(
        plan.optimizer, betas=(0.9, plan.beta2), weight_decay=plan.weight_decay, momentum=plan.momentum
    )
    return TrainingSettings(
        lora=_lora(plan, targets),
        rank1=_rank1(plan, targets),
        rest=plan.rest and plan.method in MERGING,
        merging=plan.method in MERGING,
        seed=plan.seed,
        optimizer=optimizer,
        clip=plan.clip,
        checkpoint_activations=plan.checkpoint_activations,
    )


def chosen_layers(written: str) -> tuple[int, ...] | None:
    """Layer numbers from ``0-5,11``; None for all.

    Raises:
        UsageError: it is not written like that.
    """
    found: set[int] = set()
    for part in filter(None, (p.strip() for p in written.split(","))):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) > MAX_LAYER:
            raise UsageError(f"layers: {part[:40]!r} is no layer and no range; write for example 0-5,11")
        found |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(found)) if found else None


def _lora(plan: TrainingPlan, targets: tuple[str, ...]) -> LoRASettings | None:
    layers = chosen_layers(plan.layers)
    if plan.method == "rank1" and plan.mode == "alternate":
        return LoRASettings(1, 1.0, 0.0, targets, layers)
    if plan.method not in ADAPTERS:
        return None
    dora = plan.method == "dora"
    return LoRASettings(plan.rank, plan.alpha, plan.dropout, targets, layers, plan.rslora, dora)


def _rank1(plan: TrainingPlan, targets: tuple[str, ...]) -> Rank1Settings | None:
    if plan.method != "rank1" or plan.mode == "alternate":
        return None
    return Rank1Settings(
        plan.mode,
        targets,
        chosen_layers(plan.layers),
        plan.iterations,
        plan.error_feedback,
        plan.update_momentum,
        plan.normalised,
        plan.update_rate,
    )


def _check_blocks(plan: TrainingPlan) -> None:
    if plan.packing:
        raise UsageError("packing: blocks would reach over the borders of documents; leave it out with --method sbd")
    if plan.next_token_weight == plan.masked_weight == 0:
        raise UsageError("masked_weight: with both weights 0 nothing is learnt: raise one")


def _check_restarts(plan: TrainingPlan) -> None:
    if plan.method != "relora":
        raise UsageError("schedule: jagged belongs to --method relora; take cosine, linear or constant")
    if plan.full_rank_steps >= plan.steps:
        raise UsageError(f"warm_start: {plan.warm_start} steps leave none of {plan.steps}: give more steps")
    if plan.warmup_steps > plan.reset_every or plan.restart_warmup >= plan.reset_every:
        raise UsageError(f"reset_every: {plan.reset_every} is shorter than a warm-up: restart less often")
