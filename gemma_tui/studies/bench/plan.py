"""What a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engines import ENGINES, available_engines
from engines.gemma3 import Gemma3Config
from gemma_tui.errors import UsageError
from gemma_tui.studies.bench.cell import INFERENCE, TRAINING, Cell
from gemma_tui.studies.plan import check_honoured, command, option

DTYPES = ("float32", "bfloat16")
METHODS = ("lora", "full", "rank1")
NO_TRAINING = "none"
MOST_CELLS = 200


@dataclass(frozen=True)
class BenchPlan:
    """Both engines side by side on this machine: which one, and which batch, is the fastest."""

    model: str = option("", "name, folder, run or hub id", required=True, group="What")
    engines: str | None = option(None, "engines, with commas between", open_means="all that are here", group="What")
    dtypes: str = option("float32,bfloat16", "dtypes of the weights, with commas between", group="What")
    batches: str = option("1,4", "rows side by side, with commas between", group="What")
    repeats: int = option(5, "times that each is measured, after once that is not", low=1, high=1000, group="What")
    prompt: int = option(128, "tokens of a prompt", unit="tokens", low=8, high=131_072, group="Inference")
    new_tokens: int = option(16, "tokens decoded after it", unit="tokens", low=1, high=4096, group="Inference")
    method: str = option("lora", "what is trained", choices=(*METHODS, NO_TRAINING), group="Training")
    sequence_length: int = option(
        128, "tokens in a window", unit="tokens", low=8, high=131_072, methods=METHODS, group="Training"
    )
    name: str = option("bench", "name of the run", group="What")


def cells_of(plan: BenchPlan, folder: str, config: Gemma3Config) -> list[Cell]:
    """Every combination, the quickest to measure first: those of inference before those of training.

    Args:
        folder: of the model.
        config: of the model; if its weights are quantised, only MLX computes them.

    Raises:
        UsageError: an engine, a dtype or a batch is none, a text is longer than the context, or there are too many
            combinations.
    """
    check_honoured(plan)
    _check_context(plan, config.max_position_embeddings)
    tasks = (INFERENCE,) if plan.method == NO_TRAINING else (INFERENCE, TRAINING)
    found = [
        Cell(
            folder, engine, dtype, batch, task, plan.prompt if task == INFERENCE else plan.sequence_length,
            plan.new_tokens, plan.method, plan.repeats,
        )
        for task in tasks
        for engine in _engines(plan, config.quantization is not None)
        for dtype in _words("dtypes", plan.dtypes, DTYPES) or DTYPES
        for batch in _batches(plan.batches)
    ]  # fmt: skip
    if len(found) > MOST_CELLS:
        raise UsageError(f"{len(found)} combinations are more than {MOST_CELLS}: leave some out")
    return found


def command_of(plan: BenchPlan) -> str:
    """The command that measures so."""
    return command(("bench", plan.model), replace(plan, model=BenchPlan.model))


def _check_context(plan: BenchPlan, context: int) -> None:
    if plan.prompt + plan.new_tokens > context:
        raise UsageError(
            f"prompt: {plan.prompt:,} tokens and {plan.new_tokens:,} after them are more than the context of "
            f"{context:,}: lower --prompt"
        )
    if plan.method != NO_TRAINING and plan.sequence_length > context:
        raise UsageError(
            f"sequence_length: {plan.sequence_length:,} tokens are more than the context of {context:,}: lower "
            "--sequence-length"
        )


def _engines(plan: BenchPlan, packed: bool) -> tuple[str, ...]:
    here = available_engines()
    engines = _words("engines", plan.engines or "", ENGINES)
    missing = [name for name in engines if name not in here]
    if missing:
        raise UsageError(f"engines: {missing[0]} is not installed here: `gemma-tui doctor` says how to add it")
    if not packed:
        return engines or tuple(here)
    if "mlx" not in here or set(engines) - {"mlx"}:
        raise UsageError("engines: quantised weights are computed by mlx alone: name no other, or take a plain model")
    return ("mlx",)


def _words(name: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for word in words:
        if word not in known:
            raise UsageError(f"{name}: {word[:40]!r} is none; choose {' or '.join(known)}")
    return words


def _batches(text: str) -> tuple[int, ...]:
    try:
        batches = tuple(dict.fromkeys(int(word) for word in text.split(",") if word.strip()))
    except ValueError:
        batches = ()
    if not batches or not all(1 <= batch <= 4096 for batch in batches):
        raise UsageError(f"batches is {text[:40]!r}; whole numbers from 1 to 4096 with commas between are needed")
    return batches
