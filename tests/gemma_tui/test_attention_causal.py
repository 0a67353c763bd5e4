"""Ablations against models whose weights have no such heads, cut edges against the weights, and what is typed."""

from __future__ import annotations

import numpy as np
import pytest
from insides import kl, log_softmax, model, reading_of, rows, run, text_ids, without_head

from engines import open_engine
from engines.edits import Ablation, Knockout, Patch
from engines.errors import UnsupportedError
from gemma_tui.errors import UsageError
from gemma_tui.hub.models import resolve
from gemma_tui.studies.attention.causal import ablation_scan, causal_view, parse_target
from gemma_tui.studies.attention.reading import read
from gemma_tui.tokenizer import read_tokenizer

ALL = (0, 1, 2, 3)


@pytest.fixture
def folder(tiny_folder, two_to_one, tokenizer):
    return model(tiny_folder, two_to_one, tokenizer)


@pytest.fixture
def reading(folder, tokenizer):
    return reading_of(open_engine("torch"), folder, tokenizer, text_ids(20))


def predictions(engine, folder, tokens):
    """Logits, and their log-probabilities, of a model folder."""
    engine.load(folder, "float32")
    logits = engine.logits(tokens[None])[0].astype(np.float64)
    return logits, log_softmax(logits)


@pytest.mark.parametrize(("target", "layer", "heads"), [("L1.H2", 1, [2]), ("L0.G1", 0, [2, 3]), ("global", 2, ALL)])
def test_ablation_is_a_model_without_the_heads(engine, folder, tokenizer, tmp_path, target, layer, heads):
    reading = reading_of(engine, folder, tokenizer, text_ids(70))
    figure, _ = run(causal_view(reading, parse_target(target, reading.inspection.config), target))
    logits, p = predictions(engine, folder, reading.tokens)
    edited, q = predictions(engine, without_head(folder, tmp_path / "cut", layer, heads, 4), reading.tokens)
    assert np.abs(edited - logits).max() > 0.5
    assert np.allclose(figure.arrays["kl"], kl(p, q), atol=1e-3)
    following, at = reading.tokens[1:], np.arange(69)
    last = logits[-1].argmax()
    assert figure.arrays["targets"].tolist() == [*following, last]
    assert np.allclose(figure.arrays["log_prob"][:-1], q[at, following], atol=1e-3)
    assert np.array_equal(figure.arrays["top"], edited.argmax(-1))
    before, after = -p[at, following].mean(), -q[at, following].mean()
    loss, next_token = found_numbers(figure)
    assert loss == pytest.approx((before, after), abs=2e-3)
    assert next_token == pytest.approx((logits[-1, last], edited[-1, last]), abs=2e-3)


def found_numbers(figure):
    """What the notes say: the loss, and the logit of the next token, each before and after."""
    token, loss = figure.notes[:2]
    assert token.startswith("next token ")
    pairs = [text.partition(": ")[2].removeprefix("logit ").split() for text in (loss, token)]
    return [(float(words[0]), float(words[2])) for words in pairs]


def test_the_most_changed_positions_come_first(reading):
    figure, _ = run(causal_view(reading, parse_target("L1", reading.inspection.config), "L1"))
    found = rows(figure, "changed")
    assert [row["position"] for row in found] == np.argsort(-figure.arrays["kl"], kind="stable").tolist()
    assert [row["token"] for row in found] == [reading.labels[row["position"]] for row in found]
    row = next(row for row in found if row["position"] == 4)
    assert row["next"] == reading.labels[5]
    assert row["log_prob_after"] == pytest.approx(figure.arrays["log_prob"][4])
    assert np.array_equal(figure.charts[0].series[0].y, figure.arrays["kl"])


