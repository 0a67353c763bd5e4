"""How far the weights shown here are from those of an implementation that is not ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engines import eager_attention
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure, Table
from gemma_tui.remembered import recall, remember
from gemma_tui.studies.attention.heads import grid
from gemma_tui.studies.attention.reading import Reading, View

BEYOND = 64
"""Tokens beyond the window in the text that is compared, so that the window is."""

FILE = "checked.json"
KEYS = ("model", "engine", "device", "version", "dtype")


def parity(reading: Reading) -> View:
    """Compare every weight of the beginning of a text with transformers' eager attention in float32, and remember it.

    Raises:
        UsageError: an adapter is on the model, or it was trained since it was loaded.
        UnsupportedError: transformers is not installed.
        GemmaTuiError: the result cannot be kept.
    """
    if reading.facts["adapter"]:
        raise UsageError("the check reads a whole model: fuse the adapter first with `gemma-tui adapters fuse`")
    if reading.facts["trained"]:
        raise UsageError("the check reads a model from its folder, and this one was trained since: load it again")
    config = reading.inspection.config
    length = min(reading.length, config.sliding_window + BEYOND)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    # The first words of a causal model do not depend on the rest, so the whole text's weights can be compared.
    found = np.zeros((layers, heads))
    for layer, expected in enumerate(eager_attention(Path(reading.facts["model"]), reading.tokens[:length])):
        for head in range(heads):
            ours = reading.inspection.attention(layer, head, (0, length))[:, :length]
            found[layer, head] = np.abs(ours - expected[head]).max()
        yield (layer + 1) / layers
    worst = float(found.max())
    remember(FILE, "the check", {_key(reading.facts): {"worst": worst, "tokens": length}})
    return Figure(
        "check against transformers' eager attention",
        notes=[badge(reading.facts)],
        heats=[grid(found, config, "largest |difference| of a weight", "")],
        tables=[Table("check", ("tokens", "largest difference"), [(length, worst)])],
        arrays={"difference": found},
        facts=reading.facts,
    )


def badge(facts: dict[str, Any]) -> str:
    """What a view says of the weights it is made of."""
    if facts["adapter"] or facts["trained"]:
        why = "an adapter is on the model" if facts["adapter"] else "the model was trained since it was loaded"
        return f"weights not checked against transformers (eager): {why}"
    known = _known(facts)
    if known is None:
        return "weights not checked against transformers (eager)"
    return f"weights checked against transformers (eager): max |Δ| {known[0]:.1e} on T = {known[1]:,}"


def _key(facts: dict[str, Any]) -> str:
    files = [*Path(facts["model"]).glob("*.safetensors"), Path(facts["model"]) / "config.json"]
    stamps = [(path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(files) if path.is_file()]
    return " ".join(str(facts[name]) for name in KEYS) + f" {stamps}"


def _known(facts: dict[str, Any]) -> tuple[float, int] | None:
    """The largest difference of a check of the same weights, and the tokens it was taken on."""
    try:
        found = recall(FILE)[_key(facts)]
        return float(found["worst"]), int(found["tokens"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None  # never checked, or a file that says nothing
