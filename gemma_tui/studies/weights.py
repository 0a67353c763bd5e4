"""The weights of a model in numbers, matrix by matrix, and how they differ from those of another model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engines.adapters import read_adapter
from engines.base import Progress
from engines.blending import merged
from engines.checkpoints import as_float32
from engines.gemma3 import Gemma3Config
from engines.quantization import iterate_dense
from engines.training import LINEARS
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.heat import Heat
from gemma_tui.hub.models import Model, base_model
from gemma_tui.plots import Series

ROWS = 1 << 12
"""Of a matrix that are summed at a time: the embedding in float64 would be gigabytes."""
MEASURES = {"norm": "‖W‖", "rms": "root mean square of W", "largest": "largest |W|"}
DIFFERENCES = {"relative": "‖W - V‖ / ‖V‖", "difference": "‖W - V‖", "moved": "largest |W - V|"}


@dataclass(frozen=True)
class Matrix:
    """One parameter W, and V of the other model, if there is one.

    Attributes:
        norm: ‖W‖, Frobenius.
        largest: of the absolute values; the same for ``moved`` and W - V.
        relative: ‖W - V‖ / ‖V‖.
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    rms: float
    largest: float
    difference: float | None = None
    relative: float | None = None
    moved: float | None = None


def base_of(model: Model, progress: Progress | None = None) -> Model | None:
    """What the weights of a model are told against where nothing is named: an adapter's base; None of a whole model.

    Raises:
        EngineError: the base is not here.
    """
    return base_model(model.adapter, progress) if model.adapter is not None else None


def measure(model: Model, against: Model | None, progress: Progress) -> list[Matrix]:
    """Every parameter, one at a time, so that no model is held whole.

    Raises:
        EngineError: files are broken, or the other model has another shape.
    """
    config, found, done = model.config(), [], 0
    total = config.parameter_count()
    others = weights_of(against) if against is not None else None
    if against is not None and against.config().parameter_shapes() != config.parameter_shapes():
        raise GemmaTuiError(f"{against.name} has other shapes than {model.name}: compare models of one size")
    for name, w in weights_of(model):
        v = None if others is None else next(others)[1]
        found.append(_matrix(name, w, v))
        done += w.size
        progress(done / total, name)
    return found


