"""Canaries as files: rows to be trained on with canaries among them, and a sidecar that tells which; their exposure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.checkpoints import replacing
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.rows import TextRow, row_json
from gemma_tui.studies.memorization.canaries import (
    SPACES,
    Canary,
    CanarySpace,
    Planted,
    exposure_table,
    exposures,
    strings_beside,
)
from gemma_tui.studies.memorization.extras import Extra
from gemma_tui.studies.memorization.sequences import Sequences
from gemma_tui.studies.turns import render
from gemma_tui.tokenizer import Tokenizer

EXPOSURE = "exposure"
KIND = "gemma-tui canaries"
MAX_SIDECAR_BYTES = 64 << 20


@dataclass(frozen=True)
class Sidecar:
    """What was planted."""

    space: CanarySpace
    canaries: tuple[Canary, ...]


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
