"""What a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass

from engines import ENGINES, available_engines
from gemma_tui.errors import UsageError
from gemma_tui.studies.bench.cell import INFERENCE, TRAINING, Cell
from gemma_tui.studies.plan import option

DTYPES = ("float32", "bfloat16")
METHODS = ("lora", "full", "rank1")
MOST_CELLS = 200


@dataclass(frozen=True)
class BenchPlan:
    """Both engines side by side on this machine: which one, and which batch, is the fastest."""

    model: str = option("", "name, folder, run or hub id", required=True, group="What")
    engines: str = option("", "engines, with commas between; empty for all that are here", group="What")
    dtypes: str = option("float32,bfloat16", "dtypes of the weights, with commas between", group="What")
    batches: str = option("1,4", "rows side by side, with commas between", group="What")
    prompt: int = option(
        128, "tokens of a prompt", unit="tokens", low=8, high=131_072, group="Inference"
    )  # fmt: skip
    new_tokens: int = option(16, "tokens decoded after it", unit="tokens", low=1, high=4096, group="Inference")
    training: bool = option(True, "measure training as well", group="Training")
    method: str = option("lora", "what is trained", choices=METHODS, group="Training")
    sequence_length: int = option(128, "tokens in a window", unit="tokens", low=8, high=131_072, group="Training")
    steps: int = option(2, "optimizer steps, after one that does not count", low=1, high=1000, group="Training")
    name: str = option("bench", "name of the run", group="What")


def cells_of(plan: BenchPlan, folder: str, packed: bool) -> list[Cell]:
    """Every combination, the quickest to measure first: those of inference before those of training.

    Args:
        folder: of the model.
        packed: whether its weights are quantised, which only MLX computes and only LoRA trains.

    Raises:
        UsageError: an engine, a dtype or a batch is none, or there are too many combinations.
    """
    engines = _words("engines", plan.engines, ENGINES) or tuple(available_engines())
    missing = [name for name in engines if name not in available_engines()]
    if missing:
        raise UsageError(f"engines: {missing[0]} is not installed here: `gemma-tui doctor` says how to add it")
    if packed:
        engines = tuple(name for name in engines if name == "mlx")
    if not engines:
        raise UsageError("engines: quantised weights are computed by mlx alone: add it, or take the unquantised model")
    tasks = (INFERENCE, TRAINING) if plan.training else (INFERENCE,)
    found = [
        Cell(
            folder, engine, dtype, batch, task, plan.prompt if task == INFERENCE else plan.sequence_length,
            plan.new_tokens, plan.method, plan.steps,
        )
        for task in tasks
        for engine in engines
        for dtype in _words("dtypes", plan.dtypes, DTYPES) or DTYPES
        for batch in _batches(plan.batches)
    ]  # fmt: skip
    if len(found) > MOST_CELLS:
        raise UsageError(f"{len(found)} combinations are more than {MOST_CELLS}: leave some out")
    return found


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
