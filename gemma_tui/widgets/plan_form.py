"""A form made from a plan's fields: one row each, moved over with the arrows and changed with enter."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import DataTable, Input, Label

from gemma_tui.errors import UsageError
from gemma_tui.studies.plan import Option, build, honoured, options, parse
from gemma_tui.text import clean, one_line

P = TypeVar("P")


class PlanForm(DataTable[Text], Generic[P]):
    """The options of a plan as rows; enter edits, toggles or takes the next choice, backspace restores the default."""

    BINDINGS = [
        Binding("enter", "select_cursor", "Edit", id="form.change"),
        Binding("backspace,delete", "restore", "Default", id="form.default", show=False),
    ]

    class Changed(Message):
        """A value was changed."""

    class Explained(Message):
        """The cursor is on another row.

        Attributes:
            text: what that option does.
        """

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self, plan: type[P], hidden: tuple[str, ...] = (), **arguments: Any) -> None:
        super().__init__(cursor_type="row", show_header=False, cell_padding=1, **arguments)
        self.plan = plan
        self.options = {o.name: o for o in options(plan) if o.name not in hidden}
        self.values: dict[str, Any] = {name: o.default for name, o in self.options.items()}

    def on_mount(self) -> None:
        """Lay out the rows."""
        for key in ("name", "value"):
            self.add_column(key, key=key)
        self._fill()

    def build(self) -> P:
        """The plan that the form describes; rows that are hidden have their defaults.

        Raises:
            UsageError: a required value is missing.
        """
        return honoured(build(self.plan, {k: v for k, v in self.values.items() if v is not None}, "form"))

    def set(self, name: str, value: Any) -> None:
        """Change a value, as if it had been typed."""
        self.values[name] = value
        if self.columns and self._honoured() != [str(key.value) for key in self.rows]:
            self._fill()
        elif self.is_mounted and name in self.rows:
            self.update_cell(name, "value", self._value(self.options[name]), update_width=True)
        self.post_message(self.Changed())

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Tell what the row is for."""
        event.stop()
        self._explain(str(event.row_key.value))

    def on_focus(self) -> None:
        """Tell it again: another form may have told of its own."""
        if self.row_count:
            self._explain(str(self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value))

    def _explain(self, name: str) -> None:
        if (o := self.options.get(name)) is not None:
            self.post_message(self.Explained(f"{o.help} ({o.hint})" if o.hint else o.help))

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Change the row's value: at once where there are only a few, in a field otherwise."""
        event.stop()
        o = self.options[str(event.row_key.value)]
        value = self.values[o.name]
        if o.kind is bool:
            self.set(o.name, not value)
        elif o.choices:
            choices = (*((None,) if o.optional else ()), *o.choices)
            self.set(o.name, choices[(choices.index(value) + 1) % len(choices)])
        else:
            self.edit(o.name)

    def edit(self, name: str) -> None:
        """Open a field for one value."""
        o = self.options[name]

        def changed(text: str | None) -> None:
            if text is not None:
                self.set(name, parse(o, text, "form"))

        self.app.push_screen(Field(o, self.values[name]), changed)

    def action_restore(self) -> None:
        """Put the row's default back."""
        name = str(self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value)
        self.set(name, self.options[name].default)

    def _fill(self) -> None:
        row = self.cursor_row
        self.clear()
        for name in self._honoured():
            self.add_row(Text(name.replace("_", " "), "bold"), self._value(self.options[name]), key=name)
        self.move_cursor(row=min(row, self.row_count - 1))

    def _honoured(self) -> list[str]:
        """The options that make a difference beside the other values."""
        return [name for name, o in self.options.items() if o.honoured(self.values)]

    def _value(self, o: Option) -> Text:
        value = self.values[o.name]
        if value is None:
            return Text(f"({one_line(o.open_means, 30)})", "dim")
        if o.kind is bool:
            return Text("yes" if value else "no")
        shown = f"{value:g}" if isinstance(value, float) else one_line(str(value), 32)
        missing = o.required and not value
        return Text("needed" if missing else shown, "bold red" if missing else "")


class Line(Input):
    """An input that shows what is pasted without obeying it: Textual passes control characters on."""

    def validate_value(self, value: str) -> str:
        """Cleaned, and on one line; the length stays, and so does the cursor."""
        return clean(value).translate({ord("\t"): "␉", ord("\n"): "␊"})


class Field(ModalScreen[str | None]):
    """One value to type, with its help; it closes only with a valid value or none."""

    BINDINGS = [Binding("escape", "cancel", "Keep the old value", id="field.cancel")]
    DEFAULT_CSS = """
    Field { align: center middle; }
    Field > Vertical {
        width: 72; max-width: 96%; height: auto;
        border: round $accent; padding: 0 1; background: $surface;
    }
    Field Label { width: 1fr; }
    Field #problem { color: $error; }
    """

    def __init__(self, option: Option, value: Any) -> None:
        super().__init__()
        self.option = option
        self.value = "" if value is None else str(value)

    def compose(self) -> ComposeResult:
        """Name and help, the field, and what is wrong with it."""
        o = self.option
        with Vertical():
            yield Label(f"{o.name.replace('_', ' ')}: {o.help}", markup=False)
            if o.hint or o.optional:
                left_open = f"; empty: {o.open_means}" if o.optional else ""
                yield Label(f"{o.hint}{left_open}", markup=False)
            yield Line(self.value, compact=True, select_on_focus=False)
            yield Label("enter keeps it, escape leaves the old value", id="problem", markup=False)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Close with a value that can be used, or say why it cannot."""
        try:
            parse(self.option, event.value, "form")
        except UsageError as error:
            self.query_one("#problem", Label).update(one_line(str(error)))
            return
        self.dismiss(event.value)

    def action_cancel(self) -> None:
        """Close without a value."""
        self.dismiss(None)
