"""One cell of a benchmark, in a process of its own: ``python -m gemma_tui.studies.bench.cell '{...}'``.

A process that computed nothing before has a clean peak of memory, and a crash or a lack of memory costs one cell.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from engines import open_engine
from engines.base import Engine, Sampling
from engines.errors import EngineError
from engines.gemma3 import GLOBAL, LOCAL, Gemma3Config, Rope
from engines.memory import is_out_of_memory
from engines.training import Batch
from gemma_tui.studies.generation import warm
from gemma_tui.studies.methods import usual_settings

INFERENCE, TRAINING = "inference", "training"
WATCH_SECONDS = 0.5
FREE_TOKEN = 5
"""Token ids are drawn from here on: those below have meanings of their own."""


WARMING = Gemma3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, sliding_window=16, layer_types=(LOCAL, GLOBAL), rope_global=Rope(1e6),
    rope_local=Rope(1e4), query_pre_attn_scalar=16,
)  # fmt: skip
"""A model that is gone through before, for what a framework does only once."""


@dataclass(frozen=True)
class Cell:
    """What is measured in one process.

    Attributes:
        task: ``inference`` or ``training``.
        length: tokens of a prompt, or of a window.
        new_tokens: decoded after each prompt.
        repeats: times that it is measured, after once that is not: readings of the prompt, or optimizer steps.
    """

    folder: str
    engine: str
    dtype: str
    batch: int
    task: str
    length: int
    new_tokens: int = 0
    method: str = "lora"
    repeats: int = 1
    rank: int = 8


@dataclass(frozen=True)
class Measured:
    """What a cell took.

    Attributes:
        prefill, decode, training: tokens a second of each repeat, of all rows together; none where it was not measured.
        memory: bytes at the peak after loading, less what the process had before it loaded.
        device, version: of the engine.
    """

    memory: int
    device: str
    version: str
    prefill: tuple[float, ...] = ()
    decode: tuple[float, ...] = ()
    training: tuple[float, ...] = ()


def measure(cell: Cell) -> Measured:
    """Load the model and do the task, timed.

    Raises:
        EngineError: the engine refuses the model, the dtype or the method.
    """
    engine, generator = open_engine(cell.engine), np.random.default_rng(0)
    # Code, threads and their buffers come with the first use of a framework; they belong to no model.
    engine.initialise(WARMING, 0, cell.dtype)
    _task(engine, replace(cell, batch=1, length=8, new_tokens=1, repeats=1), generator)
    engine.unload()
    engine.peak_memory(reset=True)
    empty = engine.peak_memory()
    engine.load(Path(cell.folder), cell.dtype)
    engine.peak_memory(reset=True)
    speeds = _task(engine, cell, generator)
    device = engine.device()
    return Measured(max(0, engine.peak_memory() - empty), device.device, device.version, **speeds)


def _task(engine: Engine, cell: Cell, generator: np.random.Generator) -> dict[str, tuple[float, ...]]:
    return _inference(engine, cell, generator) if cell.task == INFERENCE else _training(engine, cell, generator)


def _inference(engine: Engine, cell: Cell, generator: np.random.Generator) -> dict[str, tuple[float, ...]]:
    prompts = _ids(engine, generator, (cell.batch, cell.length)).tolist()
    sampling = Sampling(max_tokens=cell.new_tokens + 1)
    warm(engine, prompts, sampling, [None])
    prefill, decode = [], []
    for _ in range(cell.repeats):
        began, said = time.perf_counter(), engine.decode(prompts, sampling)
        first, *others = [time.perf_counter() for _ in said]
        prefill.append(cell.batch * cell.length / (first - began))
        decode.append(cell.batch * len(others) / (others[-1] - first))
    return {"prefill": tuple(prefill), "decode": tuple(decode)}


def _training(engine: Engine, cell: Cell, generator: np.random.Generator) -> dict[str, tuple[float, ...]]:
    engine.start_training(usual_settings(cell.method, cell.rank))
    speeds = []
    for step in range(cell.repeats + 1):
        ids = _ids(engine, generator, (cell.batch, cell.length + 1))
        batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy())
        began = time.perf_counter()
        engine.train_step([batch], 1e-5)
        if cell.method == "rank1":
            engine.merge("keep", step)
        speeds.append(cell.batch * cell.length / (time.perf_counter() - began))
    return {"training": tuple(speeds[1:])}


def _ids(engine: Engine, generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    info = engine.model()
    top = info.config.vocab_size if info else FREE_TOKEN + 1
    return generator.integers(min(FREE_TOKEN, top - 1), top, shape, dtype=np.int32)


def end_with_parent() -> None:
    """Let this process end within a second after the one that started it, however that ends."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(text: str) -> int:
    """Measure a cell and print it, or what kept it from being measured."""
    end_with_parent()
    try:
        found = asdict(measure(Cell(**json.loads(text))))
    except EngineError as error:
        found = {"error": str(error)}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        found = {"error": "not enough memory"}
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
