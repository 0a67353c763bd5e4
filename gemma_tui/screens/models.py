"""Models: what is here, whether it fits, loading, checking and removing it, and what is fetched from the hub."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable
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
from gemma_tui.widgets.dialogs import Question, Reading
from gemma_tui.widgets.download_list import DownloadList, told

if TYPE_CHECKING:
    from engines.gemma3 import Gemma3Config
    from gemma_tui.hub.cache import Removal
    from gemma_tui.hub.models import Model, Summary

LINES = 12
"""Of a preview; what comes after stays in the command's."""

COLUMNS = ("model", "params", "dtype", "size", "state", "where")


class ModelTable(DataTable[Text]):
    """The models; enter loads one."""

    BINDINGS = [
        Binding("enter", "select_cursor", "Load", id="models.load"),
        Binding("i", "screen.about", "About", id="models.about", tooltip="Origin, chat template and card of a model"),
        Binding("f", "screen.fit", "Fit", id="models.fit",
                tooltip="What a model needs here, to be read with and to be trained, on each engine"),
        Binding("b", "screen.bench", "Bench", id="models.bench", tooltip="How fast a model is on this machine"),
        Binding("n", "screen.convert", "Convert", id="models.convert",
                tooltip="Make a new model of one: quantised for MLX, or in another dtype"),
        Binding("t", "screen.tree", "Tree", id="models.tree", show=False, tooltip="The architecture of a model"),
        Binding("w", "screen.weights", "Weights", id="models.weights", show=False,
                tooltip="Each matrix of a model in numbers"),
        Binding("v", "screen.verify", "Verify", id="models.verify", show=False,
                tooltip="Hold a model against its checksums"),
        Binding("delete,backspace", "screen.remove", "Remove", id="models.remove", show=False,
                tooltip="Delete, after a look"),
    ]  # fmt: skip


