"""What one should know of a model beside its shape: commit, licence, tokenizer, chat template, files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from gemma_tui.hub.cards import read_card
from gemma_tui.hub.models import Model
from gemma_tui.hub.remote import CODE, COMMIT
from gemma_tui.templates import TemplateError, read_template, template_difference
from gemma_tui.text import one_line


@dataclass(frozen=True)
class Facts:
    """What is known of a model's folder.

    Attributes:
        commit: of the hub; empty for a model that is not from there.
        template: SHA-256 of the chat template, hexadecimal; empty if there is none.
        difference: how the template writes turns otherwise than Gemma's; empty if it does not.
        tokenizer: the kind of the tokenizer's file, and its size.
        left_alone: files that could run code, which are never opened.
    """

    commit: str
    licence: str
    tokenizer: str
    template: str
    difference: str
    left_alone: tuple[str, ...]
    card: str


def facts(model: Model) -> Facts:
    """Read them.

    Raises:
        GemmaTuiError: the card cannot be read.
    """
    licence, card = read_card(model.folder)
    try:
        template = read_template(model.folder)
    except TemplateError:
        template = None  # the difference says why
    return Facts(
        commit=commit_of(model),
        licence=licence,
        tokenizer=_tokenizer(model.folder),
        template=hashlib.sha256(template.encode()).hexdigest() if template else "",
        difference=template_difference(model.folder),
        left_alone=tuple(sorted(one_line(p.name, 80) for p in model.folder.iterdir() if p.name.endswith(CODE)))[:20],
        card=card,
    )


def about(known: Facts) -> list[tuple[str, str]]:
    """The facts by name, without the card."""
    left = ", ".join(known.left_alone)
    return [
        ("commit", known.commit or "none: not of the hub"),
        ("licence", known.licence or "not told"),
        ("tokenizer", known.tokenizer),
        ("chat template", known.template or ("none that can be used" if known.difference else "none")),
        *([("", known.difference or "writes turns as Gemma does")] if known.template or known.difference else []),
        *([("never opened", left)] if left else []),
    ]


def about_lines(known: Facts) -> list[str]:
    """Facts and card as lines for a person."""
    return [f"{name:<13}  {fact}" for name, fact in about(known)] + ["", known.card or "no model card"]


def commit_of(model: Model) -> str:
    """The commit of a model in the hub's cache; empty for others."""
    return model.folder.name if model.source == "hub cache" and COMMIT.fullmatch(model.folder.name) else ""


def _tokenizer(folder: Path) -> str:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return f"{name}, {(folder / name).stat().st_size:,} bytes"
    return "none"
