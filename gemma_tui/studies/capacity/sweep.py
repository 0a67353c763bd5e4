"""A capacity sweep as a run: cells of one shape are trained side by side, each until it holds no more.

A finished cell is an event of the run and is never trained again; what is unfinished goes on from the last save.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import Engine
from engines.checkpoints import write_json
from engines.errors import CheckpointError
from engines.networks import Networks, stack_bytes
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.output import bytes_text
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.capacity.measures import data_bits, memorised_bits
from gemma_tui.studies.capacity.plan import CapacityPlan, Cell, MoreCells, cells_of, plan_of, training_of
from gemma_tui.studies.events import Control, Event, wait_while_paused
from gemma_tui.studies.plan import command
from gemma_tui.studies.recording import Recorded, check_engine, recorded

STUDY = "capacity"
TRACE = "bits"
"""The kind of the events that tell how far every cell of a stack is."""

MOST_NETWORKS = 16
STACK_BYTES = 16 << 20
"""Weights of a stack, which should stay in a CPU's cache between two passes."""

SCORED = 32
"""Strings of each network that are scored at once."""

HELD_OUT = 256
HELD_OUT_SEED = 1 << 32
"""Beyond every seed of a cell, so that no network was trained on these strings."""

LOOKED_BACK = 5
NEARLY_ALL = 0.9995
"""The share of its data's bits at which a cell has nothing left to learn."""

LEARNED, FLAT, BUDGET = "learned", "flat", "budget"
"""What ended a cell: all was learned, the bits grew no more, or the steps were taken."""

SAVE_SECONDS = 60.0
TOLD_SECONDS = 0.5
PLACE = "stack.json"


def record_capacity(engine: Engine, plan: CapacityPlan, control: Control, store: RunStore) -> Recorded:
    """Register a sweep and make its recorded events; nothing is trained before they are asked for.

    Raises:
        EngineError: the grid is none, or does not fit the memory or the disk; no run is made.
    """
    cells = cells_of(plan)
    check_room(engine, plan, cells, paths.runs())
    run = store.create(plan.name or STUDY, STUDY, engine.name, asdict(plan), words_of(engine.name, plan), len(cells))
    return Recorded(run, recorded(store, run, lambda folder: sweep(engine, plan, folder, control), control))


def resume_capacity(
    engine: Engine, run: Run, control: Control, store: RunStore, more: MoreCells | None = None
) -> Recorded:
    """Go on with a sweep; finished cells stay as they are.

    Args:
        more: what is added to it.

    Raises:
        UsageError: the run is another study or another engine's, nothing is added, or nothing is left to do.
        EngineError: another process computes it, or it does not fit.
    """
    plan, done = sweep_plan(run), finished(store, run)
    if more is not None:
        plan = extended(plan, more)
    check_engine(run, engine)
    cells = cells_of(plan)
    if all(cell.name in done for cell in cells):
        raise UsageError(
            f"{run.run_id} has all of its {len(cells):,} cells: add some with --add {run.run_id} --sizes N"
        )
    check_room(engine, plan, [cell for cell in cells if cell.name not in done], run.folder)
    run = store.adopt(run.run_id)
    store.replan(run.run_id, asdict(plan), words_of(engine.name, plan), len(cells))
    run = store.run(run.run_id)
    return Recorded(run, recorded(store, run, lambda folder: sweep(engine, plan, folder, control, done), control))


def words_of(engine: str, plan: CapacityPlan) -> str:
    """The command of a sweep."""
    return command(("capacity", "sweep", "--engine", engine), plan)


def sweep_plan(run: Run) -> CapacityPlan:
    """The plan a sweep was started with.

    Raises:
        UsageError: the run is another study.
    """
    if run.study != STUDY:
        raise UsageError(f"{run.run_id} is no capacity sweep: `gemma-tui runs list` tells what it is")
    return plan_of(run.plan, run.run_id)


def extended(plan: CapacityPlan, more: MoreCells) -> CapacityPlan:
    """A sweep with more data-set sizes or seeds; the cells it has stay among the others.

    Raises:
        UsageError: nothing is added, or fewer seeds are wanted than there are.
    """
    seeds = plan.seeds if more.seeds is None else more.seeds
    if seeds < plan.seeds:
        raise UsageError(f"seeds: the sweep has {plan.seeds} already: give more")
    if not more.sizes and seeds == plan.seeds:
        raise UsageError(f"add: that adds nothing: give --sizes that it has not, or more than {plan.seeds} --seeds")
    return replace(plan, sizes=f"{plan.sizes},{more.sizes}" if more.sizes else plan.sizes, seeds=seeds)