class ModelsScreen(Workbench):
    """The models of this machine; enter loads one."""

    MODE = "models"

    BINDINGS = [
        Binding("slash", "search", "Hub", id="models.search", key_display="/", tooltip="Search the hub, and fetch"),
        Binding("r", "look", "Look again", id="models.look", show=False),
        Binding("k", "clean", "Clean", id="models.clean", show=False, tooltip="Delete what broken downloads left"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[str, tuple[Summary, str]] = {}

    def body(self) -> Iterable[Widget]:
        """The table, and what is known of the model under the cursor."""
        table = ModelTable(cursor_type="row")
        yield Container(table, Static("looking for models…", classes="detail", markup=False), classes="split")
        yield DownloadList()

    def on_mount(self) -> None:
        """Look for models once the frame is there."""
        self.query_one(ModelTable).add_columns(*COLUMNS)
        self.query_one(DownloadList).display = False
        self.set_timer(AFTER_FIRST_FRAME, self._look)
        self.set_interval(0.25, self._advance)

    def command(self) -> str:
        """The listing, or the model or the download under the cursor."""
        rows = self.query_one(DownloadList)
        if rows.has_focus and (item := rows.chosen()) is not None:
            from gemma_tui.hub.descriptions import fetching_command, using_command

            return using_command(item) if item.folder else fetching_command(item.request)
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

    def action_search(self) -> None:
        """Go to the hub."""
        from gemma_tui.screens.hub_search import HubSearch

        self.app.push_screen(HubSearch())

    def action_about(self) -> None:
        """Origin, licence, tokenizer, chat template and card of the model under the cursor."""
        if (item := self._item()) is not None:
            self._read_about(item.model)

    def action_verify(self) -> None:
        """Hold the model under the cursor against its checksums."""
        if (item := self._item()) is not None:
            self._verify(item.model)

    def action_remove(self) -> None:
        """Show what would go with the model under the cursor, and ask."""
        name = self._chosen()
        if name and any(place.model == name for place in self.bench.session.places):
            self.bench.tell(f"{name} is loaded: load another model first", "warning")
        elif name:
            self._preview(name)

    def action_clean(self) -> None:
        """Show what broken downloads have left, and ask."""
        self._preview("")

    def action_fit(self) -> None:
        """What the model under the cursor needs here."""
        from gemma_tui.screens.model_figures import fit_screen

        self._enter(fit_screen)

    def action_tree(self) -> None:
        """The architecture of the model under the cursor."""
        from gemma_tui.screens.model_figures import tree_screen

        self._enter(tree_screen)

    def action_weights(self) -> None:
        """The matrices of the model under the cursor."""
        from gemma_tui.screens.model_figures import weights_screen

        self._enter(weights_screen)

    def action_bench(self) -> None:
        """How fast the model under the cursor is here."""
        from gemma_tui.screens.bench import BenchScreen

        self._enter(BenchScreen)

    def action_convert(self) -> None:
        """A new model of the one under the cursor."""
        from gemma_tui.screens.conversion import ConversionScreen

        self._enter(ConversionScreen)

    def _enter(self, screen: Callable[[str], Workbench]) -> None:
        """Go to a screen of the model under the cursor."""
        if name := self._chosen():
            self.app.push_screen(screen(name))

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Load the model under the cursor."""
        event.stop()
        if isinstance(event.data_table, DownloadList):
            return
        name = self._chosen()
        if name and (problem := self._found[name][0].problem):
            self.bench.tell(problem, "error")
        elif name:
            self.bench.load(name)

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Show the model's facts."""
        event.stop()
        if isinstance(event.data_table, DownloadList):
            return
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

    @work(thread=True, exclusive=True, group="about")
    def _read_about(self, model: Model) -> None:
        from gemma_tui.hub.facts import about_lines, facts

        try:
            lines = about_lines(facts(model))
        except (EngineError, OSError) as error:
            self.app.call_from_thread(self.bench.tell, str(error), "error")
            return
        self.app.call_from_thread(self.app.push_screen, Reading(one_line(model.name, 60), "\n".join(lines)))

    @work(thread=True, exclusive=True, group="verify")
    def _verify(self, model: Model) -> None:
        from huggingface_hub import is_offline_mode

        from gemma_tui.hub.verification import verify

        last = [0.0]

        def progress(share: float, text: str) -> None:
            if time.monotonic() - last[0] > 0.2:
                last[0] = time.monotonic()
                self.app.call_from_thread(self._say, f"{share:.0%} {text}")

        try:
            found = verify(model, is_offline_mode(), progress)
        except EngineError as error:
            self.app.call_from_thread(self.bench.tell, str(error), "error")
            return
        said = f"{model.name}: {found.files} files against {found.against}"
        problems = [f"{name}: {problem}" for name, problem in found.problems.items()]
        self.app.call_from_thread(self._say, "\n".join([said, *(problems or ["everything is as it should be"])]))

    @work(thread=True, exclusive=True, group="remove")
    def _preview(self, name: str) -> None:
        from gemma_tui.hub import keeping
        from gemma_tui.hub.cache import leftovers
        from gemma_tui.hub.descriptions import preview
        from gemma_tui.studies.using import refuse_in_use

        try:
            found = keeping.removal(name) if name else leftovers()
            refuse_in_use(found)
            lines = preview(found, keeping.adapters_on(found))
        except EngineError as error:
            self.app.call_from_thread(self.bench.tell, str(error), "warning")
            return
        if found.empty:
            self.app.call_from_thread(self.bench.tell, "there is nothing to delete")
            return
        text = "\n".join(one_line(line, 200) for line in lines[:LINES])
        question = Question(text, {"y": "delete it"})
        self.app.call_from_thread(self.app.push_screen, question, lambda answer: answer and self._delete(found))

    @work(thread=True, group="remove")
    def _delete(self, found: Removal) -> None:
        try:
            found.execute()
            self.app.call_from_thread(self.bench.tell, f"freed {bytes_text(found.frees)}")
        except EngineError as error:
            self.app.call_from_thread(self.bench.tell, str(error), "error")
        self.app.call_from_thread(self._look)

    def _advance(self) -> None:
        """Start the next download, show how far all are, and look again when one has ended."""
        downloads = self.bench.downloads
        if downloads is None:
            return
        self.bench.attempt(downloads.advance)
        rows = self.query_one(DownloadList)
        rows.downloads = downloads
        rows.fill()
        if rows.has_focus and (chosen := rows.chosen()) is not None:
            self._say(told(chosen))
        for item in downloads.ended():
            done = item.state == "done"
            use = "; c on its row has the command for it" if item.request.include else ""
            self.bench.tell(f"{item.request.repo} is checked and ready{use}" if done else item.detail,
                            "information" if done else "error")  # fmt: skip
            self._look()

    def _say(self, text: str) -> None:
        if self.is_attached:
            self.query_one(".detail", Static).update(Text("\n".join(one_line(line, 300) for line in text.split("\n"))))

    def _item(self) -> Summary | None:
        name = self._chosen()
        return self._found[name][0] if name else None

    def _fill(self, found: dict[str, tuple[Summary, str]]) -> None:
        if not self.is_attached:
            return
        self._found = found
        table = self.query_one(ModelTable)
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
        if not isinstance(self.focused, DownloadList):
            table.focus()

    def _chosen(self) -> str:
        table = self.query_one(ModelTable)
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
    from gemma_tui.studies.fitting import memory_lines

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
    return lines + [f"{name}  {line}" for name, line in memory_lines(config)]
