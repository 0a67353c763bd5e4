"""The lens against the final norm and the embedding table, multiplied out."""

from __future__ import annotations

import numpy as np
import pytest
from insides import kl, log_softmax, model, normed, reading_of, rows, run, text_ids, weights

from engines import open_engine
from gemma_tui.errors import UsageError
from gemma_tui.hub.models import resolve
from gemma_tui.studies.attention.lens import lens_view
from gemma_tui.studies.attention.reading import read
from gemma_tui.tokenizer import read_tokenizer


@pytest.fixture
def folder(tiny_folder, two_to_one, tokenizer):
    return model(tiny_folder, two_to_one, tokenizer)


def dense(reading, folder, layer):
    """ln p of every position through the lens before a layer."""
    arrays = weights(folder)
    h = reading.inspection.stream(layer, (0, reading.length))
    return log_softmax(
        normed(h, arrays["model.norm.weight"]) @ arrays["model.embed_tokens.weight"].T.astype(np.float64)
    )


def test_numbers_are_those_of_the_norm_and_the_table(engine, folder, tokenizer):
    reading = reading_of(engine, folder, tokenizer, text_ids(70))
    figure, shares = run(lens_view(reading, (2, 70)))
    assert len(shares) == 2 * 4
    final = log_softmax(engine.logits(reading.tokens[None])[0])
    targets = np.append(reading.tokens[1:], final[-1].argmax())
    for layer in range(4):
        p = dense(reading, folder, layer)[2:]
        wanted = p[np.arange(68), targets[2:]]
        assert np.array_equal(figure.arrays["top"][layer], p.argmax(-1))
        assert np.allclose(figure.arrays["probability"][layer], np.exp(p.max(-1)), atol=1e-4)
        assert np.allclose(figure.arrays["kl"][layer], kl(final[2:], p), atol=1e-3)
        assert np.allclose(figure.arrays["entropy"][layer], -(np.exp(p) * p).sum(-1), atol=1e-3)
        assert np.allclose(figure.arrays["log_prob"][layer], wanted, atol=1e-3)
        assert (np.abs(figure.arrays["rank"][layer] - (p > wanted[:, None]).sum(-1)) <= 1).all()
    assert np.array_equal(figure.arrays["targets"], targets[2:])


def test_the_table_heats_and_curves_show_the_arrays(folder, tokenizer):
    reading = reading_of(open_engine("torch"), folder, tokenizer, text_ids(30))
    figure, _ = run(lens_view(reading, (5, 25)))
    found = rows(figure, "lens")
    assert len(found) == 4 * 20
    row = found[2 * 20 + 7]
    assert (row["layer"], row["position"], row["token"]) == ("L2", 12, reading.labels[12])
    assert row["rank"] == figure.arrays["rank"][2, 7]
    assert row["kl"] == pytest.approx(figure.arrays["kl"][2, 7])
    assert found[-1]["layer"] == "out"
    probability, rank = figure.heats
    assert probability.columns[0] == f"{reading.labels[5]} 5"
    assert list(probability.marks) == ["·", "·", "G", " "]
    assert np.array_equal(rank.values, figure.arrays["rank"] + 1)
    assert rank.log
    nats, ranks = figure.charts
    assert np.allclose(nats.series[0].y, figure.arrays["kl"].mean(1))
    assert nats.series[0].y[-1] == pytest.approx(0, abs=1e-6)
    assert np.allclose(nats.series[2].y, -figure.arrays["log_prob"].mean(1))
    assert np.allclose(ranks.series[0].y, figure.arrays["rank"].mean(1) + 1)


def test_a_long_text_shows_its_last_64_and_says_so(folder, tokenizer):
    reading = reading_of(open_engine("torch"), folder, tokenizer, text_ids(90))
    figure, _ = run(lens_view(reading))
    assert figure.arrays["top"].shape == (4, 64)
    assert figure.arrays["positions"].tolist() == list(range(26, 90))
    assert any("last 64 of 90 positions" in note for note in figure.notes)
    assert not any("last 64" in note for note in run(lens_view(reading, (1, 9)))[0].notes)


def test_one_target_is_looked_for_everywhere(folder, tokenizer):
    reading = reading_of(open_engine("torch"), folder, tokenizer, text_ids(12))
    figure, _ = run(lens_view(reading, target=np.int32(301)))
    wanted = dense(reading, folder, 1)[:, 301]
    assert np.allclose(figure.arrays["log_prob"][1], wanted, atol=1e-3)
    assert (figure.arrays["targets"] == 301).all()


@pytest.mark.parametrize(("asked", "words"), [
    ({"positions": (5, 5)}, "positions 5 to 4 are not there: the text has positions 0 to 11"),
    ({"positions": (0, 13)}, "positions 0 to 12 are not there"),
    ({"target": 4500}, "token 4500 is not there: the vocabulary has ids 0 to"),
])  # fmt: skip
def test_what_is_not_there_is_refused(folder, tokenizer, asked, words):
    reading = reading_of(open_engine("torch"), folder, tokenizer, text_ids(12))
    with pytest.raises(UsageError, match=words):
        run(lens_view(reading, **asked))


def test_a_trained_model_comes_nearer_to_its_answer_layer_by_layer():
    nano = resolve("nano")
    engine = open_engine("torch")
    engine.load(nano.folder, "float32")
    reading = read(engine, read_tokenizer(nano.folder), "Once upon a time there was a little dog. The dog")
    figure, _ = run(lens_view(reading))
    far = figure.arrays["kl"].mean(1)
    assert far[0] > 2 * far[-2]
    assert far[-1] < 1e-6
    loss = -figure.arrays["log_prob"].mean(1)
    assert loss[-1] < loss[0]