def test_mean_ablation_puts_in_the_mean_over_the_text(reading):
    figure, _ = run(causal_view(reading, parse_target("L1.H3", reading.inspection.config, "mean"), "L1.H3"))
    outputs = reading.inspection.head_outputs(1, (3,), (0, 20))
    values = np.repeat(outputs.mean(1, keepdims=True), 20, 1)
    by_hand, _ = run(causal_view(reading, [Patch(1, (3,), (0, 20), values)], "by hand"))
    assert np.allclose(figure.arrays["kl"], by_hand.arrays["kl"], atol=1e-5)
    assert figure.arrays["kl"].max() > 1e-3


def test_a_cut_edge_is_gone_and_changes_nothing_before(reading):
    edits = parse_target("L1.H2:10-12>7-8", reading.inspection.config)
    edited = reading.edited(edits)
    before, after = (i.attention(1, 2, (0, 20)) for i in (reading.inspection, edited))
    cut = np.zeros((20, 20), bool)
    cut[10:13, 7:9] = True
    assert (before[cut] > 0).all()
    assert (after[cut] == 0).all()
    kept = np.where(cut, 0, before)
    assert np.allclose(after, kept / kept.sum(1, keepdims=True), atol=1e-6)
    figure, _ = run(causal_view(reading, edits, "L1.H2:10-12>7-8"))
    assert np.abs(figure.arrays["kl"][:10]).max() < 1e-6
    assert figure.arrays["kl"][10:13].min() > 1e-6


def test_beyond_changes_only_what_is_beyond_the_window(reading):
    figure, _ = run(causal_view(reading, parse_target("beyond", reading.inspection.config), "beyond"))
    assert np.abs(figure.arrays["kl"][:8]).max() < 1e-6
    assert figure.arrays["kl"][8:].min() > 1e-6
    assert not any("WINDOW IDLE" in note for note in figure.notes)


def test_beyond_says_when_there_is_nothing_there(folder, tokenizer):
    reading = reading_of(open_engine("torch"), folder, tokenizer, text_ids(8))
    figure, _ = run(causal_view(reading, parse_target("beyond", reading.inspection.config), "beyond"))
    assert any("WINDOW IDLE" in note for note in figure.notes)


def test_a_single_token_has_no_loss(folder, tokenizer):
    reading = reading_of(open_engine("torch"), folder, tokenizer, [2])
    figure, _ = run(causal_view(reading, parse_target("L1", reading.inspection.config), "L1"))
    assert not any("loss" in note for note in figure.notes)
    scan, _ = run(ablation_scan(reading))
    assert np.isfinite(scan.arrays["loss_change"]).all()


@pytest.mark.parametrize(("text", "edits"), [
    ("L1", [Ablation(1, ALL)]),
    ("l1.h3", [Ablation(1, (3,))]),
    ("L2.G0", [Ablation(2, (0, 1))]),
    ("L2.G1, L0.H0", [Ablation(2, (2, 3)), Ablation(0, (0,))]),
    ("local", [Ablation(0, ALL), Ablation(1, ALL)]),
    ("Global", [Ablation(2, ALL)]),
    ("beyond", [Knockout(2, ALL, beyond=8)]),
    ("L2.H1:9>0", [Knockout(2, (1,), (9, 10), (0, 1))]),
    ("L2.G1:10-12>0-3", [Knockout(2, (2, 3), (10, 13), (0, 4))]),
    ("global:12>12", [Knockout(2, ALL, (12, 13), (12, 13))]),
    ("L1:12>5", [Knockout(1, ALL, (12, 13), (5, 6))]),
])  # fmt: skip
def test_targets(two_to_one, text, edits):
    assert parse_target(text, two_to_one, length=13) == edits


def test_the_way_of_ablation(two_to_one):
    assert parse_target("L0.H1", two_to_one, "mean") == [Ablation(0, (1,), "mean")]
    with pytest.raises(UsageError, match="ablation 'half' is not there: choose zero or mean"):
        parse_target("L0.H1", two_to_one, "half")


