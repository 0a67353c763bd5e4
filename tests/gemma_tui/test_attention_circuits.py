"""Circuits of a layer by the formula with the weights of the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from insides import model, normed, reading_of, rows, run, text_ids, weights

from gemma_tui.errors import UsageError
from gemma_tui.studies.attention.circuits import circuits_view, sample
from gemma_tui.tokenizer import BOS

LAYER, POSITION = 1, 60


def embedded(arrays: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Bare tokens as a layer sees them."""
    table = arrays["model.embed_tokens.weight"].astype(np.float64)
    scale = np.float32(table.shape[1] ** 0.5)
    return normed(table[tokens] * scale, arrays[f"model.layers.{LAYER}.input_layernorm.weight"])


def dense(reading: Any, arrays: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits less their mean, ``[heads, tokens, vocabulary]``; the scale of the post-norm is that of the run."""
    config, inspection = reading.inspection.config, reading.inspection
    prefix, heads = f"model.layers.{LAYER}.", config.num_attention_heads
    here, last = (POSITION, POSITION + 1), config.num_hidden_layers
    matrix = arrays[prefix + "self_attn.o_proj.weight"].astype(np.float64).reshape(config.hidden_size, heads, -1)
    z = inspection.head_outputs(LAYER, range(heads), here)[:, 0].astype(np.float64)
    y, r = np.einsum("dhe,he->d", matrix, z), inspection.stream(last, here)[0].astype(np.float64)
    gains = 1 + arrays[prefix + "post_attention_layernorm.weight"].astype(np.float64)
    gains = gains * (1 + arrays["model.norm.weight"]) / np.sqrt(((y**2).mean() + 1e-6) * ((r**2).mean() + 1e-6))
    v = embedded(arrays, tokens) @ arrays[prefix + "self_attn.v_proj.weight"].T
    v = v.reshape(len(tokens), config.num_key_value_heads, -1).repeat(heads // config.num_key_value_heads, 1)
    logits = np.einsum("the,dhe,d,wd->htw", v, matrix, gains, arrays["model.embed_tokens.weight"], optimize=True)
    return logits - logits.mean(-1, keepdims=True)


@pytest.mark.parametrize("named", [None, 311])
def test_circuits_are_those_of_the_weights(
    engine: Any, tiny_folder: Any, two_to_one: Any, tokenizer: Any, named: int | None
) -> None:
    folder = model(tiny_folder, two_to_one, tokenizer)
    reading = reading_of(engine, folder, tokenizer, text_ids(70))
    figure, _ = run(circuits_view(reading, LAYER, POSITION, named))
    token = int(reading.tokens[POSITION]) if named is None else named
    arrays, tried = weights(folder), reading.tokens[sample(reading.tokens)]
    (one,), every = dense(reading, arrays, np.array([token])).swapaxes(0, 1), dense(reading, arrays, tried)
    size = 1e-4 * np.abs(every).max()
    for row in rows(figure, "ov"):
        head, place = int(row["head"][-1]), row["place"]
        order = np.argsort(one[head])
        for name, at in (("raised", order[-place]), ("lowered", order[place - 1])):
            assert row[f"{name}_by"] == pytest.approx(one[head, at], abs=size)
            assert row[name] == shown(tokenizer, at)
    assert [(row["head"], row["place"]) for row in rows(figure, "ov")][3:5] == [("L1.H3", 1), ("L1.H0", 2)]
    assert len(rows(figure, "ov")) == 4 * 10
    own = np.take_along_axis(every, tried[None, :, None].astype(int), -1)
    rank = (every > own).sum(-1)
    found = {row["head"]: row for row in rows(figure, "copying")}
    for head in range(4):
        row = found[f"L1.H{head}"]
        assert row["raised"] == (own[head] > 0).mean()
        assert row["in_top_10"] == (rank[head] < 10).mean()
        assert (row["mean_rank"], row["median_rank"]) == (rank[head].mean() + 1, np.median(rank[head]) + 1)
        assert row["deviations"] == pytest.approx((own[head, :, 0] / every[head].std(-1)).mean(), abs=1e-4)
    assert [row["mean_rank"] for row in rows(figure, "copying")] == sorted(row["mean_rank"] for row in found.values())
    assert np.array_equal(figure.heats[0].values, rank + 1)
    check_queries(figure, reading, arrays, token, tried)


def shown(tokenizer: Any, token: int) -> str:
    from gemma_tui.studies.attention.reading import label

    return label(tokenizer, int(token))


def check_queries(figure: Any, reading: Any, arrays: Any, token: int, tried: np.ndarray) -> None:
    prefix, config = f"model.layers.{LAYER}.self_attn.", reading.inspection.config

    def made(tokens: np.ndarray, name: str) -> np.ndarray:
        x = embedded(arrays, tokens) @ arrays[f"{prefix}{name}_proj.weight"].T
        return normed(x.reshape(len(tokens), -1, config.head_dim), arrays[f"{prefix}{name}_norm.weight"])

    q, k = made(np.array([token]), "q")[0], made(tried, "k").repeat(2, 1)
    scores = np.einsum("he,the->ht", q, k) * config.query_pre_attn_scalar**-0.5
    for row in rows(figure, "qk"):
        head = int(row["head"][-1])
        at = np.argsort(-scores[head])[row["place"] - 1]
        assert row["score"] == pytest.approx(scores[head, at], abs=1e-3)
        assert row["key"] == shown(reading.tokenizer, tried[at])
    assert len(rows(figure, "qk")) == 40


def test_a_head_made_to_copy_copies(torch_engine: Any, tiny_folder: Any, two_to_one: Any, tokenizer: Any) -> None:
    """Its output map is the transpose of its value map, so that a token's own direction comes back."""
    from engines.checkpoints import write_arrays

    folder = model(tiny_folder, two_to_one, tokenizer, seed=5)
    arrays = weights(folder)
    values = arrays["model.layers.1.self_attn.v_proj.weight"][:16].astype(np.float32)
    matrix = arrays["model.layers.1.self_attn.o_proj.weight"].copy()
    matrix[:, :16], matrix[:, 16:32] = values.T, -values.T
    plain = {name: np.zeros_like(array) for name, array in arrays.items() if name.endswith("norm.weight")}
    write_arrays(folder / "model.safetensors", {**arrays, **plain, "model.layers.1.self_attn.o_proj.weight": matrix})
    reading = reading_of(torch_engine, folder, tokenizer, text_ids(40))
    figure, _ = run(circuits_view(reading, 1, -1))
    found = {row["head"]: row for row in rows(figure, "copying")}
    assert (found["L1.H0"]["raised"], found["L1.H1"]["raised"]) == (1, 0)
    assert found["L1.H0"]["mean_rank"] < 10
    assert rows(figure, "copying")[0]["head"] == "L1.H0"


def test_tokens_that_are_tried_are_distinct_and_spread() -> None:
    assert sample(np.array([BOS, 5, 4, 5, 4, 9], np.int32)).tolist() == [0, 1, 2, 5]
    many = sample(np.arange(1000, dtype=np.int32)[::-1].copy())
    assert (len(many), many[0]) == (64, 0)
    assert np.ptp(np.diff(many)) <= 1


@pytest.mark.parametrize(("asked", "words"), [
    ((3, 0), "layer 3 is not there: the model has layers 0 to 2"),
    ((0, 20), "position 20 is not there"),
    ((0, 0, 4500), "token 4500 is not there"),
])  # fmt: skip
def test_what_is_not_there_is_refused(
    torch_engine: Any, tiny_folder: Any, two_to_one: Any, tokenizer: Any, asked: tuple[int, ...], words: str
) -> None:
    reading = reading_of(torch_engine, model(tiny_folder, two_to_one, tokenizer), tokenizer, text_ids(20))
    with pytest.raises(UsageError, match=words):
        run(circuits_view(reading, *asked))
