"""``gemma-tui data``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby

from gemma_tui.commands.plans import plan_from
from gemma_tui.hub.models import resolve
from gemma_tui.output import Output
from gemma_tui.studies.survey import Bin, SplitSurvey, Survey, SurveyPlan, survey
from gemma_tui.studies.turns import Window
from gemma_tui.text import clean
from gemma_tui.tokenizer import Tokenizer, read_tokenizer

BAR = 40
TOKENS_SHOWN = 400
TOKEN_CHARACTERS = 40
SUPERVISED, SEEN = "+", "-"
"""What begins a line of tokens, so that the mask can be read without colour."""


def data(args: argparse.Namespace, output: Output) -> int:
    """Count, measure and show the data of a run."""
    plan = plan_from(SurveyPlan, args, {}, "data")
    with output.progress("opening") as progress:
        model = resolve(args.model, progress)
        tokenizer = read_tokenizer(model.folder)
        progress(0.5, "reading the data")
        found = survey(plan, tokenizer, model.folder)
    _rows(output, found, tokenizer)
    if not output.as_json:
        _show(output, found, plan.sequence_length)
        for number, window in enumerate(found.examples, 1):
            _show_window(output, number, window, tokenizer)
    output.row("end", status="done", shared=found.shared, repeated=found.repeated, held_out=found.held_out)
    return 0


def _rows(output: Output, found: Survey, tokenizer: Tokenizer) -> None:
    for split in found.splits:
        values = asdict(split)
        counts = values.pop("counts")
        counts.pop("lengths")
        output.row("split", **{**counts, **values})
    for bar in found.lengths:
        output.row("length", **asdict(bar))
    for text in found.warnings:
        output.row("warning", text=text)
    for window in found.examples:
        output.row(
            "row",
            ids=window.ids.tolist(),
            tokens=[tokenizer.token(i) for i in window.ids.tolist()],
            supervised=window.supervised.tolist(),
        )


def _show(output: Output, found: Survey, sequence_length: int) -> None:
    names = [split.name for split in found.splits]
    facts = [_facts(split) for split in found.splits]
    output.table(("", *names), [(name, *(fact[name] for fact in facts)) for name in facts[0]])
    if found.held_out:
        output.say("no validation rows: the last 5 % of the training windows are held out")
    if found.repeated:
        output.say(f"{found.repeated:,} training windows are there more than once")
    for text in found.warnings:
        output.say(f"note: {text}")
    output.say(f"\ntokens in a row, before any is cut to {sequence_length:,}")
    for line in bars(found.lengths):
        output.say(line)


def _facts(split: SplitSurvey) -> dict[str, str]:
    counts = split.counts
    packed = {} if split.packed is None else {"packed windows": f"{split.packed:,}"}
    return {
        "rows": f"{split.rows:,}",
        "characters": f"{counts.characters:,}",
        "windows": f"{split.windows:,}",
        **packed,
        "tokens": f"{split.tokens:,}",
        "supervised": f"{split.supervised:,} ({split.supervised / max(1, split.tokens):.0%})",
        "rows split": f"{counts.split:,}",
        "rows truncated": f"{counts.truncated:,}",
        "rows left out": f"{counts.masked + counts.empty:,}",
    }


def bars(lengths: Sequence[Bin]) -> Iterator[str]:
    """A histogram, one line to a bar; a bar that is not empty shows at least one mark."""
    most = max((bar.rows for bar in lengths), default=0)
    labels = [str(bar.low) if bar.low == bar.high else f"{bar.low} to {bar.high}" for bar in lengths]
    width = max(map(len, labels), default=0)
    for bar, label in zip(lengths, labels, strict=True):
        yield f"{label:>{width}} {'█' * -(-BAR * bar.rows // most)} {bar.rows:,}"


def _show_window(output: Output, number: int, window: Window, tokenizer: Tokenizer) -> None:
    from rich.console import Console
    from rich.text import Text

    count = int(window.supervised.sum())
    output.say(f"\nrow {number}: {len(window):,} tokens, {count:,} supervised ({SUPERVISED})")
    console = Console()
    pairs = list(zip(window.ids[:TOKENS_SHOWN].tolist(), window.supervised[:TOKENS_SHOWN].tolist(), strict=True))
    for supervised, run in groupby(pairs, key=lambda pair: pair[1]):
        sign, style = (SUPERVISED, "bold green") if supervised else (SEEN, "dim")
        for line in _lines([_token(tokenizer, i) for i, _ in run], console.width - 2):
            console.print(Text(f"{sign} {line}", style), soft_wrap=True)
    if len(window) > TOKENS_SHOWN:
        output.say(f"  and {len(window) - TOKENS_SHOWN:,} more")


def _lines(tokens: Sequence[str], width: int) -> Iterator[str]:
    """Tokens with bars between, as many to a line as fit."""
    from rich.cells import cell_len

    line = tokens[0]
    for token in tokens[1:]:
        if cell_len(line) + 1 + cell_len(token) > width:
            yield line
            line = token
        else:
            line = f"{line}│{token}"
    yield line


def _token(tokenizer: Tokenizer, token: int) -> str:
    shown = clean(tokenizer.token(token).replace("\n", "↵").replace("\t", "⇥"))
    return shown if len(shown) <= TOKEN_CHARACTERS else shown[: TOKEN_CHARACTERS - 1] + "…"
