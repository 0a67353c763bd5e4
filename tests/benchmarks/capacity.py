"""Sequences per second of ten small GPT-2 networks: trained side by side here, and one after the other by transformers.

One layer, width 32, 2,048 tokens, strings of 64, 200 in a step. Both take AdamW's steps in float32 on all cores;
transformers' loop is the plain one, ``loss.backward(); step(); zero_grad()``.

python -m tests.benchmarks.capacity [ROUNDS] [ENGINE] [HEADS]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from engines import open_engine
from engines.networks import NetworkShape, NetworkTraining
from tests.benchmarks.measure import machine

NETWORKS, BATCH, STEPS = 10, 200, 3


def ours(shape: NetworkShape, engine: str) -> Callable[[], float]:
    """Sequences per second of all ten networks."""
    networks = open_engine(engine).networks(shape, range(NETWORKS), NetworkTraining())
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, (NETWORKS, BATCH, shape.length), dtype=np.int32)
    rates = np.full(NETWORKS, 1e-3)
    networks.step(tokens, rates)

    def run() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            networks.step(tokens, rates)
        return NETWORKS * BATCH * STEPS / (time.perf_counter() - began)

    return run


def transformers_loop(shape: NetworkShape) -> Callable[[], float]:
    """The same of transformers: what one network takes is what each of ten takes."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocabulary, n_positions=shape.length, n_embd=shape.width, n_layer=shape.layers,
        n_head=shape.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, shape.vocabulary, (BATCH, shape.length))

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()

    def run() -> float:
        began = time.perf_counter()
        for _ in range(NETWORKS * STEPS):
            step()
        return NETWORKS * BATCH * STEPS / (time.perf_counter() - began)

    return run


def main(rounds: int, engine: str, heads: int) -> None:
    """Rounds in turn; ratios of each."""
    shape = NetworkShape("gpt2", 1, 32, heads, 2048, 64)
    theirs, stacked, ratios = transformers_loop(shape), ours(shape, engine), []
    for _ in range(rounds):
        plain = theirs()
        ratios.append(stacked() / plain)
    middle, ends = statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"ten networks of {shape.parameter_count():,} parameters, {heads} heads, {machine()}, {rounds} rounds")
    print(f"  {engine} / transformers + AdamW, sequences per second: {middle:.2f} ({ends})")


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(int(given.get(1, 5)), given.get(2, "torch"), int(given.get(3, 1)))
