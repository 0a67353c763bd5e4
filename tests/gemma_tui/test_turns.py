"""What the loss counts of each kind of row; the oracle of the turns is transformers with Gemma-3's own template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import GEMMA3_TEMPLATE, TEXTS

from gemma_tui.rows import ChatRow, Message, PromptRow, Row, TextRow
from gemma_tui.studies.turns import Window, asked, render
from gemma_tui.tokenizer import BOS, END_OF_TURN, EOS, START_OF_TURN, Tokenizer, train_tokenizer

GEMMA = train_tokenizer([*TEXTS, "user\nmodel\n"] * 2, 450)
CONTROL = [GEMMA.token(i) for i in range(107)]
WORDS = st.one_of(st.text("abc de\n漢🙂", max_size=30), st.sampled_from(["", " ", "\n\n", " a ", "user\n", "model"]))
SPELT = st.lists(st.one_of(st.sampled_from(CONTROL), st.text("<>[]abeos_", max_size=5)), max_size=6).map("".join)


@st.composite
def conversations(draw: st.DrawFn, words: st.SearchStrategy[str] = WORDS) -> ChatRow:
    turns = [Message("user" if n % 2 == 0 else "assistant", draw(words)) for n in range(draw(st.integers(2, 5)))]
    return ChatRow((*([Message("system", draw(words))] if draw(st.booleans()) else []), *turns))


@pytest.fixture(scope="module")
def oracle() -> Callable[..., list[int]]:
    """Token ids of a conversation as transformers makes them; ``begun``, with the model's next turn begun."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=GEMMA.backend, bos_token="<bos>", eos_token="<eos>")

    def ids(row: ChatRow, begun: bool = False) -> list[int]:
        messages = [{"role": m.role, "content": m.content} for m in row.messages]
        found: Any = theirs.apply_chat_template(
            messages,
            chat_template=GEMMA3_TEMPLATE,
            return_dict=False,
            add_generation_prompt=begun,
        )
        return list(found)

    return ids


def supervised(window: Window) -> list[int]:
    return window.ids[window.supervised].tolist()


def plain(text: str) -> list[int]:
    return GEMMA.encode(text, bos=False)


def test_turns_are_those_of_gemmas_template_to_the_token(oracle: Callable[..., list[int]]) -> None:
    @given(conversations())
    def same(row: ChatRow) -> None:
        assert render(row, GEMMA).ids.tolist() == oracle(row)

    same()


def test_what_is_asked_is_gemmas_template_with_a_generation_prompt(oracle: Callable[..., list[int]]) -> None:
    @given(WORDS)
    def same(text: str) -> None:
        assert asked(text, GEMMA) == oracle(ChatRow((Message("user", text),)), begun=True)

    same()


@given(conversations())
def test_the_loss_counts_every_assistant_turn_with_its_end_and_nothing_else(row: ChatRow) -> None:
    answers = [m.content.strip() for m in row.messages if m.role == "assistant"]
    assert supervised(render(row, GEMMA)) == [i for answer in answers for i in [*plain(answer), END_OF_TURN]]


def test_what_is_supervised_stands_where_the_assistant_speaks() -> None:
    row = ChatRow(
        (Message("user", "fox"), Message("assistant", "dog"), Message("user", "dog"), Message("assistant", ""))
    )
    window = render(row, GEMMA)
    turns = " ".join(
        GEMMA.token(i).upper() if s else GEMMA.token(i)
        for i, s in zip(window.ids.tolist(), window.supervised.tolist(), strict=True)
    )
    dog, model = ([GEMMA.token(i) for i in plain(text)] for text in ("dog", "model\n"))
    assert (
        " ".join(["<start_of_turn>", *model, *dog, "<END_OF_TURN>"]).replace(" ".join(dog), " ".join(dog).upper())
        in turns
    )
    assert turns.count("<END_OF_TURN>") == 2
    assert turns.count("<end_of_turn>") == 2


@given(st.one_of(conversations(), st.builds(PromptRow, WORDS, WORDS), st.builds(TextRow, WORDS)), st.booleans())
def test_there_is_one_bos_and_it_is_not_supervised(row: Row, turns: bool) -> None:
    window = render(row, GEMMA, "turns" if turns else "plain")
    assert window.ids[0] == BOS
    assert not window.supervised[0]
    assert window.ids.tolist().count(BOS) == 1
    assert window.ids.shape == window.supervised.shape


@given(WORDS)
def test_all_of_a_text_and_its_eos_is_supervised(text: str) -> None:
    window = render(TextRow(text), GEMMA)
    assert window.ids.tolist() == [BOS, *plain(text), EOS]
    assert window.supervised.tolist() == [False] + [True] * (len(window) - 1)


@given(WORDS, WORDS)
def test_a_prompt_and_its_completion_are_two_turns(prompt: str, completion: str) -> None:
    ours = render(PromptRow(prompt, completion), GEMMA)
    turns = render(ChatRow((Message("user", prompt), Message("assistant", completion))), GEMMA)
    assert ours.ids.tolist() == turns.ids.tolist()
    assert ours.supervised.tolist() == turns.supervised.tolist()


@given(WORDS, WORDS)
def test_a_plain_completion_is_supervised_with_its_eos(prompt: str, completion: str) -> None:
    window = render(PromptRow(prompt, completion), GEMMA, "plain")
    assert window.ids.tolist() == [BOS, *plain(prompt), *plain(completion), EOS]
    assert supervised(window) == [*plain(completion), EOS]


# ------------------------------------------------------------------------------------------------ foreign text


@given(conversations(SPELT))
def test_text_that_spells_control_tokens_makes_none(row: ChatRow) -> None:
    ids = render(row, GEMMA).ids.tolist()
    turns = sum(m.role != "system" for m in row.messages)
    assert [i for i in ids if i <= END_OF_TURN] == [BOS, *[START_OF_TURN, END_OF_TURN] * turns]


@given(SPELT)
def test_what_is_asked_may_spell_control_tokens(text: str) -> None:
    ids = asked(text, GEMMA)
    assert [i for i in ids if i <= END_OF_TURN] == [BOS, START_OF_TURN, END_OF_TURN, START_OF_TURN]
    assert GEMMA.decode(ids) == f"user\n{text.strip()}\nmodel\n"


@given(st.one_of(SPELT, WORDS))
def test_text_that_spells_control_tokens_is_still_the_same_text(text: str) -> None:
    assert GEMMA.decode(GEMMA.encode_foreign(text)) == text
    assert GEMMA.spelled(text) == [i for i in range(len(text)) if any(text.startswith(c, i) for c in CONTROL)]


@pytest.mark.parametrize("text", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<unused7>", "[multimodal]"])
def test_the_oracle_would_take_a_spelt_control_token_for_one(text: str) -> None:
    """What the test before would find without care."""
    assert min(GEMMA.backend.encode(text, add_special_tokens=False).ids) <= END_OF_TURN
    assert min(GEMMA.encode_foreign(text)) > END_OF_TURN


def test_names_of_control_tokens_may_overlap() -> None:
    backend = train_tokenizer(TEXTS, 400).backend
    backend.add_special_tokens(["ab", "ba"])
    hostile = Tokenizer(backend)
    assert hostile.spelled("aba") == [0, 1]
    assert not {backend.token_to_id("ab"), backend.token_to_id("ba")} & set(hostile.encode_foreign("aba"))


def test_text_without_control_tokens_is_encoded_as_ever() -> None:
    for text in (*TEXTS, "<table>\n\n<b> [1] a < b"):
        assert GEMMA.encode_foreign(text) == plain(text)
