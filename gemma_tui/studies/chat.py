"""A prompt as a turn of the user, by the model's own chat template where it has one."""

from __future__ import annotations

from pathlib import Path

from gemma_tui.errors import GemmaTuiError
from gemma_tui.studies.turns import asked
from gemma_tui.templates import TemplateError, read_template, render_apart
from gemma_tui.tokenizer import Tokenizer

PLACE = "\ue000prompt\ue000"
"""Text of no language, which stands for a prompt where the words of a template are told from those of the prompt."""


def ask(tokenizer: Tokenizer, folder: Path, text: str) -> list[int]:
    """A prompt in turns, open for the model's answer, with one ``<bos>``; what the prompt spells stays text.

    Args:
        folder: of the model; without a template in it the turns are Gemma's.

    Raises:
        GemmaTuiError: the template cannot be used.
    """
    try:
        template = read_template(folder)
        if template is None:
            return asked(text, tokenizer)
        conversations = [[{"role": "user", "content": words}] for words in (text, PLACE)]
        written, frame = render_apart(template, conversations, begun=True)
    except TemplateError as error:
        raise GemmaTuiError(
            f"the chat template of {folder.name} cannot be used ({error}): leave --chat out and write the turns"
        ) from None
    if not tokenizer.spelled(text):
        return tokenizer.encode(written)
    before, _, after = frame.partition(PLACE)
    for words in (text, text.strip()):
        if written == before + words + after:
            return tokenizer.encode(before) + tokenizer.encode_foreign(words) + tokenizer.encode(after, bos=False)
    raise GemmaTuiError(
        f"the chat template of {folder.name} rewrites the prompt, which spells a control token: take that out"
    )