def weights_of(model: Model, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 weights, adapters counted in.

    Args:
        shapes: of the parameters that are wanted; None for all.
    """
    config = model.config()
    factors, settings = read_adapter(model.adapter, config) if model.adapter is not None else ({}, None)
    for name, stored in iterate_dense(model.folder, config, shapes):
        value, module = as_float32(stored), name.removesuffix(".weight")
        del stored  # an embedding is gigabytes in either form
        if settings is not None and module in factors:
            value = merged(value, factors[module], settings)
        yield name, value


def weights_figure(model: Model, against: Model | None, found: list[Matrix]) -> Figure:
    """Maps of layers and matrices, and a table of all parameters."""
    config = model.config()
    shown = (DIFFERENCES if against is not None else {}) | MEASURES
    title = f"{model.name} against {against.name}" if against is not None else f"weights of {model.name}"
    heats = [_heat(config, found, measure, f"{title}: {what}") for measure, what in shown.items()]
    columns = ("name", "shape", *shown)
    rows = [(m.name, " x ".join(map(str, m.shape)), *(getattr(m, measure) for measure in shown)) for m in found]
    notes = []
    if against is not None:
        moved = [m for m in found if m.difference]
        whole = math.sqrt(sum((m.difference or 0) ** 2 for m in found))
        notes.append(
            f"{len(moved)} of {len(found)} parameters differ; all differences together have the norm {whole:.4g}"
        )
    arrays = {measure: heat.values for measure, heat in zip(shown, heats, strict=True)}
    facts = {"model": model.name, "against": against.name if against else "", "measures": shown}
    return Figure(title, notes, heats, tables=[Table("matrix", columns, rows)], arrays=arrays, facts=facts)


def spectrum_figure(model: Model, against: Model | None, name: str, progress: Progress) -> Figure:
    """The singular values of one matrix, or of its difference from the other model's.

    Raises:
        UsageError: there is no such matrix.
        EngineError: as ``measure``, or numbers of the matrix are not finite.
    """
    wanted = matrix_named(model.config(), name)
    if against is not None and against.config().parameter_shapes() != model.config().parameter_shapes():
        raise GemmaTuiError(f"{against.name} has other shapes than {model.name}: compare models of one size")
    w = _one(model, wanted)
    if against is not None:
        w = w - _one(against, wanted)
    progress(0.3, f"singular values of {wanted}")
    sigma = np.linalg.svd(w, compute_uv=False)
    squares = sigma**2
    energy = squares.sum()
    facts: dict[str, Any] = {"model": model.name, "against": against.name if against else "", "matrix": wanted}
    title = f"{model.name}: {wanted}" + (f" - {against.name}'s" if against is not None else "")
    if energy == 0:
        return Figure(title, ["every number of it is 0" if against is None else "the two are equal"], facts=facts)
    share = sigma[sigma > 0] / sigma.sum()
    facts |= {
        "norm": float(math.sqrt(energy)),
        "largest": float(sigma[0]),
        "stable_rank": float(energy / squares[0]),
        # exp of the entropy of the singular values (Roy & Vetterli, 2007).
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
        "rank_of_99_percent": int(np.searchsorted(np.cumsum(squares) / energy, 0.99) + 1),
    }
    note = (
        f"norm {facts['norm']:.4g}, stable rank {facts['stable_rank']:.4g}, effective rank "
        f"{facts['effective_rank']:.4g}; {facts['rank_of_99_percent']} singular values hold 99 % of the energy"
    )
    order = np.arange(1, len(sigma) + 1)
    line = Series("singular values", order.astype(np.float64), np.where(sigma > 0, sigma, np.nan))
    table = Table("singular value", ("number", "value"), list(zip(order.tolist(), sigma.tolist(), strict=True)))
    chart = LineChart(f"singular values of {wanted}", [line], "number", log=True)
    return Figure(title, [note], charts=[chart], tables=[table], arrays={"singular_values": sigma}, facts=facts)


def matrix_named(config: Gemma3Config, name: str) -> str:
    """The linear that a name like ``3.self_attn.q_proj`` means, or its full name.

    Raises:
        UsageError: there is none.
    """
    linears = [f"model.layers.{i}.{path}" for i in range(config.num_hidden_layers) for path in config.linear_shapes()]
    short = name.removesuffix(".weight").removeprefix("model.").removeprefix("layers.")
    layer, _, path = short.partition(".")
    meant = {f"model.layers.{layer}.{block}{path}" for block in ("", "self_attn.", "mlp.")}
    if found := meant.intersection(linears):
        return found.pop()
    raise UsageError(f"spectrum: there is no matrix {name[:60]!r}; name one as 3.self_attn.q_proj or 3.up_proj")


def _one(model: Model, module: str) -> np.ndarray:
    """One matrix, float64; the others are not read.

    Raises:
        GemmaTuiError: it has numbers that are not finite.
    """
    name = f"{module}.weight"
    _, w = next(weights_of(model, {name: model.config().parameter_shapes()[name]}))
    if not np.isfinite(w).all():
        raise GemmaTuiError(f"{model.name}: {name} has numbers that are not finite, so no spectrum: take another copy")
    return w.astype(np.float64)


def _matrix(name: str, w: np.ndarray, v: np.ndarray | None) -> Matrix:
    norm, largest = _norm(w)
    rms = norm / math.sqrt(w.size)
    if v is None:
        return Matrix(name, w.shape, norm, rms, largest)
    difference, moved = _norm(w, v)
    other, _ = _norm(v)
    relative = difference / other if other else (0.0 if difference == 0 else math.inf)
    return Matrix(name, w.shape, norm, rms, largest, difference, relative, moved)


def _norm(w: np.ndarray, v: np.ndarray | None = None) -> tuple[float, float]:
    """Frobenius norm of W, or of W - V, summed in float64, and the largest absolute value."""
    square, largest = 0.0, 0.0
    for start in range(0, len(w), ROWS):
        part = w[start : start + ROWS].astype(np.float64)
        if v is not None:
            part -= v[start : start + ROWS]
        square, largest = square + float((part * part).sum()), float(np.maximum(largest, np.abs(part).max()))
    return math.sqrt(square), largest


def _heat(config: Gemma3Config, found: list[Matrix], measure: str, title: str) -> Heat:
    """A row for each layer, a column for each linear."""
    values = np.full((config.num_hidden_layers, len(LINEARS)), math.nan)
    for each in found:
        parts = each.name.split(".")
        if len(parts) == 6 and parts[4] in LINEARS:
            values[int(parts[2]), LINEARS.index(parts[4])] = asdict(each)[measure]
    marks = ["▄" if config.is_local(i) else "█" for i in range(config.num_hidden_layers)]
    rows = [str(i) for i in range(config.num_hidden_layers)]
    return Heat(title, rows, LINEARS, values, marks=marks, meaning="█ global ▄ local", log=True)
