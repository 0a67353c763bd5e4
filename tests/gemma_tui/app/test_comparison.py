from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from textual.widgets import DataTable, Static

from gemma_tui.cli import _parser
from gemma_tui.plots import MARKERS
from gemma_tui.runs.comparison import ROWS_PER_READ
from gemma_tui.runs.store import RunStore
from gemma_tui.screens.comparison import HIDDEN, WATCH_SECONDS, ComparisonScreen
from gemma_tui.widgets.chart import Chart
from gemma_tui.widgets.dialogs import Reading

from .conftest import Open, Opened, Size
from .test_hostile import TEXTS, WORD, nothing_foreign, storable
from .test_screens import _footer_faults, _layout_faults
from .watching import listed

Made = Callable[..., str]


@pytest.fixture
def made(store: RunStore) -> Made:
    """``made("a", rank=4)``: a run of twenty steps that has ended."""

    def make(name: str, steps: int = 20, **plan: Any) -> str:
        facts = {"method": "lora", "rank": 4, **plan}
        run = store.create(name, "training", "torch", facts, f"gemma-tui train --name {name}", steps).run_id
        for step in range(1, steps + 1):
            loss = 2 + facts["rank"] / step
            store.record(run, "step", step, {"loss": loss, "tokens": 100 * step, "seconds": step / 4, "grad_norm": 1.5})
        store.record(run, "evaluation", steps, {"valid_loss": 2.5})
        store.set_state(run, "done")
        return run

    return make


def screen(it: Opened) -> ComparisonScreen:
    assert isinstance(it.app.screen, ComparisonScreen)
    return it.app.screen


def chart(it: Opened) -> Chart:
    return screen(it).query_one(Chart)


def labels(it: Opened) -> list[str]:
    return [line.label for line in chart(it).series]


def cell(it: Opened, run: str, column: str) -> str:
    return str(screen(it).query_one("#results", DataTable).get_cell(run, column))


async def marked(it: Opened, *names: str) -> None:
    """Go to the runs and mark some."""
    await it.mode("2", "training")
    await it.press("l")
    table = it.app.screen.query_one("#runs", DataTable)
    await it.until(lambda: {str(k.value) for k in table.rows} >= set(names), "the runs")
    for name in names:
        table.move_cursor(row=table.get_row_index(name))
        await it.press("m")
        await it.until(lambda name=name: f"● {name}" in it.text(), f"{name} marked")


async def overlaid(it: Opened, *names: str) -> None:
    """Compare some runs."""
    await marked(it, *names)
    await it.press("o")
    await it.until(lambda: isinstance(it.app.screen, ComparisonScreen) and it.app.screen.is_current, "the comparison")
    await it.until(lambda: all(cell(it, name, "state") for name in names), "the results")


async def test_runs_are_marked_and_laid_over_each_other(opened: Open, made: Made, size: Size) -> None:
    a, b, c = made("a"), made("b", rank=8), made("c")
    async with opened(size) as it:
        await overlaid(it, a, b)
        assert c not in it.text()
        assert it.sees("loss, nats per token, mean over 20", "x b-1", "differs a-1 b-1", "rank 4 8", "done")
        assert labels(it) == [a, b]
        assert cell(it, a, "valid_loss") == "2.5000"
        assert cell(it, a, "effective_rank") == "—"
        assert it.sees("valid train tokens/s peak memory optimizer rank")
        body = "\n".join(it.rows()[3 : chart(it).region.bottom])
        assert any("\u2801" <= sign <= "\u28ff" for sign in body)
        assert MARKERS[1] in body
        assert not _layout_faults(it)
        await it.until(lambda: not _footer_faults(it), f"a whole footer, not {_footer_faults(it)}")


async def test_the_list_has_a_whole_footer_with_both_keys(opened: Open, made: Made, size: Size) -> None:
    async with opened(size) as it:
        await marked(it, made("a"))
        await it.until(lambda: not _footer_faults(it), f"a whole footer, not {_footer_faults(it)}")
        await it.press("m")
        await it.until(lambda: "●" not in it.text(), "the mark gone")


async def test_one_run_is_not_compared(opened: Open, made: Made) -> None:
    async with opened() as it:
        await marked(it, made("a"))
        await it.press("o")
        await it.until(lambda: "mark two runs or more" in it.told(), "the advice")
        assert not isinstance(it.app.screen, ComparisonScreen)


