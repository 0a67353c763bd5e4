"""Extraction of a measurement: rows cut to prefix and suffix, greedy decoding, and the chance of each suffix.

Whether greedy decoding gives a suffix exactly, and where it departs, is read off one teacher-forced pass. Decoding goes
on from where it departs, and only to tell near matches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import Engine, Sampling, TokenScores
from engines.checkpoints import replacing
from gemma_tui.errors import GemmaTuiError
from gemma_tui.rows import Row
from gemma_tui.studies.events import Control, Event, Pace, wait_while_paused
from gemma_tui.studies.memorization.extraction import (
    CHANCES,
    NONE,
    Split,
    draws_for,
    matches,
    recited,
    suffix_log_prob,
)
from gemma_tui.studies.memorization.extras import Extra
from gemma_tui.studies.memorization.plan import MemorizationPlan
from gemma_tui.studies.memorization.sequences import HELD_OUT, TRAIN, Sequences, draw, read_kept
from gemma_tui.studies.memorization.tags import tag
from gemma_tui.studies.turns import Window, render, texts
from gemma_tui.text import one_line
from gemma_tui.tokenizer import EOS, Tokenizer

EXTRACTION = "extraction"
SCHEME = Sampling(temperature=1.0, top_k=40)
"""What (n, p)-discoverable extraction draws with: temperature 1 and top-k 40, as arXiv:2410.19482."""

DRAWS = (1, 10, 100, 1000)
PART = 8
"""Decoded sequences that are kept together."""

TAGGED = 20_000
"""Rows among which copies and overlaps are sought; of more only the drawn sequences are looked at."""

SHOWN = 80


def extraction_extra(
    plan: MemorizationPlan, split: Split, tokenizer: Tokenizer, rows: tuple[Sequence[Row], Sequence[Row]]
) -> Extra:
    """The rows of both sets that are long enough, cut to prefix and suffix, each once, with their tags.

    Raises:
        GemmaTuiError: no row of the training set is long enough.
    """
    train, train_counts, every = _cut(rows[0], tokenizer, split, plan.prompts, {})
    held, held_counts, more = _cut(rows[1], tokenizer, split, plan.prompts, train)
    if not train:
        masked = ", or a prompt reaches into the suffix" if train_counts["masked"] else ""
        raise GemmaTuiError(
            f"{plan.data} has no row of the {split.length:,} tokens that --extraction {plan.extraction} takes (the "
            f"longest has {train_counts['longest']:,}{masked}): take a smaller split"
        )
    pairs = [draw(found, plan.rows, plan.seed) for found in (train, held)]
    windows = [window for part in pairs for _, window in part]
    pool = [*every, *more] if len(every) + len(more) <= TAGGED else windows
    tags = _tags(windows, pool, tokenizer)
    numbers = np.array([number for part in pairs for number, _ in part])
    facts = {"rows": {TRAIN: train_counts, HELD_OUT: held_counts}, "tags": tags, "tagged_among": len(pool)}
    return Extra(EXTRACTION, Sequences(windows, numbers, len(pairs[0])), SCHEME, facts)


def _cut(
    rows: Sequence[Row], tokenizer: Tokenizer, split: Split, prompts: str, known: dict[bytes, tuple[int, Window]]
) -> tuple[dict[bytes, tuple[int, Window]], dict[str, int], list[Window]]:
    """Different sequences with their rows, what became of the rows, and the sequences of all that are long enough."""
    found: dict[bytes, tuple[int, Window]] = {}
    counts, every, longest = Counter[str](rows=len(rows)), [], 0
    for number, row in enumerate(rows):
        if not any(texts(row)):
            counts["empty"] += 1
            continue
        whole = render(row, tokenizer, prompts)
        tokens = len(whole) - 1 - int(whole.ids[-1] == EOS)
        longest = max(longest, tokens)
        window = Window(whole.ids[: split.length + 1], whole.supervised[: split.length + 1])
        if tokens < split.length:
            counts["short"] += 1
        elif not window.supervised[-split.suffix :].all():
            counts["masked"] += 1
        else:
            every.append(window)
            key = window.ids.tobytes()
            kind = "shared" if key in known else "repeated" if key in found else "kept"
            counts[kind] += 1
            if kind == "kept":
                found[key] = (number, window)
    names = ("rows", "empty", "short", "masked", "shared", "repeated", "kept")
    return found, {**{name: counts[name] for name in names}, "longest": longest}, every


def _tags(windows: Sequence[Window], pool: Sequence[Window], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    tokens = [window.ids[1:].tolist() for window in pool]
    known = tag([tokenizer.decode(ids) for ids in tokens], tokens)
    by_key = {window.ids.tobytes(): found for window, found in zip(pool, known, strict=True)}
    chosen = [by_key[window.ids.tobytes()] for window in windows]
    return [{**asdict(found), "reasons": list(found.reasons)} for found in chosen]


def compared(extra: Extra, limit: int, seed: int) -> list[int]:
    """The sequences whose greedy decoding is compared: at most ``limit`` of each set, drawn by the seed."""
    generator = np.random.default_rng([seed, 3])
    chosen = [generator.permutation(len(n))[:limit] + n.start for n in extra.sequences.sets.values()]
    return sorted(int(number) for part in chosen for number in part)


def decode(
    engine: Engine,
    extra: Extra,
    scored: Sequence[TokenScores],
    split: Split,
    numbers: Sequence[int],
    folder: Path,
    control: Control,
    done: int,
) -> Iterator[Event]:
    """Decode greedily what is not decoded yet, in parts; a part that is stopped in its middle is not kept.

    Args:
        folder: of the run.
    """
    parts = _parts(scored, split, numbers)
    missing = [part for part in range(len(parts)) if not _path(folder, part).is_file()]
    whole = sum(split.suffix - recited(scored[i].best, split.suffix) for part in missing for i in parts[part])
    pace = Pace("decoding", done, sum(len(parts[part]) for part in missing), whole)
    for part in missing:
        made = np.full((len(parts[part]), split.suffix), NONE, np.int32)
        for row, number in enumerate(parts[part]):
            yield from wait_while_paused(control, done)
            known = recited(scored[number].best, split.suffix)
            ids = extra.sequences.windows[number].ids
            prompt = ids[: 1 + split.prefix + known].tolist()
            made[row, :known] = ids[1 + split.prefix :][:known]
            scheme = Sampling(max_tokens=split.suffix - known, stop_ids=(EOS,))
            for place, token in enumerate(engine.generate(prompt, scheme), known):
                if control.stop.is_set():
                    return
                made[row, place] = token
            yield from pace.advance(split.suffix - known)
        with replacing(_path(folder, part)) as file:
            np.savez(file, ids=made)
        yield Event("decoded", done, {"sequences": len(parts[part])})


def is_decoded(scored: Sequence[TokenScores], split: Split, numbers: Sequence[int], folder: Path) -> bool:
    """Whether all compared sequences are decoded."""
    return all(_path(folder, part).is_file() for part in range(len(_parts(scored, split, numbers))))


def decoded(
    extra: Extra, scored: Sequence[TokenScores], split: Split, numbers: Sequence[int], folder: Path
) -> dict[int, np.ndarray]:
    """The greedy suffixes of the compared sequences, ids padded with -1; of exact ones nothing was decoded.

    Raises:
        GemmaTuiError: a part is missing or broken.
    """
    found = {number: extra.sequences.windows[number].ids[1 + split.prefix :] for number in numbers}
    for part, inside in enumerate(_parts(scored, split, numbers)):
        path = _path(folder, part)
        ids = read_kept(path, ("ids",))["ids"]
        if ids.shape != (len(inside), split.suffix):
            raise GemmaTuiError(f"{path} is of other sequences: start the measurement again")
        found |= zip(inside, ids, strict=True)
    return found


def _parts(scored: Sequence[TokenScores], split: Split, numbers: Sequence[int]) -> list[list[int]]:
    inexact = [number for number in numbers if recited(scored[number].best, split.suffix) < split.suffix]
    return [inexact[start : start + PART] for start in range(0, len(inexact), PART)]


def _path(folder: Path, part: int) -> Path:
    return folder / EXTRACTION / f"decoded-{part:06d}.npz"


def extracted_rows(
    extra: Extra,
    scored: Sequence[TokenScores],
    split: Split,
    suffixes: dict[int, np.ndarray],
    tokenizer: Tokenizer,
) -> list[dict[str, Any]]:
    """A row for each sequence, ready for JSON; an n that is beyond all numbers is None."""
    rows = []
    for name, numbers in extra.sequences.sets.items():
        for number in numbers:
            ids, one = extra.sequences.windows[number].ids, scored[number]
            if one.sampled is None:
                raise GemmaTuiError("the scores have no chances of a decoding scheme: start the measurement again")
            suffix, known = ids[1 + split.prefix :], recited(one.best, split.suffix)
            log_prob = suffix_log_prob(one.sampled, split.suffix)
            draws = {f"{chance:g}": draws_for(log_prob, chance) for chance in CHANCES}
            row: dict[str, Any] = {
                "set": name,
                "row": int(extra.sequences.rows[number]),
                "exact": known == split.suffix,
                "recited": known,
                "near": None,
                "edits": None,
                "log_prob": log_prob if np.isfinite(log_prob) else None,
                "draws": {chance: n if np.isfinite(n) else None for chance, n in draws.items()},
                **extra.facts["tags"][number],
                "text": one_line(tokenizer.decode(ids[1 : 1 + split.prefix].tolist()), SHOWN),
                "suffix": one_line(tokenizer.decode(suffix.tolist()), SHOWN),
                "decoded": None,
            }
            if number in suffixes:
                match = matches(suffix[None], suffixes[number][None])[0]
                made = [int(token) for token in suffixes[number] if token != NONE]
                row |= {"near": match.near, "edits": match.distance, "equal": match.equal}
                row["decoded"] = one_line(tokenizer.decode(made), SHOWN)
            rows.append(row)
    return rows


def extraction_summary(rows: Sequence[dict[str, Any]], extra: Extra, written: str) -> dict[str, Any]:
    """Counts and shares of each set, ready for JSON."""
    sets = {}
    for name in extra.sequences.sets:
        mine = [row for row in rows if row["set"] == name]
        told = [row for row in mine if row["near"] is not None]
        sets[name] = {
            "sequences": len(mine),
            "exact": sum(row["exact"] for row in mine),
            "exact_share": sum(row["exact"] for row in mine) / len(mine),
            "exact_without_reasons": sum(row["exact"] and not row["reasons"] for row in mine),
            "compared": len(told),
            "near": sum(row["near"] for row in told),
            "near_share": sum(row["near"] for row in told) / len(told),
            "recited": float(np.mean([row["recited"] for row in mine])),
            "discoverable": [
                {"chance": chance, "draws": draws, "share": _discoverable(mine, f"{chance:g}", draws)}
                for chance in CHANCES
                for draws in DRAWS
            ],
        }
    scheme = {"temperature": SCHEME.temperature, "top_k": SCHEME.top_k}
    return {"split": written, "scheme": scheme, "sets": sets, **{k: extra.facts[k] for k in ("rows", "tagged_among")}}


def _discoverable(rows: Sequence[dict[str, Any]], chance: str, draws: int) -> float:
    return sum((row["draws"][chance] or float("inf")) <= draws for row in rows) / len(rows)
