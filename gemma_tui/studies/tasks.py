"""Structured tasks whose answers follow from their questions, so that what a model writes is right or wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma_tui.errors import UsageError
from gemma_tui.hub.convert import staging
from gemma_tui.rows import PromptRow
from gemma_tui.studies.plan import option

VERSION = 1
"""Of the generators: a seed gives the same rows as long as this stays."""
TRAIN, VALID, TEST = "train", "valid", "test"
SHARES = {VALID: 0.05, TEST: 0.05}
LEAST = 10
"""Rows of a split that is held out, at the fewest."""

PEOPLE = (
    "king", "queen", "miller", "tailor", "hunter", "fisher", "shepherd", "soldier", "princess", "beggar", "giant",
    "witch", "farmer", "cook", "smith", "merchant",
)  # fmt: skip
GOODS = (
    "bread", "salt", "gold", "corn", "wood", "water", "milk", "wool", "iron", "honey", "wine", "cheese", "apples",
    "eggs", "nuts", "straw",
)  # fmt: skip
PLACES = (
    "forest", "castle", "village", "garden", "mill", "river", "tower", "mountain", "meadow", "town", "bridge", "well",
    "kitchen", "stable", "church", "market",
)  # fmt: skip


def record(draw: random.Random) -> PromptRow:
    """Five fields, and an account of them in which each comes back at its places, and so does one bag more."""
    person, goods, place = draw.choice(PEOPLE), draw.choice(GOODS), draw.choice(PLACES)
    count, coin = draw.randint(2, 9), draw.randint(2, 9)
    fields = f"{person}, {goods}, {place}, {count}, {coin}"
    account = (
        f"The {person} went to the {place} and asked for {goods}.\n"
        f"There were {count} bags of {goods}, and each was {coin} pieces of silver.\n"
        f"The {person} gave {coin} pieces of silver for each, and took {count + 1} bags, one as a gift.\n"
        f"Then the {person} took the {goods} and went home from the {place}."
    )
    return PromptRow(fields, account)


def chain(draw: random.Random) -> PromptRow:
    """A sum of six numbers below ten, and its partial sums one by one."""
    first, *others = (draw.randint(1, 9) for _ in range(6))
    signed = [(draw.choice("+-"), number) for number in others]
    total, lines = first, []
    for sign, number in signed:
        after = total + number if sign == "+" else total - number
        lines.append(f"{total} {sign} {number} = {after}")
        total = after
    question = f"{first}" + "".join(f" {sign} {number}" for sign, number in signed)
    return PromptRow(question, "\n".join([*lines, f"The answer is {total}."]))


KINDS: dict[str, Callable[[random.Random], PromptRow]] = {"records": record, "chains": chain}


@dataclass(frozen=True)
class TaskPlan:
    """Which task is made."""

    kind: str = option("records", "what the rows are", choices=tuple(KINDS))
    rows: int = option(4000, "rows in all, of which a tenth is held out", low=100, high=100_000)
    seed: int = option(0, "seed of the rows", low=0, high=2**31)


def make(plan: TaskPlan) -> dict[str, list[PromptRow]]:
    """The rows of each split; no question is there twice.

    Raises:
        UsageError: the task has not so many questions.
    """
    rows = list(_distinct(plan))
    held = {split: max(LEAST, round(share * plan.rows)) for split, share in SHARES.items()}
    valid, test = held[VALID], held[VALID] + held[TEST]
    return {TRAIN: rows[test:], VALID: rows[:valid], TEST: rows[valid:test]}


def _distinct(plan: TaskPlan) -> Iterator[PromptRow]:
    draw, seen, idle = random.Random(plan.seed), set[str](), 0
    while len(seen) < plan.rows:
        row = KINDS[plan.kind](draw)
        idle = idle + 1 if row.prompt in seen else 0
        if idle > 1000:
            raise UsageError(f"rows: {plan.kind} has hardly more than {len(seen):,} questions: ask for fewer")
        if not idle:
            seen.add(row.prompt)
            yield row


def write(plan: TaskPlan, folder: Path) -> dict[str, int]:
    """Write ``train.jsonl``, ``valid.jsonl``, ``test.jsonl`` and ``task.json``; returns the rows of each.

    The folder appears under its name only when everything in it is whole.

    Raises:
        GemmaTuiError: the folder is there already, or cannot be written.
    """
    splits = make(plan)
    with staging(folder) as whole:
        if folder.exists():
            raise UsageError(f"{folder} is there already: take another name")
        for split, rows in splits.items():
            lines = (json.dumps({"prompt": row.prompt, "completion": row.completion}) + "\n" for row in rows)
            (whole / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        (whole / "task.json").write_text(json.dumps({**asdict(plan), "version": VERSION}) + "\n", encoding="utf-8")
    return {split: len(rows) for split, rows in splits.items()}
