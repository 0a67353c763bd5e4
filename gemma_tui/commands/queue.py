"""``gemma-tui queue`` and ``gemma-tui sweep``."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from gemma_tui.commands.signals import heard
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.output import Output, age
from gemma_tui.runs.processes import Detached, start
from gemma_tui.runs.queue import OUTCOMES, Item, Queue
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.plan import build, read_toml
from gemma_tui.studies.queueing import assignments, check, detached, enqueue, plan_of, start_runner, variations
from gemma_tui.studies.training_plan import TrainingPlan

LOOK_SECONDS = 0.1
BEGIN_SECONDS = 60.0


def add(args: argparse.Namespace, output: Output) -> int:
    """Append plans, all of them or none."""
    given = assignments(args.values)
    if not args.plans and not given:
        raise UsageError("name a PLAN.toml, or give its options with --set")
    plans = []
    for file in args.plans or [""]:
        values = read_toml(Path(file)) if file else {}
        plans.append(build(TrainingPlan, {**values, **given}, file or "--set"))
        check(plans[-1])
    with closing(Queue()) as queue:
        _added(queue, enqueue(queue, plans, args.engine, args.group), output)
        output.row("end", status="done", queued=len(plans))
    return 0


def sweep(args: argparse.Namespace, output: Output) -> int:
    """Append a plan in every combination of the values, as one group."""
    values = read_toml(Path(args.plan)) if args.plan else {}
    plans = variations(values, assignments(args.values), args.plan or "--set")
    with closing(Queue()) as queue:
        name = args.group or plans[0].group or (Path(args.plan).stem if args.plan else "sweep")
        group = name if args.group else queue.free_group(name)
        _added(queue, enqueue(queue, plans, args.engine, group), output)
        if args.at_once:
            return _work(queue, output, group)
        if args.detach:
            _detach(queue, output)
        output.row("end", status="done", queued=len(plans), group=group)
    return 0


def list_queue(args: argparse.Namespace, output: Output) -> int:
    """All plans, the newest first."""
    with closing(Queue()) as queue:
        items, leader = queue.items(), queue.leader()
    for item in items:
        output.row("plan", **dataclasses.asdict(item))
    if items:
        rows = [(i.id, i.state, i.group, i.run_id, i.engine, age(i.created), i.error or _words(i)) for i in items]
        output.table(("id", "state", "group", "run", "engine", "age", "plan"), rows)
        waiting = sum(item.state == "queued" for item in items)
        if waiting and leader is None:
            output.say(f"nothing works through the {waiting} that wait: `gemma-tui queue run`")
    else:
        output.say("the queue is empty: `gemma-tui queue add PLAN.toml` appends to it")
    output.row("end", status="done", plans=len(items), runner=leader)
    return 0


def cancel(args: argparse.Namespace, output: Output) -> int:
    """Take a plan out of the queue; one that is computed already is asked to stop."""
    with closing(Queue()) as queue:
        item = queue.cancel(args.id)
    if item.state == "running":
        if not item.run_id:
            raise GemmaTuiError(f"plan {item.id} is just beginning: cancel it again in a moment")
        with closing(RunStore()) as store:
            store.request(item.run_id, "stop")
        output.say(f"{item.run_id} was asked to stop; it saves after the step in hand")
    else:
        output.say(f"plan {item.id} is {item.state}")
    output.row("end", status="done", id=item.id, state=item.state)
    return 0


def run(args: argparse.Namespace, output: Output) -> int:
    """Work through the queue, each plan in a process of its own, so that its memory and its faults end with it."""
    with closing(Queue()) as queue:
        if not args.detach:
            return _work(queue, output)
        pid = _detach(queue, output)
        output.row("end", status="detached", pid=pid)
        return 0


def _added(queue: Queue, ids: list[int], output: Output) -> None:
    for id in ids:
        item = queue.item(id)
        output.row("queued", id=id, group=item.group, plan=dict(item.plan))
        output.say(f"queued {id}: {_words(item)}")
    if queue.leader() is None:
        output.say("`gemma-tui queue run` works through the queue")


def _detach(queue: Queue, output: Output) -> int:
    """Let a process of its own work through the queue, unless one does; returns its pid."""
    pid = queue.leader()
    if pid is not None:
        output.say(f"process {pid} works through the queue already")
        return pid
    runner = start_runner()
    runner.wait(BEGIN_SECONDS)
    output.say(f"process {runner.process.pid} works through the queue: `gemma-tui queue list`")
    return runner.process.pid


def _work(queue: Queue, output: Output, group: str = "") -> int:
    """Run what is queued until nothing is left or a signal comes."""
    if not queue.lead():
        raise GemmaTuiError(f"process {queue.leader()} works through the queue already: `gemma-tui queue list`")
    output.row("runner", group=group)
    ended: list[str] = []
    signals = _Signals()
    with closing(RunStore()) as store, heard(signals.hear):
        try:
            _wait_for_orphan(queue, signals, output)
            while not signals.came and (item := queue.claim()) is not None:
                ended.append(_compute(item, queue, store, signals, output))
        finally:
            queue.leave()
    left = len(queue.queued())
    bad = sum(state == "failed" for state in ended)
    status = "interrupted" if signals.came else "done"
    output.say(f"{len(ended)} plans were run, {bad} failed, {left} are left in the queue")
    output.row("end", status=status, ran=len(ended), failed=bad, left=left)
    if signals.came:
        return 128 + signals.came[0]
    return 1 if bad else 0


def _wait_for_orphan(queue: Queue, signals: _Signals, output: Output) -> None:
    """A plan whose runner was killed may be computing still, and two at once is what a queue avoids."""
    orphan = queue.running()
    if orphan is not None:
        output.say(f"waiting for plan {orphan.id}, which an earlier runner began")
    while queue.running() is not None and not signals.came:
        time.sleep(LOOK_SECONDS)


def _compute(item: Item, queue: Queue, store: RunStore, signals: _Signals, output: Output) -> str:
    """Run one claimed plan to its end; returns what became of it."""
    run_id, state, error = "", "failed", ""
    try:
        child = start(detached(item.engine, plan_of(item)), "run", item.folder)
        with signals.passed_on(child):
            queue.began(item.id, child.process.pid)
            run_id = _registered(child, item, queue, store, output)
            child.process.wait()
        ended = store.run(run_id)
        state, error = OUTCOMES.get(ended.state, "failed"), ended.error
        if ended.state == "lost":
            error = f"its process ended with {child.process.returncode}"
    except GemmaTuiError as refused:
        state, error = "cancelled" if signals.came else "failed", str(refused)
    queue.finish(item.id, state, error)
    output.row("ran", id=item.id, run=run_id, state=state, error=error)
    output.say(f"plan {item.id}: {state}{f', {error}' if error else ''}")
    return state


def _registered(child: Detached, item: Item, queue: Queue, store: RunStore, output: Output) -> str:
    """Wait for the run of a plan; returns its name."""
    while (row := child.look()) is None:
        time.sleep(LOOK_SECONDS)
    run_id = str(row["run"])
    queue.registered(item.id, run_id)
    child.move_log(store.run(run_id).folder)
    output.row("running", id=item.id, run=run_id, pid=child.process.pid)
    output.say(f"plan {item.id}: run {run_id}")
    return run_id


class _Signals:
    """Signals that end the work: they are passed on to the plan in hand, which saves after its step.

    Attributes:
        came: their numbers.
    """

    def __init__(self) -> None:
        self.came: list[int] = []
        self._child: Detached | None = None

    @contextmanager
    def passed_on(self, child: Detached) -> Iterator[None]:
        """Signals reach this process too, also one that came while it began."""
        self._child = child
        if self.came:
            child.process.send_signal(signal.SIGTERM)
        try:
            yield
        finally:
            self._child = None

    def hear(self, number: int, frame: object) -> None:
        """Take a signal."""
        self.came.append(number)
        if self._child is not None:
            self._child.process.send_signal(signal.SIGTERM)


def _words(item: Item) -> str:
    return " ".join(f"{name}={value}" for name, value in item.plan.items() if name != "group")
