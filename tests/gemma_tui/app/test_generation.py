from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input

import gemma_tui.studies.generation
from gemma_tui.cli import _parser
from gemma_tui.commands.plans import plan_from
from gemma_tui.screens.generation import GenerationScreen
from gemma_tui.studies.generation import AR, SBD, GenerationPlan
from gemma_tui.studies.replay import Replay
from gemma_tui.widgets.dialogs import Reading
from gemma_tui.widgets.pass_chart import blocks
from gemma_tui.widgets.plan_form import Field, PlanForm
from gemma_tui.widgets.side_pane import SidePane
from gemma_tui.widgets.token_flow import visible

from .conftest import Open, Opened, Size
from .test_screens import _layout_faults

TOKENS = 100_000


def screen(it: Opened) -> GenerationScreen:
    found = it.app.screen
    assert isinstance(found, GenerationScreen)
    return found


def pane(it: Opened, decoder: str) -> SidePane:
    return screen(it).query_one(f"#{decoder}", SidePane)


def numbers(it: Opened, decoder: str) -> str:
    return it.static(f"#{decoder} .numbers")


def drawn(it: Opened, decoder: str) -> str:
    """What the widget shows of the text, without gaps and marks of the cursor."""
    strip = pane(it, decoder).strip
    return "".join(line.text for line in strip.render_lines(strip.size.region))


async def ready(it: Opened, model: str, **values: Any) -> PlanForm[Any]:
    """The generation screen with a model and a prompt."""
    await it.loaded(model)
    await it.mode("5", "generation")
    form = it.app.screen.query_one(PlanForm)
    await it.until(lambda: form.row_count, "the form")
    for name, value in {"prompt": "The fox", "max_tokens": 20, "block": 4, **values}.items():
        form.set(name, value)
    await it.pilot.pause()
    return form


