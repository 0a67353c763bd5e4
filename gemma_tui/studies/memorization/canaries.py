"""Canaries: random strings put into the training data, and how exposed they are afterwards (Carlini et al.,
arXiv:1802.08232).

A canary is drawn from a space R of strings that are all alike to a model that did not see it. Its exposure is
log₂|R| − log₂ rank, its rank among R by loss; where only a sample of R is scored, |R| is the sample and the canary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from gemma_tui.errors import UsageError
from gemma_tui.rows import Row, TextRow

ENUMERATED = 1 << 20
"""Spaces of at most this many strings can be listed."""


@dataclass(frozen=True)
class CanarySpace:
    """All strings of ``length`` symbols in a frame.

    Attributes:
        symbols: distinct strings of which a canary is made, such as digits or the texts of some tokens.
        length: symbols in a canary.
        separator: between symbols. Without one all symbols must be of one length, so that no two canaries are alike.
        frame: the text around, with ``{}`` where the symbols go.

    Raises:
        UsageError: two choices of symbols would give the same string, or there is no choice at all.
    """

    name: str
    symbols: tuple[str, ...]
    length: int
    separator: str = " "
    frame: str = "{}"

    def __post_init__(self) -> None:
        """Refuse symbols that cannot be told apart."""
        if len(set(self.symbols)) != len(self.symbols) or len(self.symbols) < 2 or self.length < 1:
            raise UsageError("a space of canaries needs two or more distinct symbols, and a length of at least 1")
        if self.frame.count("{}") != 1:
            raise UsageError("the frame of a canary needs {} once, where the symbols go")
        one_length = len({len(symbol) for symbol in self.symbols}) == 1
        if not one_length and (not self.separator or any(self.separator in symbol for symbol in self.symbols)):
            raise UsageError("symbols of several lengths need a separator that is in none of them")

    @property
    def bits(self) -> float:
        """log₂|R|: what it takes to know a canary."""
        return self.length * math.log2(len(self.symbols))

    @property
    def size(self) -> int:
        """|R|."""
        return int(len(self.symbols) ** self.length)

    def text(self, choice: Sequence[int]) -> str:
        """The string of these symbols."""
        return self.frame.replace("{}", self.separator.join(self.symbols[symbol] for symbol in choice))

    def sample(self, count: int, seed: int) -> list[str]:
        """So many distinct strings, uniformly from R.

        Raises:
            UsageError: there are not so many.
        """
        if count > self.size:
            raise UsageError(f"the space {self.name} has {self.size:,} strings, not {count:,}: take longer canaries")
        generator = np.random.default_rng(seed)
        if count * 2 > self.size:
            order = generator.permutation(self.size)[:count].tolist()
            return [self.text(self._choice(number)) for number in order]
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.text(generator.integers(len(self.symbols), size=self.length).tolist())] = None
        return list(found)

    def every(self) -> Iterator[str]:
        """All of R, in order.

        Raises:
            UsageError: it is too large.
        """
        if self.size > ENUMERATED:
            raise UsageError(f"the space {self.name} has {self.size:,} strings, too many to list: sample it")
        return (self.text(choice) for choice in product(range(len(self.symbols)), repeat=self.length))

    def _choice(self, number: int) -> list[int]:
        places = [len(self.symbols) ** place for place in reversed(range(self.length))]
        return [number // place % len(self.symbols) for place in places]


SPACES = {
    space.name: space
    for space in (
        CanarySpace("digits", tuple("0123456789"), 12, "", "My secret number is {}."),
        CanarySpace("letters", tuple("abcdefghijklmnopqrstuvwxyz"), 10, " ", "My secret letters are {}."),
    )
}
"""Spaces to choose from; Gemma has a token for each digit, and for each letter after a space."""


@dataclass(frozen=True)
class Canary:
    """One string, and how often it stands in the data; 0 for one that is only measured, as a control."""

    text: str
    repeats: int


@dataclass(frozen=True)
class Planted:
    """Rows to be trained on, and the canaries among them.

    Attributes:
        rows: the data in its order, each canary as a row of its own at random places.
        places: for each canary, the numbers of its rows.
    """

    rows: list[Row]
    canaries: tuple[Canary, ...]
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Exposure:
    """How exposed a canary is.

    Attributes:
        bits: log₂|R| − log₂ rank. A canary the model does not know has about 1.44 on average.
        ceiling: log₂|R| of the strings that were ranked, the most that can be seen.
        rank: 1 for the lowest loss; strings of the same loss share the mean of their ranks.
    """

    bits: float
    ceiling: float
    rank: float


@dataclass(frozen=True)
class ExposureRow:
    """The exposures of all canaries of one number of repeats, bits."""

    repeats: int
    canaries: int
    mean: float
    lowest: float
    highest: float
    ceiling: float


def plant(
    rows: Sequence[Row],
    space: CanarySpace,
    repeats: Sequence[int] = (0, 1, 4, 16),
    per_repeat: int = 4,
    seed: int = 0,
) -> Planted:
    """Put canaries into data: ``per_repeat`` of them for each number of repeats.

    Raises:
        UsageError: the space has too few strings, a number of repeats is negative, or a row is a canary already.
    """
    if per_repeat < 1 or not repeats or min(repeats) < 0:
        raise UsageError("canaries need numbers of repeats of at least 0, and at least one canary for each")
    counts = [count for count in repeats for _ in range(per_repeat)]
    canaries = tuple(map(Canary, space.sample(len(counts), seed), counts))
    known = {canary.text for canary in canaries}
    if any(row.text in known for row in rows):
        raise UsageError("the data holds one of the canaries already: take another seed or another space")
    owners = np.repeat(np.arange(len(canaries)), counts)
    # A place apart for each, so that the canaries do not come in the order they were drawn.
    generator = np.random.default_rng([seed, 1])
    generator.shuffle(owners)
    total = len(rows) + len(owners)
    places = np.sort(generator.choice(total, len(owners), replace=False))
    planted: dict[int, int] = dict(zip(places.tolist(), owners.tolist(), strict=True))
    rest = iter(rows)
    merged: list[Row] = [TextRow(canaries[planted[at]].text) if at in planted else next(rest) for at in range(total)]
    found = tuple(tuple(places[owners == number].tolist()) for number in range(len(canaries)))
    return Planted(merged, canaries, found)


def strings_beside(space: CanarySpace, canaries: Sequence[Canary], count: int, seed: int = 0) -> list[str]:
    """So many strings of R, or all there are, that are none of the canaries: to be ranked against."""
    known = {canary.text for canary in canaries}
    drawn = space.sample(min(space.size, count + len(known)), seed + 1)
    return [text for text in drawn if text not in known][:count]


def exposure(loss: float, others: np.ndarray) -> Exposure:
    """log₂|R| − log₂ rank of a canary among other strings of its space, by loss.

    Args:
        loss: of the canary, lower = better known; of whole strings, in any unit.
        others: losses ``[n]`` of strings of R that were not trained on; |R| is n + 1.

    Raises:
        UsageError: there are none, or a loss is not a number.
    """
    if not len(others) or math.isnan(loss) or np.isnan(others).any():
        raise UsageError("an exposure needs the losses of other strings of the space, all of them numbers")
    rank = 1 + float((others < loss).sum()) + float((others == loss).sum()) / 2
    ceiling = math.log2(len(others) + 1)
    return Exposure(ceiling - math.log2(rank), ceiling, rank)


def exposures(canaries: Sequence[Canary], losses: Mapping[str, float], others: np.ndarray) -> list[Exposure]:
    """The exposure of each canary, all against the same other strings.

    Args:
        losses: of each canary's text.
        others: losses of strings of R that are none of the canaries.

    Raises:
        UsageError: see ``exposure``, or a canary has no loss.
    """
    missing = sum(canary.text not in losses for canary in canaries)
    if missing:
        raise UsageError(f"{missing} canaries have no loss: measure each of them")
    return [exposure(losses[canary.text], others) for canary in canaries]


def exposure_table(canaries: Sequence[Canary], found: Sequence[Exposure]) -> list[ExposureRow]:
    """Exposure against repeats, repeats rising."""
    groups: dict[int, list[Exposure]] = {}
    for canary, seen in zip(canaries, found, strict=True):
        groups.setdefault(canary.repeats, []).append(seen)
    return [_row(repeats, groups[repeats]) for repeats in sorted(groups)]


def _row(repeats: int, group: Sequence[Exposure]) -> ExposureRow:
    bits = [seen.bits for seen in group]
    return ExposureRow(repeats, len(bits), math.fsum(bits) / len(bits), min(bits), max(bits), group[0].ceiling)
