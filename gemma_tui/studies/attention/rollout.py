"""Attention rollout: where weights lead back to, multiplied through the layers (Abnar & Zuidema, arXiv:2005.00928)."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.heat import Heat
from gemma_tui.plots import Series
from gemma_tui.studies.attention.attribution import resolved
from gemma_tui.studies.attention.pooling import cells
from gemma_tui.studies.attention.reading import Reading, View, window_notes

TOP = 20
"""Sources that are listed."""

COLUMNS = 64
"""Cells of the map at most."""

DEFINITION = (
    "row of the position in (0.5 A_l + 0.5 I) ⋯ (0.5 A_0 + 0.5 I), A the mean of a layer's heads (arXiv:2005.00928)"
)

CAVEAT = (
    "weights are not contributions: values, o_proj, norms and MLPs are left out, heads count alike, "
    "and 0.5 for the residual stream is a convention"
)


def rollout_view(reading: Reading, position: int) -> View:
    """How much of each token the weights lead to from a position, through as many layers as there are up to each.

    Args:
        position: negative ones count from the end.

    Raises:
        UsageError: a position that is not there.
    """
    position = resolved(reading, position)
    mass = yield from rollout(reading, position)
    config = reading.inspection.config
    return Figure(
        f"rollout from {reading.labels[position]}, position {position}",
        notes=_notes(reading, position, mass),
        heats=[_heat(reading, mass)],
        charts=[_chart(reading, position, mass)],
        tables=[_sources(reading, mass[-1]), _layers(reading, position, mass)],
        arrays={"rollout": mass},
        facts={
            **reading.facts, "position": position, "definition": DEFINITION, "caveat": CAVEAT,
            "kinds": ["local" if config.is_local(layer) else "global" for layer in range(len(mass))],
        },
    )  # fmt: skip


def rollout(reading: Reading, position: int) -> Generator[float, None, np.ndarray]:
    """The rollouts from a position through layers 0 to l, for every l, float32 ``[layers, position + 1]``.

    Rows go down through the layers, one joining at each; nothing of T × T is kept.
    """
    inspection = reading.inspection
    layers = inspection.config.num_hidden_layers
    for layer in range(layers):
        inspection.advance(layer)
        yield (layer + 1) / (2 * layers)
    mass = np.zeros((layers, position + 1), np.float32)
    mass[:, position] = 1
    for done, layer in enumerate(reversed(range(layers)), 1):
        mass[layer:] = (inspection.carried(layer, mass[layer:]) + mass[layer:]) / 2
        yield (layers + done) / (2 * layers)
    return mass


def _notes(reading: Reading, position: int, mass: np.ndarray) -> list[str]:
    last = mass[-1].astype(np.float64)
    return [
        CAVEAT,
        f"through all layers {last[0]:.4f} leads to position 0 {reading.labels[0]}, {last[position]:.4f} to itself; "
        f"sum - 1 = {last.sum() - 1:.1e}",
        *window_notes(reading),
    ]


def _heat(reading: Reading, mass: np.ndarray) -> Heat:
    """A cell of several tokens is their sum."""
    config, count = reading.inspection.config, mass.shape[1]
    edges = cells((0, count), COLUMNS)
    ends = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    names = [f"{reading.labels[a]} {a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in ends]
    marks = ["·" if config.is_local(layer) else "G" for layer in range(len(mass))]
    sums = np.add.reduceat(mass.astype(np.float64), edges[:-1], axis=1)
    meaning = "through layers 0 to the row's; G global, · local" + ("; cells are sums" if count > COLUMNS else "")
    return Heat("rollout by layer (down) and token (across)", [f"L{i}" for i in range(len(mass))], names, sums, "",
                marks, meaning, log=True)  # fmt: skip


def _parts(reading: Reading, position: int, mass: np.ndarray) -> dict[str, np.ndarray]:
    """Shares of each row: itself, position 0, farther than one window reaches."""
    far = max(0, position + 1 - reading.inspection.config.sliding_window)
    rows = mass.astype(np.float64)
    return {"itself": rows[:, position], "position 0": rows[:, 0], "beyond the window": rows[:, :far].sum(1)}


def _chart(reading: Reading, position: int, mass: np.ndarray) -> LineChart:
    layers = np.arange(len(mass), dtype=float)
    series = [Series(name, layers, share) for name, share in _parts(reading, position, mass).items()]
    return LineChart("where the rollout leads", series, "through layer")


def _layers(reading: Reading, position: int, mass: np.ndarray) -> Table:
    config, parts = reading.inspection.config, _parts(reading, position, mass)
    rows = [
        (
            f"L{layer}",
            "local" if config.is_local(layer) else "global",
            *(float(share[layer]) for share in parts.values()),
        )
        for layer in range(len(mass))
    ]
    return Table("layer", ("through", "layer", "itself", "position_0", "beyond_window"), rows)


def _sources(reading: Reading, mass: np.ndarray) -> Table:
    order = np.argsort(-mass, kind="stable")[:TOP]
    rows = [(int(at), reading.labels[at], float(mass[at])) for at in order]
    return Table("source", ("position", "token", "rollout"), rows)
