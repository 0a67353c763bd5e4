"""Set block decoding on both engines, against transformers' Gemma-3 under the dense masks of the paper."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import inside
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import close

from engines.base import Engine, Sampling
from engines.blocks import MASK, ORDERS, BlockDecoding, DecodingPass, Noise, Predictions, sure
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config
from engines.training import IGNORED, Batch, LoRASettings, OptimizerSettings, TrainingSettings

LENGTH, BLOCK, WINDOW = 23, 5, 8
PROMPTS = ([2, 9, 30, 31, 7, 7, 12, 40, 5, 33, 21, 2, 60], [2, 17, 50], [2, 3, 3, 9, 41, 28, 8])


def noised(length: int = LENGTH, block: int = BLOCK, seed: int = 0, rows: int = 2, **weights: float) -> Batch:
    """Random text, every third of whose tokens is not supervised, and a copy in which half of the others are masked."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, 64, (rows, length), dtype=np.int32)
    labels = np.full_like(tokens, IGNORED)
    labels[:, :-1] = tokens[:, 1:]
    labels[:, 2::3] = IGNORED
    copied = length // block * block
    masked = generator.random((rows, copied)) < 0.5
    masked[:, 0] = False
    masked[:, 1:] &= labels[:, : copied - 1] != IGNORED
    copy = np.where(masked, MASK, tokens[:, :copied]).astype(np.int32)
    own = np.where(masked, tokens[:, :copied], IGNORED).astype(np.int32)
    return Batch(tokens, labels, noise=Noise(copy, own, block, **weights))


def sees(query: int, key: int, length: int, block: int, window: float) -> bool:
    """Figure 9 of arXiv:2509.04185, for a text of some tokens and its copy after it, with a window by position."""
    q, k = query % length, key % length
    if q - k >= window:
        return False
    if query < length:
        return key < length and k <= q
    return k // block < q // block if key < length else k // block == q // block


def dense_logits(network: Any, tokens: np.ndarray, allowed: Callable[[float], np.ndarray], places: np.ndarray) -> Any:
    """transformers' logits under masks ``allowed(window)``, boolean ``[length, length]``, at given positions."""
    import torch

    def additive(window: float) -> Any:
        seen = torch.from_numpy(allowed(window))
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

    masks = {"full_attention": additive(math.inf), "sliding_attention": additive(WINDOW)}
    given = torch.from_numpy(tokens).long()
    return network(
        given, attention_mask=masks, position_ids=torch.from_numpy(places).long().expand(len(tokens), -1)
    ).logits


def oracle(network: Any, batch: Batch) -> tuple[Any, Any]:
    """Both losses, summed, with transformers' gradients."""
    from torch import from_numpy
    from torch.nn.functional import cross_entropy

    noise = batch.noised()
    length, copied = batch.tokens.shape[1], noise.tokens.shape[1]
    index = range(length + copied)

    def allowed(window: float) -> np.ndarray:
        return np.array([[sees(q, k, length, noise.block, window) for k in index] for q in index])

    tokens = np.concatenate((batch.tokens, noise.tokens), axis=1)
    places = np.array([*range(length), *range(copied)])
    logits = dense_logits(network, tokens, allowed, places)
    sides = (logits[:, :length], batch.labels), (logits[:, length:], noise.labels)
    text, copy = (
        cross_entropy(some.flatten(0, 1), from_numpy(labels).long().flatten(), ignore_index=IGNORED, reduction="sum")
        for some, labels in sides
    )
    return text, copy


@pytest.mark.parametrize(("length", "block"), [(23, 5), (24, 2), (17, 16), (40, 16)])
def test_both_losses_are_those_of_the_dense_mask(
    engine: Engine, folder: Path, reference_model: Callable[[Path], Any], length: int, block: int
) -> None:
    batch = noised(length, block)
    engine.load(folder, "float32")
    text, copy = oracle(reference_model(folder), batch)
    assert engine.loss(batch) == pytest.approx(text.item(), rel=1e-5)
    assert engine.masked_loss(batch) == pytest.approx(copy.item(), rel=1e-5)