async def test_every_key_does_what_it_says(opened: Open, made: Made) -> None:
    a, b = made("a"), made("b", rank=8)
    async with opened() as it:
        await overlaid(it, a, b)
        for measure, title in (
            ("valid_loss", "validation loss"),
            ("grad_norm", "gradient norm"),
            ("loss", "loss, nats"),
        ):
            await it.press("m")
            await it.until(lambda title=title: it.rows()[2].strip().startswith(title), measure)
        for axis in ("tokens seen", "seconds of computing", "rank", "step"):
            await it.press("x")
            await it.until(lambda axis=axis: chart(it).x_label == axis and it.sees(axis), axis)
        await it.press("y")
        await it.until(lambda: it.sees("(log)"), "the axis")
        before = cell(it, a, "loss")
        await it.press("plus")
        await it.until(lambda: it.sees("mean over 50"), "more")
        assert cell(it, a, "loss") != before
        for _ in range(12):
            await it.press("minus")
        await it.until(lambda: not it.sees("mean over"), "none")
        assert cell(it, a, "loss") == f"{2 + 4 / 20:.4f}"
        await it.press("down", "space")
        await it.until(lambda: labels(it) == [a], "one run hidden")
        assert cell(it, b, "sign") == HIDDEN
        await it.press("space", "up", "space")
        await it.until(lambda: labels(it) == [b], "the other hidden")
        assert chart(it).series[0].look == 1, "hiding the first leaves the second its look"
        await it.press("escape")
        await it.until(lambda: not isinstance(it.app.screen, ComparisonScreen), "the way back")
        assert it.sees("● a-1", "● b-1")


async def test_the_ends_of_the_runs_are_drawn_against_what_differs(opened: Open, made: Made, size: Size) -> None:
    runs = [made(str(rank), rank=rank) for rank in (8, 2, 4)]
    async with opened(size) as it:
        await overlaid(it, *runs)
        await it.press("m", "x", "x", "x")
        await it.until(lambda: labels(it) == ["rank"], "the axis")
        (line,) = chart(it).series
        assert (list(line.x), list(line.y)) == ([2, 4, 8], [2.5, 2.5, 2.5])
        await it.press("m", "m", "minus", "minus", "minus", "minus")
        ends = [2 + rank / 20 for rank in (2, 4, 8)]
        await it.until(lambda: list(chart(it).series[0].y) == pytest.approx(ends), "the losses")
        assert not _layout_faults(it)
        await it.press("c")
        words = shlex.split(it.app.clipboard)
        assert _parser(words[1:]).parse_args(words[1:]).x == "rank"


async def test_what_else_differs_makes_lines_that_are_named(opened: Open, made: Made, size: Size) -> None:
    runs = [made(f"r{every}-{window}", global_every=every, window=window) for every in (0, 1) for window in (16, 64)]
    async with opened(size) as it:
        await overlaid(it, *runs)
        assert not chart(it).named
        for axis, names in (
            ("global every", ["window 16", "window 64"]),
            ("window", ["global_every 0", "global_every 1"]),
        ):
            await it.until(lambda axis=axis: (chart(it).x_label == axis) or it.app.screen.action_axis(), axis)
            assert sorted(labels(it)) == names
            await it.until(lambda names=names: it.sees(*names), "the names of the lines")
            assert not _layout_faults(it)
        await it.press("x")
        assert not chart(it).named


async def test_o_compares_the_group_under_the_cursor_where_nothing_is_marked(
    opened: Open, store: RunStore, made: Made
) -> None:
    def grouped(name: str, group: str) -> str:
        run = store.create(name, "training", "torch", {"method": name}, "gemma-tui train", 1, group).run_id
        store.set_state(run, "done")
        return run

    four = [grouped(name, "four") for name in ("full", "lora", "rank1")]
    alone, other = grouped("alone", "one"), made("other")
    async with opened() as it:
        await it.mode("2", "training")
        table = await listed(it, *four, alone, other)
        for run in (alone, other):
            table.move_cursor(row=table.get_row_index(run))
            await it.press("o")
        await it.until(lambda: it.told().count("mark two runs or more") == 2, "the advice")
        table.move_cursor(row=table.get_row_index(four[1]))
        await it.press("o")
        await it.until(lambda: isinstance(it.app.screen, ComparisonScreen), "the comparison")
        assert [compared.run.run_id for compared in screen(it).comparison.runs] == four
        await it.press("escape")
        await it.until(lambda: not isinstance(it.app.screen, ComparisonScreen), "the way back")
        assert "●" not in it.text()


async def test_help_and_command_know_the_screen(opened: Open, made: Made) -> None:
    a, b = made("a"), made("b")
    async with opened() as it:
        await overlaid(it, a, b)
        assert it.sees("the plans do not differ")
        await it.press("x", "m", "y", "question_mark")
        assert isinstance(it.app.screen, Reading)
        for words in (
            "Draw the next measure",
            "Against step, tokens, seconds",
            "Mean over fewer",
            "Leave the run out",
        ):
            assert words in it.app.screen.text
        await it.press("escape", "c")
        words = shlex.split(it.app.clipboard)
        args = _parser(words[1:]).parse_args(words[1:])
        assert (args.run_names, args.x, args.measure, args.smooth, args.log) == (
            [a, b],
            "tokens",
            "valid_loss",
            20,
            True,
        )


