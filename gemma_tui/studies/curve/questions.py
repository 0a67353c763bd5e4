"""Rows as what a model is asked, and what it should answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_tui.rows import ASSISTANT, USER, ChatRow, Message, PromptRow, Row, RowSplits
from gemma_tui.studies.turns import asked_in
from gemma_tui.tokenizer import BOS, Tokenizer


@dataclass(frozen=True)
class Question:
    """A row: its number in the data, and the tokens that are gone on from.

    Attributes:
        answer: what should be written; None where the row does not tell.
    """

    row: int
    prompt: tuple[int, ...]
    answer: str | None

    def right(self, text: str) -> bool | None:
        """Whether a text is the answer, white space at its ends left out; None where there is none."""
        return None if self.answer is None else text.strip() == self.answer.strip()


def rows_of(splits: RowSplits) -> list[Row]:
    """The test rows of a folder; of a file, or a folder without them, all there are."""
    return splits.test or [*splits.train, *splits.valid]


def questions(rows: Sequence[Row], tokenizer: Tokenizer, prompts: str, prefix: int) -> list[Question]:
    """What each row asks; a text that is not longer than the prefix asks nothing and is left out.

    Of a conversation the last answer is asked for.

    Args:
        prompts: ``turns`` or ``plain``, how a prompt with its completion is written.
    """
    made = []
    for number, row in enumerate(rows):
        if isinstance(row, ChatRow):
            last = max(i for i, message in enumerate(row.messages) if message.role == ASSISTANT)
            made.append(Question(number, tuple(asked_in(row.messages[:last], tokenizer)), row.messages[last].content))
        elif isinstance(row, PromptRow) and prompts == "turns":
            asked = asked_in((Message(USER, row.prompt),), tokenizer)
            made.append(Question(number, tuple(asked), row.completion))
        elif isinstance(row, PromptRow):
            made.append(Question(number, (BOS, *tokenizer.encode_foreign(row.prompt)), row.completion))
        else:
            ids = tokenizer.encode_foreign(row.text)
            if len(ids) > prefix:
                made.append(Question(number, (BOS, *ids[:prefix]), None))
    return made


def drawn(every: Sequence[Question], limit: int, seed: int) -> list[Question]:
    """So many questions by the seed, in their order; 0 for all."""
    if not limit or limit >= len(every):
        return list(every)
    chosen = np.random.default_rng(seed).permutation(len(every))[:limit]
    return [every[i] for i in sorted(chosen)]
