from __future__ import annotations

import math

import pytest
from decoding_passes import in_blocks, one_by_one, said

from gemma_tui.studies.replay import Replay, entropy_level, turn_level

TOKENS = list(range(100, 111))
ENTROPIES = [0.5, 0.0, 2.0, 0.01, 3.0, 0.02, 0.03, 1.0, 0.04, 4.0, 0.0]


def test_after_each_pass_every_place_is_what_that_pass_or_one_before_it_said() -> None:
    passes = in_blocks(TOKENS, ENTROPIES, 4, 0.1)
    replay = Replay(passes, 4)
    assert replay.steps == len(passes) < len(TOKENS)
    decided: dict[int, tuple[int, int]] = {}
    for step, one in enumerate(passes, 1):
        waiting = {}
        for i, place in enumerate(one.places.tolist()):
            if one.decided[i]:
                decided[place] = int(one.tokens[i]), step
            else:
                waiting[place] = int(one.tokens[i]), 0
        shown = {cell.place: (cell.token, cell.step) for cell in replay.cells(step)}
        assert shown == dict(sorted((decided | waiting).items()))
        assert replay.counts[step - 1] == one.decided.sum()
    assert [cell.token for cell in replay.decisions()] == TOKENS
    assert [cell.entropy for cell in replay.decisions()] == pytest.approx(ENTROPIES)
    assert [cell.probability for cell in replay.decisions()] == pytest.approx([math.exp(-h) for h in ENTROPIES])
    assert replay.cells(0) == []


def test_turns_count_the_passes_of_a_block() -> None:
    replay = Replay(in_blocks(TOKENS, ENTROPIES, 4, 0.1), 4)
    for start in range(0, len(TOKENS), 4):
        block = replay.decisions()[start : start + 4]
        first = min(cell.step for cell in block)
        assert [cell.turn for cell in block] == [cell.step - first + 1 for cell in block]
        assert min(cell.turn for cell in block) == 1
    beside = Replay(one_by_one(TOKENS, ENTROPIES), 4)
    assert [cell.turn for cell in beside.decisions()] == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]
    assert [cell.turn for cell in replay.cells(2) if not cell.decided] == [2] * sum(
        not cell.decided for cell in replay.cells(2)
    )


def test_passes_that_come_later_are_taken_in_once() -> None:
    passes = in_blocks(TOKENS, ENTROPIES, 4, 0.1)
    growing = passes[:1]
    replay = Replay(growing, 4)
    for one in passes[1:]:
        growing.append(one)
        replay.read()
        replay.read()
    whole = Replay(passes, 4)
    assert replay.steps == whole.steps
    assert [replay.cells(n) for n in range(whole.steps + 1)] == [whole.cells(n) for n in range(whole.steps + 1)]


def test_what_differs_between_two_numbers_of_passes_comes_after_the_place_that_is_told() -> None:
    replay = Replay(in_blocks(TOKENS, ENTROPIES, 4, 0.1), 4)
    for one in range(replay.steps + 1):
        for other in range(replay.steps + 1):
            first = replay.changed(one, other)
            assert replay.cells(one)[:first] == replay.cells(other)[:first]
            assert replay.cells(one, first) == replay.cells(one)[first:]


def test_nothing_is_seen_after_the_end_or_after_a_place_that_is_given_up() -> None:
    stopped = Replay([said((0, 9, 0.1, True), (1, 1, 0.2, True), (2, 7, 3.0, False), (3, 8, 0.0, True))], 4)
    assert [cell.place for cell in stopped.cells(1)] == [0, 1, 2, 3]
    stopped.end = 2
    assert [cell.place for cell in stopped.cells(1)] == [0, 1]
    given_up = Replay([said((0, 9, 2.0, False), (1, 1, 0.0, True), (2, 7, 1.0, False), (3, 8, 0.0, True)),
                       said((0, 9, 2.0, True))], 4)  # fmt: skip
    assert [cell.place for cell in given_up.cells(2)] == [0, 1]


def test_levels_grow_with_entropy_and_with_turns_and_stay_on_the_scale() -> None:
    cells = [Replay([said((0, 5, h, True))]).decisions()[0] for h in (0.0, 0.01, 0.1, 1.0, 10.0, 12.0)]
    assert [entropy_level(cell) for cell in cells] == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1], abs=1e-6)
    turns = Replay(one_by_one(TOKENS, ENTROPIES), 4).decisions()[:4]
    assert [turn_level(cell, 4) for cell in turns] == pytest.approx([0, 0.5, math.log(3, 4), 1])
    assert turn_level(turns[3], 1) == 0
