"""How far the weights shown here are from those of an implementation that is not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from engines.torch.eager import eager_attention
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.figure import Figure, Table
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
    remember(reading.facts, worst, length)
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
    known = _known().get(_key(facts))
    if known is None:
        return "weights not checked against transformers (eager)"
    return f"weights checked against transformers (eager): max |Δ| {known['worst']:.1e} on T = {known['tokens']:,}"


def remember(facts: dict[str, Any], worst: float, length: int) -> None:
    """Keep the result of a check, for this model, engine and dtype."""
    known = _known() | {_key(facts): {"worst": worst, "tokens": length}}
    path = paths.home() / FILE
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(known, indent=1))
        part.replace(path)
    except OSError as error:
        raise GemmaTuiError(f"{path} cannot be written ({error.strerror}): the check is not kept") from None


def _key(facts: dict[str, Any]) -> str:
    files = [*Path(facts["model"]).glob("*.safetensors"), Path(facts["model"]) / "config.json"]
    stamps = [(path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(files) if path.is_file()]
    return " ".join(str(facts[name]) for name in KEYS) + f" {stamps}"


def _known() -> dict[str, dict[str, Any]]:
    try:
        known = json.loads((paths.home() / FILE).read_text())
        return {str(k): {"worst": float(v["worst"]), "tokens": int(v["tokens"])} for k, v in known.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}  # never checked, or a file that says nothing
