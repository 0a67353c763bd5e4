"""Text of models, files and other people, which no command lets through to a terminal as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from samples import write_rows

from engines.blocks import DecodingPass
from gemma_tui import paths
from gemma_tui.runs.queue import Queue
from gemma_tui.runs.store import RunStore
from gemma_tui.tokenizer import Tokenizer

ESCAPE = "\x1b[2J\x9b31m\x07"

pytestmark = pytest.mark.usefixtures("empty_hub_cache")


def hostile_model() -> list[str]:
    folder = paths.models() / f"evil{ESCAPE}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "' + "\\u001b[2J" + '"}')
    return ["models", "list"]


def hostile_run() -> list[str]:
    store = RunStore()
    run = store.create("evil", "training", f"torch{ESCAPE}", {"model": f"m{ESCAPE}"}, f"gemma-tui {ESCAPE}", 3)
    store.record(run.run_id, "warning", 1, {"text": f"careful{ESCAPE}"})
    store.record(run.run_id, "checkpoint", 1, {"path": f"/somewhere/{ESCAPE}"})
    store.set_state(run.run_id, "failed", f"because{ESCAPE}")
    store.close()
    return ["runs", "show", "evil"]


def hostile_list() -> list[str]:
    hostile_run()
    return ["runs", "list"]


def hostile_queue() -> list[str]:
    values = [f"model=m{ESCAPE}", f"data={ESCAPE}", f"group=g{ESCAPE}"]
    queue = Queue()
    queue.enqueue([dict(value.split("=") for value in values)], f"torch{ESCAPE}", f"/{ESCAPE}")
    queue.finish(1, "failed", f"because{ESCAPE}")
    queue.close()
    return ["queue", "list"]


def hostile_sweep() -> list[str]:
    return ["sweep", "--set", f"model=m{ESCAPE}", "--set", f"data={ESCAPE}", "--group", ESCAPE]


def hostile_rows() -> list[str]:
    path = write_rows(paths.home() / "rows.jsonl", ["fine"])
    path.write_text(path.read_text() + json.dumps({f"key{ESCAPE}": 1}) + "\n")
    return ["train", "--model", "tiny", "--data", str(path)]


def hostile_tokens() -> list[str]:
    return ["data", "tiny", "--data", str(write_rows(paths.home() / "rows.jsonl", [f"fine{ESCAPE}", "more"]))]


def hostile_template() -> list[str]:
    (paths.models() / "tiny" / "chat_template.jinja").write_text(f"{{{{ raise_exception('{ESCAPE}') }}}}")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = paths.home() / "turns.jsonl"
    path.write_text(json.dumps({"messages": turns}))
    return ["data", "tiny", "--data", str(path)]


def hostile_folder() -> list[str]:
    return ["models", "info", f"./none{ESCAPE}"]


def hostile_option() -> list[str]:
    return ["train", f"--{ESCAPE}"]


def hostile_debug() -> list[str]:
    return [*hostile_rows(), "--debug"]


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize(
    "hostile",
    [
        hostile_model,
        hostile_run,
        hostile_list,
        hostile_queue,
        hostile_sweep,
        hostile_rows,
        hostile_tokens,
        hostile_template,
        hostile_folder,
        hostile_option,
        hostile_debug,
    ],
    ids=lambda hostile: hostile.__name__,
)
def test_foreign_text_never_reaches_a_terminal_raw(
    spoken: Callable[..., tuple[int, str, str]], tiny: str, hostile: Callable[[], list[str]], as_json: list[str]
) -> None:
    _, text, errors = spoken(*hostile(), *as_json)
    assert "\x1b" not in text + errors
    assert "\x9b" not in text + errors
    assert "\x07" not in text + errors
    assert any(shown in text + errors for shown in ("␛", "\\u241b", "\\u001b", "\\x1b", "<0x1B>"))


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_what_a_model_writes_never_reaches_a_terminal_raw(
    spoken: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tiny: str,
    tokenizer: Tokenizer,
    as_json: list[str],
) -> None:
    class Hostile:
        name = "torch"

        def load(self, *given: object) -> None: ...

        def model(self) -> None: ...

        def decode(self, *given: object) -> Iterator[DecodingPass]:
            for place, token in enumerate(tokenizer.encode(f"fox{ESCAPE} dog", bos=False)):
                ids, numbers = (np.array([n], np.int32) for n in (token, place))
                yield DecodingPass(numbers * 0, numbers, ids, numbers * 0.0, numbers * 0.0, numbers >= 0, 1)

    monkeypatch.setattr("gemma_tui.commands.generate.open_engine", lambda name: Hostile())
    code, text, errors = spoken("generate", tiny, "--prompt", "a", *as_json)
    assert (code, errors) == (0, "")
    assert not {"\x1b", "\x9b", "\x07"} & set(text)
    if as_json:
        assert json.loads(text.splitlines()[-1])["text"] == f"fox{ESCAPE} dog"
    else:
        assert text == "fox␛[2J\ufffd31m␇ dog\n"
