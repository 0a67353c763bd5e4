"""``models tree`` and ``models weights``: counts, norms, differences and spectra by closed forms and numpy."""

from __future__ import annotations

import math
import shutil
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import checkpoints
from engines.adapters import LowRank, target_modules, write_adapter
from engines.checkpoints import read_arrays, write_arrays
from engines.gemma3 import read_config
from engines.official import official_config
from engines.training import LINEARS, LoRASettings
from gemma_tui import paths
from gemma_tui.cli import USAGE
from gemma_tui.hub.models import resolve
from gemma_tui.studies import weights
from gemma_tui.studies.architecture import architecture, told
from gemma_tui.studies.weights import measure, weights_figure

Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]
MOVED = "model.layers.1.mlp.up_proj.weight"


def nothing(share: float, text: str) -> None:
    pass


@pytest.fixture
def other(tiny: str) -> str:
    """The tiny model with one matrix moved by half of itself."""
    shutil.copytree(paths.models() / tiny, paths.models() / "other")
    arrays = read_arrays(paths.models() / "other" / "model.safetensors")
    arrays[MOVED] = arrays[MOVED] * np.float32(1.5)
    write_arrays(paths.models() / "other" / "model.safetensors", arrays)
    return "other"


def test_the_tree_adds_up(command: Commands) -> None:
    config = official_config("gemma-3-1b")
    nodes = list(architecture(config, 8))
    whole, top = nodes[0], [node for node in nodes if node.depth == 1]
    assert whole.parameters == config.parameter_count() == sum(node.parameters for node in top)
    assert whole.lora == config.lora_count(8, LINEARS) == sum(node.lora for node in top)
    assert sum(math.prod(node.shape) for node in nodes if node.shape) == whole.parameters
    assert next(n for n in nodes if n.name == "embed_tokens").share == pytest.approx(301_989_888 / 999_885_952)
    assert [n.name for n in nodes if n.note == "global"] == [f"layers.{i}" for i in config.global_layers]
    assert len(told(nodes)) < len(nodes)
    at = {node.name: place for place, node in reversed(list(enumerate(nodes)))}
    attention = nodes[at["self_attn"] + 1 : at["self_attn"] + 7]
    assert {node.name for node in attention} == {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
    assert nodes[at["self_attn"]].parameters == sum(node.parameters for node in attention)
    code, rows, _ = command("models", "tree", "gemma-3-1b", "--rank", "4")
    assert (code, rows[-1]["lora"]) == (0, config.lora_count(4, LINEARS))
    assert command("models", "tree", "gemma-3-1b", "--rank", "0")[0] == USAGE


def test_each_matrix_has_its_numbers(tiny: str, command: Commands) -> None:
    code, rows, error = command("models", "weights", tiny)
    assert code == 0, error
    found = {row["name"]: row for row in rows if row["kind"] == "matrix"}
    arrays = read_arrays(paths.models() / tiny / "model.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name]["norm"] == pytest.approx(float(np.linalg.norm(array.astype(np.float64))), rel=1e-6), name
        assert found[name]["largest"] == pytest.approx(float(np.abs(array).max())), name
        assert found[name]["rms"] == pytest.approx(float(np.sqrt(np.mean(array.astype(np.float64) ** 2))), rel=1e-6)


def test_a_difference_is_where_it_is(tiny: str, other: str, command: Commands) -> None:
    code, rows, error = command("models", "weights", other, "--against", tiny)
    assert code == 0, error
    found = {row["name"]: row for row in rows if row["kind"] == "matrix"}
    assert found[MOVED]["relative"] == pytest.approx(0.5, rel=1e-6)
    assert {name for name, row in found.items() if row["difference"]} == {MOVED}
    figure = weights_figure(resolve(other), resolve(tiny), measure(resolve(other), resolve(tiny), nothing))
    heat = figure.heats[0]
    assert heat.values[1, LINEARS.index("up_proj")] == pytest.approx(0.5, rel=1e-6)
    assert np.count_nonzero(heat.values) == 1
    assert list(heat.marks) == ["▄", "█"]


def test_an_adapter_differs_from_its_base_by_its_update(tiny: str, tmp_path: Path, command: Commands) -> None:
    config, generator = read_config(paths.models() / tiny), np.random.default_rng(0)
    factors = {
        name: LowRank(
            generator.standard_normal((2, inner)).astype(np.float32),
            generator.standard_normal((out, 2)).astype(np.float32),
        )
        for name, (out, inner) in target_modules(config, ("q_proj",), None).items()
    }
    settings = LoRASettings(2, 3.0, targets=("q_proj",))
    (tmp_path / "tuned").mkdir()
    write_adapter(tmp_path / "tuned", factors, settings, config, tiny)
    tuned = str(tmp_path / "tuned")
    rows = command("models", "weights", tuned, "--against", tiny)[1]
    found = {row["name"]: row for row in rows if row["kind"] == "matrix"}
    for name, factor in factors.items():
        expected = np.linalg.norm(1.5 * factor.lora_B.astype(np.float64) @ factor.lora_A)
        assert found[f"{name}.weight"]["difference"] == pytest.approx(expected, rel=1e-5)
    assert command("models", "weights", tuned)[1] == rows
    code, rows, _ = command("models", "weights", tuned, "--against", tiny, "--spectrum", "0.q_proj")
    values = [row["value"] for row in rows if row["kind"] == "singular value"]
    assert code == 0
    assert values[1] > 1e-2 > 1e3 * values[2]


def test_a_spectrum_is_that_of_the_matrix(tiny: str, command: Commands) -> None:
    rows = command("models", "weights", tiny, "--spectrum", "1.mlp.down_proj")[1]
    matrix = read_arrays(paths.models() / tiny / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    sigma = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose([r["value"] for r in rows if r["kind"] == "singular value"], sigma, rtol=1e-9)
    assert rows[0]["facts"]["stable_rank"] == pytest.approx((sigma**2).sum() / sigma[0] ** 2)


def test_what_cannot_be_compared_is_refused(tiny: str, command: Commands) -> None:
    code, _, error = command("models", "weights", tiny, "--against", tiny)
    assert (code, "the same model" in error) == (USAGE, True)
    code, _, error = command("models", "weights", tiny, "--against", "nano")
    assert (code, "other shapes" in error) == (1, True)
    code, _, error = command("models", "weights", tiny, "--spectrum", "9.q_proj")
    assert (code, "3.self_attn.q_proj" in error) == (USAGE, True)


def test_a_spectrum_reads_one_matrix(tiny: str, command: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = checkpoints.read_array
    monkeypatch.setattr(checkpoints, "read_array", lambda tensor, *kinds: (read.append(tensor.shape), real(tensor))[1])
    code, _, error = command("models", "weights", tiny, "--spectrum", "1.mlp.down_proj")
    assert code == 0, error
    assert read == [resolve(tiny).config().parameter_shapes()["model.layers.1.mlp.down_proj.weight"]]


def test_weights_are_not_held_in_two_forms(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = checkpoints.read_array

    def as_stored(tensor: checkpoints.StoredTensor) -> np.ndarray:
        array = checkpoints.as_bfloat16(real(tensor))
        read.append(weakref.ref(array))
        return array

    monkeypatch.setattr(checkpoints, "read_array", as_stored)
    given = weights.weights_of(resolve(tiny))
    _, value = next(given)
    assert value.dtype == np.float32
    assert [stored() for stored in read] == [None]


def test_bfloat16_is_widened_in_place() -> None:
    array = np.arange(1 << 20, dtype=np.uint32).astype(np.uint16)
    tracemalloc.start()
    try:
        wide = checkpoints.as_float32(array)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.1 * wide.nbytes
    np.testing.assert_array_equal(checkpoints.as_bfloat16(wide[:1000]), array[:1000])


def test_a_difference_of_large_matrices_is_never_held_whole() -> None:
    w, v = np.ones((32 * weights.ROWS, 16), np.float32), np.full((32 * weights.ROWS, 16), np.float32(0.25))
    tracemalloc.start()
    try:
        found = weights._matrix("embedding", w, v)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.difference == pytest.approx(0.75 * math.sqrt(w.size))
    assert (found.relative, found.moved) == (pytest.approx(3.0), 0.75)
    assert peak < w.nbytes / 2


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_has_no_spectrum(tiny: str, other: str, command: Commands, number: float) -> None:
    file = paths.models() / "other" / "model.safetensors"
    arrays = read_arrays(file)
    arrays[MOVED] = np.full_like(arrays[MOVED], number)
    write_arrays(file, arrays)
    for given in ((other,), (tiny, "--against", other)):
        code, _, error = command("models", "weights", *given, "--spectrum", "1.up_proj")
        assert (code, error.count("\n")) == (1, 1), error
        assert f"other: {MOVED} has numbers that are not finite" in error
    assert not math.isfinite(next(m for m in measure(resolve("other"), None, nothing) if m.name == MOVED).largest)
    assert command("models", "weights", "other", "--against", tiny)[0] == 0


def test_a_matrix_of_zeros_is_not_said_to_equal_another(tiny: str, other: str, command: Commands) -> None:
    file = paths.models() / "other" / "model.safetensors"
    arrays = read_arrays(file)
    arrays[MOVED] = np.zeros_like(arrays[MOVED])
    write_arrays(file, arrays)
    assert command("models", "weights", other, "--spectrum", "1.up_proj")[1][0]["notes"] == ["every number of it is 0"]
    notes = command("models", "weights", other, "--against", tiny, "--spectrum", "0.up_proj")[1][0]["notes"]
    assert notes == ["the two are equal"]