async def test_a_run_that_goes_on_grows_and_is_drawn_once_per_look(opened: Open, made: Made, store: RunStore) -> None:
    a, b = made("a"), made("b")
    store.set_state(b, "running")
    async with opened() as it:
        await overlaid(it, a, b)
        assert cell(it, b, "state") == "running"
        drawn: list[int] = []
        render = chart(it).render

        def counted() -> Any:
            drawn.append(1)
            return render()

        chart(it).render = counted  # type: ignore[method-assign]
        reads: list[int] = []
        real = RunStore.metrics

        def read(self: RunStore, *arguments: Any) -> Any:
            rows = real(self, *arguments)
            reads.append(len(rows))
            return rows

        screen(it)._store.metrics = read.__get__(screen(it)._store)  # type: ignore[union-attr, method-assign]
        for step in range(21, 24):
            store.record(b, "step", step, {"loss": 1.0, "tokens": 100 * step, "seconds": 1.0, "grad_norm": 1.0})
        await it.until(lambda: len(chart(it).series[1].x) == 23, "the new points")
        assert sum(reads) == 3, "only what is new is read"
        await it.until(lambda: cell(it, b, "tokens") == "2.3K", "the table")
        count = len(drawn)
        await it.pilot.pause(3 * WATCH_SECONDS)
        assert len(drawn) <= count + 1, "nothing new is not drawn"
        store.set_state(b, "done")
        await it.until(lambda: cell(it, b, "state") == "done", "the end")


async def test_a_long_run_is_caught_up_with_over_several_reads(opened: Open, store: RunStore, made: Made) -> None:
    a, b = made("a"), made("b")
    store._db.execute("BEGIN")
    for step in range(21, 2 * ROWS_PER_READ):
        store._db.execute(
            "INSERT INTO metrics (run_id, timestamp, run_name, step, metrics) VALUES (?, ?, ?, ?, ?)",
            (b, "2026-01-01T00:00:00+00:00", b, step, f'{{"loss": {2 + math.sin(step)}}}'),
        )
    store._db.execute("COMMIT")
    async with opened() as it:
        await overlaid(it, a, b)
        assert len(chart(it).series[1].x) <= ROWS_PER_READ
        await it.until(lambda: len(chart(it).series[1].x) == 2 * ROWS_PER_READ - 1, "all of it")


async def test_a_store_that_breaks_is_told_once(opened: Open, made: Made, store: RunStore) -> None:
    async with opened() as it:
        await overlaid(it, made("a"), made("b"))
        store._db.execute("DROP TABLE gt_events")
        await it.until(lambda: "gemma-tui.db" in it.told(), "the reason")
        await it.press("m", "x", "space", "escape")
        await it.until(lambda: not isinstance(it.app.screen, ComparisonScreen), "the way back")


@pytest.mark.parametrize("small", [(30, 8), (1, 1), (80, 10)], ids=str)
async def test_no_size_is_too_small(opened: Open, made: Made, small: Size) -> None:
    a, b = made("a"), made("b", rank=9)
    async with opened() as it:
        await overlaid(it, a, b)
        await it.pilot.resize_terminal(*small)
        await it.press("m", "x", "y", "plus", "space", "tab", "down")
        it.rows()


async def test_runs_that_recorded_nothing_are_shown_as_well(opened: Open, store: RunStore) -> None:
    names = [store.create(n, "training", "torch", {"method": "full"}, "gemma-tui train", 3).run_id for n in "ab"]
    async with opened() as it:
        await overlaid(it, *names)
        assert it.sees("nothing yet")
        await it.press("m", "x", "y", "minus")
        assert it.sees("nothing yet")
        assert screen(it).query_one("#same", Static).is_on_screen


async def test_foreign_text_in_plans_and_measures_is_harmless(opened: Open, store: RunStore) -> None:
    runs = []
    for name, text in zip("abc", map(storable, (TEXTS[0], TEXTS[1], "[/nope]")), strict=True):
        runs.append(store.create(name, "training", text, {text: text, "data": text}, text, 3).run_id)
        for measure in map(storable, TEXTS):
            store.record(runs[-1], "step", 1, {measure: 2.0})
            store.record(runs[-1], "step", 2, {measure: 1.0})
    async with opened((120, 40)) as it:
        await overlaid(it, *runs)
        for _ in TEXTS:
            await it.press("m")
            assert WORD in nothing_foreign(it)
        await it.press("c")
        nothing_foreign(it)
