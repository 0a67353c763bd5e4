"""A model's own chat template, which is code of a stranger."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import GEMMA3_TEMPLATE

from gemma_tui import templates
from gemma_tui.templates import PROBES, TemplateError, read_template, render, render_apart, template_difference

HOSTILE = {
    "python's insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "a list that is changed": "{{ messages.append(1) }}",
    "an endless loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "gigabytes": "{{ 'x' | center(3000000000) }}",
    "much text": "{{ 'x' * 2000000 }}",
    "a wide number": "{{ '%999999999d' % 1 }}",
    "broken": "{% if %}",
    "refusing": "{{ raise_exception('no\n\x1b[2J') }}",
    "including": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_is_told_of_in_one_line_and_ends(tmp_path: Path, kind: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(HOSTILE[kind])
    began = time.monotonic()
    said = template_difference(tmp_path)
    assert "cannot be used" in said
    assert not {"\n", "\x1b"} & set(said)
    assert time.monotonic() - began < templates.WALL_SECONDS


def test_only_the_sandbox_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    from jinja2 import sandbox

    def opened(*given: Any, **more: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sandbox, "ImmutableSandboxedEnvironment", opened)
    with pytest.raises(ZeroDivisionError):
        render("{{ 1 }}", [])


def test_the_turns_that_are_expected_are_those_of_transformers_and_gemma() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs, _ = render_jinja_template([m for m, _ in PROBES], chat_template=GEMMA3_TEMPLATE, bos_token="<bos>")
    assert theirs == [expected for _, expected in PROBES] == render_apart(GEMMA3_TEMPLATE, [m for m, _ in PROBES])


def in_config(template: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))

    return write


def in_file(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(GEMMA3_TEMPLATE)


PLACES = {
    "a file": in_file,
    "the config": in_config(GEMMA3_TEMPLATE),
    "a list": in_config([{"name": "other", "template": "x"}, {"name": "default", "template": GEMMA3_TEMPLATE}]),
}


@pytest.mark.parametrize("place", PLACES)
def test_gemmas_own_template_is_no_difference(tmp_path: Path, place: str) -> None:
    PLACES[place](tmp_path)
    assert read_template(tmp_path) == GEMMA3_TEMPLATE
    assert template_difference(tmp_path) == ""


@pytest.mark.parametrize("config", ["{}", "[]", '{"chat_template": null}', '{"chat_template": [1, {"name": []}]}'])
def test_a_model_without_a_template_is_no_difference(tmp_path: Path, config: str) -> None:
    assert template_difference(tmp_path) == ""
    (tmp_path / "tokenizer_config.json").write_text(config)
    assert template_difference(tmp_path) == ""


def test_another_template_is_told_with_the_place_where_it_differs(tmp_path: Path) -> None:
    other = GEMMA3_TEMPLATE.replace("'<end_of_turn>\n'", "'<end_of_turn>\n\n'")
    assert other != GEMMA3_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text(other)
    said = template_difference(tmp_path)
    assert "(sha256 " in said
    assert "writes Gemma's turns" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("chat_template.jinja", b"\xff", "not UTF-8"),
        ("chat_template.jinja", b" " * (templates.MAX_TEMPLATE_BYTES + 1), "over 1 MiB"),
        ("tokenizer_config.json", b"{", "no JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "no JSON"),
        ("tokenizer_config.json", b'{"chat_template": 1}', "no text"),
        ("tokenizer_config.json", b'{"chat_template": "' + b" " * (1 << 20) + b' "}', "over 1 MiB"),
    ],
)
def test_a_broken_file_is_told(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TemplateError, match=reason):
        read_template(tmp_path)
    assert reason in template_difference(tmp_path)
