"""``gemma-tui canaries``."""

from __future__ import annotations

import argparse
from pathlib import Path

from gemma_tui.errors import UsageError
from gemma_tui.exports import check_writable
from gemma_tui.output import Output
from gemma_tui.rows import data_path, read_sources
from gemma_tui.studies.memorization.canaries import SPACES, plant
from gemma_tui.studies.memorization.planting import write_planted
from gemma_tui.text import one_line

MAX_PLANTED = 1_000_000


def canaries(args: argparse.Namespace, output: Output) -> int:
    """Plant canaries in rows and write down which."""
    out = data_path(args.out)
    sidecar = data_path(args.sidecar) if args.sidecar else out.with_name(f"{out.name}.canaries.json")
    if out.suffix != ".jsonl":
        raise UsageError(f"{out} does not end in .jsonl: name a file that training can read")
    for path in (out, sidecar):
        _check_new(path)
    if out == sidecar:
        raise UsageError(f"{out} would be rows and sidecar: name two files")
    repeats = _repeats(args.repeats, args.each)
    if args.seed < 0:
        raise UsageError(f"seed is {args.seed}; a whole number from 0 on is needed")
    rows, space = read_sources(args.data), SPACES[args.space]
    planted = plant(rows.train, space, repeats, args.each, args.seed)
    write_planted(planted, space, out, sidecar)
    count = len(planted.rows) - len(rows.train)
    output.row("canaries", out=str(out), sidecar=str(sidecar), rows=len(planted.rows), planted=count,
               canaries=len(planted.canaries), space=space.name, repeats=repeats)  # fmt: skip
    output.say(f"{out}: {len(planted.rows):,} rows, {count:,} of them from {len(planted.canaries):,} canaries")
    output.say(
        f"{sidecar}: what was planted; `gemma-tui memorization RUN --data {out} --exposure {sidecar}` measures it"
    )
    if rows.valid or rows.test:
        output.say("validation and test rows are not copied: put them beside as valid.jsonl and test.jsonl")
    else:
        output.say("training on data without validation rows keeps its last windows for them, canaries too: add some")
    output.row("end", status="done")
    return 0


def _check_new(path: Path) -> None:
    check_writable(path)
    if path.exists():
        raise UsageError(f"{path} is there already: take another name")


def _repeats(written: str, each: int) -> list[int]:
    try:
        found = sorted({int(part) for part in written.split(",")})
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise UsageError(f"repeats is {one_line(written, 40)!r}; whole numbers from 0 on with commas are needed")
    if not 0 < each <= MAX_PLANTED or sum(found) * each > MAX_PLANTED:
        raise UsageError(f"--each {each} gives {sum(found) * each:,} rows; from 1 to {MAX_PLANTED:,} can be planted")
    return found
