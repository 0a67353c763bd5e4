from __future__ import annotations

import re
import shlex
from itertools import combinations
from pathlib import Path

import pytest
from textual.command import CommandPalette
from textual.widget import Widget
from textual.widgets import Footer
from textual.widgets._footer import FooterKey
from textual.widgets._toast import ToastRack

from gemma_tui.cli import _parser
from gemma_tui.widgets.dialogs import Reading
from gemma_tui.widgets.plan_form import PlanForm

from .conftest import Open, Opened, Size

MODES = {"1": "models", "2": "training", "3": "capacity", "4": "attention", "5": "generation"}
PANES = ("p", "w", "l")


async def test_the_keys_1_to_5_reach_the_five_screens(opened: Open, size: Size) -> None:
    async with opened(size) as it:
        for key in ("5", "4", "3", "2", "1"):
            await it.mode(key, MODES[key])
            assert it.sees(*(f"{k} {name.capitalize()}" for k, name in MODES.items()))


async def test_the_status_line_names_engine_device_dtype_model_memory_and_what_runs(
    opened: Open, tiny: str, corpus: Path, size_and_engine: tuple[Size, str]
) -> None:
    size, engine_name = size_and_engine
    async with opened(size, engine=engine_name) as it:
        await it.until(lambda: "no model" in it.rows()[1], "the status")
        it.app.load(tiny)
        await it.loaded(tiny)
        await it.until(lambda: tiny in it.rows()[1], "the status")
        device = it.app.session.place.device
        assert device is not None
        for word in (engine_name, device.device, "float32", f"{tiny} "):
            assert word in it.rows()[1]
        assert re.search(r"\d [MG]B ", it.rows()[1])
        run = await it.started(tiny, corpus, steps=100_000)
        await it.until(lambda: run in it.rows()[1] and "/100,000" in it.rows()[1], "the run in the status")


async def test_help_lists_every_binding(opened: Open) -> None:
    async with opened() as it:
        for key, mode in MODES.items():
            await it.mode(key, mode)
            active = it.app.screen.active_bindings.values()
            wanted = {(b.key_display or it.app.get_key_display(b)) for _, b, on, _ in active if on and b.description}
            await it.press("question_mark")
            assert isinstance(it.app.screen, Reading)
            listed = {line.split("  ")[0].strip() for line in it.app.screen.text.strip("\n").split("\n")}
            listed |= {line.strip().split("  ")[0] for line in it.app.screen.text.split("\n")}
            assert wanted <= listed
            assert {"1", "2", "3", "4", "5", "e", "c", "?", "^p", "q"} <= listed
            await it.press("escape")


async def test_the_palette_has_every_action_that_has_a_key(opened: Open) -> None:
    async with opened() as it:
        for key, mode in MODES.items():
            await it.mode(key, mode)
            names = [command.title for command in it.app.get_system_commands(it.app.screen)]
            for _, binding, enabled, _ in it.app.screen.active_bindings.values():
                if enabled and binding.id and binding.id != "app.palette":
                    assert binding.description in names
            assert len(set(names)) == len(names)


async def test_the_palette_does_what_the_key_does(opened: Open) -> None:
    async with opened() as it:
        await it.mode("2", "training")
        await it.press("ctrl+p")
        await it.until(lambda: isinstance(it.app.screen, CommandPalette), "the palette")
        await it.press(*"runs")
        await it.until(lambda: it.sees("Runs"), "the command")
        await it.press("down", "enter")
        await it.until(lambda: not isinstance(it.app.screen, CommandPalette), "the palette's end")
        await it.until(lambda: it.sees("run state engine step method age"), "the list of runs")


