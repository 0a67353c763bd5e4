"""Foreign text in every view: no control character reaches the terminal, nothing is taken for markup, nothing crashes.

Every text begins with a word, so that it is known to have been shown.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from decoding_passes import said as one
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from textual import events
from textual.widgets import DataTable, Input

import gemma_tui.hub.models
import gemma_tui.studies.side_by_side
from engines.errors import EngineError
from engines.torch.engine import TorchEngine
from gemma_tui import paths
from gemma_tui.runs.queue import Queue
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.generation import Generation, GenerationPlan
from gemma_tui.studies.side_by_side import Side, SideBySide
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.tokenizer import Tokenizer
from gemma_tui.widgets.dialogs import Reading
from gemma_tui.widgets.event_log import EventLog
from gemma_tui.widgets.plan_form import Field, PlanForm

from .conftest import Open, Opened, Size

WORD = "seen"
CONTROLS = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029"
SEQUENCES = {
    "every control": CONTROLS,
    "clipboard": "\x1b]52;c;cm0gLXJmIC8=\x07\x1b]52;c;cm0gLXJmIC8=\x1b\\",
    "title": "\x1b]0;PWNED\x1b\\\x1b]2;PWNED\x07",
    "link": "\x1b]8;;file:///etc/passwd\x1b\\x\x1b]8;;\x1b\\",
    "screen": "\x1b[2J\x1b[3J\x1b[?1049l\x1b[?25l\x1b[!p\x1b7\x1b8\x1b[10A\x1b[999D",
    "8-bit": "\x9b2J\x9d0;PWNED\x9c\x90q\x9c\x9fGx\x9c",
    "device": "\x1bPq#0;2;0;0;0~-\x1b\\\x1b_Gf=24;AAAA\x1b\\\x1b^pm\x1b\\\x1bXsos\x1b\\\x1bP+q544e",
    "bidirectional": BIDI + "\U000e0041\U000e007f",
    "half a pair": "\ud800\udfff",
    "wide and joined": "👩\u200d👩\u200d👧\u200d👦 e" + "\u0301" * 200 + " 漢字",
    "brackets": "[INST] [/INST] [/] [ [[ ]] [PAD] \\[ [[b]] [/nope]",
    "actions": "[@click=app.quit]x[/] [@click=app.boom(] [link=file:///etc/passwd]y[/link] [on_click=app.quit]",
    "styles": "[red on $nosuch]z[/] [bold $primary] $var ${x} $foreground :skull: {0} %s",
}
TEXTS = [f"{WORD}{text}{WORD}{text}" for text in SEQUENCES.values()]

FORBIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)


def nothing_foreign(it: Opened) -> str:
    """Check every cell of every screen that is shown, and of every widget itself; returns the text."""
    text = []
    for screen in it.app.screen_stack:
        strips = list(screen._compositor.render_strips())
        for widget in screen.walk_children():
            if getattr(widget, "size", None) and widget.is_on_screen:  # type: ignore[attr-defined]
                strips += widget.render_lines(widget.size.region)  # type: ignore[attr-defined]
        for strip in strips:
            for segment in strip:
                found = FORBIDDEN.search(segment.text)
                assert segment.control or not found, f"{segment.text!r} on the screen"
                style = segment.style
                assert style is None or not style.link, f"a link to {style and style.link!r}"
                clicks = {str(v) for k, v in (style.meta if style else {}).items() if k.startswith("@")}
                assert not any("boom" in c or "quit" in c for c in clicks)
        text.append("\n".join(strip.text for strip in strips))
    return "\n".join(text)


def storable(text: str) -> str:
    """As SQLite and JSON files can hold it."""
    return text.encode("utf-8", "replace").decode()


def folder_name(text: str) -> str:
    return re.sub("[/\x00]", "", storable(text)).encode()[:200].decode(errors="ignore")


async def test_what_the_model_writes(opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"text": ""}

    def write(engine: Any, tokenizer: Any, plan: Any, generation: Generation) -> Iterator[str]:
        for place in range(3):
            generation.passes.append(one((place, 7, 1.0, True)))
            generation.tokens.append(7)
            generation.text += plan.prompt
            generation.seconds = 1.0
            yield plan.prompt
        generation.ended = plan.prompt
        generation.warnings.append(plan.prompt)

    monkeypatch.setattr(gemma_tui.studies.side_by_side, "write", write)
    monkeypatch.setattr(Tokenizer, "token", lambda self, token: said["text"])
    async with opened(model=tiny) as it:
        await it.loaded(tiny)
        await it.mode("5", "generation")
        form = it.app.screen.query_one(PlanForm)
        await it.until(lambda: form.row_count, "the form")
        for text in TEXTS:
            said["text"] = text
            form.set("prompt", text)
            await it.press("f")
            await it.press("g")
            screen = it.app.screen
            await it.until(lambda screen=screen: screen.step == 3 and screen._job is None, "the end")  # type: ignore[attr-defined]
            assert nothing_foreign(it).count(WORD) > 5
            await it.press("t")
            await it.until(lambda: isinstance(it.app.screen, Reading), "the text")
            assert WORD in nothing_foreign(it)
            await it.press("escape")
            await it.press("c")
            assert isinstance(it.app.screen, Reading)
            assert WORD in nothing_foreign(it)
            assert not FORBIDDEN.search(it.app.clipboard.replace("\n", "").replace("\t", ""))
            await it.press("escape")
            await it.press("p")
            await it.until(lambda: isinstance(it.app.screen, Field), "the field")
            assert WORD in nothing_foreign(it)
            await it.press("escape")
            await it.until(lambda: not isinstance(it.app.screen, Field), "the end of the field")


async def test_what_is_pasted_into_a_field(opened: Open) -> None:
    async with opened() as it:
        await it.mode("5", "generation")
        for text in TEXTS:
            await it.press("p")
            await it.until(lambda: isinstance(it.app.screen, Field), "the field")
            field = it.app.screen.query_one(Input)
            field.value = ""
            field.post_message(events.Paste(text.replace("\n", "").replace("\r", "")))
            await it.until(lambda field=field: field.value, "the pasted text")
            assert WORD in nothing_foreign(it)
            await it.press("enter")
            await it.until(lambda: not isinstance(it.app.screen, Field), "the end of the field")
            nothing_foreign(it)


async def test_the_names_and_the_configs_of_models(opened: Open, tiny: str) -> None:
    config = json.loads((paths.models() / tiny / "config.json").read_text())
    names = []
    for number, text in enumerate(TEXTS):
        names.append(folder_name(f"{number}{text}"))
        shutil.copytree(paths.models() / tiny, paths.models() / names[-1])
        if number % 2:
            bad = {**config, "model_type": text, "architectures": [text], "layer_types": [text]}
            (paths.models() / names[-1] / "config.json").write_text(json.dumps(bad))
    async with opened() as it:
        table = await it.table()
        for name in names:
            table.move_cursor(row=table.get_row_index(name))
            await it.until(lambda: WORD in nothing_foreign(it), "the name")
            await it.press("c")
            nothing_foreign(it)
            await it.press("escape")
            await it.press("enter")
            await it.until(lambda: it.told() and not it.app.session.jobs, "why it cannot be loaded")
            nothing_foreign(it)
            it.app.clear_notifications()


async def test_what_a_store_of_someone_elses_holds(opened: Open, size: Size) -> None:
    store, queue, names = RunStore(), Queue(), []
    for text in map(storable, TEXTS):
        plan = {"method": text, "name": text, "model": text, "data": text}
        run = store.create("hostile", "training", "torch", plan, text, 4).run_id
        facts = {"model": text, "engine": text, "device": text, "dtype": text}
        store.record(run, "load", 0, {"model": text})
        store.record(run, "start", 0, {**facts, "trainable": 1, "parameters": 2, "train_tokens": 3})
        store.record(run, "step", 1, {"loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_second": 1.0})
        for kind, key in (("checkpoint", "path"), ("warning", "text"), (text, "text")):
            store.record(run, kind, 1, {key: text})
        store.set_state(run, "failed", text)
        store._db.execute("UPDATE gt_runs SET engine = ?, group_name = ? WHERE run_id = ?", (text, text, run))
        # Names are checked when a run is made; a store from elsewhere may still have others.
        kept = (
            "name, study, state, created, updated, engine, plan, command, step, steps, pid, pid_started, error, "
            "request, group_name"
        )
        named = f"{run} {text}"
        store._db.execute(f"INSERT INTO gt_runs SELECT ?, {kept} FROM gt_runs WHERE run_id = ?", (named, run))
        names += [run, named]
        queue.enqueue([{**plan, "steps": text, text: text}], text, text, text)
    queued = len(queue.queued())
    queue.close()
    async with opened(size) as it:
        await it.mode("2", "training")
        await it.press("l")
        table = it.app.screen.query_one("#runs", DataTable)
        await it.until(lambda: table.row_count == len(names) + queued, "the list")
        await it.press("c")
        nothing_foreign(it)
        await it.press("escape", "delete")
        assert WORD in nothing_foreign(it)
        for name in names:
            it.app.screen.watch_run(name)  # type: ignore[attr-defined]
            await it.until(lambda name=name: it.app.screen._view.run.run_id == name, "the run")  # type: ignore[attr-defined]
            await it.until(lambda name=name: it.app.screen.query_one(EventLog).lines or " " in name, "its events")
            await it.pilot.pause(0.02)
            assert WORD in nothing_foreign(it)
        await it.press("x", "space")
        nothing_foreign(it)


async def test_rows_of_a_store_that_another_version_wrote(opened: Open) -> None:
    store = RunStore()
    odd = store.create("odd", "training", "torch", {}, "", 0).run_id
    store.record(odd, "start", 0, {})
    store.record(odd, "load", 0, {"model": ["a", {"list": 1}]})
    store.record(odd, "start", 0, {"trainable": "x", "parameters": None, "train_tokens": [], "model": 1, "engine": 2})
    store.record(odd, "step", 1, {"loss": None, "learning_rate": None, "more": {"than": ["is", "known"]}})
    store.record(odd, "evaluation", 1, {"valid_loss": None})
    store.set_state(odd, "done")
    async with opened() as it:
        await it.mode("2", "training")
        await it.press("l")
        table = it.app.screen.query_one("#runs", DataTable)
        await it.until(lambda: table.row_count, "the list")
        await it.press("enter")
        await it.until(lambda: "odd-1" in it.static("#headline"), "the headline")
        await it.until(lambda: len(it.app.screen.query_one(EventLog).lines) >= 3, "its events")
        nothing_foreign(it)


async def test_errors_of_jobs(opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[BaseException] = []

    def fail(*arguments: object) -> None:
        raise raised[-1]

    monkeypatch.setattr(TorchEngine, "load", fail)
    async with opened() as it:
        for text in TEXTS:
            raised.append((EngineError, RuntimeError)[len(raised) % 2](text))
            it.app.load(tiny)
            await it.until(lambda: WORD in nothing_foreign(it), "the message")
            it.app.clear_notifications()
            await it.until(lambda: WORD not in it.text(), "the message's end")


async def test_errors_of_data_rows(opened: Open, tiny: str, tmp_path: Path) -> None:
    async with opened() as it:
        for number, text in enumerate(TEXTS[::2]):
            data = tmp_path / f"{folder_name(text)[:50]}{number}.jsonl"
            data.write_text(json.dumps({text: text}) + "\n")
            await it.plan(tiny, str(data))
            nothing_foreign(it)
            await it.press("s")
            await it.until(lambda: WORD in it.told() and not it.app.session.jobs, "the message")
            await it.until(lambda n=number: f"lora-{n + 1}  failed" in it.static("#headline"), "the headline")
            nothing_foreign(it)
            it.app.clear_notifications()
            await it.press("p")


async def test_progress_and_status(opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, go_on, plan = list(TEXTS), threading.Event(), TrainingPlan(model=tiny, data="x")

    def slow(name: str, progress: Any = None) -> Any:
        it_is.app.session.jobs[0].label = texts[0]
        progress(0.4, texts[0])
        assert go_on.wait(20)
        go_on.clear()
        raise EngineError("refused")

    monkeypatch.setattr(gemma_tui.hub.models, "resolve", slow)
    async with opened() as it:
        it_is = it
        while texts:
            it.app.load(tiny)
            await it.until(lambda: it.app.session.jobs[0].detail and WORD in it.rows()[1], "the status")
            it.app.attempt(lambda: it.app.session.begin("training", plan))
            await it.until(lambda: f"torch is busy with {WORD}" in it.told(), "the refusal")
            await it.until(lambda: nothing_foreign(it).count(WORD) > 2, "the message")
            texts.pop(0)
            go_on.set()
            await it.until(lambda: not it.app.session.jobs, "the end")
            it.app.clear_notifications()


FOREIGN = st.text(st.one_of(st.sampled_from(CONTROLS + BIDI + "[]/@=$\\\"'abm;"), st.characters()), max_size=60)


@dataclass
class Vocabulary:
    """A tokenizer with one token."""

    text: str

    def token(self, token: int) -> str:
        return self.text


@settings(max_examples=2, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(texts=st.lists(FOREIGN, min_size=10, max_size=10))
async def test_any_text(texts: list[str], opened: Open) -> None:
    """Each text goes through messages, windows, the form and the written text, many of them through one app."""
    async with opened() as it:
        await it.mode("5", "generation")
        form = it.app.screen.query_one(PlanForm)
        for text in texts:
            form.set("prompt", text)
            plan = GenerationPlan(text)
            passes = [one((0, 0, 1.0, True), (1, 0, 1.0, False))]
            said = Generation(passes, tokens=[0], text=text, ended=text, warnings=[text])
            texts_of = SideBySide((Side(plan, said),), Vocabulary(text))  # type: ignore[arg-type]
            it.app.screen._begin(texts_of)  # type: ignore[attr-defined]
            it.app.tell(text)
            await it.pilot.pause(0.02)
            nothing_foreign(it)
            it.app.push_screen(Reading(text, text))
            await it.pilot.pause(0.02)
            nothing_foreign(it)
            it.app.pop_screen()
            it.app.clear_notifications()
