"""Heads put out, edges cut and values put in, against hooks in transformers; what texts share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.base import Engine
from engines.edits import Ablation, Knockout, Patch
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config


def zero_heads(network: Any, layer: int, heads: tuple[int, ...], mean: bool) -> Any:
    """A hook that replaces the inputs of ``o_proj`` that come from some heads."""

    def hook(module: Any, arguments: tuple) -> tuple:
        (x,) = arguments
        size = x.shape[-1] // network.config.num_attention_heads
        x = x.clone()
        for head in heads:
            part = slice(head * size, (head + 1) * size)
            x[..., part] = x[..., part].mean(1, keepdim=True) if mean else 0
        return (x,)

    return network.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_ablation_equals_a_hook_in_transformers(
    engine: Engine, folder: Path, text: Any, reference_model: Any, reference_logits: Any, how: str
) -> None:
    ids = text(50)
    engine.load(folder, "float32")
    network = reference_model(folder)
    before = reference_logits(network, ids[None])[0]
    zero_heads(network, 1, (0, 3), how == "mean")
    after = reference_logits(network, ids[None])[0]
    base, edited = engine.inspect(ids), engine.inspect(ids, [Ablation(1, (0, 3), how)])
    check_effect(edited.effect(base, (5, 50), np.roll(ids, -1)[5:]), before[5:], after[5:], np.roll(ids, -1)[5:])


def check_effect(effect: Any, before: np.ndarray, after: np.ndarray, targets: np.ndarray) -> None:
    import torch

    p, q = (torch.from_numpy(logits).log_softmax(-1).numpy() for logits in (before, after))
    rows = np.arange(len(targets))
    assert np.abs(after - before).max() > 0.1
    assert np.allclose(effect.kl, (np.exp(p) * (p - q)).sum(-1), atol=2e-4)
    assert np.allclose(effect.base_log_prob, p[rows, targets], atol=2e-4)
    assert np.allclose(effect.log_prob, q[rows, targets], atol=2e-4)
    assert np.allclose(effect.base_logit, before[rows, targets], atol=2e-4)
    assert np.allclose(effect.logit, after[rows, targets], atol=2e-4)
    assert (effect.base_top == before.argmax(-1)).all()
    assert (effect.top == after.argmax(-1)).all()


def test_a_window_on_global_layers_equals_a_model_that_has_one(
    engine: Engine, config: Gemma3Config, folder: Path, text: Any, reference_model: Any
) -> None:
    """All global attention beyond the window cut: transformers with the windowed mask on its global layer."""
    import torch

    ids = text(100)
    heads = tuple(range(config.num_attention_heads))
    cuts = [Knockout(layer, heads, beyond=config.sliding_window) for layer in config.global_layers]
    engine.load(folder, "float32")
    network = reference_model(folder)
    distance = torch.arange(100)[:, None] - torch.arange(100)
    seen = (distance >= 0) & (distance < config.sliding_window)
    mask = torch.where(seen, 0.0, -torch.inf)[None, None]
    with torch.no_grad():
        whole = torch.from_numpy(ids[None]).long()
        before = network(whole).logits[0].numpy()
        given = {"full_attention": mask, "sliding_attention": mask}
        after = network(whole, attention_mask=given).logits[0].numpy()
    targets = np.roll(ids, -1)
    effect = engine.inspect(ids, cuts).effect(engine.inspect(ids), (0, 100), targets)
    check_effect(effect, before, after, targets)


def test_cut_edges_are_zero_and_a_row_without_any_keeps_its_own(engine: Engine, folder: Path, text: Any) -> None:
    engine.load(folder, "float32")
    edits = [Knockout(0, (1,), queries=(10, 20), keys=(12, 14)), Knockout(2, (0, 1), keys=(0, 30))]
    inspection = engine.inspect(text(30), edits)
    cut, whole = inspection.attention(0, 1, (0, 30)), inspection.attention(0, 0, (0, 30))
    assert (cut[14:18, 12:14] == 0).all()
    assert (cut[20, 13:21] > 0).all()
    assert (whole[14, 12:14] > 0).all()
    assert np.array_equal(inspection.attention(2, 1, (0, 30)), np.eye(30, dtype=np.float32))


def test_a_patch_of_the_whole_stream_takes_the_other_texts_predictions(
    engine: Engine, config: Gemma3Config, folder: Path, text: Any
) -> None:
    engine.load(folder, "float32")
    ids, other = text(24), text(48)[24:]
    donor, base = engine.inspect(other), engine.inspect(ids)
    patched = engine.inspect(ids, [Patch(1, None, (0, 24), donor.stream(1, (0, 24)))])
    last = config.num_hidden_layers
    assert np.array_equal(patched.stream(last, (0, 24)), donor.stream(last, (0, 24)))
    assert not np.allclose(base.stream(last, (0, 24)), donor.stream(last, (0, 24)), atol=0.1)
    heads = (0, 2)
    some = engine.inspect(ids, [Patch(1, heads, (4, 9), donor.head_outputs(1, heads, (4, 9)))])
    assert np.array_equal(some.head_outputs(1, heads, (4, 9)), donor.head_outputs(1, heads, (4, 9)))
    assert np.array_equal(some.head_outputs(1, (1, 3), (0, 24)), base.head_outputs(1, (1, 3), (0, 24)))


def test_a_base_shares_what_edits_leave_alone_and_changes_nothing(
    engine: Engine, config: Gemma3Config, folder: Path, text: Any
) -> None:
    """Bit for bit, of every kind of edit at every layer; the base is the same afterwards."""
    engine.load(folder, "float32")
    ids, last, span = text(150), config.num_hidden_layers, (10, 140)
    targets, base, donor = np.roll(ids, -1)[slice(*span)], engine.inspect(ids), engine.inspect(text(300)[150:])
    before = [base.stream(layer, (0, 150)) for layer in range(last + 1)]
    for layer in range(last):
        for edit in (
            Ablation(layer, (0, 3), "mean"),
            Knockout(layer, (1,), keys=(0, 30)),
            Patch(layer, (2,), (4, 9), donor.head_outputs(layer, (2,), (4, 9))),
            Patch(layer, None, (4, 9), donor.stream(layer, (4, 9))),
        ):
            edits = [edit, Ablation(last - 1, (0,))]
            alone, sharing = engine.inspect(ids, edits), engine.inspect(ids, edits, base)
            for depth in range(last + 1):
                assert np.array_equal(sharing.stream(depth, (0, 150)), alone.stream(depth, (0, 150))), (edit, depth)
            ours, theirs = (
                vars(x.effect(y, span, targets)) for x, y in ((sharing, base), (alone, engine.inspect(ids)))
            )
            assert all(np.array_equal(ours[name], theirs[name]) for name in theirs), edit
            assert ours["kl"].max() > 0
    assert all(np.array_equal(base.stream(layer, (0, 150)), h) for layer, h in enumerate(before))
    assert np.array_equal(engine.inspect(ids, (), base).stream(last, (0, 150)), before[last])


def test_layers_below_an_edit_and_the_logits_of_a_base_are_computed_once(
    engine: Engine, config: Gemma3Config, folder: Path, text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load(folder, "float32")
    ids, last = text(100), config.num_hidden_layers
    base, layers, products = engine.inspect(ids), [], []
    outputs, logits = type(base)._outputs, type(base)._logits
    monkeypatch.setattr(type(base), "_outputs", lambda i, layer: layers.append(layer) or outputs(i, layer))
    monkeypatch.setattr(type(base), "_logits", lambda i, *asked: products.append(asked) or logits(i, *asked))
    base.advance(last)
    for layer in range(last):
        layers.clear()
        edited = engine.inspect(ids, [Ablation(layer, (0,))], base)
        for target in (ids[40:100], ids[41:101]):
            edited.effect(base, (40, 100), np.resize(target, 60))
        assert layers == list(range(layer, last))
    assert len(products) == 1 + last
    edited.effect(base, (0, 100), ids)
    for inspection in (base, edited):
        assert inspection._known[1].shape == (36, config.vocab_size)


def test_a_base_of_something_else_is_refused(both_engines: tuple[Engine, Engine], folder: Path, text: Any) -> None:
    for engine in both_engines:
        engine.load(folder, "float32")
    for engine, other in (both_engines, both_engines[::-1]):
        edits = [Ablation(0, (0,))]
        for base, words in (
            (other.inspect(text(10)), "another engine or model"),
            (engine.inspect(text(11)), "of another text"),
            (engine.inspect(text(11)[1:]), "of another text"),
            (engine.inspect(text(10), edits), "edits of its own"),
        ):
            with pytest.raises(UnsupportedError, match=words):
                engine.inspect(text(10), edits, base)
        base = engine.inspect(text(10))
        engine.load(folder, "float32")
        with pytest.raises(UnsupportedError, match="another engine or model"):
            engine.inspect(text(10), edits, base)


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([Ablation(0, ())], "no head is named"),
        ([Ablation(3, (0,))], "layer 3 is not there"),
        ([Ablation(0, (4,))], "head L0.H4 is not there"),
        ([Ablation(0, (1,), "half")], "choose zero or mean"),
        ([Knockout(0, (0,), keys=(5, 5))], "positions 5 to 4 are not there"),
        ([Knockout(-1, (0,))], "layer -1 is not there"),
        ([Patch(0, None, (0, 2), np.zeros((3, 64), np.float32))], "values (3, 64), not (2, 64)"),
    ],
)
def test_edits_of_what_is_not_there_are_refused(
    engine: Engine, folder: Path, text: Any, edits: list, words: str
) -> None:
    engine.load(folder, "float32")
    with pytest.raises(UnsupportedError) as caught:
        engine.inspect(text(10), edits)
    assert words in str(caught.value)
