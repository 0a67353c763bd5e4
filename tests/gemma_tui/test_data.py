from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import TEXTS, write_rows

from engines.training import IGNORED, Batch
from gemma_tui.errors import GemmaTuiError
from gemma_tui.rows import ChatRow, Message, PromptRow, Row, TextRow
from gemma_tui.studies import data
from gemma_tui.studies.data import (
    NO_DOCUMENT,
    PADDING,
    counted_windows,
    evaluation_batches,
    make_batch,
    pack,
    read_splits,
    training_batches,
    warnings,
    windows,
)
from gemma_tui.studies.turns import Window
from gemma_tui.tokenizer import BOS, EOS, PAD, Tokenizer, train_tokenizer

GEMMA = train_tokenizer(TEXTS, 450)
ROWS = st.lists(st.text("abc de\n漢", max_size=80), max_size=5)


def window(*ids: int) -> Window:
    """All of a window but ``<bos>`` is supervised."""
    return Window(np.array(ids, np.int32), np.arange(len(ids)) > 0)


def numbered(lengths: list[int]) -> list[Window]:
    """Windows that can be told apart by their first token after ``<bos>``."""
    return [window(BOS, 1000 + i, *range(5, 3 + n)) for i, n in enumerate(lengths)]


def text_rows(texts: list[str]) -> list[Row]:
    return [TextRow(text) for text in texts]


def names(batches: list[Batch]) -> list[int]:
    return [int(row[1]) - 1000 for batch in batches for row in batch.tokens]


