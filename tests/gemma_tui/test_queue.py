from __future__ import annotations

import dataclasses
import json
import os
import pty
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from engines import available_engines
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.runs.queue import Queue
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.events import Control, Event
from gemma_tui.studies.queueing import (
    assignments,
    enqueue,
    merge_variations,
    method_variations,
    plan_of,
    variations,
)
from gemma_tui.studies.recording import recorded
from gemma_tui.studies.training_plan import MERGING, TrainingPlan

Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]
SECONDS = 60.0
SMALL = {"batch_size": 2, "sequence_length": 32, "rank": 2, "evaluate_every": 0}
QUICK = available_engines()[-1]
"""The engine that is imported faster: every plan here is computed by a process of its own."""
ENDLESS = 1_000_000
NEEDED = {"model": "m", "data": "d"}


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue()
    yield queue
    queue.close()


@pytest.fixture
def settings(tiny: str, corpus: Path) -> Callable[..., list[str]]:
    """``settings(steps=2)``: ``--set`` options of a plan for the tiny model."""

    def words(**values: Any) -> list[str]:
        values = {"model": tiny, "data": corpus, **SMALL, **values}
        return ["--engine", QUICK, *(word for name, value in values.items() for word in ("--set", f"{name}={value}"))]

    return words


@pytest.fixture
def front() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``front("queue", "run")``: the program as a process of its own; it and what it started end with the test."""
    begun: list[subprocess.Popen[str]] = []

    def start(*words: str, **options: Any) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-m", "gemma_tui", *words]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options}
        begun.append(subprocess.Popen(arguments, text=True, **streams))
        return begun[-1]

    yield start
    with closing(Queue()) as queue:
        for item in queue.items():
            if item.state == "running":
                psutil.Process(item.pid).kill()
    for process in begun:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} never happened"
        time.sleep(0.02)
    return found


def computing(queue: Queue, store: RunStore, id: int) -> Run:
    """The run of a plan, once it takes steps."""
    until(lambda: queue.item(id).run_id, "a run")
    until(lambda: store.run(queue.item(id).run_id).step > 0, "a step")
    return store.run(queue.item(id).run_id)


def states(queue: Queue) -> list[str]:
    return [item.state for item in reversed(queue.items())]


def add(queue: Queue, *plans: dict[str, Any], group: str = "") -> list[int]:
    return queue.enqueue(plans, "torch", "/", group)


def elsewhere(code: str) -> str:
    lines = f"from gemma_tui.runs.queue import Queue\nqueue = Queue()\n{code}"
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True).stdout.strip()


class TestStore:
    def test_plans_come_back_in_order_and_are_claimed_once(self, queue: Queue) -> None:
        ids = add(queue, {"rank": 1}, {"rank": 2}, group="g")
        assert [(i.id, i.plan["rank"], i.group, i.state) for i in queue.queued()] == [
            (ids[0], 1, "g", "queued"),
            (ids[1], 2, "g", "queued"),
        ]
        assert queue.lead()
        first, second = queue.claim(), queue.claim()
        assert first is not None
        assert second is not None
        assert (first.id, second.id, first.state) == (*ids, "running")
        assert queue.leader() == os.getpid()
        assert queue.claim() is None
        assert queue.leader() is None, "who finds nothing leads no longer"

    def test_only_one_process_leads_and_a_dead_one_does_not(self, queue: Queue) -> None:
        assert queue.lead()
        assert elsewhere("print(queue.lead())") == "False"
        queue.leave()
        assert elsewhere("print(queue.lead())") == "True"
        assert queue.leader() is None
        assert queue.lead()

    def test_two_processes_never_claim_the_same(self, queue: Queue) -> None:
        ids = add(queue, *[{}] * 60)
        code = "while (item := queue.claim()) is not None: print(item.id)"
        lines = f"from gemma_tui.runs.queue import Queue\nqueue = Queue()\n{code}"
        children = [
            subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE, text=True) for _ in range(2)
        ]
        claimed = [int(word) for child in children for word in child.communicate()[0].split()]
        assert sorted(claimed) == ids

    def test_a_plan_whose_process_is_gone_goes_by_its_run(self, queue: Queue, store: RunStore) -> None:
        ids = add(queue, *[{}] * 5)
        elsewhere("while queue.claim(): pass")
        for id, state in zip(ids[1:], ("done", "stopped", "failed", "running"), strict=True):
            run = store.create("r", "training", "torch", {}, "", 1)
            store.set_state(run.run_id, state, "why" if state == "failed" else "")
            queue.registered(id, run.run_id)
        assert states(queue) == ["lost", "done", "cancelled", "failed", "lost"]
        assert queue.item(ids[3]).error == "why"
        assert queue.running() is None
        assert queue.queued() == []

    def test_a_cancelled_plan_is_not_claimed_and_a_claimed_one_not_cancelled(self, queue: Queue) -> None:
        ids = add(queue, {}, {})
        assert queue.cancel(ids[0]).state == "cancelled"
        claimed = queue.claim()
        assert claimed is not None
        assert claimed.id == ids[1]
        assert queue.cancel(ids[1]).state == "running"
        with pytest.raises(GemmaTuiError, match="no plan 99"):
            queue.cancel(99)

    def test_runs_of_a_group_are_found(self, store: RunStore) -> None:
        for name, group in (("a", "g"), ("b", ""), ("c", "g")):
            store.create(name, "training", "torch", {}, "", 1, group=group)
        assert [(run.run_id, run.group) for run in store.group("g")] == [("a-1", "g"), ("c-1", "g")]

    def test_a_database_without_groups_is_kept_and_gets_them(self) -> None:
        paths.runs().mkdir(parents=True)
        with sqlite3.connect(paths.runs() / "gemma-tui.db") as db:
            db.execute(
                "CREATE TABLE gt_runs (run_id TEXT PRIMARY KEY, name TEXT NOT NULL, study TEXT NOT NULL, state TEXT NOT"
                " NULL, created REAL NOT NULL, updated REAL NOT NULL, engine TEXT NOT NULL, plan TEXT NOT NULL, command"
                " TEXT NOT NULL, step INTEGER NOT NULL, steps INTEGER NOT NULL, pid INTEGER NOT NULL, pid_started REAL"
                " NOT NULL, error TEXT NOT NULL, request TEXT NOT NULL)"
            )
            db.execute(
                "INSERT INTO gt_runs VALUES"
                " ('old-1', 'old', 'training', 'done', 1, 2, 'torch', '{\"rank\": 3}', 'c', 4, 5, 6, 7, 'e', '')"
            )
        db.close()
        openers = [
            subprocess.Popen([sys.executable, "-c", "from gemma_tui.runs.store import RunStore; RunStore()"])
            for _ in range(3)
        ]
        assert [opener.wait() for opener in openers] == [0, 0, 0]
        store = RunStore()
        old = store.run("old-1")
        assert (old.state, old.plan, old.step, old.steps, old.error, old.group) == ("done", {"rank": 3}, 4, 5, "e", "")
        assert store.create("new", "training", "torch", {}, "", 1, group="g").group == "g"
        store.close()


class TestRequests:
    def test_the_last_one_counts_and_is_heard_once_but_stop_stays(self, store: RunStore) -> None:
        run = store.create("r", "training", "torch", {}, "", 1).run_id
        for asked, heard in ((["pause"], "pause"), (["pause", "resume"], "resume"), (["stop", "resume"], "stop")):
            for what in asked:
                store.request(run, what)
            assert (store.take_request(run), store.take_request(run)) == (heard, "")
        with pytest.raises(UsageError, match="choose pause"):
            store.request(run, "dance")

    def test_a_study_heeds_them_also_while_it_waits(self, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gemma_tui.studies.recording.REQUEST_SECONDS", -1)
        run, control = store.create("r", "training", "torch", {}, "", 9), Control()

        def study(folder: Path) -> Iterator[Event]:
            while not control.stop.is_set():
                yield Event("waiting" if control.pause.is_set() else "step")

        other = RunStore()
        events = recorded(store, run, study, control)
        seen = [next(events).kind, next(events).kind]
        for what in ("pause", "resume", "pause", "stop"):
            other.request(run.run_id, what)
            seen.append(next(events).kind)
        assert seen == ["run", "step", "waiting", "step", "waiting", "end"]
        assert other.run(run.run_id).state == "stopped"
        other.close()


class TestSweep:
    def test_it_is_the_product_the_last_changing_fastest(self) -> None:
        plans = variations(NEEDED, assignments(["rank=1,2", "learning-rate=1e-3, 1e-4"]), "plan")
        assert [(p.rank, p.learning_rate) for p in plans] == [(1, 1e-3), (1, 1e-4), (2, 1e-3), (2, 1e-4)]

    def test_semicolons_part_values_that_have_commas(self) -> None:
        plans = variations(NEEDED, assignments(["targets=q_proj,k_proj;v_proj;"]), "plan")
        assert [plan.targets for plan in plans] == ["q_proj,k_proj", "v_proj"]

    @pytest.mark.parametrize(
        ("texts", "reason"),
        [
            (["rank=1,none"], "rank is 'none'"),
            (["rank=1,0"], "rank is '0'"),
            (["rank"], "no OPTION=VALUE"),
            (["rank=,"], "has no value"),
            (["rank=1", "rank=2"], "given twice"),
            (["rnak=1"], "unknown option 'rnak'"),
            (["targets=q_proj,lm_head"], "targets: lm_head"),
            (["name=fine,../up"], "is no run name"),
            (["seed=" + ",".join(map(str, range(1001)))], "1,001 plans"),
        ],
    )
    def test_nothing_is_queued_unless_all_of_it_can_begin(
        self, command: Commands, queue: Queue, texts: list[str], reason: str
    ) -> None:
        words = [word for text in ["model=m", "data=d", *texts] for word in ("--set", text)]
        code, rows, errors = command("sweep", *words)
        assert (code, errors.count("\n")) == (2, 1)
        assert reason in errors
        assert rows[-1]["status"] == "failed"
        assert queue.items() == []

    def test_a_file_names_the_group_and_each_sweep_has_its_own(
        self, command: Commands, queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("rates.toml").write_text('model = "m"\ndata = "d"\nsteps = 7\n')
        groups = [command("sweep", "rates.toml", "--set", "rank=2,4")[1][-1]["group"] for _ in range(2)]
        assert groups == ["rates", "rates-2"]
        assert command("sweep", "rates.toml", "--set", "rank=2", "--group", "mine")[1][-1]["group"] == "mine"
        items = queue.queued()
        assert [item.group for item in items] == ["rates", "rates", "rates-2", "rates-2", "mine"]
        assert items[1].folder == str(tmp_path)
        plan = plan_of(items[1])
        assert (plan.steps, plan.rank, plan.group) == (7, 4, "rates")


class TestVariationsOfAPlan:
    def test_the_four_methods_share_data_seed_and_tokens(self) -> None:
        plan = TrainingPlan("m", "d", method="lora", steps=60, seed=7, rank=3, batch_size=2, learning_rate=1e-3)
        plans = method_variations(plan)
        assert [p.method for p in plans] == ["full", "lora", "relora", "rank1"]
        for key in ("model", "data", "seed", "steps", "batch_size", "accumulate", "sequence_length", "learning_rate"):
            assert {getattr(p, key) for p in plans} == {getattr(plan, key)}
        assert [p.rank for p in plans] == [8, 3, 3, 8], "what a method does not honour has its default"
        assert {p.diagnose_every for p in plans} == {61}, "a look at the end, and none before"
        assert (plans[2].reset_every, plans[2].restart_warmup) == (15, 1)
        assert sum(plans[2].rate(step) == 0 for step in range(1, 61)) >= 3

    def test_what_the_plan_says_of_a_method_stays_and_an_open_rate_is_each_methods_own(self) -> None:
        given = {"reset_every": 20, "restart_warmup": 5, "schedule": "jagged", "name": "mine", "diagnose_every": 3}
        plans = method_variations(TrainingPlan("m", "d", method="relora", steps=60, **given))
        assert [p.name for p in plans] == ["mine-full", "mine-lora", "mine", "mine-rank1"]
        assert [p.shape for p in plans] == ["cosine", "cosine", "jagged", "cosine"]
        assert (plans[2].reset_every, plans[2].restart_warmup, plans[2].diagnose_every) == (20, 5, 3)
        assert len({p.peak_rate for p in plans}) == 4

    @pytest.mark.parametrize("steps", [1, 2, 3, 10, 100, 5000])
    def test_they_can_begin_however_short_they_are(self, steps: int) -> None:
        assert len(method_variations(TrainingPlan("m", "d", steps=steps, warmup=min(steps, 40)))) == 4

    def test_new_weights_have_no_adapters_to_compare(self) -> None:
        with pytest.raises(UsageError, match="fresh"):
            method_variations(TrainingPlan("m", "d", method="full", fresh=True))

    @pytest.mark.parametrize(
        ("steps", "intervals"),
        [(4, [1, 2]), (10, [1, 2, 4]), (64, [1, 2, 4, 8, 16, 32]), (3000, [1, 2, 4, 8, 16, 32])],
    )
    @pytest.mark.parametrize("method", MERGING)
    def test_intervals_double_up_to_half_of_the_steps(self, method: str, steps: int, intervals: list[int]) -> None:
        plan = TrainingPlan("m", "d", method=method, steps=steps, seed=3)
        plans = merge_variations(plan)
        assert [p.merge_every for p in plans] == intervals
        assert {dataclasses.replace(p, merge_every=None) for p in plans} == {plan}

    def test_intervals_are_refused_where_nothing_merges_or_there_is_no_choice(self) -> None:
        for method in ("lora", "dora", "full"):
            with pytest.raises(UsageError, match=f"{method} does not merge; choose relora or rank1"):
                merge_variations(TrainingPlan("m", "d", method=method))
        with pytest.raises(UsageError, match="3 are too few"):
            merge_variations(TrainingPlan("m", "d", method="rank1", steps=3))


def test_what_is_queued_is_the_plan_that_was_built(queue: Queue) -> None:
    plans = variations({**NEEDED, "fresh": True, "method": "full", "data": "a b,c"}, {"seed": "1,2"}, "plan")
    enqueue(queue, plans, "torch", "")
    assert [plan_of(item) for item in queue.queued()] == plans


def test_the_queue_is_worked_through_and_a_failure_ends_only_its_own_plan(
    command: Commands, settings: Callable[..., list[str]], queue: Queue, store: RunStore
) -> None:
    command("queue", "add", *settings(steps=2, data="none.txt"))
    command("sweep", *settings(steps="1,2"), "--group", "both")
    code, rows, errors = command("queue", "run")
    assert (code, errors) == (1, "")
    assert rows[-1] == {"kind": "end", "status": "done", "ran": 3, "failed": 1, "left": 0}
    assert states(queue) == ["failed", "done", "done"]
    assert "none.txt does not exist" in queue.items()[-1].error
    group = store.group("both")
    assert [(run.step, run.state, run.plan["group"]) for run in group] == [(1, "done", "both"), (2, "done", "both")]
    assert [item.run_id for item in reversed(queue.items())][1:] == [run.run_id for run in group]
    assert all((run.folder / "log.jsonl").is_file() for run in group)
    assert not list(paths.runs().glob("*.log"))
    assert queue.leader() is None
    assert command("queue", "run")[:2] == (
        0,
        [
            {"kind": "runner", "group": ""},
            {"kind": "end", "status": "done", "ran": 0, "failed": 0, "left": 0},
        ],
    )


def test_an_interrupt_saves_the_plan_in_hand_and_leaves_the_rest(
    command: Commands, front: Callable[..., Any], settings: Callable[..., list[str]], queue: Queue, store: RunStore
) -> None:
    command("queue", "add", *settings(steps=ENDLESS))
    command("queue", "add", *settings(steps=2))
    runner = front("queue", "run", "--json")
    run = computing(queue, store, 1)
    code, _, errors = command("queue", "run")
    assert (code, errors.count("\n")) == (1, 1)
    assert f"process {runner.pid} works through the queue already" in errors
    runner.send_signal(signal.SIGINT)
    assert runner.wait(SECONDS) == 130
    assert json.loads(runner.stdout.read().splitlines()[-1])["left"] == 1
    assert states(queue) == ["cancelled", "queued"]
    assert store.run(run.run_id).state == "stopped"
    assert (run.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert queue.leader() is None


def test_a_killed_runner_leaves_its_plan_to_its_process_and_the_next_waits_for_that(
    command: Commands, front: Callable[..., Any], settings: Callable[..., list[str]], queue: Queue, store: RunStore
) -> None:
    command("queue", "add", *settings(steps=ENDLESS))
    command("queue", "add", *settings(steps=1))
    runner = front("queue", "run")
    run = computing(queue, store, 1)
    runner.kill()
    runner.wait()
    assert queue.leader() is None
    assert (states(queue), store.run(run.run_id).state) == (["running", "queued"], "running")
    code, rows, _ = command("queue", "run", "--detach")
    assert (code, rows[-1]["status"]) == (0, "detached")
    assert states(queue) == ["running", "queued"], "two never compute at once"
    psutil.Process(queue.item(1).pid).kill()
    until(lambda: states(queue) == ["lost", "done"], "the next plan")
    until(lambda: not psutil.pid_exists(rows[-1]["pid"]), "the end of the runner, and no zombie")


def test_cancelling_a_plan_that_is_computed_saves_it_and_the_queue_goes_on(
    command: Commands, front: Callable[..., Any], settings: Callable[..., list[str]], queue: Queue, store: RunStore
) -> None:
    command("queue", "add", *settings(steps=ENDLESS))
    command("queue", "add", *settings(steps=1, name="second"))
    command("queue", "add", *settings(steps=1, name="third"))
    runner = front("queue", "run")
    run = computing(queue, store, 1)
    assert command("queue", "cancel", "2")[1][-1]["state"] == "cancelled"
    assert command("queue", "cancel", "1")[0] == 0
    assert runner.wait(SECONDS) == 0
    assert states(queue) == ["cancelled", "cancelled", "done"]
    assert store.run(run.run_id).state == "stopped"
    assert [r.name for r in store.runs()] == ["third", "lora"]


def test_a_detached_run_outlives_its_terminal_is_paused_and_saves_when_terminated(
    command: Commands, tiny: str, corpus: Path, store: RunStore
) -> None:
    plan = {"model": tiny, "data": corpus, "engine": QUICK, **SMALL, "steps": ENDLESS}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in plan.items()]
    pid, terminal = pty.fork()
    if pid == 0:
        train = [sys.executable, "-m", "gemma_tui", "train", *words, "--detach"]
        # A shell that leads the terminal's session: when that closes, the kernel signals all in it.
        os.execv("/bin/sh", ["sh", "-c", f"{shlex.join(train)}; sleep 60"])
    until(lambda: store.runs() and store.runs()[0].step > 0, "a step")
    run = store.runs()[0].run_id
    os.close(terminal)
    os.waitpid(pid, 0)
    child = psutil.Process(store._db.execute("SELECT pid FROM gt_runs").fetchone()[0])
    try:
        step = store.run(run).step
        until(lambda: store.run(run).step > step, "a step without the terminal")
        assert command("runs", "pause", run)[1][-1]["asked"]
        until(lambda: store.run(run).state == "paused", "the pause")
        assert not command("runs", "pause", run)[1][-1]["asked"]
        step = store.run(run).step
        assert command("runs", "resume", run)[1][-1]["asked"]
        until(lambda: store.run(run).step > step, "another step")
        child.terminate()
        until(lambda: store.run(run).state == "stopped", "its end")
        assert (store.run(run).folder / "adapter" / "adapter_model.safetensors").is_file()
    finally:
        if child.is_running():
            child.kill()
