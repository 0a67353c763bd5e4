"""Canaries as files: rows to be trained on with canaries among them, and a sidecar that tells which; their exposure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engines.checkpoints import replacing
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.exports import check_writable
from gemma_tui.rows import TextRow, data_path, read_sources, row_json
from gemma_tui.studies.memorization.canaries import (
    SPACES,
    Canary,
    CanarySpace,
    Planted,
    exposure_table,
    exposures,
    plant,
    strings_beside,
)
from gemma_tui.studies.memorization.extras import Extra
from gemma_tui.studies.memorization.sequences import Sequences
from gemma_tui.studies.plan import command, option
from gemma_tui.studies.turns import render
from gemma_tui.text import one_line
from gemma_tui.tokenizer import Tokenizer

EXPOSURE = "exposure"
KIND = "gemma-tui canaries"
MAX_SIDECAR_BYTES = 64 << 20
MAX_PLANTED = 1_000_000


@dataclass(frozen=True)
class CanaryPlan:
    """What is planted in which rows; every field is an option of ``gemma-tui canaries``."""

    data: str = option("", "rows to plant them in: .jsonl or .txt, a folder or hf:REPO", required=True)
    out: str = option("", "the rows to train on: a .jsonl that is not there yet", required=True)
    sidecar: str = option("", "what was planted; empty for the file of the rows with .canaries.json behind it")
    space: str = option("digits", "of what they are", choices=tuple(SPACES))
    repeats: str = option("0,1,4,16", "how often each, with commas")
    each: int = option(4, "canaries of each number", low=1, high=MAX_PLANTED)
    seed: int = option(0, "seed of strings and places", low=0, high=2**31)


@dataclass(frozen=True)
class Sidecar:
    """What was planted."""

    space: CanarySpace
    canaries: tuple[Canary, ...]


@dataclass(frozen=True)
class PlantedFiles:
    """What was written.

    Attributes:
        rows, planted: all rows, and those of them that are canaries.
        canaries: how many different ones.
        apart: whether the data has validation or test rows, which are not copied.
    """

    out: Path
    sidecar: Path
    rows: int
    planted: int
    canaries: int
    apart: bool

    @property
    def told(self) -> list[str]:
        """Sentences for a person."""
        out, sidecar = self.out, self.sidecar
        return [
            f"{out}: {self.rows:,} rows, {self.planted:,} of them from {self.canaries:,} canaries",
            f"{sidecar}: what was planted; `gemma-tui memorization RUN --data {out} --exposure {sidecar}` measures it",
            "validation and test rows are not copied: put them beside as valid.jsonl and test.jsonl"
            if self.apart
            else "training on data without validation rows keeps its last windows for them, canaries too: add some",
        ]


def words_of(plan: CanaryPlan) -> str:
    """The command that plants."""
    return command(("canaries", plan.data or "DATA"), replace(plan, data=CanaryPlan.data))


def plant_files(plan: CanaryPlan) -> PlantedFiles:
    """Plant canaries in rows and write down which.

    Raises:
        EngineError: the data cannot be used, a file is there already or cannot be written, or these are too many.
    """
    out = data_path(plan.out)
    sidecar = data_path(plan.sidecar) if plan.sidecar else out.with_name(f"{out.name}.canaries.json")
    if out.suffix != ".jsonl":
        raise UsageError(f"{out} does not end in .jsonl: name a file that training can read")
    for path in (out, sidecar):
        check_writable(path)
        if path.exists():
            raise UsageError(f"{path} is there already: take another name")
    if out == sidecar:
        raise UsageError(f"{out} would be rows and sidecar: name two files")
    repeats = repeats_of(plan)
    rows, space = read_sources(plan.data), SPACES[plan.space]
    planted = plant(rows.train, space, repeats, plan.each, plan.seed)
    write_planted(planted, space, out, sidecar)
    count, apart = len(planted.rows) - len(rows.train), bool(rows.valid or rows.test)
    return PlantedFiles(out, sidecar, len(planted.rows), count, len(planted.canaries), apart)


def repeats_of(plan: CanaryPlan) -> list[int]:
    """How often canaries are planted, rising.

    Raises:
        UsageError: these are no whole numbers, or too many rows.
    """
    try:
        found = sorted({int(part) for part in plan.repeats.split(",")})
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise UsageError(f"repeats is {one_line(plan.repeats, 40)!r}; whole numbers from 0 on with commas are needed")
    if (rows := sum(found) * plan.each) > MAX_PLANTED:
        raise UsageError(f"repeats: these are {rows:,} rows; {MAX_PLANTED:,} can be planted: take fewer")
    return found


def write_planted(planted: Planted, space: CanarySpace, out: Path, sidecar: Path) -> None:
    """Write the rows as ``.jsonl`` and what was planted beside them.

    Raises:
        EngineError: a file cannot be written.
    """
    pairs = zip(planted.canaries, planted.places, strict=True)
    found = [{**asdict(canary), "rows": list(places)} for canary, places in pairs]
    try:
        with replacing(out) as file:
            for row in planted.rows:
                file.write((json.dumps(row_json(row), ensure_ascii=False) + "\n").encode())
        with replacing(sidecar) as file:
            text = json.dumps({"kind": KIND, "space": space.name, "canaries": found}, ensure_ascii=False, indent=1)
            file.write((text + "\n").encode())
    except OSError as error:
        raise GemmaTuiError(f"{out} cannot be written ({error.strerror}): take another name or folder") from None


def read_sidecar(path: Path) -> Sidecar:
    """What ``write_planted`` kept.

    Raises:
        UsageError: the file is missing, or is none.
    """
    wrong = UsageError(f"exposure: {path} tells of no planted canaries: name the file that `gemma-tui canaries` wrote")
    try:
        if path.stat().st_size > MAX_SIDECAR_BYTES:
            raise wrong
        kept = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"exposure: {path} cannot be read ({error.strerror}): check the path") from None
    except (ValueError, RecursionError):
        raise wrong from None
    try:
        if kept["kind"] != KIND:
            raise wrong
        canaries = tuple(Canary(_checked(c["text"], str), _checked(c["repeats"], int)) for c in kept["canaries"])
        space = SPACES[kept["space"]]
    except (KeyError, TypeError):
        raise wrong from None
    if not canaries:
        raise wrong
    return Sidecar(space, canaries)


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def exposure_extra(sidecar: Sidecar, strings: int, seed: int, tokenizer: Tokenizer, prompts: str) -> Extra:
    """The canaries, and after them other strings of their space that were not planted."""
    others = strings_beside(sidecar.space, sidecar.canaries, strings, seed)
    texts = [canary.text for canary in sidecar.canaries] + others
    windows = [render(TextRow(text), tokenizer, prompts) for text in texts]
    kept = Sequences(windows, np.arange(len(windows)), len(sidecar.canaries))
    facts = {
        "space": sidecar.space.name,
        "space_bits": sidecar.space.bits,
        "canaries": [asdict(canary) for canary in sidecar.canaries],
    }
    return Extra(EXPOSURE, kept, facts=facts)


def exposure_summary(extra: Extra, log_likelihoods: np.ndarray) -> dict[str, Any]:
    """Exposure of each canary and by repeats, ready for JSON.

    Args:
        log_likelihoods: of all sequences, nats.
    """
    canaries: Sequence[Canary] = [Canary(**canary) for canary in extra.facts["canaries"]]
    losses = {canary.text: -float(value) for canary, value in zip(canaries, log_likelihoods, strict=False)}
    found = exposures(canaries, losses, -log_likelihoods[len(canaries) :])
    each = [
        {"text": canary.text, "repeats": canary.repeats, "loss": losses[canary.text], **asdict(seen)}
        for canary, seen in zip(canaries, found, strict=True)
    ]
    return {
        "space": extra.facts["space"],
        "space_bits": extra.facts["space_bits"],
        "strings": len(log_likelihoods) - len(canaries),
        "repeats": [asdict(row) for row in exposure_table(canaries, found)],
        "canaries": each,
    }