def same(a: list[Batch], b: list[Batch]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(np.array_equal(x.tokens, y.tokens) and np.array_equal(x.labels, y.labels) for x, y in pairs)


SEQUENCES = numbered([3 + n * 7 % 40 for n in range(23)])


@given(ROWS, st.integers(8, 40))
def test_windows_hold_every_token_of_a_row_once_and_in_order(rows: list[str], length: int) -> None:
    found = windows(text_rows(rows), GEMMA, length)
    expected = [i for row in rows if row for i in [*GEMMA.encode(row, bos=False), EOS]]
    assert [i for w in found for i in w.ids[1:]] == expected
    assert all(w.supervised.tolist() == [False] + [True] * (len(w) - 1) for w in found)


@given(ROWS, st.integers(8, 40))
def test_windows_begin_with_one_bos_and_keep_the_length(rows: list[str], length: int) -> None:
    for found in windows(text_rows(rows), GEMMA, length):
        assert (found.ids.dtype, found.supervised.dtype) == (np.int32, np.bool_)
        assert found.ids[0] == BOS
        assert BOS not in found.ids[1:]
        assert 2 <= len(found) <= length + 1


@given(st.text("abc de", min_size=1, max_size=400), st.integers(8, 40))
def test_a_long_row_is_cut_evenly_and_its_last_window_alone_ends(row: str, length: int) -> None:
    found = windows([TextRow(row)], GEMMA, length)
    sizes = [len(w) - 1 for w in found]
    assert max(sizes) - min(sizes) <= 1
    assert len(found) == -(-sum(sizes) // length)
    assert [EOS in w.ids for w in found] == [False] * (len(found) - 1) + [True]
    assert found[-1].ids[-1] == EOS


def test_no_window_crosses_from_one_row_into_another() -> None:
    assert [w.ids.tolist() for w in windows(text_rows(["a", "", "b"]), GEMMA, 64)] == [
        [BOS, *GEMMA.encode("a", bos=False), EOS],
        [BOS, *GEMMA.encode("b", bos=False), EOS],
    ]


def test_a_label_is_the_next_token_and_padding_is_ignored() -> None:
    batch = make_batch([window(BOS, 7, 8, EOS), window(BOS, 9)])
    assert batch.tokens.shape == batch.labels.shape == (2, PADDING)
    assert batch.tokens[:, :4].tolist() == [[BOS, 7, 8, PAD], [BOS, PAD, PAD, PAD]]
    assert batch.labels[:, :4].tolist() == [[7, 8, EOS, IGNORED], [9, IGNORED, IGNORED, IGNORED]]
    assert (batch.tokens[:, 4:] == PAD).all()
    assert (batch.labels[:, 4:] == IGNORED).all()
    assert batch.supervised == 4
    assert batch.segments is None


@pytest.mark.parametrize(("longest", "padded"), [(1, 32), (32, 32), (33, 64), (64, 64)])
def test_lengths_are_padded_to_few_shapes(longest: int, padded: int) -> None:
    assert make_batch([window(*range(longest + 1))]).tokens.shape == (1, padded)


@pytest.mark.parametrize("size", [1, 4, 23, 100])
def test_an_epoch_holds_no_window_twice_and_leaves_out_less_than_a_batch(size: int) -> None:
    per_epoch = max(1, len(SEQUENCES) // size)
    seen = Counter(names(list(islice(training_batches(SEQUENCES, size, seed=0), per_epoch))))
    assert set(seen.values()) == {1}
    assert len(seen) == per_epoch * min(size, len(SEQUENCES))


def test_every_window_is_trained_on_once_per_epoch() -> None:
    batches = list(islice(training_batches(SEQUENCES[:20], 4, seed=3), 15))
    for epoch in range(3):
        assert sorted(names(batches[5 * epoch : 5 * epoch + 5])) == list(range(20))


def test_the_order_depends_on_the_epoch_and_the_seed_alone() -> None:
    def epochs(seed: int) -> tuple[list[int], list[int]]:
        batches = list(islice(training_batches(SEQUENCES[:20], 4, seed), 10))
        return names(batches[:5]), names(batches[5:])

    assert epochs(3) == epochs(3)
    assert len({str(order) for seed in range(4) for order in epochs(seed)}) == 8


@pytest.mark.parametrize("start", [1, 4, 5, 6, 13])
def test_training_goes_on_exactly_where_it_was(start: int) -> None:
    whole = list(islice(training_batches(SEQUENCES, 4, seed=1), 20))
    assert same(list(islice(training_batches(SEQUENCES, 4, seed=1, start=start), 20 - start)), whole[start:])


def test_going_back_to_a_position_makes_no_batch_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Batch] = []

    def counted(sequences: list[Window]) -> Batch:
        made.append(make_batch(sequences))
        return made[-1]

    monkeypatch.setattr(data, "make_batch", counted)
    next(training_batches(SEQUENCES, 4, seed=1, start=1_000_003))
    assert len(made) == 1


def test_windows_of_like_length_share_a_batch() -> None:
    lengths = [9] * 8 + [33] * 8
    shapes = Counter(b.tokens.shape for b in islice(training_batches(numbered(lengths), 4, seed=0), 4))
    assert shapes == {(4, 32): 4}
    mixed = [b.tokens.shape[1] for b in islice(training_batches(numbered([9] * 8 + [100] * 8), 4, seed=0), 4)]
    assert sorted(mixed) == [32, 32, 128, 128]


def test_evaluation_is_always_on_the_same_windows() -> None:
    first, second = (list(evaluation_batches(SEQUENCES, 4, limit=3)) for _ in range(2))
    assert same(first, second)
    assert len(first) == 3
    assert len(set(names(first))) == 12


@pytest.mark.parametrize("size", [1, 4, 100])
def test_evaluation_without_a_limit_is_on_every_window(size: int) -> None:
    assert sorted(names(list(evaluation_batches(SEQUENCES, size, limit=0)))) == list(range(23))


def test_evaluation_is_spread_over_the_windows() -> None:
    seen = names(list(evaluation_batches(numbered([5] * 100), 2, limit=5)))
    assert max(seen) >= 80
    assert min(seen) < 20


def test_a_folder_keeps_its_own_validation_rows(corpus: Path, tokenizer: Tokenizer) -> None:
    splits = read_splits(str(corpus), tokenizer, 256)
    assert [len(splits.train), len(splits.valid)] == [20, 4]
    assert splits.valid_characters == sum(map(len, TEXTS[20:]))
    assert tokenizer.decode(splits.valid[0].ids.tolist()) == TEXTS[20]


def test_the_last_windows_of_a_single_file_are_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"row {n}" for n in range(40)]
    splits = read_splits(str(write_rows(tmp_path / "data.jsonl", texts)), tokenizer, 64)
    assert [tokenizer.decode(w.ids.tolist()) for w in splits.train] == texts[:38]
    assert [tokenizer.decode(w.ids.tolist()) for w in splits.valid] == texts[38:]


def test_a_single_window_is_trained_on_and_not_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    splits = read_splits(str(write_rows(tmp_path / "data.jsonl", ["one"])), tokenizer, 64)
    assert [len(splits.train), len(splits.valid)] == [1, 0]


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_data_without_text_are_refused(tmp_path: Path, tokenizer: Tokenizer, name: str, texts: list[str]) -> None:
    path = tmp_path / name
    path.write_text("") if name.endswith(".txt") else write_rows(path, texts)
    with pytest.raises(GemmaTuiError, match="holds no text to train on"):
        read_splits(str(path), tokenizer, 64)


def test_several_sources_are_joined(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    more = write_rows(tmp_path / "more.jsonl", ["another text"])
    alone, both = (read_splits(sources, tokenizer, 64) for sources in (str(corpus), f"{corpus}, {more}"))
    assert len(both.train) == len(alone.train) + 1
    assert len(both.valid) == len(alone.valid)


# ------------------------------------------------------------------------------------------------ what is cut


def answered(prompt: str, answer: str) -> ChatRow:
    return ChatRow((Message("user", prompt), Message("assistant", answer)))


def test_a_label_that_is_not_supervised_is_ignored() -> None:
    batch = make_batch([Window(np.array([BOS, 7, 8, 9], np.int32), np.array([False, False, True, False]))])
    assert batch.tokens[0, :3].tolist() == [BOS, 7, 8]
    assert batch.labels[0, :3].tolist() == [IGNORED, 8, IGNORED]


def test_a_conversation_that_is_too_long_loses_its_end() -> None:
    row = answered("abc", "de " * 40)
    whole, short = windows([row], GEMMA, 1000)[0], windows([row], GEMMA, 32)
    assert len(short) == 1
    assert short[0].ids.tolist() == whole.ids[:33].tolist()
    assert short[0].supervised.tolist() == whole.supervised[:33].tolist()


def test_rows_are_counted_by_what_becomes_of_them() -> None:
    rows = [
        TextRow("fox"),
        TextRow("fox " * 100),
        TextRow(""),
        answered("fox", "dog"),
        answered("fox", "dog " * 100),
        answered("fox " * 100, "dog"),
        PromptRow("fox", "dog"),
        TextRow("<end_of_turn>"),
    ]
    found, counts = counted_windows(rows, GEMMA, 32)
    assert (counts.rows, counts.empty, counts.split, counts.truncated) == (8, 1, 1, 2)
    assert (counts.masked, counts.spelled, counts.turns) == (1, 1, 4)
    assert counts.characters == sum(len(row.text) - isinstance(row, ChatRow) for row in rows)
    assert len(counts.lengths) == 7
    assert all(len(w) <= 33 and w.supervised.any() for w in found)


def test_what_is_left_out_or_not_as_it_looks_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    splits = read_splits(str(write_rows(tmp_path / "data.jsonl", ["a", "b<eos>"])), tokenizer, 32)
    assert [text.split(";")[0] for text in warnings(splits, tmp_path)] == [
        "rows that spell control tokens such as <end_of_turn>, which stay plain text: 1"
    ]
    path = tmp_path / "long.jsonl"
    turns = [{"role": "user", "content": "fox " * 99}, {"role": "assistant", "content": "a"}]
    path.write_text("\n".join(map(json.dumps, [{"messages": turns}, {"text": "a"}])))
    assert warnings(read_splits(str(path), tokenizer, 32), tmp_path) == [
        "rows left out because their supervised part lies beyond sequence_length: 1"
    ]


def test_rows_of_which_nothing_fits_are_no_training_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "fox " * 99, "completion": "a"}))
    with pytest.raises(GemmaTuiError, match="holds no text to train on that fits into 32 tokens"):
        read_splits(str(path), tokenizer, 32)


