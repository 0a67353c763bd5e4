"""Models: what is here, whether it fits, and loading it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text
from textual import work
from textual.binding import Binding
from textual.containers import Container
from textual.widget import Widget
from textual.widgets import DataTable, Static

from engines.errors import EngineError
from gemma_tui.output import bytes_text, count_text
from gemma_tui.screens.workbench import AFTER_FIRST_FRAME, Workbench
from gemma_tui.text import one_line

if TYPE_CHECKING:
    from engines.gemma3 import Gemma3Config
    from gemma_tui.hub.models import Summary

COLUMNS = ("model", "params", "dtype", "size", "state", "where")


class ModelTable(DataTable[Text]):
    """The models; enter loads one."""

    BINDINGS = [
        Binding("enter", "select_cursor", "Load", id="models.load"),
        Binding("t", "screen.tree", "Tree", id="models.tree", tooltip="The architecture of a model"),
        Binding("w", "screen.weights", "Weights", id="models.weights", tooltip="Each matrix of a model in numbers"),
        Binding("b", "screen.bench", "Bench", id="models.bench", tooltip="How fast a model is on this machine"),
    ]


class ModelsScreen(Workbench):
    """The models of this machine; enter loads one."""

    MODE = "models"

    BINDINGS = [
        Binding("r", "look", "Look again", id="models.look"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[str, tuple[Summary, str]] = {}

    def body(self) -> Iterable[Widget]:
        """The table, and what is known of the model under the cursor."""
        table = ModelTable(cursor_type="row")
        yield Container(table, Static("looking for models…", classes="detail", markup=False), classes="split")

    def on_mount(self) -> None:
        """Look for models once the frame is there."""
        self.query_one(DataTable).add_columns(*COLUMNS)
        self.set_timer(AFTER_FIRST_FRAME, self._look)

    def command(self) -> str:
        """The listing, or the model under the cursor."""
        name = self._chosen()
        return f"gemma-tui models info {shlex.quote(name)}" if name else "gemma-tui models list"

    def job_ended(self) -> None:
        """A model was imported, or a run left one."""
        self._look()

    def on_screen_resume(self) -> None:
        """What another screen has made is here as well."""
        if self._found:  # the first look waits for the first frame
            self._look()

    def action_look(self) -> None:
        """Look again."""
        self._look()

    def action_tree(self) -> None:
        """The architecture of the model under the cursor."""
        from gemma_tui.screens.model_figures import tree_screen

        if name := self._chosen():
            self.app.push_screen(tree_screen(name))

    def action_weights(self) -> None:
        """The matrices of the model under the cursor."""
        from gemma_tui.screens.model_figures import weights_screen

        if name := self._chosen():
            self.app.push_screen(weights_screen(name))

    def action_bench(self) -> None:
        """How fast the model under the cursor is here."""
        from gemma_tui.screens.model_figures import BenchScreen

        if name := self._chosen():
            self.app.push_screen(BenchScreen(name))

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Load the model under the cursor."""
        event.stop()
        name = self._chosen()
        if name and (problem := self._found[name][0].problem):
            self.bench.tell(problem, "error")
        elif name:
            self.bench.load(name)

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Show the model's facts."""
        event.stop()
        name = self._chosen()
        if name:
            self._show(*self._found[name])

    @work(thread=True, exclusive=True, group="look")
    def _look(self) -> None:
        from gemma_tui.hub import fit
        from gemma_tui.hub.models import local_models

        try:
            found = {item.model.name: (item, fit.state(item)) for item in local_models()}
        except OSError as error:
            self.app.call_from_thread(self.bench.tell, f"{error.filename}: {error.strerror}", "error")
            return
        self.app.call_from_thread(self._fill, found)

    def _fill(self, found: dict[str, tuple[Summary, str]]) -> None:
        if not self.is_attached:
            return
        self._found = found
        table = self.query_one(DataTable)
        row = max(0, table.cursor_row)
        table.clear()
        for name, (item, state) in found.items():
            cells = (
                item.model.name,
                count_text(item.parameters) if item.parameters else "",
                item.dtype,
                bytes_text(item.nbytes) if item.nbytes else "",
                state,
                item.model.source,
            )
            table.add_row(*(Text(one_line(cell, 40)) for cell in cells), key=name)
        table.move_cursor(row=min(row, table.row_count - 1))
        table.focus()

    def _chosen(self) -> str:
        table = self.query_one(DataTable)
        if not table.row_count:
            return ""
        return str(table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value)

    def _show(self, item: Summary, state: str) -> None:
        detail = self.query_one(".detail", Static)
        try:
            config = item.model.config() if item.installed and not item.problem else None
        except EngineError as error:  # it was there when the list was made
            detail.update(one_line(str(error), 400))
            return
        if item.problem:
            detail.update(one_line(item.problem, 400))
        elif config is None:
            detail.update(f"{item.model.name}: the real Gemma-3 270M, {state}; it takes some seconds, once")
        else:
            detail.update(Text("\n".join(_facts(item, config))))


def _facts(item: Summary, config: Gemma3Config) -> list[str]:
    from gemma_tui.hub import fit

    table = config.vocab_size * config.hidden_size
    kinds = "".join("▄" if config.is_local(i) else "█" for i in range(config.num_hidden_layers))
    heads = f"{config.num_attention_heads} query heads share {config.num_key_value_heads} of {config.head_dim}"
    lines = [
        f"{one_line(item.model.name, 60)}  {item.parameters:,} parameters",
        f"layers  {kinds}  {config.num_hidden_layers}, █ global, ▄ local",
        f"window  {config.sliding_window:,} of {config.max_position_embeddings:,} tokens",
        f"heads   {heads}",
        f"width   {config.hidden_size:,}, MLP {config.intermediate_size:,}",
        f"tokens  {config.vocab_size:,}, {table / item.parameters:.0%} of the parameters",
    ]
    needs = fit.estimates(config)
    return lines + [f"memory  {bytes_text(size)} for {use}, {fit.here(size)}" for use, size in needs.items()]
