"""The bundled model is a real one: it has learnt its corpus, keeps Gemma's shape, and shows a sink on ``<bos>``."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from engines import open_engine
from engines.gemma3 import GLOBAL
from gemma_tui import paths
from gemma_tui.hub.models import resolve, summary
from gemma_tui.rows import read_rows
from gemma_tui.studies.data import evaluation_batches, windows
from gemma_tui.studies.plan import build, read_toml
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.tokenizer import BOS, END_OF_TURN, EOS, MASK, PAD, START_OF_TURN, UNK, read_tokenizer

CORPUS = paths.assets() / "corpus"


@pytest.fixture(scope="module")
def nano():
    return resolve("nano")


@pytest.fixture(scope="module")
def held_out(nano):
    return windows(read_rows(CORPUS / "valid.jsonl"), read_tokenizer(nano.folder), 512)


def test_its_shape_is_gemma3s_at_a_small_scale(nano):
    config = nano.config()
    assert 2_000_000 <= config.parameter_count() <= 4_000_000
    assert config.layer_types.count(GLOBAL) * 6 == config.num_hidden_layers
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.sliding_window <= 64
    assert config.max_position_embeddings >= 512
    assert sum(p.stat().st_size for p in nano.folder.iterdir()) <= 8_000_000
    assert summary(nano).problem == ""


def test_its_tokenizer_has_gemmas_special_ids(nano):
    backend = read_tokenizer(nano.folder).backend
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    assert [backend.token_to_id(n) for n in names] == [PAD, EOS, BOS, UNK, MASK, START_OF_TURN, END_OF_TURN]
    assert backend.get_vocab_size() == nano.config().vocab_size


def test_its_held_out_loss_is_far_below_a_unigram_models(nano, held_out):
    engine = open_engine("torch")
    engine.load(nano.folder, "float32")
    batches = list(evaluation_batches(held_out, 4, 6))
    loss = sum(engine.loss(b) for b in batches) / sum(b.supervised for b in batches)
    assert loss < 0.65 * _unigram_loss(nano, batches)


def test_a_head_has_a_sink_on_bos(nano, held_out):
    """Where every layer still sees ``<bos>``, one head gives it several times the even share."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        nano.folder, dtype=torch.float32, attn_implementation="eager"
    )
    queries = range(32, nano.config().sliding_window)
    rows = [w.ids[: len(queries) + 32] for w in held_out if len(w) >= 64][:12]
    with torch.inference_mode():
        weights = model(torch.tensor(np.stack(rows)), output_attentions=True).attentions
    columns = torch.cat([layer[:, :, 32:, :20].mean(dim=(0, 2)) for layer in weights])
    sink = columns[columns[:, 0].argmax()]
    assert float(sink[0]) > 3 * np.mean([1 / (q + 1) for q in queries])
    assert float(sink[0]) > 2 * float(sink[1:].max())


def test_its_plan_can_be_run_again(nano):
    plan = build(TrainingPlan, read_toml(nano.folder / "plan.toml"))
    assert plan.fresh
    assert plan.model == "nano"


def _unigram_loss(nano, batches) -> float:
    vocabulary = nano.config().vocab_size
    tokens = windows(read_rows(CORPUS / "train.jsonl"), read_tokenizer(nano.folder), 512)
    counts = Counter(int(t) for w in tokens for t in w.ids[1:])
    total = sum(counts.values()) + vocabulary
    labels = [int(t) for b in batches for t in b.labels.ravel() if t >= 0]
    return -sum(math.log((counts[t] + 1) / total) for t in labels) / len(labels)