# ------------------------------------------------------------------------------------------------ packing

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


@given(LENGTHS, st.integers(0, 3))
def test_packing_keeps_every_window_whole_and_every_row_short(lengths: list[int], seed: int) -> None:
    given = numbered(lengths)
    packed = pack(given, 39, seed)
    assert max(map(len, packed)) <= 40
    parts = [
        (row.ids[row.segments == n], row.supervised[row.segments == n]) for row in packed for n in set(row.segments)
    ]
    assert Counter(ids.tobytes() for ids, _ in parts) == Counter(w.ids.tobytes() for w in given)
    assert all(not supervised[0] and supervised[1:].all() for _, supervised in parts)
    assert all((np.diff(row.segments) >= 0).all() for row in packed)


@given(LENGTHS)
def test_at_most_one_packed_row_is_less_than_half_full(lengths: list[int]) -> None:
    assert sum(2 * len(row) <= 40 for row in pack(numbered(lengths), 39, 0)) <= 1


def test_windows_go_where_the_least_room_is_left() -> None:
    packed = pack(numbered([30, 25, 15, 10]), 39, 0)
    assert sorted(sorted(np.bincount(row.segments).tolist()) for row in packed) == [[10, 30], [15, 25]]


def test_packing_follows_its_seed_alone() -> None:
    def order(seed: int) -> list[bytes]:
        return [row.ids.tobytes() for row in pack(numbered([9] * 40), 31, seed)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_a_packed_batch_numbers_its_documents_and_never_asks_for_the_first_token_of_one() -> None:
    (row,) = pack([window(BOS, 7, 8, EOS), window(BOS, 9, EOS)], 10, 0)
    batch = make_batch([row])
    assert batch.tokens[0, :7].tolist() == [BOS, 7, 8, EOS, BOS, 9, PAD]
    assert batch.labels[0, :7].tolist() == [7, 8, EOS, IGNORED, 9, EOS, IGNORED]
    assert batch.segments is not None
    assert batch.segments[0, :7].tolist() == [0, 0, 0, 0, 1, 1, NO_DOCUMENT]


def test_packing_leaves_the_supervised_tokens_of_an_epoch_alone() -> None:
    packed = pack(SEQUENCES, 64, 0)
    apart, together = (sum(b.supervised for b in evaluation_batches(s, 1, 0)) for s in (SEQUENCES, packed))
    assert apart == together
    assert len(packed) < len(SEQUENCES) / 2
