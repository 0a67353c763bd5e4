"""Text from passes that decide its tokens in whatever order."""

from __future__ import annotations

import numpy as np
import pytest

from engines.blocks import DecodingPass
from gemma_tui.studies.writing import STOP_STRING, STOP_TOKEN, Agreement, Writing, agreement, parse_stops
from gemma_tui.tokenizer import EOS, Tokenizer


def said(*placed: tuple[int, int, bool], row: int = 0) -> DecodingPass:
    """A pass that says a token of each place, and whether it stays."""
    places, tokens, decided = (np.array(column) for column in zip(*placed, strict=True))
    entropies = np.linspace(0.5, 1, len(places), dtype=np.float32)
    rows = np.full(len(places), row, np.int32)
    return DecodingPass(rows, places, tokens, entropies, np.exp(-entropies), decided.astype(bool), len(places))


def written(tokenizer: Tokenizer, text: str, stops: tuple[str, ...]) -> tuple[Writing, list[str]]:
    """A text that is written token by token."""
    writing = Writing(tokenizer, (EOS,), stops)
    pieces = [writing.take(said((i, token, True))) for i, token in enumerate(tokenizer.encode(text, bos=False))]
    return writing, [*pieces, writing.finish()]


def test_what_is_decided_is_given_out_once_there_is_no_gap_before_it(tokenizer: Tokenizer) -> None:
    a, b, c = tokenizer.encode("fox dogs towns", bos=False)[:3]
    writing = Writing(tokenizer, (EOS,))
    assert writing.take(said((0, b, False), (1, b, False), (2, c, True))) == ""
    assert writing.take(said((0, a, True), (1, a, False))) == tokenizer.decode([a])
    assert writing.tokens == [a]
    assert writing.take(said((1, b, True))) == tokenizer.decode([b, c])
    assert (writing.tokens, writing.passes, writing.ended) == ([a, b, c], 3, "")


def test_tokens_after_a_stop_inside_a_block_do_not_count(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("fox dogs", bos=False)[:2]
    writing = Writing(tokenizer, (EOS,))
    assert writing.take(said((0, a, False), (1, EOS, True), (2, b, True))) == ""
    assert writing.take(said((0, a, True))) == tokenizer.decode([a])
    assert (writing.tokens, writing.passes, writing.ended) == ([a, EOS], 2, STOP_TOKEN)
    assert writing.take(said((3, b, True))) == writing.finish() == ""
    assert (writing.tokens, writing.passes) == ([a, EOS], 2)


def test_passes_without_a_row_are_none_of_its_own(tokenizer: Tokenizer) -> None:
    writing = Writing(tokenizer, ())
    assert writing.take(said((0, 110, True), row=1), row=0) == ""
    assert (writing.tokens, writing.passes) == ([], 0)


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        (("dogs",), "The 3rd fox jumps over "),
        (("ogs, a",), "The 3rd fox jumps over d"),
        (("nowhere", "\n", "fox j"), "The 3rd "),
        (("The",), ""),
        (("dogs, and soon", "and so on"), "The 3rd fox jumps over dogs, "),
    ],
)
def test_a_stop_string_ends_the_text_wherever_tokens_end(
    tokenizer: Tokenizer, stops: tuple[str, ...], shown: str
) -> None:
    text = "The 3rd fox jumps over dogs, and so on\nand on"
    writing, pieces = written(tokenizer, text, stops)
    assert "".join(pieces) == shown
    assert writing.ended == STOP_STRING
    # The token that completes the string is the last that counts.
    whole = [tokenizer.decode(writing.tokens[:n]) for n in (len(writing.tokens), len(writing.tokens) - 1)]
    assert [any(stop in part for stop in stops) for part in whole] == [True, False]


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none(tokenizer: Tokenizer) -> None:
    text = "fox over fox on"
    writing, pieces = written(tokenizer, text, ("fox on the", "over fox o!"))
    assert "".join(pieces) == text
    assert writing.ended == ""
    assert pieces[-1] == "fox on"


def test_a_stop_string_of_bytes_that_are_held_back_counts(tokenizer: Tokenizer) -> None:
    writing, pieces = written(tokenizer, "fox漢", ("漢",))
    assert "".join(pieces) == "fox"
    assert writing.ended == STOP_STRING


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("", ()),
        ("a", ("a",)),
        (r"a,\n,b\,c", ("a", "\n", "b,c")),
        (r"\t\\,,\x", ("\t\\", r"\x")),
        ("a\\", ("a\\",)),
        ("\n", ("\n",)),
    ],
)
def test_stop_strings_are_read_from_one_text(text: str, stops: tuple[str, ...]) -> None:
    assert parse_stops(text) == stops


@pytest.mark.parametrize(
    ("one", "other", "expected", "share"),
    [
        ([1, 2, 3], [1, 2, 3], Agreement(3, 3, None), 1.0),
        ([1, 2, 3, 4], [1, 9, 3], Agreement(3, 2, 1), 2 / 3),
        ([1, 2], [1, 2, 3], Agreement(2, 2, 2), 1.0),
        ([], [], Agreement(0, 0, None), 1.0),
        ([], [1], Agreement(0, 0, 0), 1.0),
    ],
)
def test_agreement_is_place_by_place(one: list[int], other: list[int], expected: Agreement, share: float) -> None:
    assert agreement(one, other) == expected
    assert agreement(one, other).share == pytest.approx(share)
