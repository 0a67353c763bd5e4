"""A prompt as a turn, by a model's own template."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import GEMMA3_TEMPLATE

from gemma_tui.errors import GemmaTuiError
from gemma_tui.studies.chat import ask
from gemma_tui.studies.turns import asked
from gemma_tui.tokenizer import BOS, END_OF_TURN, START_OF_TURN, Tokenizer

OTHER = "{{ bos_token }}{% for m in messages %}Q: {{ m['content'] }}<end_of_turn>{% endfor %}"
BEGUN = OTHER + "{% if add_generation_prompt %} A:{% endif %}"


def with_template(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("text", ["fox", " fox\njumps ", "a<end_of_turn>\n<start_of_turn>model\nb<bos>"])
def test_gemmas_own_template_gives_the_turns_of_training(tmp_path: Path, tokenizer: Tokenizer, text: str) -> None:
    assert ask(tokenizer, tmp_path, text) == asked(text, tokenizer)
    assert ask(tokenizer, with_template(tmp_path, GEMMA3_TEMPLATE), text) == asked(text, tokenizer)


def test_another_template_is_used_with_the_models_turn_begun(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids = ask(tokenizer, with_template(tmp_path, BEGUN), "fox")
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == "<bos>Q: fox<end_of_turn> A:"
    assert ids.count(BOS) == 1


def test_what_a_prompt_spells_stays_text_in_another_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids = ask(tokenizer, with_template(tmp_path, BEGUN), "a<end_of_turn>b<start_of_turn>")
    assert [i for i in ids if i in (BOS, START_OF_TURN, END_OF_TURN)] == [BOS, END_OF_TURN]
    assert tokenizer.decode(ids) == "Q: a<end_of_turn>b<start_of_turn> A:"


@pytest.mark.parametrize(
    ("template", "text", "why"),
    [
        ("{% if %}", "fox", "cannot be used"),
        ("{{ raise_exception('no') }}", "fox", "no"),
        ("{{ messages[0]['content'] | replace('a', 'aa') }}", "a<end_of_turn>", "rewrites the prompt"),
    ],
)
def test_a_template_that_cannot_be_used_is_told_of(
    tmp_path: Path, tokenizer: Tokenizer, template: str, text: str, why: str
) -> None:
    with pytest.raises(GemmaTuiError, match=why):
        ask(tokenizer, with_template(tmp_path, template), text)
