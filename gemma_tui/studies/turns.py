"""Rows to token ids and the mask of what the loss counts.

Gemma's turns are written here rather than by a chat template, because the mask has to know which token came from
which role. Text of a row never becomes a control token, whatever it spells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_tui.rows import SYSTEM, USER, ChatRow, Message, PromptRow, Row, TextRow
from gemma_tui.tokenizer import BOS, END_OF_TURN, EOS, START_OF_TURN, Tokenizer

PROMPT_FORMS = ("turns", "plain")


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens that are trained on together, ``<bos>`` first; the last is only predicted.

    Attributes:
        ids: int32 ``[n]``.
        supervised: bool ``[n]``, whether the loss counts the prediction of this token; never of ``<bos>``.
        segments: int32 ``[n]``, the number of each token's document where several are packed; None for one.
    """

    ids: np.ndarray
    supervised: np.ndarray
    segments: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of ids."""
        return len(self.ids)


def render(row: Row, tokenizer: Tokenizer, prompts: str = "turns") -> Window:
    """A whole row, however long.

    Text ends with ``<eos>``, and all of it is supervised. Of a conversation the assistant's words are, and the
    ``<end_of_turn>`` after each of its turns; nothing else is. A prompt and its completion are a conversation of two
    turns, as in mlx-lm; or plain text, whose completion and ``<eos>`` are supervised, for models that know no turns.

    Args:
        prompts: ``turns`` or ``plain``.
    """
    if isinstance(row, TextRow):
        return _joined([(tokenizer.encode_foreign(row.text), True), ([EOS], True)])
    if isinstance(row, ChatRow):
        return _joined(_turns(row.messages, tokenizer))
    if prompts == "turns":
        return _joined(_turns((Message(USER, row.prompt), Message("assistant", row.completion)), tokenizer))
    return _joined(
        [
            (tokenizer.encode_foreign(row.prompt), False),
            (tokenizer.encode_foreign(row.completion), True),
            ([EOS], True),
        ]
    )


def asked(text: str, tokenizer: Tokenizer) -> list[int]:
    """``<bos>``, a text as the user's turn, and the model's turn begun: Gemma's template with a generation prompt."""
    return asked_in((Message(USER, text),), tokenizer)


def asked_in(messages: tuple[Message, ...], tokenizer: Tokenizer) -> list[int]:
    """As ``asked``, for a conversation whose last turn is the user's."""
    return _joined([*_turns(messages, tokenizer), (_model_begins(tokenizer), False)]).ids.tolist()


def in_turns(row: Row, prompts: str) -> bool:
    """Whether a row is written in Gemma's turns."""
    return isinstance(row, ChatRow) or (isinstance(row, PromptRow) and prompts == "turns")


def texts(row: Row) -> tuple[str, ...]:
    """Every piece of text of a row."""
    if isinstance(row, ChatRow):
        return tuple(message.content for message in row.messages)
    return (row.text,) if isinstance(row, TextRow) else (row.prompt, row.completion)


def _turns(messages: tuple[Message, ...], tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """Gemma-3's own template: content is stripped, and the system text stands before that of the first user turn."""
    found = []
    newline = tokenizer.encode_foreign("\n")
    system = messages[0].content + "\n\n" if messages[0].role == SYSTEM else ""
    for message in messages[1 if messages[0].role == SYSTEM else 0 :]:
        content = message.content.strip()
        if message.role == USER:
            found += [([START_OF_TURN, *tokenizer.encode_foreign(f"user\n{system}{content}"), END_OF_TURN], False)]
        else:
            found += [(_model_begins(tokenizer), False)]
            found += [([*tokenizer.encode_foreign(content), END_OF_TURN], True)]
        found += [(newline, False)]
        system = ""
    return found


def _model_begins(tokenizer: Tokenizer) -> list[int]:
    return [START_OF_TURN, *tokenizer.encode_foreign("model\n")]


def _joined(parts: list[tuple[list[int], bool]]) -> Window:
    ids = np.array([BOS, *(i for part, _ in parts for i in part)], np.int32)
    supervised = np.repeat([False, *(s for _, s in parts)], [1, *(len(part) for part, _ in parts)])
    return Window(ids, supervised)