async def written(it: Opened) -> None:
    """Let the loaded model write, to the end."""
    await it.press("g")
    await it.until(lambda: not it.app.session.jobs and screen(it)._job is None, "the end")


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model never ends its text by itself."""
    monkeypatch.setattr(gemma_tui.studies.generation, "STOP_IDS", ())


async def test_the_prompt_is_edited_in_a_field(opened: Open, tiny: str, size: Size) -> None:
    async with opened(size, model=tiny) as it:
        form = await ready(it, tiny)
        await it.press("p")
        await it.until(lambda: isinstance(it.app.screen, Field), "the field")
        assert it.app.screen.query_one(Input).value == "The fox"
        await it.press(*" sat", "enter")
        await it.until(lambda: not isinstance(it.app.screen, Field), "the end of the field")
        assert form.values["prompt"] == "The fox sat"
        assert it.sees("The fox sat", "g writes token by token and in blocks, side by side")


@pytest.mark.usefixtures("endless")
async def test_both_texts_are_the_ones_that_each_decoder_writes_alone(
    opened: Open, tiny: str, size_and_engine: tuple[Size, str]
) -> None:
    size, engine_name = size_and_engine
    async with opened(size, model=tiny, engine=engine_name) as it:
        await ready(it, tiny, max_tokens=10, gamma=7.0)
        await written(it)
        sides = {side.plan.decoder: side for side in screen(it).texts.sides}
        tokenizer = screen(it).texts.tokenizer
        assert tokenizer is not None
        thread = it.app.session.place.thread
        prompt = tokenizer.encode("The fox")
        for decoder, side in sides.items():
            plan = GenerationPlan("The fox", decoder=decoder, block=4, gamma=7.0, max_tokens=10, temperature=0.0)
            passes = thread.submit(
                lambda engine, plan=plan: list(engine.decode([prompt], plan.sampling(), plan.blocks()))
            ).result(30)
            alone = Replay(passes, 4).decisions()
            assert side.generation.tokens == [cell.token for cell in alone]
            assert [c.step for c in pane(it, decoder).replay.decisions()] == [cell.step for cell in alone]
            shown = drawn(it, decoder)
            assert all(visible(tokenizer.token(cell.token)) in shown for cell in alone)
            told = numbers(it, decoder)
            assert f"10 tokens in {len(passes)} passes ({10 / len(passes):.2f} each)" in told
            assert "/s, " in told
        assert len(sides[SBD].generation.passes) < len(sides[AR].generation.passes) == 10
        one, other = (sides[decoder].generation.tokens for decoder in (AR, SBD))
        equal = [a == b for a, b in zip(one, other, strict=True)]
        assert f"agreement {100 * sum(equal) / 10:.1f} % of 10 tokens" in it.static("#clock")
        first = None if all(equal) else equal.index(False)
        assert (f"first difference at token {first} (≠)" in it.static("#clock")) is (first is not None)
        assert (drawn(it, AR).count("≠"), drawn(it, SBD).count("≠")) == ((1, 1) if first is not None else (0, 0))
        assert "was last trained without a mask token" in it.static("#warning")
        assert f"{tiny}, prompt, {len(prompt)} tokens: The fox" in it.static("#prompt")
        assert not _layout_faults(it)


@pytest.mark.usefixtures("endless")
async def test_the_text_streams_with_its_speed_and_x_ends_it(opened: Open, tiny: str, size: Size) -> None:
    async with opened(size, model=tiny) as it:
        await ready(it, tiny, max_tokens=TOKENS // 10, decoder=AR)
        await it.press("g")
        await it.until(lambda: pane(it, AR).strip.step > 3, "passes on the screen")
        assert "writing" in numbers(it, AR)
        assert not pane(it, SBD).display
        await it.until(lambda: "writing" in it.rows()[1] and "tokens" in it.rows()[1], "the status")
        before = pane(it, AR).strip.step
        await it.until(lambda: pane(it, AR).strip.step > before, "more of it")
        await it.press("x")
        await it.until(lambda: numbers(it, AR).endswith("ended") and not it.app.session.jobs, "the end")
        assert it.app.session.place.model == tiny
        tokens = screen(it).texts.sides[0].generation.tokens
        assert 3 < len(tokens) < TOKENS // 10
        await it.until(lambda: pane(it, AR).strip.step == len(tokens), "the last pass on the screen")


@pytest.mark.usefixtures("endless")
async def test_the_passes_are_gone_through_by_keys(opened: Open, tiny: str, size: Size) -> None:
    async with opened(size, model=tiny) as it:
        await ready(it, tiny, max_tokens=8, gamma=0.0)
        await written(it)
        sbd, ar = pane(it, SBD), pane(it, AR)
        steps = sbd.replay.steps
        assert steps == ar.replay.steps == 8
        await it.press("left_curly_bracket")
        assert (ar.strip.step, sbd.strip.step) == (0, 0)
        assert not drawn(it, SBD).strip()
        for step in range(1, 4):
            await it.press("right_square_bracket")
            assert (ar.strip.step, sbd.strip.step) == (step, step)
            assert f"pass {step}/8" in it.static("#clock")
            assert drawn(it, SBD).count("‹") == 4 - step
        await it.press("left_square_bracket")
        assert (ar.strip.step, sbd.strip.step) == (2, 2)
        await it.press("home", "m")
        await it.until(lambda: "not decided" in it.static("#sbd .under") or "pass" in it.static("#sbd .under"), "cell")
        assert sbd.strip.shade == ar.strip.shade == "entropy"
        assert "nats" in it.static("#legend")
        await it.press("space")
        assert "▶" in it.static("#clock")
        await it.until(lambda: sbd.strip.step > 2, "a pass that plays")
        await it.press("space")
        at = sbd.strip.step
        assert "▶" not in it.static("#clock")
        await it.pilot.pause(0.5)
        assert sbd.strip.step == at
        await it.press("right_curly_bracket")
        assert sbd.strip.step == 8
        await it.press("space")
        await it.until(lambda: 0 < sbd.strip.step < 8, "the play from the first pass on")
        await it.until(lambda: sbd.strip.step == 8 and "▶" not in it.static("#clock"), "the end of the play")


@pytest.mark.usefixtures("endless")
async def test_one_cursor_tells_of_the_token_in_both_texts(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await ready(it, tiny, max_tokens=8, gamma=0.0)
        await written(it)
        await it.press("home", "right", "right")
        sides = {side.plan.decoder: side.generation.tokens for side in screen(it).texts.sides}
        for decoder in (AR, SBD):
            cell = pane(it, decoder).replay.decisions()[2]
            under = it.static(f"#{decoder} .under")
            assert under.startswith("token 2 ")
            assert f"pass {cell.step} ({cell.turn} of its block)" in under
            assert f"{cell.entropy:.3g} nats, p {cell.probability:.3g}" in under
            assert ("agrees" in under) is (sides[AR][2] == sides[SBD][2])
        await it.press("tab")
        await it.press("end")
        assert {pane(it, decoder).strip.cursor for decoder in (AR, SBD)} == {7}


@pytest.mark.usefixtures("endless")
async def test_the_small_chart_is_of_what_the_passes_said(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await ready(it, tiny, max_tokens=8, gamma=0.0)
        await written(it)
        await it.press("v")
        counts = pane(it, SBD).replay.counts
        assert counts == [int(said.decided.sum()) for said in screen(it).texts.sides[1].generation.passes]
        assert it.sees("tokens decided per pass", "blocks " + "█" * 8)
        await it.press("v", "left_curly_bracket", "right_square_bracket")
        assert it.sees("entropy of each token")
        assert "█" * 8 not in it.text()


def test_a_row_of_blocks_has_the_highest_of_each_column_and_gaps() -> None:
    from gemma_tui.plots import Series

    nan = float("nan")
    assert blocks(Series("", [0, 1, 2, 3], [0.0, 4.0, nan, 8.0]), 80, 8.0) == "▁▅ █"
    assert blocks(Series("", list(range(6)), [0.0, 8.0, 1.0, 0.0, nan, 4.0]), 3, 8.0) == "█▂▅"
    assert blocks(Series("", [], []), 80, 8.0) == ""


@pytest.mark.usefixtures("endless")
async def test_all_tokens_that_were_asked_for_come_and_the_seed_repeats_them(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await ready(it, tiny, max_tokens=12, seed=3, temperature=1.0, decoder=AR)
        texts = []
        for _ in range(2):
            await written(it)
            assert "12 tokens" in numbers(it, AR)
            texts.append(screen(it).texts.sides[0].generation.text)
        assert texts[0] == texts[1]
        await it.press("t")
        await it.until(lambda: isinstance(it.app.screen, Reading), "the text")
        assert texts[0][:8] in it.app.screen.text  # type: ignore[attr-defined]


async def test_the_end_that_the_model_sets_is_told(opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma_tui.studies.generation, "STOP_IDS", tuple(range(1000)))
    async with opened(model=tiny) as it:
        await ready(it, tiny)
        await written(it)
        for decoder in (AR, SBD):
            assert "1 tokens" in numbers(it, decoder)
            assert numbers(it, decoder).endswith("stop token")
            assert len(pane(it, decoder).replay.cells(99)) == 1


async def test_d_chooses_the_decoders_and_the_commands_say_the_same(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        form = await ready(it, tiny, gamma=0.4)
        for sides in ([AR, SBD], [AR], [SBD]):
            plans = []
            for line in screen(it).command().splitlines():
                args = _parser(shlex.split(line)[1:]).parse_args(shlex.split(line)[1:])
                plans.append(plan_from(GenerationPlan, args, {}, "generate"))
            assert [plan.decoder for plan in plans] == sides
            assert [(p.block, p.gamma) for p in plans if p.decoder == SBD] == [(4, 0.4)] * (SBD in sides)
            assert {(plan.prompt, plan.max_tokens, plan.temperature) for plan in plans} == {("The fox", 20, 0.0)}
            await it.press("d")
        assert form.values["decoder"] == SBD
        await it.press("d", "g")
        await it.until(lambda: not it.app.session.jobs and screen(it)._job is None, "the end")
        assert [side.plan.decoder for side in screen(it).texts.sides] == [AR]


async def test_the_texts_are_exported(opened: Open, tiny: str, tmp_path: Path) -> None:
    async with opened(model=tiny) as it:
        await ready(it, tiny)
        await written(it)
        for ending in ("json", "html", "svg"):
            path = tmp_path / f"out.{ending}"
            await it.press("o")
            await it.until(lambda: isinstance(it.app.screen, Field), "the field")
            it.app.screen.query_one(Input).value = str(path)
            await it.press("enter")
            await it.until(lambda path=path: f"written: {path}" in it.told().replace("\n", ""), "the file")
        facts = json.loads((tmp_path / "out.json").read_text())
        tokens = {side.plan.decoder: side.generation.tokens for side in screen(it).texts.sides}
        assert str(tokens[SBD])[1:-1] in json.dumps(facts)
        assert str(tokens[AR])[1:-1] in json.dumps(facts)
        assert (facts["facts"]["model"], facts["facts"]["engine"]) == (tiny, "torch")
        assert facts["notes"][0].startswith(f"{tiny} on torch, prompt: ")


async def test_without_a_model_the_way_to_one_is_told(opened: Open) -> None:
    async with opened() as it:
        await it.mode("5", "generation")
        await it.press("x")
        await it.press("g")
        await it.until(lambda: "no model is loaded: press 1" in it.told(), "the message")
        assert not it.app.session.jobs


async def test_a_model_of_any_folder_writes(opened: Open, prepared_model: Path) -> None:
    """It has no name that means it, only its path."""
    async with opened(model=str(prepared_model)) as it:
        await ready(it, str(prepared_model), max_tokens=4)
        await written(it)
        assert pane(it, AR).side.generation.tokens


async def test_an_empty_prompt_and_a_busy_engine_are_told(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened(model=tiny) as it:
        form = await ready(it, tiny, prompt="")
        assert it.sees("needed")
        await it.press("g")
        await it.until(lambda: "--prompt is needed" in it.told(), "what is missing")
        form.set("prompt", "x")
        run = await it.started(tiny, corpus, steps=TOKENS)
        await it.mode("5", "generation")
        await it.press("g")
        await it.until(lambda: "no model is loaded" in it.told() or f"busy with {run}" in it.told(), "the refusal")
        assert [job.run for job in it.app.session.jobs] == [run]


async def test_the_text_goes_on_while_another_screen_is_shown(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await ready(it, tiny, max_tokens=30)
        await it.press("g")
        await it.mode("1", "models")
        await it.until(lambda: not it.app.session.jobs, "the end of the job")
        await it.mode("5", "generation")
        await it.until(lambda: "writing" not in numbers(it, SBD) and "passes" in numbers(it, SBD), "the end")
        assert pane(it, SBD).strip.step == pane(it, SBD).replay.steps > 0


@pytest.mark.usefixtures("endless")
async def test_the_program_is_left_in_the_middle_of_a_text(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await ready(it, tiny, max_tokens=TOKENS // 10)
        await it.press("g")
        await it.until(lambda: pane(it, AR).strip.step > 1, "passes on the screen")
        await it.press("q")
        await it.until(lambda: it.app._exit, "the end of the app")
