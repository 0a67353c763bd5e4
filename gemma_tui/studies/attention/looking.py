"""From a plan to a view: which model, which text, and which of the views."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

from engines import open_engine
from engines.base import Engine, ModelInfo, Progress
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure
from gemma_tui.hub.identity import model_digest
from gemma_tui.hub.models import resolve
from gemma_tui.pair_grid import PairGrid
from gemma_tui.studies.attention.attribution import attribution_view, position_of, token_id
from gemma_tui.studies.attention.causal import ablation_scan, causal_view, parse_target
from gemma_tui.studies.attention.circuits import circuits_view
from gemma_tui.studies.attention.differences import Kept, divergence_view, keep
from gemma_tui.studies.attention.heads import head_grid
from gemma_tui.studies.attention.lens import lens_view
from gemma_tui.studies.attention.locality import local_global
from gemma_tui.studies.attention.neurons import neurons_view
from gemma_tui.studies.attention.pairs import Shading, head_view, span_of
from gemma_tui.studies.attention.parity import badge, parity
from gemma_tui.studies.attention.patching import patching_view
from gemma_tui.studies.attention.plan import AttentionPlan, text_of
from gemma_tui.studies.attention.reading import Reading, View, read
from gemma_tui.studies.attention.rollout import rollout_view
from gemma_tui.studies.attention.sinks import sinks
from gemma_tui.studies.attention.types import head_types
from gemma_tui.studies.loading import load
from gemma_tui.tokenizer import Tokenizer, read_tokenizer

Cells = tuple[int, int]

CELLS = (512, 512)


class StoppedError(Exception):
    """A view was stopped; whoever stopped it knows."""


@dataclass
class Desk:
    """A model on an engine, and the text that was read last: what was computed for it serves the next view.

    Attributes:
        stop: while it is set, what is computed for the text ends between two tiles, with ``StoppedError``.
    """

    engine: Engine
    name: str
    dtype: str | None
    tokenizer: Tokenizer
    reading: Reading | None = None
    info: ModelInfo | None = None
    stop: Event = field(default_factory=Event)
    _read: tuple[str, bool] = ("", True)

    def read(self, text: str, bos: bool) -> Reading:
        """The reading of a text; the one before if it is the same."""
        if self.reading is None or self._read != (text, bos):
            self.reading = None
            self.reading, self._read = read(self.engine, self.tokenizer, text, bos), (text, bos)
            self.reading.inspection.tick = self._tick
        return self.reading

    def _tick(self) -> None:
        if self.stop.is_set():
            raise StoppedError

    def reopen(self) -> None:
        """Load the model again, after another one had its place."""
        self.reading = None
        load(self.engine, self.name, self.dtype)
        self.info = self.engine.model()


def open_desk(engine: Engine, name: str, dtype: str | None = None, progress: Progress | None = None) -> Desk:
    """Load a model, or a run's result, and its tokenizer.

    Raises:
        EngineError: it is not there or not usable.
    """
    model = load(engine, name, dtype, progress)
    return Desk(engine, name, dtype, read_tokenizer(model.folder))


def desk_of(desk: Desk | None, engine: Engine, name: str) -> Desk:
    """The desk of the model that an engine holds: the one before, unless another model was loaded since."""
    info = engine.model()
    if desk is None or desk.info is not info:
        desk = Desk(engine, name, info.dtype if info else None, read_tokenizer(resolve(name).folder))
        desk.info = info
    return desk


@dataclass(frozen=True)
class Board:
    """What a screen shows of a text; made by the engine's thread as a whole, and never changed.

    Attributes:
        model: its name.
        labels: the tokens of the text.
        local: for each layer whether it is local.
    """

    figure: Figure | None = None
    plan: AttentionPlan = field(default_factory=AttentionPlan)
    model: str = ""
    engine: str = ""
    labels: list[str] = field(default_factory=list)
    local: list[bool] = field(default_factory=list)
    heads: int = 0
    window: int = 0

    def pairs(self) -> PairGrid | None:
        """The map of the head that is shown; None for other views."""
        if self.figure is None or self.plan.view != "head":
            return None
        arrays, plan = self.figure.arrays, self.plan
        changed = {"rows normalised": plan.per_row, f"γ {plan.gamma:g}": plan.gamma != 1}
        return PairGrid(
            arrays["weights"], arrays["query_edges"], arrays["key_edges"], self.labels, self.labels,
            self.window if self.local[plan.layer] else None, plan.pooling,
            arrays["values"] if any(changed.values()) else None,
            ", ".join(words for words, wanted in changed.items() if wanted),
        )  # fmt: skip


def board_of(desk: Desk, figure: Figure, plan: AttentionPlan) -> Board:
    """A view with what a screen has to know of its text and model."""
    if desk.reading is None:
        return Board(figure, plan, desk.name, desk.engine.name)
    config = desk.reading.inspection.config
    local = [config.is_local(layer) for layer in range(config.num_hidden_layers)]
    return Board(
        figure, plan, desk.name, desk.engine.name, desk.reading.labels, local, config.num_attention_heads,
        config.sliding_window,
    )  # fmt: skip


def look(desk: Desk, plan: AttentionPlan, cells: Cells = CELLS) -> View:
    """The view that a plan asks for, with the badge that tells whether its weights were checked.

    Args:
        cells: rows and columns that a map of pairs has at most.

    Raises:
        EngineError: the text, or what the plan names in it, is not there.
    """
    reading = desk.read(text_of(plan), plan.bos)
    figure = yield from _view(desk, reading, plan, cells)
    return replace(figure, notes=[badge(reading.facts), *figure.notes])


def _view(desk: Desk, reading: Reading, plan: AttentionPlan, cells: Cells) -> View:
    match plan.view:
        case "heads":
            return head_grid(reading, plan.metric, plan.where)
        case "head":
            return _head(reading, plan, cells)
        case "local-global":
            return local_global(reading)
        case "sinks":
            return sinks(reading, plan.epsilon, compare=True)
        case "types":
            return head_types(desk.engine, desk.tokenizer, plan.repeats, seed=plan.seed)
        case "lens":
            return lens_view(reading, _around(reading, plan), _token(desk, plan.token))
        case "attribution":
            token, contrast = _token(desk, plan.token), _token(desk, plan.contrast)
            return attribution_view(reading, _position(reading, plan), token, contrast, (plan.layer, plan.head))
        case "ablation":
            if not plan.ablate:
                raise UsageError("ablate: name what is taken away, as L3.H1")
            edits = parse_target(plan.ablate, reading.inspection.config, plan.how, reading.length)
            return causal_view(reading, edits, plan.ablate)
        case "scan":
            return ablation_scan(reading, plan.how)
        case "patching":
            if not plan.other_text:
                raise UsageError("other_text: patching takes values from a second text of as many tokens")
            other = read(desk.engine, desk.tokenizer, plan.other_text, plan.bos)
            return patching_view(reading, other, plan.patch, _answers(desk, plan))
        case "differences":
            return _differences(desk, plan)
        case "neurons":
            key = position_of(reading, plan.key_position) if plan.key_position else None
            return neurons_view(reading, plan.layer, plan.head, _position(reading, plan), key)
        case "circuits":
            return circuits_view(reading, plan.layer, _position(reading, plan), _token(desk, plan.token))
        case "rollout":
            return rollout_view(reading, _position(reading, plan))
        case "check":
            return parity(reading)
    raise UsageError(f"view {plan.view[:40]!r} is not there")


def _head(reading: Reading, plan: AttentionPlan, cells: Cells) -> View:
    query = position_of(reading, plan.position) if plan.position else None
    key = position_of(reading, plan.key_position) if plan.key_position else query
    shading = Shading(plan.pooling, plan.per_row, plan.without_sink, plan.gamma)
    queries, keys = (span_of(getattr(plan, name), name, reading.length) for name in ("queries", "keys"))
    return head_view(reading, plan.layer, plan.head, cells, shading, query, key, queries=queries, keys=keys)


def _position(reading: Reading, plan: AttentionPlan) -> int:
    return position_of(reading, plan.position) if plan.position else reading.length - 1


def _around(reading: Reading, plan: AttentionPlan) -> tuple[int, int] | None:
    """The positions of the lens: up to the one that is named."""
    if not plan.position:
        return None
    end = position_of(reading, plan.position) + 1
    return max(0, end - 64), end


def _token(desk: Desk, text: str) -> int | None:
    return token_id(desk.tokenizer, text) if text else None


def _answers(desk: Desk, plan: AttentionPlan) -> tuple[int, int] | None:
    """What the two texts are to be told apart by."""
    if not plan.token and not plan.contrast:
        return None
    if not plan.token or not plan.contrast:
        raise UsageError("patching takes both answers: --token of the text, --contrast of the other one")
    return token_id(desk.tokenizer, plan.token), token_id(desk.tokenizer, plan.contrast)


def _differences(desk: Desk, plan: AttentionPlan) -> View:
    """The other side first, since it may take the place of the model that is loaded."""
    kept, name = _other_side(desk, plan)
    reading = desk.read(text_of(plan), plan.bos)
    return divergence_view(reading, kept, (desk.name, name))


def _other_side(desk: Desk, plan: AttentionPlan) -> tuple[Kept, str]:
    text = plan.other_text or text_of(plan)
    elsewhere = [part for part in (plan.other_model, plan.other_engine, plan.other_dtype) if part]
    if not elsewhere:
        if not plan.other_text:
            raise UsageError(
                "differences need another side: --other-text, --other-model, --other-engine or --other-dtype"
            )
        return keep(read(desk.engine, desk.tokenizer, text, plan.bos)), "the other text"
    if plan.other_engine and plan.other_engine != desk.engine.name:
        other = open_engine(plan.other_engine)
    else:
        other = desk.engine
    try:
        side = open_desk(other, plan.other_model or desk.name, plan.other_dtype or desk.dtype)
        return keep(side.read(text, plan.bos)), " ".join(elsewhere)
    finally:
        if other is desk.engine:
            desk.reopen()
        else:
            other.unload()


def signed(figure: Figure) -> Figure:
    """A figure whose facts name the weights by their digest; takes seconds for a large model's first.

    Raises:
        GemmaTuiError: a file of the model cannot be read.
    """
    model, adapter = figure.facts.get("model"), figure.facts.get("adapter")
    if not model:
        return figure
    digest = model_digest(Path(model), Path(adapter) if adapter else None)
    return replace(figure, facts={**figure.facts, "model_sha256": digest})
