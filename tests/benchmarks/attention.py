"""Statistics of all heads of the 270M, torch, float32, against transformers' eager weights and numpy.

python -m tests.benchmarks.attention [ROUNDS] [LENGTH]

Memory is counted from where the weights are loaded and used once. Afterwards ``nano`` reads 8,192 tokens, beside what
the eager weights of such a text would take.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np
import psutil

from engines.base import Engine
from tests.benchmarks.measure import Numbers, compare, report, resident, side

MODULE, MODEL = "tests.benchmarks.attention", "gemma-3-270m"
LONG = 8192


def text(length: int, vocabulary: int) -> np.ndarray:
    """int32 ids with repetitions, the same for both sides."""
    return np.random.default_rng(0).integers(3, vocabulary, length // 2).astype(np.int32).repeat(2)


def gemma_tui(length: int) -> None:
    """This program's torch engine."""
    from engines import open_engine
    from gemma_tui.hub.models import resolve

    engine = open_engine("torch")
    engine.load(resolve(MODEL).folder, "float32")
    all_statistics(engine, length)


def nano(length: int) -> None:
    """The same for the shape of ``nano``, whose own context is shorter, with random weights."""
    from engines import open_engine
    from engines.gemma3 import read_config
    from gemma_tui.hub.models import resolve

    engine = open_engine("torch")
    engine.initialise(replace(read_config(resolve("nano").folder), max_position_embeddings=length), 0, "float32")
    all_statistics(engine, length)


def all_statistics(engine: Engine, length: int) -> None:
    """Those of every layer of the loaded model."""
    info = engine.model()
    assert info is not None
    ids = text(length, info.config.vocab_size)
    engine.log_probs(ids[None, :8])
    loaded, began = resident(), clocks()
    inspection = engine.inspect(ids)
    sums = [inspection.statistics(layer) for layer in range(info.config.num_hidden_layers)]
    finish(began, loaded, sum(float(s.entropy.mean()) for s in sums))


def transformers(length: int) -> None:
    """All weights of an eager model at once, then each layer's statistics."""
    import torch
    from transformers import AutoModelForCausalLM

    from gemma_tui.hub.models import resolve

    folder = resolve(MODEL).folder
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    config, values = network.config, []
    ids = text(length, config.vocab_size)
    with torch.no_grad():
        network(torch.from_numpy(ids[None, :8]).long())
        for layer in network.model.layers:
            layer.self_attn.v_proj.register_forward_hook(lambda _, __, v: values.append(v[0].numpy()))
        loaded, began = resident(), clocks()
        weights = network.model(torch.from_numpy(ids[None]).long(), output_attentions=True).attentions
    edges, total = Edges(ids), 0.0
    for a, v, kind in zip(weights, values, config.layer_types, strict=True):
        shaped = v.reshape(length, config.num_key_value_heads, -1).swapaxes(0, 1)
        window = None if kind == "sliding_attention" else config.sliding_window
        total += float(edges.statistics(a[0].numpy(), shaped, window)["entropy"].mean())
    finish(began, loaded, total)


class Edges:
    """What is alike in all layers, and the statistics of ``engines.inspection.LayerStatistics`` from dense weights."""

    def __init__(self, ids: np.ndarray) -> None:
        places = np.arange(len(ids))
        self.distance = places[:, None] - places
        self.duplicate = ((ids[:, None] == ids) & (self.distance > 0)).astype(np.float32)
        self.induction = np.zeros_like(self.duplicate)
        self.induction[:, 1:] = self.duplicate[:, :-1]
        self.reach = (self.distance * (places > 0)).astype(np.float32)

    def statistics(self, a: np.ndarray, v: np.ndarray, window: int | None) -> dict[str, np.ndarray]:
        """Of weights ``[heads, T, T]`` and values ``[kv_heads, T, head_dim]``; every sum over edges is one product."""
        heads, length, _ = a.shape
        norm = np.sqrt(np.einsum("hkd,hkd->hk", v, v))
        logs = np.log(np.maximum(a, 1e-37))
        found = {
            "entropy": -np.einsum("hqk,hqk->hq", a, logs),
            "first": a[:, :, 0],
            "elsewhere": a[:, :, 1:].sum(-1),
            "weighted_value": (a.reshape(len(v), -1, length) @ norm[:, :, None]).reshape(heads, length),
            "previous": np.pad(a.diagonal(-1, 1, 2), ((0, 0), (1, 0))),
            "received": a.sum(1),
            "value_norm": norm,
        }
        del logs
        for name in ("reach", "duplicate", "induction"):
            found[name] = np.einsum("hqk,qk->hq", a, getattr(self, name))
        if window is not None:
            found["beyond"] = np.einsum("hqk,qk->hq", a, (self.distance >= window).astype(np.float32))
        # Each row moved by one against the one before, so that a distance becomes a column.
        room = np.zeros((heads, length * (2 * length + 1)), np.float32)
        room[:, : 2 * length * length].reshape(heads, length, -1)[:, :, length - 1 : 2 * length - 1] = a
        found["by_distance"] = room.reshape(heads, length, -1).sum(1)[:, :length][:, ::-1]
        return found


def clocks() -> tuple[float, float]:
    """Seconds that went by, and seconds of computing."""
    return time.perf_counter(), time.process_time()


def finish(began: tuple[float, float], loaded: int, entropy: float) -> None:
    """Report time and memory, and the sum over the layers of the mean entropy, by which both sides can be compared."""
    seconds, cpu = (now - then for now, then in zip(clocks(), began, strict=True))
    report({"seconds": seconds, "cpu_seconds": cpu, "entropy": entropy}, loaded)


def long_text(found: Numbers) -> None:
    """Print what a long text took, beside what eager weights would."""
    from engines.gemma3 import read_config
    from gemma_tui.hub.models import resolve

    config = read_config(resolve("nano").folder)
    eager = (config.num_hidden_layers + 1) * config.num_attention_heads * LONG**2 * 4
    memory = psutil.virtual_memory().total
    print(f"statistics of all heads of nano's shape at {LONG:,} tokens")
    print(f"  gemma_tui: {found['seconds']:.1f} s, {found['memory_above_weights'] / 1e9:.2f} GB above the weights")
    print(f"  eager weights, of all layers and once more in the softmax: {eager / 1e9:.1f} GB")
    print(f"  memory of this machine: {memory / 1e9:.1f} GB")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["gemma_tui", length]:
            gemma_tui(int(length))
        case ["transformers", length]:
            transformers(int(length))
        case ["nano", length]:
            nano(int(length))
        case given:
            rounds, length = (*map(int, given), *(3, 2048)[len(given) :])
            title = f"statistics of all heads of Gemma-3 270M at {length:,} tokens, torch, float32"
            compare(title, MODULE, "gemma_tui", "transformers", rounds, [str(length)])
            long_text(side(MODULE, "nano", str(LONG)))
