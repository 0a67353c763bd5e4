"""Runs of other processes, detached runs and the queue, from the training screen."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines import available_engines
from gemma_tui import paths
from gemma_tui.runs.processes import Detached, start
from gemma_tui.runs.queue import Queue
from gemma_tui.runs.store import RunStore

from .conftest import Open, Size
from .watching import LONG, headline, listed, points

OTHER_PROCESS = """
import sys, time
from gemma_tui.runs.store import RunStore
store = RunStore()
run = store.create("elsewhere", "training", "torch", {"method": "lora"}, "gemma-tui train", 1000).run_id
print(run, flush=True)
for step in range(1, 1000):
    store.record(run, "step", step, {"loss": 3.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 9.0})
    while (asked := store.take_request(run)) == "pause" or (asked == "" and store.run(run).state == "paused"):
        store.set_state(run, "paused")
        time.sleep(0.02)
    store.set_state(run, "stopped" if asked == "stop" else "running")
    if asked == "stop":
        break
    time.sleep(0.05)
"""


async def test_a_run_of_another_process_is_watched_steered_and_known_as_lost(opened: Open) -> None:
    other = subprocess.Popen([sys.executable, "-c", OTHER_PROCESS], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        run = other.stdout.readline().strip()
        async with opened() as it:
            await it.mode("2", "training")
            await listed(it, run)
            await it.press("enter")
            await it.until(lambda: f"{run}  running" in headline(it) and points(it, "loss") > 1, "the run")
            seen = points(it, "loss")
            await it.until(lambda: points(it, "loss") > seen, "more of it")
            await it.press("space")
            await it.until(lambda: f"{run}  paused" in headline(it), "the pause")
            assert f"{run} was asked to pause" in it.told()
            await it.press("space")
            await it.until(lambda: f"{run}  running" in headline(it), "that it goes on")
            assert f"{run} was asked to resume" in it.told()
            await it.press("x")
            await it.until(lambda: f"{run} was asked to stop" in it.told(), "the request")
            await it.until(lambda: f"{run}  stopped" in headline(it), "its end")
            RunStore().set_state(run, "running")
            other.wait(30)
            await it.until(lambda: f"{run}  lost" in headline(it), "the loss of its process")
    finally:
        other.kill()
        other.wait()
        other.stdout.close()  # type: ignore[union-attr]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes that the app started end with the test."""
    begun: list[Detached] = []

    def starts(*arguments: Any) -> Detached:
        begun.append(start(*arguments))
        return begun[-1]

    monkeypatch.setattr("gemma_tui.screens.training.start", starts)
    monkeypatch.setattr("gemma_tui.studies.queueing.start", starts)
    yield
    for process in begun:
        process.process.terminate()
        process.process.wait(30)


@pytest.mark.usefixtures("ended")
async def test_a_run_is_detached_paused_and_goes_on_when_the_app_has_ended(
    opened: Open, tiny: str, corpus: Path
) -> None:
    async with opened(engine=available_engines()[-1]) as it:
        await it.plan(tiny, corpus, steps=LONG, evaluate_every=0)
        await it.press("d", "d")
        await it.until(lambda: "one is starting already" in it.told(), "that once is enough")
        await it.until(lambda: "lora-1 goes on by itself, also when the app ends" in it.told(), "its beginning")
        await it.until(lambda: "lora-1  running" in headline(it) and points(it, "loss") > 1, "its steps")
        assert not it.app.session.jobs
        await it.press("space")
        await it.until(lambda: "lora-1  paused" in headline(it), "the pause")
        await it.press("space")
        await it.until(lambda: "lora-1  running" in headline(it), "that it goes on")
        table = await listed(it, "lora-1")
        assert table.row_count == 1
        await it.press("q")
        await it.until(lambda: it.app._exit, "leaving without a question")
    store = RunStore()
    step = store.run("lora-1").step
    while store.run("lora-1").step == step:
        assert store.run("lora-1").state == "running"
        time.sleep(0.05)
    assert (paths.runs() / "lora-1" / "log.jsonl").is_file()
    store.close()


