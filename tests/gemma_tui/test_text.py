from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tui.text import clean, one_line

BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
FORBIDDEN = {
    "C0": [code for code in range(0x20) if code not in (0x09, 0x0A)],
    "DEL": [0x7F],
    "C1": range(0x80, 0xA0),
    "bidi": BIDI,
    "separators": [0x2028, 0x2029],
    "surrogates": range(0xD800, 0xE000),
    "tags": range(0xE0000, 0xE0080),
}
ANY_TEXT = st.text(st.characters(exclude_categories=()))


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_each_forbidden_character_becomes_one_visible_one(kind: str) -> None:
    for code in FORBIDDEN[kind]:
        shown = clean(f"a{chr(code)}b")
        assert len(shown) == 3
        assert shown[1] == "\ufffd" or 0x2400 <= ord(shown[1]) <= 0x2421, hex(code)


def test_tab_newline_and_visible_characters_stay() -> None:
    kept = "a\tb\nc é 漢 🙂 \u00a0 \ufffd ▁ <bos>"
    assert clean(kept) == kept


def test_an_escape_sequence_is_shown_and_not_obeyed() -> None:
    assert clean("\x1b[2J\x07\r\x9b31m") == "␛[2J␇␍\ufffd31m"


@given(ANY_TEXT)
def test_nothing_that_steers_a_terminal_is_left_and_offsets_stay(text: str) -> None:
    shown = clean(text)
    assert len(shown) == len(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n"]
    assert not {ord(c) for c in shown} & {*BIDI, 0x2028, 0x2029, *FORBIDDEN["tags"]}
    assert clean(shown) == shown
    shown.encode("utf-8")


@given(ANY_TEXT, st.integers(1, 20))
def test_one_line_is_one_short_clean_line(text: str, limit: int) -> None:
    line = one_line(text, limit)
    assert len(line) <= limit
    assert len(line.splitlines()) <= 1
    assert "\t" not in line
    assert clean(line) == line


def test_one_line_joins_lines_and_marks_a_cut() -> None:
    assert one_line("a\n b\t\tc\r\n") == "a b c"
    assert one_line("abcdef", 4) == "abc…"
    assert one_line("abcd", 4) == "abcd"
