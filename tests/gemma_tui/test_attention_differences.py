"""Distances of attention against the formula on dense rows, between texts, models, engines and dtypes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from insides import model, reading_of, rows, run, text_ids, weights

from engines import open_engine
from engines.checkpoints import write_arrays
from gemma_tui.errors import UsageError
from gemma_tui.studies.attention import differences
from gemma_tui.studies.attention.differences import divergence_view, keep, kept_bytes
from gemma_tui.studies.attention.reading import read_tokens


@pytest.fixture
def folder(tiny_folder, two_to_one, tokenizer):
    return model(tiny_folder, two_to_one, tokenizer)


def attention(reading):
    """float64 ``[layers, heads, T, T]``."""
    whole, config = (0, reading.length), reading.inspection.config
    return np.array([
        [reading.inspection.attention(layer, head, whole) for head in range(config.num_attention_heads)]
        for layer in range(config.num_hidden_layers)
    ], np.float64)  # fmt: skip


def distance(p, q):
    """√ of ½ KL(p ‖ m) + ½ KL(q ‖ m), with m = (p + q) / 2 and logarithms to base 2."""
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        halves = [np.where(x > 0, x * np.log2(x / middle), 0).sum(-1) / 2 for x in (p, q)]
    return np.sqrt(np.maximum(halves[0] + halves[1], 0))


def test_distances_of_two_texts_are_those_of_dense_rows(engine, folder, tokenizer):
    reading = reading_of(engine, folder, tokenizer, text_ids(140))
    other = read_tokens(engine, tokenizer, text_ids(140, seed=1))
    kept = keep(other)
    assert kept.bytes == kept_bytes(other.inspection.config, 140)
    figure, shares = run(divergence_view(reading, kept, ("this", "that")))
    assert len(shares) == 3
    wanted = distance(attention(reading), attention(other))
    assert np.allclose(figure.arrays["distance"], wanted, atol=2e-3)
    assert 0.2 < wanted.max() <= 1
    means = wanted[:, :, 1:].mean(-1)
    assert np.allclose(figure.heats[0].values, means, atol=1e-3)
    local, globally = rows(figure, "layers")
    assert local["distance"] == pytest.approx(means[:2].mean(), abs=1e-3)
    assert globally["distance"] == pytest.approx(means[2].mean(), abs=1e-3)
    assert (
        figure.notes[0] == f"mean Jensen-Shannon distance: local {means[:2].mean():.4f}, global {means[2].mean():.4f}"
    )
    differing = int((reading.tokens != other.tokens).sum())
    assert any(f"{differing} of 140 tokens differ" in note for note in figure.notes)


def test_heads_are_listed_by_their_difference_with_their_most_different_row(folder, tokenizer):
    engine = open_engine("torch")
    reading = reading_of(engine, folder, tokenizer, text_ids(30))
    other = read_tokens(engine, tokenizer, text_ids(30, seed=1))
    figure, _ = run(divergence_view(reading, keep(other), ("this", "that")))
    found, arrays = rows(figure, "head"), figure.arrays["distance"]
    assert len(found) == 12
    sizes = [row["distance"] for row in found]
    assert sizes == sorted(sizes, reverse=True)
    for row in found:
        layer, head = (int(part[1:]) for part in row["head"].split("."))
        assert row["most"] == pytest.approx(arrays[layer, head].max())
        assert row["most"] == pytest.approx(arrays[layer, head, row["position"]])
        assert row["token"] == reading.labels[row["position"]]
        assert row["other_token"] == other.labels[row["position"]]
        assert row["layer"] == ("global" if layer == 2 else "local")


def test_rows_without_a_common_key_are_at_distance_one(folder, tokenizer, monkeypatch):
    """The divergence of such rows is ln 2 nats."""
    reading = reading_of(open_engine("torch"), folder, tokenizer, text_ids(9))
    kept = keep(reading)
    apart = np.full((4, 9), np.log(2), np.float32)
    monkeypatch.setattr(reading.inspection, "divergence", lambda layer, queries, keys: apart)
    figure, _ = run(divergence_view(reading, kept, ("this", "that")))
    assert np.allclose(figure.arrays["distance"], 1, atol=1e-6)


def test_the_same_run_is_at_no_distance_and_says_so(folder, tokenizer):
    reading = reading_of(open_engine("torch"), folder, tokenizer, text_ids(60))
    figure, _ = run(divergence_view(reading, keep(reading), ("this", "this")))
    assert figure.arrays["distance"].max() < 1e-3
    assert any("what rounding in float32 makes" in note for note in figure.notes)
    single = reading_of(open_engine("torch"), folder, tokenizer, [2])
    assert np.isfinite(run(divergence_view(single, keep(single), ("a", "b")))[0].heats[0].values).all()


def test_another_model_may_take_the_engines_place(folder, tokenizer, tmp_path):
    """It differs in the queries of the last layer alone, so all other heads are at no distance."""
    engine, ids, arrays = open_engine("torch"), text_ids(40), weights(folder)
    name = "model.layers.2.self_attn.q_proj.weight"
    write_arrays(tmp_path / "model.safetensors", {**arrays, name: arrays[name][::-1].copy()})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    kept = keep(reading_of(engine, folder, tokenizer, ids))
    tuned = reading_of(engine, tmp_path, tokenizer, ids)
    figure, _ = run(divergence_view(tuned, kept, ("tuned", "base")))
    assert figure.arrays["distance"][:2].max() < 1e-3
    assert figure.heats[0].values[2].min() > 0.05
    assert not any("tokens differ" in note for note in figure.notes)
    assert figure.facts["other"]["model"] == str(folder)


def test_bfloat16_is_nearer_than_another_text(folder, tokenizer):
    engine = open_engine("torch")
    ids = text_ids(40)
    kept = keep(reading_of(engine, folder, tokenizer, ids))
    rounded, _ = run(divergence_view(reading_of(engine, folder, tokenizer, ids, "bfloat16"), kept, ("bf16", "fp32")))
    reading = reading_of(engine, folder, tokenizer, text_ids(40, seed=1))
    foreign, _ = run(divergence_view(reading, kept, ("b", "a")))
    assert 1e-3 < rounded.heats[0].values.mean() < foreign.heats[0].values.mean() / 2


def test_both_engines_are_at_no_distance(both_engines, folder, tokenizer):
    one, other = (reading_of(engine, folder, tokenizer, text_ids(60)) for engine in both_engines)
    for this, that in ((one, other), (other, one)):
        figure, _ = run(divergence_view(this, keep(that), ("this", "that")))
        assert figure.arrays["distance"].max() < 3e-3


def test_what_cannot_be_compared_is_refused(tiny_folder, two_to_one, four_to_one, tokenizer, folder):
    engine = open_engine("torch")
    kept = keep(reading_of(engine, folder, tokenizer, text_ids(12)))
    shorter = read_tokens(engine, tokenizer, text_ids(9))
    with pytest.raises(UsageError, match="the texts have 9 and 12 tokens"):
        run(divergence_view(shorter, kept, ("a", "b")))
    for changed, words in (
        (four_to_one, r"the models differ in num_hidden_layers \(7 and 3\)"),
        (replace(two_to_one, sliding_window=9), r"the models differ in sliding_window \(9 and 8\)"),
        (replace(two_to_one, query_pre_attn_scalar=16), r"differ in query_pre_attn_scalar \(16.* and 21.*\)"),
    ):
        reading = reading_of(engine, model(tiny_folder, changed, tokenizer), tokenizer, text_ids(12))
        with pytest.raises(UsageError, match=words):
            run(divergence_view(reading, kept, ("a", "b")))


def test_more_than_a_gigabyte_is_not_kept(folder, tokenizer, monkeypatch):
    reading = reading_of(open_engine("torch"), folder, tokenizer, text_ids(100))
    assert kept_bytes(reading.inspection.config, 100) == 4 * 3 * (4 + 2) * 100 * 16
    monkeypatch.setattr(differences, "MOST_BYTES", 100_000)
    with pytest.raises(
        UsageError, match=r"100 tokens would keep 0\.0 GB of queries and keys, .*: cut the text to 86 tok"
    ):
        keep(reading)
    monkeypatch.setattr(reading.inspection, "queries_keys", None)
    with pytest.raises(UsageError):
        keep(reading)
