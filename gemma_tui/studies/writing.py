"""The text after a prompt, put together from passes that decide its tokens in whatever order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from engines.blocks import DecodingPass
from gemma_tui.tokenizer import Stream, Tokenizer

STOP_TOKEN, STOP_STRING = "stop token", "stop string"


class Writing:
    """What is written after one prompt, as far as it is decided without a gap.

    Args:
        stop_ids: tokens that end the text and are no part of it.
        stops: strings that end it and are no part of it.

    Attributes:
        tokens: up to the one that ended the text, which counts.
        passes: forward passes that it took up to there.
        ended: ``STOP_TOKEN``, ``STOP_STRING``, or nothing where neither came.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int], stops: Sequence[str] = ()) -> None:
        self.tokens: list[int] = []
        self.passes = 0
        self.ended = ""
        self._stop_ids, self._stops = stop_ids, stops
        self._stream = Stream(tokenizer)
        self._waiting: dict[int, int] = {}
        self._held = ""

    def take(self, said: DecodingPass, row: int = 0) -> str:
        """The text that a pass completes; not cleaned. A pass after the end, or without the row, says nothing."""
        mine = said.rows == row
        if self.ended or not mine.any():
            return ""
        self.passes += 1
        chosen = mine & said.decided
        self._waiting |= zip(said.places[chosen].tolist(), said.tokens[chosen].tolist(), strict=True)
        return "".join(self._next())

    def finish(self) -> str:
        """What is still held back where neither a stop token nor a string came."""
        return "" if self.ended else self._shown(self._stream.flush(), last=True)

    def _next(self) -> Iterator[str]:
        while not self.ended and len(self.tokens) in self._waiting:
            token = self._waiting.pop(len(self.tokens))
            self.tokens.append(token)
            if token in self._stop_ids:
                yield self.finish()
                self.ended = self.ended or STOP_TOKEN
            else:
                yield self._shown(self._stream.push(token))

    def _shown(self, piece: str, last: bool = False) -> str:
        """A piece of text up to a stop string; what may be the beginning of one waits for what follows."""
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.ended, self._held = STOP_STRING, ""
            return text[: min(found)]
        held = 0 if last else max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def parse_stops(written: str) -> tuple[str, ...]:
    r"""Stop strings, with commas between; ``\n``, ``\t``, ``\,`` and ``\\`` are newline, tab, comma and backslash."""
    plain = {"n": "\n", "t": "\t", ",": ",", "\\": "\\"}
    found, letters = [""], iter(written)
    for letter in letters:
        if letter == ",":
            found.append("")
        elif letter == "\\":
            after = next(letters, "")
            found[-1] += plain.get(after, letter + after)
        else:
            found[-1] += letter
    return tuple(filter(None, found))


@dataclass(frozen=True)
class Agreement:
    """How far two texts of tokens are the same.

    Attributes:
        compared: places up to the end of the shorter one.
        equal: those of them that hold the same token.
        first: the first place in which they differ, be it that one of them has ended; None where nowhere.
    """

    compared: int
    equal: int
    first: int | None

    @property
    def share(self) -> float:
        """Equal places among those compared; 1 where there are none."""
        return self.equal / self.compared if self.compared else 1.0


def agreement(one: Sequence[int], other: Sequence[int]) -> Agreement:
    """Compare tokens place by place."""
    pairs = list(zip(one, other, strict=False))
    same = [a == b for a, b in pairs]
    end = None if len(one) == len(other) else len(pairs)
    return Agreement(len(pairs), sum(same), same.index(False) if False in same else end)
