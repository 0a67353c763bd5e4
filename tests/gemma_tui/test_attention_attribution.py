"""The parts of a logit against the formula with the weights of the file, and what is typed for tokens and places."""

from __future__ import annotations

import numpy as np
import pytest
from insides import model, normed, reading_of, rows, run, text_ids, weights

from engines import open_engine
from gemma_tui.errors import UsageError
from gemma_tui.studies.attention.attribution import attribution_view, position_of, token_id
from gemma_tui.studies.attention.reading import read


@pytest.fixture
def folder(tiny_folder, two_to_one, tokenizer):
    return model(tiny_folder, two_to_one, tokenizer)


@pytest.fixture
def reading(folder, tokenizer):
    return reading_of(open_engine("torch"), folder, tokenizer, text_ids(20))


def dense(reading, arrays, layer, position, toward):
    """A layer's shares of the logits: of each head by source ``[heads, position + 1]``, and of the MLP."""
    inspection, config = reading.inspection, reading.inspection.config
    prefix = f"model.layers.{layer}."
    x = inspection.stream(layer, (0, reading.length))
    values = normed(x, arrays[prefix + "input_layernorm.weight"]) @ arrays[prefix + "self_attn.v_proj.weight"].T
    values = values.reshape(reading.length, config.num_key_value_heads, config.head_dim)
    group = config.num_attention_heads // config.num_key_value_heads
    out = arrays[prefix + "self_attn.o_proj.weight"].reshape(config.hidden_size, config.num_attention_heads, -1)
    written = []
    for head in range(config.num_attention_heads):
        a = inspection.attention(layer, head, (position, position + 1))[0]
        written.append(a[:, None] * values[:, head // group] @ out[:, head].T)
    written = np.stack(written)[:, : position + 1]
    y = written.sum((0, 1))
    gain = 1 + arrays[prefix + "post_attention_layernorm.weight"].astype(np.float64)
    scale = np.sqrt((y**2).mean() + 1e-6)
    after = x[position] + y / scale * gain
    following = inspection.stream(layer + 1, (position, position + 1))[0]
    return (written * gain / scale) @ toward, float((following - after) @ toward)


@pytest.mark.parametrize("contrast", [None, 311])
def test_parts_are_those_of_the_formula(engine, folder, tokenizer, contrast):
    reading = reading_of(engine, folder, tokenizer, text_ids(20))
    position, token, arrays = 18, 305, weights(folder)
    figure, _ = run(attribution_view(reading, position, token, contrast, head=(1, 2)))
    h = reading.inspection.stream(3, (position, position + 1))[0].astype(np.float64)
    table = arrays["model.embed_tokens.weight"].astype(np.float64)
    row = table[token] - (0 if contrast is None else table[contrast])
    toward = row * (1 + arrays["model.norm.weight"]) / np.sqrt((h**2).mean() + 1e-6)
    sources = np.zeros((3, 4, position + 1))
    for layer in range(3):
        sources[layer], mlp = dense(reading, arrays, layer, position, toward)
        assert figure.arrays["mlps"][layer] == pytest.approx(mlp, abs=1e-3)
    embedding = reading.inspection.stream(0, (position, position + 1))[0] @ toward
    assert figure.arrays["embedding"] == pytest.approx(embedding, abs=1e-3)
    assert np.allclose(figure.arrays["sources"], sources, atol=1e-3)
    assert np.allclose(figure.heats[0].values, sources.sum(-1), atol=1e-3)
    logits = engine.logits(reading.tokens[None])[0, position]
    wanted = logits[token] - (0 if contrast is None else logits[contrast])
    assert figure.facts["logit"] == pytest.approx(wanted, abs=1e-3)
    assert sum(part["logits"] for part in rows(figure, "part")) == pytest.approx(wanted, abs=1e-3)
    sizes = [abs(part["logits"]) for part in rows(figure, "part")]
    assert sizes == sorted(sizes, reverse=True)
    check_listed(rows(figure, "source"), sources.sum((0, 1)), reading)
    check_listed(rows(figure, "source_of_L1.H2"), sources[1, 2], reading)


def check_listed(found, wanted, reading):
    sizes = [abs(row["logits"]) for row in found]
    assert len(found) == len(wanted)
    assert sizes == sorted(sizes, reverse=True)
    for row in found:
        assert row["logits"] == pytest.approx(wanted[row["position"]], abs=1e-3)
        assert row["token"] == reading.labels[row["position"]]


def test_the_sum_is_checked_aloud(reading):
    figure, _ = run(attribution_view(reading, -1, 301))
    (note,) = (note for note in figure.notes if note.startswith("sum of the parts - logit = "))
    assert abs(float(note.rpartition("= ")[2])) < 1e-4
    assert len(rows(figure, "part")) == 1 + 3 + 12
    assert figure.facts["position"] == 19


def test_the_token_is_the_most_probable_if_none_is_named(reading):
    figure, _ = run(attribution_view(reading, 7))
    logits = reading.engine.logits(reading.tokens[None])[0, 7]
    assert figure.facts["token"] == logits.argmax()
    assert figure.facts["logit"] == pytest.approx(logits.max(), abs=1e-4)


@pytest.mark.parametrize(("asked", "words"), [
    ({"position": 20}, "position 20 is not there: the text has positions 0 to 19"),
    ({"position": -21}, "position -21 is not there"),
    ({"position": 3, "token": 4500}, "token 4500 is not there"),
    ({"position": 3, "contrast": -1}, "token -1 is not there"),
    ({"position": 3, "head": (0, 4)}, "head L0.H4 is not there: a layer has heads 0 to 3"),
    ({"position": 3, "head": (3, 0)}, "layer 3 is not there: the model has layers 0 to 2"),
])  # fmt: skip
def test_what_is_not_there_is_refused(reading, asked, words):
    with pytest.raises(UsageError, match=words):
        run(attribution_view(reading, **asked))


def test_typed_tokens(tokenizer):
    assert tokenizer.token(token_id(tokenizer, " fox")) == "▁fox"
    assert token_id(tokenizer, "<bos>") == 2
    assert token_id(tokenizer, "▁fox") == token_id(tokenizer, " fox")
    with pytest.raises(UsageError, match=r"the▁dogs is \d tokens \(.*▁dogs\), not one"):
        token_id(tokenizer, "the dogs")
    with pytest.raises(UsageError, match="the token is empty"):
        token_id(tokenizer, "")
    with pytest.raises(UsageError) as caught:
        token_id(tokenizer, "a\x1b[31m\nb" * 30)
    assert caught.value.args[0].isprintable()


def test_typed_positions(folder, tokenizer):
    engine = open_engine("torch")
    engine.load(folder, "float32")
    reading = read(engine, tokenizer, "The fox and the fox sleep")
    found = position_of(reading, " fox")
    assert reading.labels[found] == "▁fox"
    assert "▁fox" not in reading.labels[found + 1 :]
    assert position_of(reading, "-1") == reading.length - 1
    assert position_of(reading, "<bos>") == position_of(reading, "0") == 0
    with pytest.raises(UsageError, match="token ▁dogs is not in the text: take one that is, or a position 0 to"):
        position_of(reading, " dogs")
    with pytest.raises(UsageError, match="position 99 is not there"):
        position_of(reading, "99")