@pytest.mark.usefixtures("ended")
async def test_a_detached_run_that_does_not_begin_says_why(opened: Open, corpus: Path) -> None:
    async with opened() as it:
        await it.plan("m", corpus)
        it.app.session.engine = "jax"
        await it.press("d")
        await it.until(lambda: "invalid choice: 'jax'" in it.told(), "the reason")
        await it.until(lambda: "did not start" in headline(it), "the headline")


@pytest.mark.usefixtures("ended")
async def test_plans_are_queued_shown_cancelled_and_worked_through(
    opened: Open, tiny: str, corpus: Path, size: Size
) -> None:
    queue = Queue()
    assert queue.lead()
    async with opened(size, engine=available_engines()[-1]) as it:
        for name in ("first", "second"):
            await it.plan(tiny, corpus, steps=2, name=name, group="pair")
            await it.press("a")
            await it.until(lambda name=name: name in {i.plan["name"] for i in queue.queued()}, name)
        assert "was started" not in it.told(), "while something works through the queue, nothing else is started"
        table = await listed(it, "queue:1", "queue:2")
        await it.until(lambda: it.sees("plan 1 first queued", "0/2", "lora", "plan 2 second queued"), "both")
        assert size[0] > 80 or it.sees("age group", "s pair")
        table.move_cursor(row=table.get_row_index("queue:1"))
        assert "--name first" in it.app.screen.command()  # type: ignore[attr-defined]
        await it.press("enter")
        await it.until(lambda: "waits for its turn" in it.told(), "that there is nothing to see")
        await it.press("delete")
        await it.until(lambda: "plan 1 is cancelled" in it.told(), "the end of the first")
        await it.until(lambda: "queue:1" not in {str(k.value) for k in table.rows}, "the table without it")
        queue.leave()
        await it.press("a")
        await it.until(lambda: "a process that works through the queue was started" in it.told(), "the runner")
        await listed(it, "second-1", "second-2")
        await it.until(lambda: it.sees("second-1 done", "second-2 done"), "both runs")
        table.move_cursor(row=0)
        await it.press("backspace")
        await it.until(lambda: "only a queued plan can be cancelled" in it.told(), "that a run stays")
    queue.close()


async def test_f_queues_the_four_methods_and_g_the_intervals_each_as_a_group(
    opened: Open, tiny: str, corpus: Path, size: Size
) -> None:
    queue = Queue()
    assert queue.lead()
    async with opened(size) as it:
        form = await it.plan(tiny, corpus, steps=8, seed=5)
        await it.press("g")
        await it.until(lambda: "lora does not merge; choose relora or rank1" in it.told(), "the refusal")
        assert not queue.queued()
        await it.press("f")
        await it.until(lambda: "queued as plans 1 to 4, group methods; o on one" in it.told(), "the four")
        items = queue.queued()
        assert [item.plan.get("method", "lora") for item in items] == ["full", "lora", "relora", "rank1"]
        assert {(item.plan["seed"], item.plan["steps"], item.group) for item in items} == {(5, 8, "methods")}
        form.set("method", "rank1")
        await it.press("g")
        await it.until(lambda: "queued as plans 5 to 7, group merges" in it.told(), "the intervals")
        assert [item.plan["merge_every"] for item in queue.queued()[4:]] == [1, 2, 4]
        form.set("group", "mine")
        for group in ("mine", "mine-2"):
            await it.press("g")
            await it.until(lambda group=group: f"group {group};" in it.told(), "a group of its own")
        await listed(it, "queue:1", "queue:7")
        await it.until(lambda: it.sees("plan 4 rank1 queued"), "the plans in the list")
        assert it.app.session.jobs == []
        await it.press("question_mark")
        for words in ("Queue full, LoRA, ReLoRA and rank 1", "merging every 1, 2, 4"):
            await it.until(lambda words=words: it.sees(words), words)
    queue.close()
