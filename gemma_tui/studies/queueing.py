"""Training plans as lines of the queue: checked, varied, stored, and made the words of a command again."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_tui.errors import UsageError
from gemma_tui.runs.processes import Detached, start
from gemma_tui.runs.queue import Item, Queue
from gemma_tui.runs.store import check_name
from gemma_tui.studies.plan import build, changed, check_honoured, command, honoured
from gemma_tui.studies.training_plan import FOUND, MERGING, TrainingPlan, settings

MAX_VARIATIONS = 1000
RUNNER = ("queue", "run")
DECIDING = {"method", "optimizer", "mode", "fresh"}
"""Where these are varied, what others honour is left out of the plans that do not."""

COMPARED = ("full", "lora", "relora", "rank1")
MOST_INTERVALS = 6


def check(plan: TrainingPlan) -> None:
    """Refuse a plan that could not begin, as far as it can be told without its model and data.

    Raises:
        UsageError: what is wrong with it.
    """
    settings(plan)
    check_honoured(plan)
    if plan.method == "rank1" and plan.mode in FOUND and not plan.rest and plan.optimizer != TrainingPlan().optimizer:
        raise UsageError("optimizer: rank-1 updates have none; give --rest to train what is no target with it")
    if plan.memorization_rows != TrainingPlan.memorization_rows and not plan.memorization_every:
        raise UsageError(
            "memorization_rows: nothing is measured without --memorization-every: give it, or leave this out"
        )
    check_name(plan.name or plan.method)


def assignments(texts: Sequence[str]) -> dict[str, str]:
    """``["steps=3", ...]`` as a mapping; dashes in names are underscores.

    Raises:
        UsageError: one has no name or no ``=``, or a name comes twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or not name:
            raise UsageError(f"--set {text[:60]!r} is no OPTION=VALUE")
        if name in found:
            raise UsageError(f"--set {name} is given twice: put all its values behind one")
        found[name] = value
    return found


def variations(values: Mapping[str, Any], choices: Mapping[str, str], where: str) -> list[TrainingPlan]:
    """A plan for every combination of the choices, the last one changing fastest.

    Args:
        choices: values with commas between, or with semicolons, so that a value can have commas.

    Raises:
        UsageError: a combination is no plan that could begin, or there are more than ``MAX_VARIATIONS``.
    """
    lists = {name: _split(name, text) for name, text in choices.items()}
    number = math.prod(map(len, lists.values()))
    if number > MAX_VARIATIONS:
        raise UsageError(f"these are {number:,} plans; {MAX_VARIATIONS:,} at most go into a queue at once")
    plans = []
    for combination in itertools.product(*lists.values()):
        plan = build(TrainingPlan, {**values, **dict(zip(lists, combination, strict=True))}, where)
        plan = honoured(plan, DECIDING & set(lists))
        check(plan)
        plans.append(plan)
    return plans


def method_variations(plan: TrainingPlan) -> list[TrainingPlan]:
    """The plan with each of ``COMPARED`` in place of its method: the same data, seed, tokens and, if given, rate.

    What a method does not honour has its default. ReLoRA restarts four times, unless the plan says how often; the rank
    of the accumulated update is measured at the end at least.

    Raises:
        UsageError: one of them could not begin.
    """
    if plan.diagnose_every == 0:
        plan = dataclasses.replace(plan, diagnose_every=plan.steps + 1)
    plans = [honoured(plan if method == plan.method else _with_method(plan, method)) for method in COMPARED]
    for made in plans:
        check(made)
    return plans


def merge_variations(plan: TrainingPlan) -> list[TrainingPlan]:
    """The plan merging every 1, 2, 4… steps, up to half of them and at most ``MOST_INTERVALS`` plans.

    Raises:
        UsageError: its method does not merge, or its steps are too few.
    """
    if plan.method not in MERGING:
        raise UsageError(f"method: {plan.method} does not merge; choose {' or '.join(MERGING)}")
    intervals = [2**n for n in range(MOST_INTERVALS) if 2**n <= (plan.steps - plan.full_rank_steps) // 2]
    if len(intervals) < 2:
        raise UsageError(f"steps: {plan.steps} are too few to merge more and less often: give more")
    return variations(changed(plan), {"merge_every": ",".join(map(str, intervals))}, "plan")


def enqueue(queue: Queue, plans: Sequence[TrainingPlan], engine: str, group: str = "") -> list[int]:
    """Append checked plans, all or none; with a group they become its members. Returns their numbers."""
    if group:
        plans = [dataclasses.replace(plan, group=group) for plan in plans]
    return queue.enqueue([changed(plan) for plan in plans], engine, str(Path.cwd()), group)


def plan_of(item: Item) -> TrainingPlan:
    """The plan of a line of the queue.

    Raises:
        UsageError: another version of the program wrote it, and this one does not know its options.
    """
    return build(TrainingPlan, item.plan, f"queue {item.id}")


def detached(engine: str, plan: TrainingPlan) -> list[str]:
    """The words of the command that runs a plan without an onlooker."""
    return [*shlex.split(command(("train", "--engine", engine), plan))[1:], "--quiet"]


def start_runner() -> Detached:
    """Start a process that works through the queue."""
    return start(RUNNER, "runner")


def _with_method(plan: TrainingPlan, method: str) -> TrainingPlan:
    """The plan with another method, its name as well if it has one."""
    name = f"{plan.name}-{method}" if plan.name else ""
    schedule = None if plan.schedule == "jagged" else plan.schedule
    other = dataclasses.replace(plan, method=method, name=name, schedule=schedule)
    unsaid = TrainingPlan()
    if method != "relora" or (plan.reset_every, plan.restart_warmup) != (unsaid.reset_every, unsaid.restart_warmup):
        return other
    every = max(2, plan.warmup_steps, plan.steps // 4)
    return dataclasses.replace(other, reset_every=every, restart_warmup=max(1, min(unsaid.restart_warmup, every // 10)))


def _split(name: str, text: str) -> list[str]:
    separator = ";" if ";" in text else ","
    found = [value.strip() for value in text.split(separator)]
    found = [value for value in found if value]
    if not found:
        raise UsageError(f"--set {name} has no value")
    return found
