"""Patches against texts with tokens exchanged, which is what a patch of the embeddings is."""

from __future__ import annotations

import numpy as np
import pytest
from insides import model, reading_of, rows, run, text_ids

from engines import open_engine
from engines.edits import Patch
from gemma_tui.errors import UsageError
from gemma_tui.studies.attention.patching import patching_view
from gemma_tui.studies.attention.reading import read_tokens


@pytest.fixture
def folder(tiny_folder, two_to_one, tokenizer):
    return model(tiny_folder, two_to_one, tokenizer)


def pair(engine, folder, tokenizer, length=12, same=4):
    """Two prompts whose first tokens are the same."""
    ids = text_ids(length)
    other = ids[:same] + text_ids(length, seed=1)[same:]
    reading = reading_of(engine, folder, tokenizer, ids)
    return reading, read_tokens(engine, tokenizer, other)


def difference(engine, tokens, answers):
    logits = engine.logits(np.asarray(tokens, np.int32)[None])[0, -1]
    return float(logits[answers[1]] - logits[answers[0]])


def test_a_patch_of_an_embedding_is_another_token(engine, folder, tokenizer):
    reading, other = pair(engine, folder, tokenizer)
    figure, shares = run(patching_view(reading, other))
    first = int(np.flatnonzero(reading.tokens != other.tokens)[0])
    assert len(shares) == 3 * (12 - first)
    answers = [engine.logits(r.tokens[None])[0, -1].argmax() for r in (reading, other)]
    assert figure.facts["answers"] == answers
    base, donor = (difference(engine, r.tokens, answers) for r in (reading, other))
    assert figure.facts["logit_difference"] == pytest.approx(base, abs=1e-3)
    assert figure.facts["logit_difference_other"] == pytest.approx(donor, abs=1e-3)
    restored = figure.arrays["restored"]
    for column, position in enumerate(range(first, 12)):
        mixed = reading.tokens.copy()
        mixed[position] = other.tokens[position]
        wanted = (difference(engine, mixed, answers) - base) / (donor - base)
        assert restored[0, column] == pytest.approx(wanted, abs=1e-3)
    assert np.array_equal(figure.heats[0].values, restored)
    assert figure.heats[0].columns[-1] == f"{reading.labels[11]} 11"


def test_the_share_of_a_deeper_patch_is_that_of_its_predictions(folder, tokenizer):
    engine = open_engine("torch")
    reading, other = pair(engine, folder, tokenizer)
    figure, _ = run(patching_view(reading, other))
    here, answers = (11, 12), figure.facts["answers"]
    patch = Patch(2, None, here, other.inspection.stream(2, here))
    edited = engine.inspect(reading.tokens, [patch])
    logits = edited.stream(3, here)
    assert not np.allclose(logits, reading.inspection.stream(3, here), atol=0.1)
    moved = [edited.effect(reading.inspection, here, np.array([a], np.int32)).logit[0] for a in answers]
    base, donor = figure.facts["logit_difference"], figure.facts["logit_difference_other"]
    assert figure.arrays["restored"][2, -1] == pytest.approx((moved[1] - moved[0] - base) / (donor - base), abs=1e-4)


def test_heads_that_are_all_patched_after_all_differences_restore_everything(folder, tokenizer, tmp_path):
    """Where only the last token is the same in both, one layer's head that alone writes carries the whole answer."""
    from insides import weights

    from engines.checkpoints import write_arrays

    arrays = weights(folder)
    for name, matrix in arrays.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            alone = np.zeros_like(matrix)
            if "layers.1.self_attn" in name:
                alone[:, 32:48] = matrix[:, 32:48]
            arrays[name] = alone
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    write_arrays(lonely / "model.safetensors", arrays)
    (lonely / "config.json").write_text((folder / "config.json").read_text())
    engine = open_engine("torch")
    ids = text_ids(6)
    reading = reading_of(engine, lonely, tokenizer, ids)
    other = read_tokens(engine, tokenizer, [*ids[:1], *text_ids(6, seed=3)[1:5], ids[5]])
    answers = (301, 305)
    figure, _ = run(patching_view(reading, other, "heads", answers))
    wanted = np.zeros((3, 4))
    wanted[1, 2] = 1
    assert np.allclose(figure.arrays["restored"], wanted, atol=1e-3)
    assert rows(figure, "patched_head")[0] == {"head": "L1.H2", "restored": pytest.approx(1, abs=1e-3)}


def test_long_prompts_are_patched_in_pieces_and_say_so(folder, tokenizer):
    reading, other = pair(open_engine("torch"), folder, tokenizer, 80, 10)
    figure, _ = run(patching_view(reading, other))
    assert figure.arrays["restored"].shape == (3, 32)
    assert any("neighbours are patched together, up to 3 to a column" in note for note in figure.notes)
    first = int(np.flatnonzero(reading.tokens != other.tokens)[0])
    assert any(f"positions 0 to {first - 1} have the same tokens" in note for note in figure.notes)
    assert figure.heats[0].columns[-1].endswith("-79")


def test_prompts_that_cannot_be_compared_are_refused(folder, tokenizer):
    engine = open_engine("torch")
    reading, other = pair(engine, folder, tokenizer)
    shorter = read_tokens(engine, tokenizer, text_ids(9))
    for call, words in (
        ((reading, shorter), "the prompts have 12 and 9 tokens"),
        ((reading, reading), "the prompts are the same"),
        ((reading, other, "mlp"), "patching of 'mlp' is not there: choose stream or heads"),
        ((reading, other, "stream", (301, 301)), "both prompts go on with"),
        ((reading, other, "stream", (301, 4500)), "token 4500 is not there"),
    ):
        with pytest.raises(UsageError, match=words):
            run(patching_view(*call))