def finished(store: RunStore, run: Run) -> set[str]:
    """Names of the cells that a sweep has finished."""
    return {event.values["name"] for event in store.events(run.run_id, limit=1_000_000) if event.kind == "cell"}


def check_room(engine: Engine, plan: CapacityPlan, cells: Sequence[Cell], folder: Path) -> None:
    """Refuse a grid whose largest stack does not fit the memory, or whose state does not fit the disk.

    Raises:
        EngineError: it does not fit; the message has both numbers.
    """
    needed = kept = 0
    for stack in stacks(cells, plan):
        memory, disk = stack_bytes(stack[0].shape, len(stack))
        strings = sum(cell.sequences for cell in stack) * plan.length * 4
        needed, kept = max(needed, memory + strings), max(kept, 2 * disk)
    left = max(0, engine.device().memory_total - engine.memory())
    if needed > left:
        raise GemmaTuiError(
            f"the largest stack of networks needs {bytes_text(needed)} of memory, and this device has "
            f"{bytes_text(left)} left: give smaller networks or fewer strings"
        )
    free = shutil.disk_usage(folder).free
    if kept > free:
        raise GemmaTuiError(
            f"the state of the largest stack needs {bytes_text(kept)} of disk, and {bytes_text(free)} are free in "
            f"{folder}: free some, or give smaller networks"
        )


