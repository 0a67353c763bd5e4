"""Estimates of memory beside measured peaks, on nano and the 270M, both engines, float32; each in its own process.

python -m tests.benchmarks.memory [MODEL ...]

On a CPU the peak is that of the process, less what it had before the model was loaded. MLX computes on a CPU at a small
part of torch's speed, so that its work on the 270M is smaller.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

from engines import ENGINES, open_engine
from engines.base import DeviceInfo
from gemma_tui.hub.models import resolve
from gemma_tui.studies.bench.cell import INFERENCE, TRAINING, Cell
from gemma_tui.studies.estimate import estimate, inference_bytes
from gemma_tui.studies.methods import usual_settings
from tests.benchmarks.measure import machine

MODELS = ("nano", "gemma-3-270m")
METHODS = ("lora", "full", "rank1")


def cells(model: str, engine: str) -> Iterator[Cell]:
    """Inference at two lengths, and each method at two sizes."""
    small = engine == "mlx" and model != "nano"
    folder, shared = str(resolve(model).folder), {"engine": engine, "dtype": "float32"}
    for length in (128, 512) if small else (512, 2048):
        yield Cell(folder, batch=1, task=INFERENCE, length=length, new_tokens=4, **shared)
    for method in METHODS:
        for batch, length in ((1, 64), (2, 64)) if small else ((2, 128), (4, 256)):
            yield Cell(folder, batch=batch, task=TRAINING, length=length, method=method, **shared)


def estimated(cell: Cell, device: DeviceInfo) -> int:
    """What the program tells before."""
    from pathlib import Path

    from engines.gemma3 import read_config

    config = read_config(Path(cell.folder))
    if cell.task == INFERENCE:
        return inference_bytes(config, cell.length + cell.new_tokens, cell.batch, cell.dtype, device)
    return estimate(config, usual_settings(cell.method, cell.rank), cell.batch, cell.length, cell.dtype, device).total


def measured(cell: Cell) -> int:
    """The peak of a process that does it."""
    command = [sys.executable, "-m", "gemma_tui.studies.bench.cell", json.dumps(asdict(cell))]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode:
        sys.exit(f"{cell} failed:\n{told.stderr[-2000:]}")
    found = json.loads(told.stdout.splitlines()[-1])
    return int(found.get("memory") or sys.exit(found["error"]))


if __name__ == "__main__":
    print(f"{machine()}\nmodel, engine, task, batch x length: estimated MB, measured MB, estimated / measured")
    for model in sys.argv[1:] or MODELS:
        for engine in ENGINES:
            device = open_engine(engine).device()
            for cell in cells(model, engine):
                told, peak = estimated(cell, device), measured(cell)
                what = cell.task if cell.task == INFERENCE else cell.method
                print(
                    f"{model} {engine} {what} {cell.batch} x {cell.length}: {told / 1e6:,.0f} {peak / 1e6:,.0f} "
                    f"{told / peak:.2f}",
                    flush=True,
                )
