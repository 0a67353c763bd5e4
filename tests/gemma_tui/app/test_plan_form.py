from __future__ import annotations

import shutil

from textual.widgets import Input, Label

from gemma_tui import paths
from gemma_tui.studies.schedules import SCHEDULES
from gemma_tui.studies.training_plan import ADAPTERS, METHODS, OPTIMIZERS, WHOLE, TrainingPlan
from gemma_tui.widgets.plan_form import Field, PlanForm

from .conftest import Open, Size
from .watching import on_row

LORA_ROWS = {"rank", "alpha", "dropout", "targets"}
WRONG = (
    ("steps", "many", "a whole number", "2_000", 2000),
    ("steps", "0", "1 to 10,000,000", "1", 1),
    ("steps", "1.5", "a whole number", "3", 3),
    ("learning_rate", "-1", "0 to 10", "3e-4", 3e-4),
    ("learning_rate", "nan", "a number", "", None),
    ("dropout", "1", "0 to 0.99", "0.5", 0.5),
)
"""An option, a wrong value and what is said of it, a right value and what it becomes."""


class TestForm:
    async def test_choices_go_round_and_what_is_open_can_be_opened_again(self, opened: Open, size: Size) -> None:
        async with opened(size) as it:
            form = await it.plan("nano", "x")
            for name, choices in (("schedule", (None, *SCHEDULES)), ("dtype", (None, "float32", "bfloat16"))):
                await on_row(it, form, name)
                first = choices.index(form.values[name])
                seen = [form.values[name]]
                for _ in choices[1:]:
                    await it.press("enter")
                    seen.append(form.values[name])
                assert seen == [choices[(first + i) % len(choices)] for i in range(len(choices))]
                await it.press("enter")
                assert form.values[name] == seen[0]

    async def test_a_yes_or_no_is_turned_by_enter(self, opened: Open) -> None:
        async with opened() as it:
            form = await it.plan("nano", "x")
            await on_row(it, form, "fresh")
            for value, word in ((True, "yes"), (False, "no")):
                await it.press("enter")
                assert form.values["fresh"] is value
                assert str(form.get_cell("fresh", "value")) == word

    async def test_a_wrong_value_stays_in_the_field_and_is_explained(self, opened: Open) -> None:
        async with opened() as it:
            form = await it.plan("nano", "x")
            for name, wrong, problem, right, value in WRONG:
                before = form.values[name]
                await on_row(it, form, name)
                await it.press("enter")
                field = it.app.screen
                assert isinstance(field, Field)
                typed = field.query_one(Input)
                typed.value = wrong
                await it.press("enter")
                assert it.app.screen is field
                assert typed.value == wrong
                assert problem in str(field.query_one("#problem", Label).content)
                assert form.values[name] == before
                typed.value = right
                await it.press("enter")
                await it.until(lambda field=field: it.app.screen is not field, "the end of the field")
                assert form.values[name] == value

    async def test_escape_keeps_the_old_value(self, opened: Open) -> None:
        async with opened() as it:
            form = await it.plan("nano", "x", steps=12)
            await on_row(it, form, "steps")
            await it.press("enter")
            await it.press("9", "escape")
            await it.until(lambda: not isinstance(it.app.screen, Field), "the end of the field")
            assert form.values["steps"] == 12

    async def test_backspace_puts_the_default_back(self, opened: Open) -> None:
        async with opened() as it:
            form = await it.plan("nano", "x", steps=12, rank=3, dtype="bfloat16")
            for name in ("steps", "rank", "dtype"):
                await on_row(it, form, name)
                await it.press("backspace")
                assert form.values[name] == form.options[name].default

    async def test_the_rows_of_a_method_come_and_go_with_it(self, opened: Open, size: Size) -> None:
        async with opened(size) as it:
            form = await it.plan("nano", "x")
            assert {str(k.value) for k in form.rows} >= LORA_ROWS
            await on_row(it, form, "method")
            for method in (*METHODS[1:], METHODS[0]):
                await it.press("enter")
                shown = {str(k.value) for k in form.rows}
                assert form.values["method"] == method
                assert (shown >= LORA_ROWS) is (method in ADAPTERS)
                assert ("save_dtype" in shown) is (method in WHOLE)
                assert form.get_row_index("method") == form.cursor_row

    async def test_the_rows_of_an_optimizer_come_and_go_with_it(self, opened: Open, size: Size) -> None:
        async with opened(size) as it:
            form = await it.plan("nano", "x")
            await on_row(it, form, "optimizer")
            for optimizer in (*OPTIMIZERS[1:], OPTIMIZERS[0]):
                await it.press("enter")
                shown = {str(k.value) for k in form.rows}
                assert form.values["optimizer"] == optimizer
                assert ("momentum" in shown) is (optimizer in ("sgd", "muon"))
                assert ("beta2" in shown) is (optimizer in ("adamw", "muon"))
                assert form.get_row_index("optimizer") == form.cursor_row

    async def test_every_option_is_explained_and_what_is_needed_is_said(self, opened: Open, size: Size) -> None:
        async with opened(size) as it:
            form = await it.plan("", "")
            for name in ("model", "data"):
                assert str(form.get_cell(name, "value")) == "needed"
            for name, option in form.options.items():
                if name in {str(k.value) for k in form.rows}:
                    await on_row(it, form, name)
                    await it.until(lambda text=option.help: text in it.static("#explained"), option.help)
            await it.press("s")
            await it.until(lambda: "--model is needed" in it.told(), "what is missing")
            assert not it.app.session.jobs


async def test_the_form_takes_the_model_that_is_loaded_unless_one_was_chosen(opened: Open, tiny: str) -> None:
    shutil.copytree(paths.models() / tiny, paths.models() / "tinier")
    async with opened() as it:
        await it.mode("2", "training")
        form = it.app.screen.query_one(PlanForm)
        for name in (tiny, "tinier"):
            it.app.load(name)
            await it.loaded(name)
            await it.mode("1", "models")
            await it.mode("2", "training")
            assert form.values["model"] == name
        form.set("model", "chosen")
        it.app.load(tiny)
        await it.loaded(tiny)
        await it.mode("1", "models")
        await it.mode("2", "training")
        assert form.values["model"] == "chosen"


def test_the_form_has_every_option_of_the_plan() -> None:
    form = PlanForm(TrainingPlan)
    assert list(form.values) == list(TrainingPlan.__dataclass_fields__)
