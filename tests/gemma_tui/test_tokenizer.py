from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tui.errors import GemmaTuiError
from gemma_tui.tokenizer import BOS, Stream, Tokenizer, read_tokenizer, train_tokenizer

FIRST_BYTE = 107
GEMMA = train_tokenizer(["a few words, and a few more words\n"] * 20, 420)
ANY_TOKENS = st.lists(st.one_of(st.integers(0, 106), st.integers(107, 362), st.integers(363, GEMMA.size)), max_size=60)
# ▁ is how the vocabulary writes a space, and < may begin a special token.
PLAIN_TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁<"))


@pytest.mark.parametrize("text", ["a", "", " a", "<bos>", "<bos>a", "<bos><bos>a", "<eos>a", "\n", "<bos> <bos>"])
def test_a_text_begins_with_exactly_one_bos(text: str) -> None:
    ids = GEMMA.encode(text)
    assert ids[0] == BOS
    assert ids[1:2] != [BOS]
    assert GEMMA.encode(text, bos=False) == ids[1:]


def test_a_bos_that_the_file_itself_would_add_is_not_doubled() -> None:
    assert GEMMA.backend.encode("a").ids[0] == BOS
    assert GEMMA.encode("a").count(BOS) == 1


@given(PLAIN_TEXT)
def test_any_text_comes_back_through_bytes(text: str) -> None:
    assert GEMMA.decode(GEMMA.encode(text)) == text


def test_characters_outside_the_vocabulary_are_their_bytes() -> None:
    ids = GEMMA.encode("漢🙂", bos=False)
    assert bytes(i - FIRST_BYTE for i in ids) == "漢🙂".encode()


def test_special_tokens_have_gemmas_ids() -> None:
    names = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 105: "<start_of_turn>", 106: "<end_of_turn>"}
    assert {i: GEMMA.token(i) for i in names} == names
    assert [GEMMA.token(FIRST_BYTE + byte) for byte in range(256)] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert GEMMA.encode("<start_of_turn>a<end_of_turn>", bos=False)[0::2] == [105, 106]


def test_special_tokens_are_left_out_of_the_text() -> None:
    assert GEMMA.decode(GEMMA.encode("<start_of_turn>a few<end_of_turn>")) == "a few"


def test_training_is_the_same_for_the_same_texts() -> None:
    assert (
        train_tokenizer(["abc abd"] * 9, 380).backend.to_str() == train_tokenizer(["abc abd"] * 9, 380).backend.to_str()
    )


@given(ANY_TOKENS)
def test_streamed_pieces_are_the_decode_of_the_whole(ids: list[int]) -> None:
    stream = Stream(GEMMA)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == GEMMA.decode(ids)


@given(PLAIN_TEXT)
def test_a_character_is_never_streamed_in_halves(text: str) -> None:
    stream = Stream(GEMMA)
    pieces = [stream.push(i) for i in GEMMA.encode(text)]
    assert "".join(pieces).count("\ufffd") <= text.count("\ufffd")
    assert "".join([*pieces, stream.flush()]) == text


class CountingTokenizer:
    """Counts the tokens that are decoded."""

    decoded = 0

    def token(self, token: int) -> str:
        return GEMMA.token(token)

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return GEMMA.decode(ids)


@pytest.mark.parametrize("token", [GEMMA.encode("a", bos=False)[0], FIRST_BYTE + 0xFF, BOS])
def test_streaming_decodes_each_token_once(token: int) -> None:
    counting = CountingTokenizer()
    stream = Stream(counting)  # type: ignore[arg-type]
    for _ in range(1000):
        stream.push(token)
    stream.flush()
    assert counting.decoded <= 1000


def saved(folder: Path, change: Callable[[dict], None] = lambda described: None) -> Path:
    described = json.loads(GEMMA.backend.to_str())
    change(described)
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


def test_a_saved_tokenizer_reads_back_the_same(tmp_path: Path) -> None:
    read = read_tokenizer(saved(tmp_path))
    assert read.encode("a few 漢 words\n") == GEMMA.encode("a few 漢 words\n")
    assert read.size == GEMMA.size


def test_truncation_and_padding_kept_in_the_file_are_not_applied(tmp_path: Path) -> None:
    def change(described: dict) -> None:
        cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        pad = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None}
        described["truncation"] = cut
        described["padding"] = pad | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}

    assert read_tokenizer(saved(tmp_path, change)).encode("many words " * 9) == GEMMA.encode("many words " * 9)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"model": {"type": "Nonsense"}}', b'{"a":' * 100_000, b"[" * 100_000],
    ids=["empty", "cut", "null", "list", "not-utf-8", "unknown-model", "nested-objects", "nested-lists"],
)
def test_a_broken_or_hostile_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(GemmaTuiError, match=r"tokenizer\.json is no tokenizer .*fetch it again") as refused:
        read_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GemmaTuiError, match=r"tokenizer\.json is missing"):
        read_tokenizer(tmp_path)


def test_a_file_too_large_to_be_a_tokenizer_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(GemmaTuiError, match="over 64 MiB"):
        read_tokenizer(tmp_path)


def replacing(times: int) -> dict:
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"normalizer": {"type": "Sequence", "normalizers": [double] * times}}


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
TROUBLE = {
    "a regular expression": ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a+)+$"}}}, "regular expression"),
    "one inside": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**SPLIT, "pattern": {"Regex": "(a|a)*$"}}]}},
        "regular expression",
    ),
    "one of a normalizer": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}},
        "regular expression",
    ),
    "replacements of replacements": (replacing(30), "1,073,741,824 times as long"),
    "what the library panics at": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA=="}},
        "is no tok",
    ),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_a_tokenizer_that_could_take_all_time_or_memory_is_refused(tmp_path: Path, kind: str) -> None:
    terms, reason = TROUBLE[kind]
    with pytest.raises(GemmaTuiError, match=reason):
        read_tokenizer(saved(tmp_path, lambda described: described.update(terms)))


@pytest.mark.parametrize(("name", "other"), [("<bos>", "<mask>"), ("<eos>", "<pad>"), ("<pad>", "<unk>")])
def test_special_tokens_in_other_places_are_refused(tmp_path: Path, name: str, other: str) -> None:
    def swap(described: dict) -> None:
        vocabulary = described["model"]["vocab"]
        vocabulary[name], vocabulary[other] = vocabulary[other], vocabulary[name]
        described["added_tokens"] = []

    with pytest.raises(GemmaTuiError, match="this is no Gemma tokenizer"):
        read_tokenizer(saved(tmp_path, swap))


def test_half_a_surrogate_pair_is_refused_in_one_line() -> None:
    with pytest.raises(GemmaTuiError, match="surrogate"):
        GEMMA.encode("a\udcff")


def test_the_vocabulary_is_no_larger_than_asked(tokenizer: Tokenizer) -> None:
    assert 363 < tokenizer.size <= 450