def test_a_text_in_several_tiles_is_read_as_in_one(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load(folder, "float32")
    batch = noised(40, 4)
    whole = engine.masked_loss(batch)
    monkeypatch.setattr(inside.module(engine, "attention"), "TILE", 8)
    assert engine.masked_loss(batch) == pytest.approx(whole, rel=1e-6)


def test_a_mask_that_forgets_the_window_is_told(engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.load(folder, "float32")
    batch, attention = noised(), inside.module(engine, "attention")
    exact, right = engine.masked_loss(batch), attention._tiles
    monkeypatch.setattr(attention, "_tiles", lambda places, block, window: right(places, block, None))
    assert abs(engine.masked_loss(batch) - exact) > 1e-4 * exact


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
def test_a_step_goes_down_the_weighted_sum(
    engine: Engine, folder: Path, reference_model: Callable[[Path], Any], weights: tuple[float, float]
) -> None:
    """With plain gradient descent the change of a weight is its gradient."""
    batch = noised(next_token_weight=weights[0], masked_weight=weights[1])
    network = reference_model(folder)
    text, copy = oracle(network, batch)
    ((weights[0] * text + weights[1] * copy) / batch.supervised).backward()
    engine.load(folder, "float32")
    before = inside.weights(engine)
    engine.start_training(TrainingSettings(optimizer=OptimizerSettings("sgd", momentum=0.0), clip=0.0))
    result = engine.train_step([batch], 1.0)
    assert result.loss == pytest.approx(text.item() / batch.supervised, rel=1e-5)
    assert result.masked_loss == pytest.approx(copy.item() / batch.masked, rel=1e-5)
    for name, parameter in network.named_parameters():
        after = inside.weights(engine)[name]
        close(before[name] - after, parameter.grad.numpy(), 1e-4, name)


@pytest.mark.parametrize("lora", [None, LoRASettings(rank=2, alpha=4.0)])
def test_without_weight_the_copy_changes_nothing(engine: Engine, folder: Path, lora: LoRASettings | None) -> None:
    batch, trained = noised(masked_weight=0.0), []
    for some in (batch, dataclasses.replace(batch, noise=None)):
        engine.load(folder, "float32")
        engine.start_training(TrainingSettings(lora))
        results = [engine.train_step([some], 1e-2) for _ in range(3)]
        assert all(result.masked_loss is None for result in results)
        trained.append(inside.weights(engine))
    for name, value in trained[0].items():
        np.testing.assert_array_equal(value, trained[1][name], err_msg=name)


def test_micro_batches_weigh_what_is_in_them(engine: Engine, folder: Path) -> None:
    batch, seen = noised(rows=4), []
    for parts in ([batch], batch.split(4)):
        engine.load(folder, "float32")
        engine.start_training(TrainingSettings(optimizer=OptimizerSettings(epsilon=1.0)))
        seen.append(engine.train_step(parts, 1e-2))
    assert seen[0].loss == pytest.approx(seen[1].loss, rel=1e-5)
    assert seen[0].masked_loss == pytest.approx(seen[1].masked_loss, rel=1e-5)
    assert seen[0].grad_norm == pytest.approx(seen[1].grad_norm, rel=1e-4)


def block_oracle(network: Any, prompt: Sequence[int], count: int, how: BlockDecoding, stops: Sequence[int] = ()) -> Any:
    """Tokens and passes of set block decoding without a cache: the text causally, the block on top, every time anew."""
    import torch

    text, passes = list(prompt), 0
    while len(text) < len(prompt) + count:
        size = min(how.block, len(prompt) + count - len(text))
        block, length = [how.mask] * size, len(text)

        def allowed(window: float, length: int = length, size: int = size) -> np.ndarray:
            index = np.arange(length + size)
            seen = index <= np.where(index < length, index, length + size)[:, None]
            return seen & (index[:, None] - index < window)

        while how.mask in block:
            with torch.no_grad():
                tokens = np.array([[*text, *block]])
                logits = dense_logits(network, tokens, allowed, np.arange(tokens.size))[0]
            logits = logits[length:] if size > 1 else logits[length - 1 : length]
            logits[:, how.mask] = -torch.inf
            p = logits.double().softmax(dim=-1)
            entropies = torch.special.entr(p).sum(dim=-1).tolist()
            two = p.topk(2).values.tolist()
            proxies = {"entropy": entropies, "confidence": [-a for a, _ in two], "margin": [b - a for a, b in two]}
            ranked = sorted((i for i in range(size) if block[i] == how.mask), key=lambda i: proxies[how.order][i])
            taken: list[int] = []
            for i in ranked:
                bound = [entropies[j] for j in (*taken, i)]
                if taken and sum(bound) - max(bound) > how.gamma:
                    break
                taken.append(i)
            for i in taken:
                block[i] = int(logits[i].argmax())
            passes += 1
            ends = [i for i in range(size) if block[i] in stops]
            if ends and how.mask not in block[: ends[0]]:
                return text[len(prompt) :] + block[: ends[0] + 1], passes
        text += block
    return text[len(prompt) :], passes


def written(passes: Sequence[DecodingPass], prompts: int, stops: Sequence[int] = ()) -> list[list[int]]:
    """The tokens of each prompt, up to and with its first stop."""
    texts: list[dict[int, int]] = [{} for _ in range(prompts)]
    for said in passes:
        for row, place, token in zip(*(a[said.decided] for a in (said.rows, said.places, said.tokens)), strict=True):
            assert place not in texts[row]
            texts[row][int(place)] = int(token)
    found = []
    for text in texts:
        tokens = [text[place] for place in sorted(text)]
        ends = [i for i, token in enumerate(tokens) if token in stops]
        found.append(tokens[: ends[0] + 1] if ends else tokens)
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("block", "gamma"), [(4, 0.0), (4, 3.5), (6, 8.0), (3, math.inf)])
def test_blocks_are_decided_as_without_a_cache(
    engine: Engine, folder: Path, reference_model: Callable[[Path], Any], block: int, gamma: float, order: str
) -> None:
    """The text outgrows the window of 8; the last block is a shorter one."""
    how = BlockDecoding(block, gamma, order)
    engine.load(folder, "float32")
    passes = list(engine.decode([PROMPTS[0]], Sampling(max_tokens=14), how))
    tokens, count = block_oracle(reference_model(folder), PROMPTS[0], 14, how)
    assert written(passes, 1) == [tokens]
    assert len(passes) == count
    assert all(said.decided.any() for said in passes)


def test_one_token_at_a_time_is_greedy_decoding(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    text = list(PROMPTS[0])
    for _ in range(20):
        text.append(int(engine.logits(np.array([text], np.int32))[0, -1].argmax()))
    sampling = Sampling(max_tokens=20)
    assert list(engine.generate(PROMPTS[0], sampling)) == text[len(PROMPTS[0]) :]
    passes = list(engine.decode([PROMPTS[0]], sampling, BlockDecoding(1, 0.0)))
    assert written(passes, 1) == [text[len(PROMPTS[0]) :]]
    assert [said.width for said in passes] == [len(PROMPTS[0])] + [1] * 19


@pytest.mark.parametrize("blocks", [None, BlockDecoding(4, 3.5)])
def test_prompts_side_by_side_are_written_as_alone(engine: Engine, folder: Path, blocks: BlockDecoding | None) -> None:
    """Some of them end earlier; what they are told is what they are told alone."""
    engine.load(folder, "float32")
    alone = [list(engine.decode([prompt], Sampling(max_tokens=15), blocks)) for prompt in PROMPTS]
    stops = (written(alone[1], 1)[0][6],)
    sampling = Sampling(max_tokens=15, stop_ids=stops)
    together = written(list(engine.decode(PROMPTS, sampling, blocks)), 3, stops)
    apart = [written(list(engine.decode([prompt], sampling, blocks)), 1, stops)[0] for prompt in PROMPTS]
    assert together == apart
    assert len(apart[1]) <= 7
    beside = next(engine.decode(PROMPTS, sampling, blocks))
    for row, first in enumerate(passes[0] for passes in alone):
        np.testing.assert_allclose(beside.entropies[beside.rows == row], first.entropies, rtol=1e-5)


def test_nobody_waits_for_what_comes_after_a_stop(
    engine: Engine, folder: Path, reference_model: Callable[[Path], Any]
) -> None:
    """One place a pass is decided, so that a whole block takes six."""
    engine.load(folder, "float32")
    how, network, counts = BlockDecoding(6, 0.0), reference_model(folder), []
    free, _ = block_oracle(network, PROMPTS[0], 12, how)
    for stop in {*free[:4], *free[6:10]}:
        tokens, count = block_oracle(network, PROMPTS[0], 12, how, (stop,))
        passes = list(engine.decode([PROMPTS[0]], Sampling(max_tokens=12, stop_ids=(stop,)), how))
        assert written(passes, 1, (stop,)) == [tokens]
        assert len(passes) == count
        counts.append(count)
    assert any(count % 6 for count in counts)


def test_what_a_pass_says_is_what_the_model_says(engine: Engine, folder: Path) -> None:
    """Next-token entropies and probabilities are those of the logits, at any temperature."""
    engine.load(folder, "float32")
    passes = list(engine.decode([PROMPTS[0]], Sampling(max_tokens=6, temperature=3.0, top_k=5, seed=3)))
    (tokens,) = written(passes, 1)
    logits = engine.logits(np.array([[*PROMPTS[0], *tokens]], np.int32))[0, len(PROMPTS[0]) - 1 : -1]
    p = np.exp(logits - logits.max(-1, keepdims=True).astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    found = [(float(said.entropies[0]), float(said.probabilities[0])) for said in passes]
    expected = [(float(-(row * np.log(row)).sum()), float(row[token])) for row, token in zip(p, tokens, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert tokens != logits.argmax(-1).tolist()


def test_the_mask_is_never_written(engine: Engine, folder: Path) -> None:
    """Whichever token the model would take first is the mask now."""
    engine.load(folder, "float32")
    for blocks in (BlockDecoding(1), BlockDecoding(4, math.inf)):
        favourite = int(next(engine.decode([PROMPTS[0]], Sampling(max_tokens=4), blocks)).tokens[0])
        banned = dataclasses.replace(blocks, mask=favourite)
        for temperature in (0.0, 5.0):
            sampling = Sampling(max_tokens=30, temperature=temperature)
            (tokens,) = written(list(engine.decode([PROMPTS[0]], sampling, banned)), 1)
            assert len(tokens) == 30
            assert favourite not in tokens


def test_a_penalty_reaches_over_prompt_and_block(engine: Engine, folder: Path) -> None:
    """With an overwhelming one nothing is written twice, nor anything of the prompt."""
    engine.load(folder, "float32")
    for blocks in (None, BlockDecoding(4, math.inf)):
        sampling = Sampling(max_tokens=12, repetition_penalty=1e6)
        logits = engine.logits(np.array([PROMPTS[0]], np.int32))
        assert logits.max() > 0
        (tokens,) = written(list(engine.decode([PROMPTS[0]], sampling, blocks)), 1)
        assert len({*tokens, *PROMPTS[0]}) == len(tokens) + len(set(PROMPTS[0]))


@pytest.mark.parametrize(
    "blocks",
    [BlockDecoding(0), BlockDecoding(gamma=-0.1), BlockDecoding(gamma=math.nan), BlockDecoding(order="best")],
)
def test_blocks_that_cannot_be_are_refused(engine: Engine, folder: Path, blocks: BlockDecoding) -> None:
    engine.load(folder, "float32")
    with pytest.raises(UnsupportedError):
        engine.decode([PROMPTS[0]], Sampling(), blocks)


def test_an_empty_prompt_is_refused(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    for prompts in ([], [PROMPTS[0], []]):
        with pytest.raises(UnsupportedError, match="no tokens"):
            engine.decode(prompts, Sampling())


def predictions(entropies: Sequence[float], tops: Sequence[float], seconds: Sequence[float]) -> Predictions:
    count = len(entropies)
    return Predictions(np.zeros(count, np.int32), *(np.array(x, np.float32) for x in (entropies, tops, seconds)))


@pytest.mark.parametrize(("gamma", "count"), [(0.0, 2), (0.1, 3), (0.15001, 4), (math.inf, 4)])
def test_the_bound_leaves_out_the_largest(gamma: float, count: int) -> None:
    said = predictions([0.5, 0.05, 0.0, 0.1], [0.5, 0.9, 1, 0.8], [0.3, 0, 0, 0])
    assert np.flatnonzero(sure(said, gamma, "entropy")).tolist() == sorted([2, 1, 3, 0][:count])


def test_the_order_says_what_comes_first() -> None:
    said = predictions([1.0, 1.2, 1.1], [0.5, 0.6, 0.55], [0.1, 0.35, 0.05])
    assert [np.flatnonzero(sure(said, 0.0, order)).tolist() for order in ORDERS] == [[0], [1], [2]]


@given(st.lists(st.floats(0, 5), min_size=1, max_size=20), st.lists(st.floats(0, 9), min_size=2, max_size=5))
def test_a_larger_bound_decides_no_less(entropies: list[float], gammas: list[float]) -> None:
    said = predictions(entropies, [1.0] * len(entropies), [0.0] * len(entropies))
    found = [sure(said, gamma, "entropy") for gamma in sorted(gammas)]
    assert all(some.any() for some in found)
    assert all((less <= more).all() for less, more in pairwise(found))


def test_the_window_is_the_one_of_the_masks(config: Gemma3Config) -> None:
    assert config.sliding_window == WINDOW
