"""Further sequences that a measurement's target scores, kept in the run's folder with what is known of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.base import Sampling
from engines.checkpoints import write_json
from gemma_tui.errors import GemmaTuiError
from gemma_tui.studies.memorization.scores import SCORES, Scores
from gemma_tui.studies.memorization.sequences import Sequences, read_sequences

FACTS = "facts.json"


@dataclass(frozen=True, eq=False)
class Extra:
    """Sequences with a folder of their own.

    Attributes:
        key: the folder's name.
        sampling: the decoding scheme whose chances are scored, too.
        facts: what was known when they were made; JSON.
    """

    key: str
    sequences: Sequences
    sampling: Sampling | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def scores(self, folder: Path) -> Scores:
        """What the target makes of them.

        Args:
            folder: of the run.
        """
        return Scores(folder / self.key / SCORES, self.sequences, self.sampling)

    def write(self, folder: Path) -> None:
        """Keep them, so that a run goes on with the same ones.

        Raises:
            EngineError: the disk is full or not writable.
        """
        (folder / self.key).mkdir(exist_ok=True)
        self.sequences.write(folder / self.key)
        write_json(folder / self.key / FACTS, self.facts)


def read_extra(key: str, folder: Path, sampling: Sampling | None = None) -> Extra:
    """What ``Extra.write`` kept in a run's folder.

    Raises:
        GemmaTuiError: a file is missing or broken.
    """
    path = folder / key / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise GemmaTuiError(f"{path} is missing or broken: start the measurement again") from None
    return Extra(key, read_sequences(folder / key), sampling, facts)
