"""Greedy generation on the 270M against transformers and, for MLX, mlx-lm, in the same dtype.

python -m tests.benchmarks.generation [ROUNDS] [TOKENS]
"""

from __future__ import annotations

import sys
import time

from tests.benchmarks.measure import compare, report

PROMPT = "The capital of France is"


def gemma_tui(engine_name: str, dtype: str, count: int) -> None:
    """One of this program's engines."""
    from engines import open_engine
    from engines.base import Sampling
    from gemma_tui.hub.models import resolve
    from gemma_tui.tokenizer import read_tokenizer

    folder = resolve("gemma-3-270m").folder
    engine = open_engine(engine_name)
    engine.load(folder, dtype)
    prompt = read_tokenizer(folder).encode(PROMPT)
    list(engine.generate(prompt, Sampling(4)))
    began = time.perf_counter()
    list(engine.generate(prompt, Sampling(count)))
    report({"tokens_per_second": count / (time.perf_counter() - began)})


def transformers(dtype: str, count: int) -> None:
    """``transformers.generate``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gemma_tui.hub.models import resolve

    folder = resolve("gemma-3-270m").folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        model.generate(**ids, max_new_tokens=4, **options)
        began = time.perf_counter()
        model.generate(**ids, max_new_tokens=count, min_new_tokens=count, **options)
    report({"tokens_per_second": count / (time.perf_counter() - began)})


def mlx_lm(dtype: str, count: int) -> None:
    """mlx-lm's own generation."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    from gemma_tui.hub.models import resolve

    model, tokenizer = load(str(resolve("gemma-3-270m").folder))
    model.update(tree_map(lambda p: p.astype(getattr(mx, dtype)), model.parameters()))
    mx.eval(model.parameters())
    ids = mx.array(tokenizer.encode(PROMPT))
    for _ in zip(range(4), generate_step(ids, model, max_tokens=4), strict=False):
        pass
    began = time.perf_counter()
    made = sum(1 for _ in generate_step(ids, model, max_tokens=count))
    report({"tokens_per_second": made / (time.perf_counter() - began)})


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["torch" | "mlx" as name, dtype, count]:
            gemma_tui(name, dtype, int(count))
        case ["transformers", dtype, count]:
            transformers(dtype, int(count))
        case ["mlx_lm", dtype, count]:
            mlx_lm(dtype, int(count))
        case given:
            rounds, count = (*given, *("3", "24")[len(given) :])
            for ours, theirs in (("torch", "transformers"), ("mlx", "mlx_lm")):
                title = f"greedy generation on Gemma-3 270M, {ours}, float32"
                module = "tests.benchmarks.generation"
                compare(title, module, ours, theirs, int(rounds), ["float32", str(count)])
