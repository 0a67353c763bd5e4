"""``bench``: cells in processes of their own, kept as a run; a cell that breaks costs no other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from engines import open_engine
from engines.gemma3 import Quantization
from engines.official import official_config
from gemma_tui import paths
from gemma_tui.cli import USAGE
from gemma_tui.errors import UsageError
from gemma_tui.hub.models import resolve
from gemma_tui.runs.processes import environment
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.bench import measuring
from gemma_tui.studies.bench.cell import INFERENCE, TRAINING, Cell, measure
from gemma_tui.studies.bench.plan import BenchPlan, cells_of
from gemma_tui.studies.bench.results import SPEEDS, bench_figure
from gemma_tui.studies.events import Control

Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]
SMALL = ("--dtypes", "float32", "--batches", "2", "--prompt", "8", "--new-tokens", "2", "--sequence-length", "8")


@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_a_benchmark_is_a_run_with_its_machine(engine: str, command: Commands, tmp_path: Path) -> None:
    code, rows, error = command("bench", "nano", *SMALL, "--engines", engine, "--repeats", "3")
    assert code == 0, error
    weights = 4 * resolve("nano").config().parameter_count()
    cells = {row["task"]: row for row in rows if row["kind"] == "cell"}
    for task, speeds in ((INFERENCE, ("prefill", "decode")), (TRAINING, ("training",))):
        for speed in SPEEDS:
            assert len(cells[task][speed]) == (3 if speed in speeds else 0)
            assert all(repeat > 0 for repeat in cells[task][speed])
        assert cells[task]["memory"] > weights
    start = next(row for row in rows if row["kind"] == "start")
    assert start["machine"]["cores"] > 0
    assert start["machine"]["packages"]["numpy"]
    told = next(row for row in rows if row["kind"] == "decode" and "lowest" in row)
    low, middle, high = sorted(cells[INFERENCE]["decode"])
    assert (told["lowest"], told["decode tok/s"], told["highest"]) == (low, middle, high)
    html = tmp_path / "bench.html"
    code, shown, _ = command("runs", "show", rows[-1]["run"], "--html", str(html))
    assert [row for row in shown if row["kind"] == "decode"] == [row for row in rows if row["kind"] == "decode"]
    assert (code, "decode tok/s" in html.read_text()) == (0, True)
    assert (shown[0]["study"], shown[0]["state"], shown[0]["step"]) == ("bench", "done", 2)
    assert "machine" in next(row for row in shown if row.get("event") == "start")["values"]


def test_it_says_which_is_fastest(store: RunStore) -> None:
    plan = BenchPlan(model="nano")
    run = store.create("bench", "bench", "torch,mlx", vars(plan), "gemma-tui bench nano", 4)
    measured = (("torch", 1, [30, 60, 40]), ("torch", 4, [110, 120, 900]), ("mlx", 1, [61, 60, 20]))
    for step, (engine, batch, speeds) in enumerate(measured, 1):
        values = {"task": TRAINING, "engine": engine, "dtype": "float32", "batch": batch, "memory": 5_000_000}
        store.record(run.run_id, "cell", step, {**values, "training": speeds, "prefill": [], "decode": []})
    broken = {"task": TRAINING, "engine": "mlx", "dtype": "float32", "batch": 4, "error": "not enough memory"}
    store.record(run.run_id, "cell", 4, broken)
    figure = bench_figure(run, store.events(run.run_id))
    best = "torch float32, batch 4: 120 tokens/s (110 to 900), 2 times mlx at its best (mlx float32, batch 1)"
    assert best in figure.notes[0]
    assert [table.kind for table in figure.tables] == ["training", "failure"]
    assert figure.tables[0].rows == [
        ("mlx", "float32", 1, 60, 20, 61, 5.0), ("torch", "float32", 1, 40, 30, 60, 5.0),
        ("torch", "float32", 4, 120, 110, 900, 5.0),
    ]  # fmt: skip
    assert figure.tables[1].rows == [("mlx", "float32", 4, TRAINING, "not enough memory")]
    lines = {line.label: (list(line.x), list(line.y)) for line in figure.charts[0].series}
    assert lines == {"torch float32": ([1, 4], [40.0, 120.0]), "mlx float32": ([1], [60.0])}


def test_a_cell_that_breaks_tells_why_and_the_others_go_on(tiny: str, command: Commands) -> None:
    code, rows, _ = command("bench", tiny, *SMALL[:-2], "--engines", "torch", "--method", "none", "--repeats", "1")
    assert code == 0
    (cell,) = (row for row in rows if row["kind"] == "cell")
    gone = Cell(folder="/no/such/model", engine="torch", dtype="float32", batch=1, task=INFERENCE, length=8)
    whole = Cell(
        **{key: cell[key] for key in ("engine", "dtype", "batch", "task", "length", "new_tokens", "repeats")},
        folder=str(paths.models() / tiny),
    )
    events = [event.values for event in measuring.bench([gone, whole], Control()) if event.kind == "cell"]
    assert "config.json is missing" in events[0]["error"]
    assert min(events[1]["prefill"]) > 0
    assert "signal 9" in measuring._result(-9, "", "")["error"]
    assert measuring._result(1, "", "Traceback\nValueError: no")["error"] == "ValueError: no"


def test_a_stop_ends_the_cell_in_hand(tiny: str, store: RunStore) -> None:
    control = Control()
    plan = BenchPlan(model=tiny, engines="torch", batches="1", dtypes="float32", repeats=1000, sequence_length=256)
    recorded, kinds = measuring.record_bench(plan, control, store), []
    for event in recorded.events:
        kinds.append(event.kind)
        if event.kind == "measuring":
            control.stop.set()
    assert "cell" not in kinds
    assert store.run(recorded.run.run_id).state == "stopped"


def test_what_was_stopped_goes_on_with_the_cells_that_are_left(tiny: str, store: RunStore, command: Commands) -> None:
    control = Control()
    plan = BenchPlan(model=tiny, engines="torch", dtypes="float32", prompt=8, new_tokens=2, sequence_length=8)
    recorded = measuring.record_bench(plan, control, store)
    for event in recorded.events:
        if event.kind == "cell":
            control.stop.set()
    run = store.run(recorded.run.run_id)
    assert (run.state, run.step, run.steps) == ("stopped", 1, 4)
    code, rows, error = command("runs", "resume", run.run_id)
    assert code == 0, error
    measured = [(row["task"], row["batch"]) for row in rows if row["kind"] == "cell"]
    assert measured == [(INFERENCE, 4), (TRAINING, 1), (TRAINING, 4)]
    assert {(row["engine"], row["batch"]) for row in rows if row["kind"] == "prefill"} == {("torch", 1), ("torch", 4)}
    code, rows, _ = command("runs", "resume", run.run_id)
    assert (code, [row for row in rows if row["kind"] == "cell"]) == (0, [])


def test_a_cell_ends_when_what_started_it_is_gone() -> None:
    cell = "from gemma_tui.studies.bench.cell import end_with_parent; end_with_parent(); print(flush=True)"
    child = f"import time; {cell}; time.sleep(600)"
    middle = (
        "import subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE); "
        "p.stdout.readline(); print(p.pid, flush=True); p.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", middle], stdout=subprocess.PIPE, env=environment()) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    process.wait(30)


@pytest.mark.parametrize("task", [INFERENCE, TRAINING])
@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_both_engines_are_measured(tiny: str, engine: str, task: str) -> None:
    device = open_engine(engine).device().device
    for method in ("lora", "full", "rank1") if task == TRAINING else ("lora",):
        found = measure(Cell(str(paths.models() / tiny), engine, "float32", 1, task, 8, 2, method, repeats=2))
        speeds = (found.prefill, found.decode) if task == INFERENCE else (found.training,)
        assert all(len(speed) == 2 and min(speed) > 0 for speed in speeds)
        assert found.device == device


def test_the_cells_are_every_combination() -> None:
    plan, config = BenchPlan(model="m", batches="1,4,8"), official_config("gemma-3-1b")
    cells = cells_of(replace(plan, engines="torch,mlx"), "folder", config)
    assert len(cells) == len(set(cells)) == 2 * 2 * 3 * 2
    assert {cell.task for cell in cells_of(replace(plan, method="none"), "folder", config)} == {INFERENCE}


def test_packed_weights_are_measured_on_mlx_alone() -> None:
    plan, config = BenchPlan(model="m"), replace(official_config("gemma-3-1b"), quantization=Quantization(4, 64))
    for engines in (None, "mlx"):
        assert {cell.engine for cell in cells_of(replace(plan, engines=engines), "folder", config)} == {"mlx"}
    for engines in ("torch", "torch,mlx"):
        with pytest.raises(UsageError, match="mlx alone"):
            cells_of(replace(plan, engines=engines), "folder", config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--engines", "jax"), "jax"),
        (("--dtypes", "float16"), "float16"),
        (("--batches", "0"), "1 to 4096"),
        (("--batches", "x"), "1 to 4096"),
        (("--batches", ",".join(map(str, range(1, 60)))), "more than 200"),
        (("--prompt", "250"), "prompt: 250"),
        (("--sequence-length", "512"), "sequence_length: 512"),
        (("--method", "none", "--sequence-length", "64"), "makes no difference"),
    ],
)
def test_what_is_not_there_is_refused(tiny: str, command: Commands, options: tuple[str, ...], said: str) -> None:
    code, _, error = command("bench", tiny, *options)
    assert (code, said in error) == (USAGE, True)