async def test_every_palette_command_of_a_screen_finds_its_action(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened() as it:
        await it.mode("2", "training")
        done: list[str] = []
        for name in ("start", "pause", "stop", "next_pane", "log_axis"):
            monkeypatch.setattr(type(it.app.screen), f"action_{name}", lambda self, name=name: done.append(name))
        commands = {c.title: c.callback for c in it.app.get_system_commands(it.app.screen)}
        for title in ("Start", "Pause", "Stop", "View", "Log"):
            await commands[title]()  # type: ignore[misc]
        assert done == ["start", "pause", "stop", "next_pane", "log_axis"]


async def test_c_shows_a_command_that_the_command_line_takes(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened(model=tiny) as it:
        await it.loaded(tiny)
        await it.table()
        await it.plan(tiny, corpus, steps=7, method="full", name="a-name", fresh=True, learning_rate=3e-4)
        await it.mode("5", "generation")
        it.app.screen.query_one(PlanForm).set("prompt", '-it\'s "so" $HOME')
        for key, mode in MODES.items():
            await it.mode(key, mode)
            await it.press("c")
            shown = it.app.screen
            assert isinstance(shown, Reading)
            assert it.app.clipboard == shown.text
            token_by_token, _, last = shown.text.partition("\ngemma-tui ")
            first, *words = shlex.split(f"gemma-tui {last}" if last else token_by_token)
            assert first == "gemma-tui"
            if mode == "training":
                args = _parser(words).parse_args(words)
                assert (args.model, args.data, args.name, args.engine) == (tiny, str(corpus), "a-name", "torch")
                assert (int(args.steps), args.fresh, float(args.learning_rate)) == (7, True, 3e-4)
            elif mode == "generation":
                args = _parser(words).parse_args(words)
                assert (args.model, args.prompt) == (tiny, '-it\'s "so" $HOME')
            elif words:
                _parser(words).parse_args(words)
            await it.press("escape")


def _leaves(it: Opened) -> list[Widget]:
    """What is seen of the screen, messages that lie over it aside."""
    screen = it.app.screen
    seen = [w for w in screen.walk_children(Widget) if w.is_on_screen and w.region.area and not w.children]
    return [w for w in seen if not any(isinstance(a, ToastRack) for a in w.ancestors_with_self)]


def _layout_faults(it: Opened) -> list[str]:
    whole, leaves = it.app.screen.size.region, _leaves(it)
    outside = [f"{w!r} at {w.region} leaves {whole}" for w in leaves if not whole.contains_region(w.region)]
    pairs = [(a, b) for a, b in combinations(leaves, 2) if a.region.overlaps(b.region)]
    return outside + [f"{a!r} {a.region} overlaps {b!r} {b.region}" for a, b in pairs]


def _footer_faults(it: Opened) -> list[str]:
    footer = it.app.screen.query_one(Footer)
    shown = {b.description for _, b, on, _ in it.app.screen.active_bindings.values() if b.show and on}
    keys = list(footer.query(FooterKey))
    faults = [f"{key.description} is cut" for key in keys if key.region.right > it.app.size.width or key.size.width < 1]
    line = it.rows()[footer.region.y]
    return faults + [f"{d} is missing in {line!r}" for d in shown if d and d not in line]


async def test_nothing_overlaps_or_is_cut_and_all_keys_fit(opened: Open, tiny: str, size: Size) -> None:
    async with opened(size, model=tiny) as it:
        await it.loaded(tiny)
        await it.table()
        await it.until(lambda: it.sees("full training"), "the facts of the model")
        for key, mode in MODES.items():
            await it.mode(key, mode)
            for pane in PANES if mode == "training" else ("",):
                if pane:
                    await it.press(pane)
                # The footer is made anew when the focus moves.
                await it.until(lambda: not _footer_faults(it), f"a whole footer in {mode} {pane}")
                assert not _layout_faults(it)


async def test_resizing_while_a_run_goes_on(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened((120, 40)) as it:
        run = await it.started(tiny, corpus, steps=100_000)
        for size in ((80, 24), (10, 4), (150, 20), (200, 60), (1, 1), (30, 8), (80, 24)):
            await it.pilot.resize_terminal(*size)
        step = it.app.session.jobs[0].detail
        await it.until(lambda: it.app.session.jobs[0].detail != step, "the next step")
        await it.until(lambda: it.app.screen.size == (80, 24), "the last size")
        await it.until(lambda: it.sees(f"{run} running"), "the headline")


@pytest.mark.parametrize("small", [(30, 8), (1, 1)], ids=str)
async def test_a_very_small_terminal_does_not_crash(opened: Open, tiny: str, small: Size) -> None:
    async with opened(small, model=tiny) as it:
        await it.loaded(tiny)
        for key, mode in MODES.items():
            await it.mode(key, mode)
            for opener in ("question_mark", "c"):
                await it.press(opener)
                await it.press("escape")
            it.rows()
        await it.press("p")
        await it.press("escape")
        await it.mode("2", "training")
        for pane in PANES:
            await it.press(pane)
            it.rows()
