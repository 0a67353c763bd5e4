"""What local and global layers do differently: distances, mass beyond the window, pressure on its edge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engines.inspection import LayerStatistics
from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.studies.attention.heads import METRICS, head_metrics
from gemma_tui.studies.attention.reading import Reading, View, window_notes

SHOWN = ("entropy_normalised", "distance", "distance_without_sink", "sink", "beyond", "edge")
PIECES = 16


def local_global(reading: Reading) -> View:
    """Histograms of distance by layer type, and how the mass beyond the window grows with the context."""
    config, window = reading.inspection.config, reading.inspection.config.sliding_window
    statistics = yield from reading.all_statistics()
    kinds = {
        "local": [s for layer, s in enumerate(statistics) if config.is_local(layer)],
        "global": [s for layer, s in enumerate(statistics) if not config.is_local(layer)],
    }
    kinds = {kind: found for kind, found in kinds.items() if found}
    heads = head_metrics(statistics, config)
    local = np.array([config.is_local(layer) for layer in range(config.num_hidden_layers)])
    rows = [(kind, *(_mean(heads[name][local if kind == "local" else ~local]) for name in SHOWN)) for kind in kinds]
    distances = {kind: histogram(found) for kind, found in kinds.items()}
    notes = window_notes(reading)
    if "global" in kinds and not notes:
        share = _mean(heads["beyond"][~local])
        notes.append(f"global heads put {share:.1%} of their mass on tokens a local head cannot see")
    return Figure(
        "local against global layers",
        notes=[*notes, "mass at each distance, means over heads and queries; position 0 is not left out"],
        charts=[
            LineChart("attention mass by distance", _distance_series(distances, window), "distance, tokens", log=True),
            LineChart("share beyond the window", _beyond_series(kinds, window), "position of the query"),
        ],
        tables=[Table("layers", ("layers", *SHOWN), rows)],
        arrays={f"mass_by_distance_{kind}": mass for kind, mass in distances.items()},
        facts={**reading.facts, "metrics": {name: METRICS[name].meaning for name in SHOWN}},
    )


def histogram(statistics: Sequence[LayerStatistics]) -> np.ndarray:
    """Mean attention mass at each distance, float64 ``[T]``, which sums to one."""
    length = statistics[0].by_distance.shape[1]
    return np.mean([s.by_distance.mean(0, dtype=np.float64) for s in statistics], axis=0) / length


def _distance_series(distances: dict[str, np.ndarray], window: int) -> list[Series]:
    series = [Series(kind, np.arange(len(mass), dtype=float), mass) for kind, mass in distances.items()]
    seen = np.concatenate([mass[mass > 0] for mass in distances.values()])
    if next(iter(distances.values())).size > window:
        series.append(Series(f"window {window}", [window, window], [float(seen.min()), float(seen.max())]))
    return series


def _beyond_series(kinds: dict[str, list[LayerStatistics]], window: int) -> list[Series]:
    """The mean over heads of the mass that a query puts beyond the window, in pieces of the text."""
    found = kinds.get("global", [])
    if not found or found[0].beyond.shape[1] <= window:
        return []
    rows = np.mean([s.beyond.mean(0, dtype=np.float64) for s in found], axis=0)
    pieces = [piece for piece in np.array_split(np.arange(len(rows)), PIECES) if len(piece)]
    x = [float(piece.mean()) for piece in pieces]
    return [Series("global", x, [float(rows[piece].mean()) for piece in pieces])]


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
