"""Metrics of heads against dense weights, the filter, and what separates local from global layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from insides import drained

from engines.base import Engine
from engines.gemma3 import Gemma3Config
from gemma_tui import paths
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure
from gemma_tui.studies.attention.heads import METRICS, head_grid, head_metrics, keep
from gemma_tui.studies.attention.locality import local_global
from gemma_tui.studies.attention.looking import StoppedError, desk_of, look
from gemma_tui.studies.attention.plan import AttentionPlan
from gemma_tui.studies.attention.reading import Reading, View, read, read_tokens
from gemma_tui.tokenizer import Tokenizer, read_tokenizer

LENGTH = 50


def figure_of(view: View) -> Figure:
    """Run a view to its end; the share done grows."""
    return drained(view)[0]


@pytest.fixture(scope="session")
def nano_tokenizer() -> Tokenizer:
    return read_tokenizer(paths.assets() / "gemma-3-nano")


@pytest.fixture
def reading(torch_engine: Engine, two_to_one: Gemma3Config, tiny_folder: Callable[..., Path],
            nano_tokenizer: Tokenizer) -> Reading:  # fmt: skip
    torch_engine.load(tiny_folder(two_to_one), "float32")
    return read_tokens(torch_engine, nano_tokenizer, np.random.default_rng(0).integers(0, 12, LENGTH).tolist())


@pytest.fixture
def weights(reading: Reading) -> np.ndarray:
    """Dense, float64 ``[layers, heads, T, T]``."""
    config = reading.inspection.config
    return np.stack([
        [reading.inspection.attention(layer, head, (0, LENGTH)) for head in range(config.num_attention_heads)]
        for layer in range(config.num_hidden_layers)
    ]).astype(np.float64)  # fmt: skip


def test_metrics_equal_their_definitions(reading: Reading, weights: np.ndarray) -> None:
    config, window = reading.inspection.config, reading.inspection.config.sliding_window
    found = head_metrics([reading.statistics(layer) for layer in range(config.num_hidden_layers)], config)
    q, k = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    local = np.array([config.is_local(layer) for layer in range(config.num_hidden_layers)])
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(weights > 0, weights * np.log(weights), 0).sum(-1)
        rest = weights[..., 1:] / weights[..., 1:].sum(-1, keepdims=True)
    seen = np.where(local[:, None], np.minimum(np.arange(1, LENGTH + 1), window), np.arange(1, LENGTH + 1))
    same = reading.tokens[:, None] == reading.tokens[None]
    duplicate = same & (k < q)
    induction = np.zeros_like(duplicate)
    induction[:, 1:] = duplicate[:, :-1]
    sees_first = np.where(local, window, LENGTH)[:, None]
    edge = np.where((q - k >= 8) & (q - k < window), weights, 0).sum((-1, -2)) / (LENGTH - 8)
    expected = {
        "entropy": entropy[..., 1:].mean(-1),
        "entropy_normalised": (entropy[..., 1:] / np.log(seen[:, None, 1:])).mean(-1),
        "distance": (weights * (q - k)).sum(-1)[..., 1:].mean(-1),
        "distance_without_sink": np.nanmean((rest * (q - k[1:])).sum(-1)[..., 1:], -1),
        "sink": weights[..., 0].sum(-1) / sees_first,
        "sink_gu": weights[..., 0].mean(-1),
        "bos_mass": weights[..., 1:, 0].mean(-1),
        "previous": np.where(q - k == 1, weights, 0).sum((-1, -2)) / weights.sum((-1, -2)),
        "self": np.where(q == k, weights, 0).sum((-1, -2)) / LENGTH,
        "duplicate": (weights * duplicate).sum((-1, -2)) / weights.sum((-1, -2)),
        "induction": (weights * np.tril(induction)).sum((-1, -2)) / weights.sum((-1, -2)),
        "beyond": np.where(q - k >= window, weights, 0).sum((-1, -2)) / LENGTH,
        "edge": np.where(local[:, None], edge, np.nan),
    }
    for name, wanted in expected.items():
        assert found[name].shape == (3, 4)
        assert np.allclose(found[name], wanted, atol=1e-5, equal_nan=True), name
    assert set(expected) | {"value", "drain"} == set(METRICS)
    assert (found["beyond"][local] == 0).all()


def test_the_grid_is_coloured_by_the_metric_and_sorted(reading: Reading) -> None:
    figure = figure_of(head_grid(reading, "sink"))
    assert figure.heats[0].values.shape == (3, 4)
    assert list(figure.heats[0].marks) == ["·", "·", "G"]
    assert [name.split()[1] for name in figure.heats[0].columns] == ["a", "a", "b", "b"]
    table = figure.tables[0]
    place = list(table.columns).index("sink")
    column = [row[place] for row in table.rows]
    assert len(column) == 12
    assert column == sorted(column, reverse=True)
    assert figure.facts["engine"] == "torch"
    assert not any("IDLE" in note for note in figure.notes)


def test_a_filter_keeps_the_heads_it_names(reading: Reading) -> None:
    config = reading.inspection.config
    heads = head_metrics([reading.statistics(layer) for layer in range(3)], config)
    sink = heads["sink"]
    middle = float(np.median(sink))
    assert (keep(heads, config, f"sink > {middle} and local")[:2] == (sink > middle)[:2]).all()
    assert not keep(heads, config, "sink > -1 and local")[2].any()
    assert keep(heads, config, "global or layer == 0").sum() == 8
    assert keep(heads, config, "not (head > 0)").sum() == 3
    assert keep(heads, config, "edge < 2").sum() == 8, "what does not apply is not less than anything"
    assert keep(heads, config, "sink*2 > sink+sink-1 & global").sum() == 4
    figure = figure_of(head_grid(reading, "sink", "layer == 1"))
    assert np.isnan(figure.heats[0].values).sum() == 8
    assert len(figure.tables[0].rows) == 4


@pytest.mark.parametrize(
    "where",
    ["sink >", "sink", "1", "sink > 1 > 0", "__import__('os')", "sink.real > 1", "nothing > 1", "(" * 500, "local + 1",
     "sink > 'a'", "[x for x in sink]", "not sink", "True", "\x00"],
)  # fmt: skip
def test_a_filter_that_cannot_be_read_is_refused_in_a_line(reading: Reading, where: str) -> None:
    config = reading.inspection.config
    heads = head_metrics([reading.statistics(layer) for layer in range(3)], config)
    with pytest.raises(UsageError, match="cannot be read: write for example") as caught:
        keep(heads, config, where)
    assert "\n" not in str(caught.value)


def test_an_unknown_metric_is_refused(reading: Reading) -> None:
    with pytest.raises(UsageError, match="metric 'nothing' is not there"):
        figure_of(head_grid(reading, "nothing"))


def test_local_and_global_layers_are_told_apart(reading: Reading, weights: np.ndarray) -> None:
    figure = figure_of(local_global(reading))
    mass = figure.arrays["mass_by_distance_global"]
    expected = [np.trace(weights[2], -d, 1, 2).mean() / LENGTH for d in range(LENGTH)]
    assert np.allclose(mass, expected, atol=1e-6)
    assert mass.sum() == pytest.approx(1, abs=1e-5)
    assert (figure.arrays["mass_by_distance_local"][8:] == 0).all()
    beyond = {row[0]: row[list(figure.tables[0].columns).index("beyond")] for row in figure.tables[0].rows}
    assert beyond["local"] == 0
    assert beyond["global"] == pytest.approx(mass[8:].sum(), abs=1e-5)
    assert any(f"{beyond['global']:.1%}" in note for note in figure.notes)


def test_a_window_that_does_nothing_is_told_loudly(torch_engine: Engine, reading: Reading) -> None:
    short = read_tokens(torch_engine, reading.tokenizer, [2, 5, 6, 7])
    figure = figure_of(local_global(short))
    assert any(note.startswith("WINDOW IDLE: the text has 4 tokens and the window 8") for note in figure.notes)


def test_a_text_is_read_with_one_bos_or_none(torch_engine: Engine, nano_tokenizer: Tokenizer) -> None:
    torch_engine.load(paths.assets() / "gemma-3-nano", "float32")
    reading = read(torch_engine, nano_tokenizer, "<bos>Once upon\na time \x1b[31m")
    assert reading.labels.count("<bos>") == 1
    assert reading.facts["bos"] is True
    assert all("\x1b" not in label and "\n" not in label and label for label in reading.labels)
    assert read(torch_engine, nano_tokenizer, "Once", bos=False).facts["bos"] is False
    with pytest.raises(UsageError, match="the text is empty"):
        read(torch_engine, nano_tokenizer, "")


def test_nano_has_heads_that_read_the_token_before(torch_engine: Engine, nano_tokenizer: Tokenizer) -> None:
    torch_engine.load(paths.assets() / "gemma-3-nano", "float32")
    text = "The old clock on the wall of the station was always seven minutes slow. " * 2
    figure = figure_of(head_grid(read(torch_engine, nano_tokenizer, text), "previous", "previous > 0.3"))
    assert 0 < len(figure.tables[0].rows) < 6


def test_the_answer_after_the_text_is_the_models_own(reading: Reading, torch_engine: Engine) -> None:
    targets = reading.targets()
    assert (targets[:-1] == reading.tokens[1:]).all()
    assert targets[-1] == torch_engine.logits(reading.tokens[None])[0, -1].argmax()


def test_a_stop_breaks_a_view_off_between_two_tiles(torch_engine: Engine) -> None:
    """Two tiles of one layer: the second never comes, and the same desk goes on afterwards."""
    torch_engine.load(paths.assets() / "gemma-3-nano", "float32")
    desk = desk_of(None, torch_engine, "nano")
    plan = AttentionPlan(text="The old clock on the wall was slow. " * 20)
    reading = desk.read(plan.text, True)
    desk.stop = Stop(after=3)
    with pytest.raises(StoppedError):
        figure_of(look(desk, plan))
    assert desk.stop.asked == 4
    desk.stop = Event()
    assert figure_of(look(desk, plan)).heats
    assert desk.reading is reading


class Stop(Event):
    """Set after some questions whether it is."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.asked = after, 0

    def is_set(self) -> bool:
        self.asked += 1
        return self.asked > self.after