@pytest.mark.parametrize(("text", "words"), [
    ("", "target '' cannot be read: write L3, L3.H1"),
    ("L1,", "target '' cannot be read"),
    ("H1", "target 'H1' cannot be read"),
    ("L1.Q2", "target 'L1.Q2' cannot be read"),
    ("L3", "layer 3 is not there: the model has layers 0 to 2"),
    ("L1.H4", "head L1.H4 is not there: a layer has heads 0 to 3"),
    ("L1.G2", "group G2 is not there: a layer has groups 0 to 1, of 2 heads each"),
    ("L1.H1:", "edges '' cannot be read: write 20>0"),
    ("L1.H1:4", "edges '4' cannot be read"),
    ("beyond:4>1", "target 'beyond:4>1' cannot be read"),
    ("L2.H1:3>4", "edges 3>4 are not there: a token sees itself and those before it"),
    ("L2.H1:6-3>0", "a range goes from its first position to its last"),
    ("L2.H1:13>0", "edges 13>0 are not there: the text has positions 0 to 12"),
    ("L1.H1:12>4", "edges 12>4 are not there: layer 1 is local and sees 8 tokens"),
    ("local:12>0-4", "layer 0 is local"),
    ("\x1b[31m\n" * 50, "cannot be read"),
])  # fmt: skip
def test_targets_that_are_not_there(two_to_one, text, words):
    with pytest.raises(UsageError) as caught:
        parse_target(text, two_to_one, length=13)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def test_edges_beyond_the_text_are_refused_even_if_nobody_counted(reading):
    with pytest.raises(UnsupportedError, match="positions 30 to 30 are not there"):
        run(causal_view(reading, parse_target("L2:30>0", reading.inspection.config), ""))


def test_a_scan_ablates_every_head_in_turn(engine, folder, tokenizer, tmp_path):
    reading = reading_of(engine, folder, tokenizer, text_ids(80))
    figure, shares = run(ablation_scan(reading))
    assert len(shares) == 12
    assert any("positions 16 to 79" in note for note in figure.notes)
    logits, p = predictions(engine, folder, reading.tokens)
    at, following = np.arange(16, 79), reading.tokens[17:]
    for layer, head in ((0, 3), (1, 0), (2, 1)):
        without = without_head(folder, tmp_path / f"{layer}-{head}", layer, [head], 4)
        edited, q = predictions(engine, without, reading.tokens)
        assert figure.arrays["kl"][layer, head] == pytest.approx(kl(p, q)[16:].mean(), abs=1e-4)
        rise = (p[at, following] - q[at, following]).mean()
        assert figure.arrays["loss_change"][layer, head] == pytest.approx(rise, abs=1e-4)
        last = logits[-1].argmax()
        assert figure.arrays["logit_change"][layer, head] == pytest.approx(
            edited[-1, last] - logits[-1, last], abs=1e-3
        )
    assert np.array_equal(figure.heats[0].values, figure.arrays["kl"])
    found = rows(figure, "head")
    assert len(found) == 12
    assert found[0]["kl"] == pytest.approx(figure.arrays["kl"].max())


def test_a_scan_by_the_mean_is_another(reading):
    zero, mean = (run(ablation_scan(reading, how))[0].arrays["kl"] for how in ("zero", "mean"))
    assert not np.allclose(zero, mean, atol=1e-3)
    with pytest.raises(UsageError, match="choose zero or mean"):
        run(ablation_scan(reading, "none"))


def test_a_trained_model_needs_its_heads():
    nano = resolve("nano")
    engine = open_engine("torch")
    engine.load(nano.folder, "float32")
    reading = read(engine, read_tokenizer(nano.folder), "Once upon a time there was a little dog. The dog was happy.")
    figure, _ = run(ablation_scan(reading))
    assert (figure.arrays["kl"] > 0).all()
    every, _ = run(causal_view(reading, parse_target("local,global", reading.inspection.config), "all"))
    assert every.arrays["kl"].mean() > figure.arrays["kl"].max()
    (before, after), _ = found_numbers(every)
    assert after > before
