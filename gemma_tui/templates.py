"""A model's own chat template: rendered apart from this program, and compared with the turns it trains on.

A template is code of a stranger. It runs in jinja2's immutable sandbox, which keeps it from files and from Python's
insides, but not from endless loops and gigabytes; so it runs in a process of its own, with limits.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engines.foreign_json import read_json
from gemma_tui.text import one_line

MAX_TEMPLATE_BYTES = 1 << 20
MAX_CONFIG_BYTES, MAX_CONFIG_VALUES = 8 << 20, 1_000_000
MAX_OUTPUT_CHARACTERS = 1 << 20
CPU_SECONDS = 2
WALL_SECONDS = 20
MEMORY_BYTES = 512 << 20
Messages = Sequence[Mapping[str, str]]

PROBES: tuple[tuple[list[dict[str, str]], str], ...] = (
    (
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello "}],
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n",
    ),
    (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
            {"role": "assistant", "content": "e"},
        ],
        "<bos><start_of_turn>user\nBe brief.\n\na\nb<end_of_turn>\n<start_of_turn>model\nc<end_of_turn>\n"
        "<start_of_turn>user\nd<end_of_turn>\n<start_of_turn>model\ne<end_of_turn>\n",
    ),
)
"""Conversations, and what Gemma-3's template makes of them."""


class TemplateError(Exception):
    """A template that cannot be read, or does not render; the text says why."""


def template_difference(folder: Path) -> str:
    """One line if a model's own chat template writes turns otherwise than Gemma's, which training does; or ``""``."""
    try:
        template = read_template(folder)
        if template is None:
            return ""
        rendered = render_apart(template, [messages for messages, _ in PROBES])
    except TemplateError as error:
        return f"the chat template of {folder.name} cannot be used ({error}); training writes Gemma's turns"
    for given, (_, expected) in zip(rendered, PROBES, strict=True):
        if given != expected:
            mark = hashlib.sha256(template.encode()).hexdigest()[:12]
            place = next((i for i, (a, b) in enumerate(zip(given, expected, strict=False)) if a != b), len(expected))
            return (
                f"the chat template of {folder.name} (sha256 {mark}) writes {one_line(repr(given[place:]), 40)} where "
                f"Gemma's turns have {one_line(repr(expected[place:]), 40)}; training writes Gemma's turns"
            )
    return ""


def read_template(folder: Path) -> str | None:
    """The template of a model folder: ``chat_template.jinja``, or the one in ``tokenizer_config.json``; None if none.

    Raises:
        TemplateError: the file is broken or too large.
    """
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if path.is_file():
            return _bounded(path, MAX_TEMPLATE_BYTES).decode("utf-8")
        if not config.is_file():
            return None
        found = read_json(_bounded(config, MAX_CONFIG_BYTES), MAX_CONFIG_VALUES)
    except OSError as error:
        raise TemplateError(f"unreadable: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise TemplateError("not UTF-8, no JSON, or too much of it") from None
    template = found.get("chat_template") if isinstance(found, dict) else None
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict) and _is_text(t.get("name"))}
        template = named.get("default")
    if template is not None and not _is_text(template):
        raise TemplateError("no text")
    if template is not None and len(template) > MAX_TEMPLATE_BYTES:
        raise TemplateError(f"over {MAX_TEMPLATE_BYTES >> 20} MiB")
    return template


def render_apart(template: str, conversations: Sequence[Messages], begun: bool = False) -> list[str]:
    """What a template makes of conversations, in a process with limits of time, memory and output.

    Args:
        begun: with the model's turn begun after them.

    Raises:
        TemplateError: it is broken, refuses a conversation, or wants too much.
    """
    work = json.dumps({"template": template, "conversations": [list(c) for c in conversations], "begun": begun})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gemma_tui.templates"],
            input=work, capture_output=True, encoding="utf-8", errors="replace", timeout=WALL_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TemplateError("it takes too long") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise TemplateError("it takes too much time or memory") from None
    if "error" in answer:
        raise TemplateError(one_line(str(answer["error"]), 100))
    return [str(text) for text in answer["rendered"]]


def render(template: str, messages: Messages, begun: bool = False) -> str:
    """A conversation by a template, in the sandbox; the variables are those transformers gives.

    Args:
        begun: with the model's turn begun after it.

    Raises:
        jinja2.TemplateError: the template is broken or refuses the conversation.
    """
    from jinja2 import TemplateError as Refused
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise Refused(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template).render(
        messages=messages, bos_token="<bos>", eos_token="<eos>", add_generation_prompt=begun, tools=None
    )


def _worker() -> None:
    """Render what comes on stdin, under limits that only this process has."""
    with suppress(ImportError, ValueError, OSError):  # macOS knows the memory limit but does not take it
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    work: dict[str, Any] = json.loads(sys.stdin.read())
    try:
        rendered = [render(work["template"], messages, work["begun"]) for messages in work["conversations"]]
        if sum(map(len, rendered)) > MAX_OUTPUT_CHARACTERS:
            raise ValueError("it writes too much")
        answer: dict[str, Any] = {"rendered": rendered}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except Exception as error:  # a template may fail in every way Python can
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    print(json.dumps(answer))


def _bounded(path: Path, limit: int) -> bytes:
    if path.stat().st_size > limit:
        raise TemplateError(f"{path.name} is over {limit >> 20} MiB")
    return path.read_bytes()


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


if __name__ == "__main__":
    _worker()