def stacks(cells: Sequence[Cell], plan: CapacityPlan) -> list[list[Cell]]:
    """Cells that are trained together: of one shape and one batch size, as many as fit a cache."""
    grouped: dict[tuple[Any, int], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.shape, min(plan.batch_size, cell.sequences)), []).append(cell)
    found = []
    for (shape, _), group in grouped.items():
        most = max(1, min(MOST_NETWORKS, STACK_BYTES // (4 * shape.parameter_count())))
        found += [group[i : i + most] for i in range(0, len(group), most)]
    return found


@dataclass
class Course:
    """One cell while it is trained.

    Attributes:
        strings: int32 ``[sequences, length]``; those of a smaller cell with the same seed are the first of them.
        falling: the step at which the bits grew no more and the rate began to fall; None while they do.
        bits: strict, at each evaluation.
        why: ``LEARNED``, ``FLAT`` or ``BUDGET``.
    """

    cell: Cell
    strings: np.ndarray
    falling: int | None = None
    bits: list[float] = field(default_factory=list)
    loss: float = math.nan
    why: str = BUDGET

    @classmethod
    def of(cls, cell: Cell) -> Course:
        """The course of a cell from its beginning."""
        return cls(cell, strings_of(cell.shape.vocabulary, cell.shape.length, cell.sequences, cell.seed))

    def batch(self, step: int, size: int) -> np.ndarray:
        """The strings of a step: every epoch in an order of its own, which hangs on the seed alone."""
        epoch, place = divmod(step, self.cell.sequences // size)
        order = np.random.default_rng((self.cell.seed, epoch)).permutation(self.cell.sequences)
        return self.strings[order[place * size : (place + 1) * size]]

    def falls_at(self, plan: CapacityPlan) -> int:
        """The step from which on the rate falls."""
        return round(plan.steps * (1 - plan.cooldown)) if self.falling is None else self.falling

    def end(self, plan: CapacityPlan) -> int:
        """The step at which the rate is zero: it falls as long, beside the steps before, as the plan has it."""
        if self.falling is None:
            return plan.steps
        return self.falling + max(1, round(self.falling * plan.cooldown / (1 - plan.cooldown)))

    def rate(self, step: int, plan: CapacityPlan) -> float:
        """The learning rate of a step: it rises, stays, and falls to zero."""
        rise, top, end = min(1.0, (step + 1) / max(1.0, plan.warmup * plan.steps)), self.falls_at(plan), self.end(plan)
        left = 0.0 if step >= end else 1.0 if step < top else (end - step) / (end - top)
        return plan.learning_rate * rise * left

    def left(self, step: int, plan: CapacityPlan) -> int:
        """Steps until the rate is zero."""
        return max(0, self.end(plan) - step)

    def ended(self, step: int, plan: CapacityPlan) -> bool:
        """Whether the rate has come to zero, or nothing is left to learn."""
        return self.why == LEARNED or not self.left(step, plan)

    def observe(self, step: int, bits: float, plan: CapacityPlan) -> None:
        """Take in an evaluation: a cell that has learned all is done, and where bits grow no more the rate falls."""
        self.bits.append(bits)
        shape = self.cell.shape
        if bits >= NEARLY_ALL * self.cell.sequences * (shape.length - 1) * math.log2(shape.vocabulary):
            self.why = LEARNED
            return
        grown = bits - self.bits[-1 - LOOKED_BACK] if len(self.bits) > LOOKED_BACK else math.inf
        steady = plan.warmup * plan.steps <= step < self.falls_at(plan)
        if steady and bits > 0 and grown < plan.flat * bits:
            self.falling, self.why = step, FLAT


def sweep(
    engine: Engine, plan: CapacityPlan, folder: Path, control: Control, done: Collection[str] = ()
) -> Iterator[Event]:
    """Train the cells of a plan that are not done, yielding what each holds; runs on the engine's thread.

    Args:
        folder: of the run.
        done: names of the cells that are.
    """
    cells = cells_of(plan)
    left = [cell for cell in cells if cell.name not in done]
    counted = len(cells) - len(left)
    facts = {"cells": len(cells), "done": counted, "dtype": plan.dtype, "device": engine.device().device}
    yield Event("start", counted, facts)
    saved = saved_stack(folder, left)
    for stack in ([saved] if saved else []) + stacks([c for c in left if c not in saved], plan):
        for event in _train(engine, plan, stack, folder, control, counted, len(cells)):
            counted += event.kind == "cell"
            yield event
        if control.stop.is_set():
            return


def _train(
    engine: Engine, plan: CapacityPlan, stack: list[Cell], folder: Path, control: Control, counted: int, total: int
) -> Iterator[Event]:
    """Train one stack until each of its cells has ended."""
    shape, batch = stack[0].shape, min(plan.batch_size, stack[0].sequences)
    networks = engine.networks(shape, [cell.seed for cell in stack], training_of(plan))
    courses, step, before = [Course.of(cell) for cell in stack], 0, 0.0
    if saved_stack(folder, stack):
        step, before = _restore(folder, networks, courses)
    fresh = strings_of(shape.vocabulary, shape.length, HELD_OUT, HELD_OUT_SEED + plan.seed)
    began = saved_at = told_at = time.monotonic()
    begun = step
    while courses:
        paused = time.monotonic()
        yield from wait_while_paused(control, counted)
        began += time.monotonic() - paused
        if control.stop.is_set():
            _save(folder, networks, courses, step, before + time.monotonic() - began)
            return
        tokens = np.stack([course.batch(step, batch) for course in courses])
        losses = networks.step(tokens, np.array([course.rate(step, plan) for course in courses]))
        step += 1
        for course, loss in zip(courses, losses, strict=True):
            course.loss = float(loss)
        last = [course.ended(step, plan) for course in courses]
        if step % plan.evaluate_every == 0 or any(last):
            found = evaluate(networks, [course.strings for course in courses])
            for course, each in zip(courses, found, strict=True):
                course.observe(step, memorised_bits(each, shape.vocabulary, shape.length).strict, plan)
            ending = [i for i, course in enumerate(courses) if course.ended(step, plan)]
            if ending:
                held_out = evaluate(networks, [fresh] * len(courses))
            pace = (time.monotonic() - began) / (step - begun)
            yield Event(TRACE, counted, _trace(courses, step, batch, plan, counted, total, pace))
            for i in ending:
                counted += 1
                passed = before + time.monotonic() - began
                yield Event("cell", counted, _found(courses[i], found[i], held_out[i], step, batch, passed))
            if ending:
                stay = [i for i in range(len(courses)) if i not in ending]
                courses = [courses[i] for i in stay]
                if courses:
                    networks.keep(stay)
                saved_at = -math.inf
        elif time.monotonic() - told_at > TOLD_SECONDS:
            told_at = time.monotonic()
            yield Event("training", counted, _passing(courses, step, plan, counted, total))
        if time.monotonic() - saved_at > SAVE_SECONDS:
            saved_at = time.monotonic()
            _save(folder, networks, courses, step, before + time.monotonic() - began)


def evaluate(networks: Networks, strings: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each network the negative log-likelihood of each of its strings, nats; data sets may differ in size."""
    longest, parts = max(map(len, strings)), []
    for start in range(0, longest, SCORED):
        places = np.arange(start, min(start + SCORED, longest))
        # A smaller set is scored again from its beginning, which is cut off below.
        parts.append(networks.losses(np.stack([each[places % len(each)] for each in strings])))
    every = np.concatenate(parts, axis=1)
    return [row[: len(each)] for row, each in zip(every, strings, strict=True)]


def strings_of(vocabulary: int, length: int, count: int, seed: int) -> np.ndarray:
    """Uniform random tokens, int32 ``[count, length]``; fewer of the same seed are the first of more."""
    return np.random.default_rng(seed).integers(0, vocabulary, (count, length), dtype=np.int32)


def _trace(
    courses: Sequence[Course], step: int, batch: int, plan: CapacityPlan, counted: int, total: int, pace: float
) -> dict[str, Any]:
    """Where every cell of a stack is: bits, loss, learning rate, and the seconds it still takes at most.

    Args:
        pace: seconds that a step takes.
    """
    cells = {c.cell.name: [c.bits[-1], c.loss, c.rate(step, plan), pace * c.left(step, plan)] for c in courses}
    return {"at": step, "strings": step * batch, "cells": cells, "share": _share(courses, step, plan, counted, total)}


def _passing(courses: Sequence[Course], step: int, plan: CapacityPlan, counted: int, total: int) -> dict[str, Any]:
    share = _share(courses, step, plan, counted, total)
    return {"done": step, "total": plan.steps, "seconds_left": None, "cells": len(courses), "share": share}


def _share(courses: Sequence[Course], step: int, plan: CapacityPlan, counted: int, total: int) -> float:
    """The part of the sweep that is done."""
    return (counted + sum(min(1.0, step / course.end(plan)) for course in courses)) / total


def _found(
    course: Course, losses: np.ndarray, held_out: np.ndarray, step: int, batch: int, seconds: float
) -> dict[str, Any]:
    """What is kept of a cell that has ended."""
    cell, shape = course.cell, course.cell.shape
    bits = memorised_bits(losses, shape.vocabulary, shape.length)
    parameters, bare = shape.parameter_count(), shape.parameter_count(embeddings=False)
    return {
        "name": cell.name, "model": cell.model, "layers": shape.layers, "width": shape.width, "heads": shape.heads,
        "sequences": cell.sequences, "seed": cell.seed, "parameters": parameters,
        "parameters_without_embeddings": bare,
        "data_bits": data_bits(cell.sequences, shape.length, shape.vocabulary),
        "bits": bits.strict, "bits_paper": bits.paper,
        "bits_per_parameter": bits.strict / parameters, "bits_per_parameter_paper": bits.paper / parameters,
        "bits_per_parameter_without_embeddings": bits.strict / bare,
        "loss": float(losses.sum()) / (cell.sequences * (shape.length - 1)),
        "held_out_loss": float(held_out.sum()) / (len(held_out) * (shape.length - 1)),
        "steps": step, "strings": step * batch, "why": course.why, "seconds": seconds,
    }  # fmt: skip


def _save(folder: Path, networks: Networks, courses: Sequence[Course], step: int, seconds: float) -> None:
    """Keep a stack, the state first: the place tells of it once it is whole."""
    before = _place(folder)
    if not courses:
        (folder / PLACE).unlink(missing_ok=True)
    else:
        state = f"stack-{step}-{len(courses)}.safetensors"
        networks.save_state(folder / state)
        cells = [{"name": c.cell.name, "falling": c.falling, "bits": c.bits, "why": c.why} for c in courses]
        write_json(folder / PLACE, {"step": step, "seconds": seconds, "state": state, "cells": cells})
    if before and (not courses or before["state"] != state):
        (folder / str(before["state"])).unlink(missing_ok=True)


def _place(folder: Path) -> dict[str, Any] | None:
    try:
        place = json.loads((folder / PLACE).read_text(encoding="utf-8"))
        return place if isinstance(place["step"], int) and Path(place["state"]).name == place["state"] else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        raise CheckpointError(f"{folder / PLACE} is broken: delete it, and its stack begins again") from None


def saved_stack(folder: Path, cells: Sequence[Cell]) -> list[Cell]:
    """The cells of the stack that was saved, if all of them are among the given ones."""
    place = _place(folder)
    names = {cell.name: cell for cell in cells}
    if place is None or not all(each["name"] in names for each in place["cells"]):
        return []
    return [names[each["name"]] for each in place["cells"]]


def _restore(folder: Path, networks: Networks, courses: Sequence[Course]) -> tuple[int, float]:
    """Take up a stack where it was saved; returns its step, and the seconds that were worked on it."""
    place = _place(folder)
    assert place is not None
    networks.load_state(folder / place["state"])
    for course, each in zip(courses, place["cells"], strict=True):
        course.falling, course.bits, course.why = each["falling"], list(each["bits"]), str(each["why"])
    return int(place["step"]), float(place.get("seconds", 0.0))
