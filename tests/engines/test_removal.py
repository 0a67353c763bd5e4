"""Heads, MLPs and adapters taken away for a while, against hooks in transformers and adapters put out in PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import LORA, close, random_factors

from engines.adapters import write_adapter
from engines.base import Engine
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config
from engines.removal import Removal
from engines.training import LoRASettings, TrainingSettings

Tokens = Callable[..., np.ndarray]

# PEFT still asks transformers for it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOLERANCE = {"torch": 1e-6, "mlx": 1e-4}
HEADS = Removal(heads={0: (2,), 2: (0, 3)})
MLPS = Removal(mlps=(0, 2))
ATTENTION = Removal(heads={1: (0, 1, 2, 3)})
Q_PROJ, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"


def log_probs(network: Any, text: np.ndarray) -> np.ndarray:
    """transformers' log-probabilities of ``text[:, 1:]``."""
    import torch

    with torch.no_grad():
        scores = network(torch.from_numpy(text).long()).logits.double().log_softmax(-1).numpy()
    return np.take_along_axis(scores[:, :-1], text[:, 1:, None].astype(np.int64), axis=-1)[..., 0]


def without(network: Any, removal: Removal) -> Any:
    """The network with hooks: ``o_proj``'s inputs that come from a head are zero, and what an MLP adds is."""

    def silent(heads: tuple[int, ...]) -> Callable[..., tuple]:
        def hook(module: Any, arguments: tuple) -> tuple:
            size = arguments[0].shape[-1] // network.config.num_attention_heads
            x = arguments[0].clone()
            for head in heads:
                x[..., head * size : (head + 1) * size] = 0
            return (x,)

        return hook

    layers = network.model.layers
    for layer, heads in removal.heads.items():
        layers[layer].self_attn.o_proj.register_forward_pre_hook(silent(heads))
    for layer in removal.mlps:
        layers[layer].post_feedforward_layernorm.register_forward_hook(lambda module, x, y: y * 0)
    return network


@pytest.mark.parametrize("removal", [HEADS, ATTENTION, MLPS, replace(MLPS, heads=HEADS.heads)], ids=str)
def test_heads_and_mlps_taken_away_equal_hooks_in_transformers(
    engine: Engine, folder: Path, tokens: Tokens, reference_model: Callable[[Path], Any], removal: Removal
) -> None:
    text = tokens(40, 3)
    engine.load(folder, "float32")
    whole, logits = engine.token_scores(text), engine.logits(text)
    close(whole.log_probs, log_probs(reference_model(folder), text), TOLERANCE[engine.name])
    expected = log_probs(without(reference_model(folder), removal), text)
    assert np.abs(expected - whole.log_probs).max() > 0.1
    with engine.without(removal):
        close(engine.token_scores(text).log_probs, expected, TOLERANCE[engine.name])
        assert np.array_equal(engine.log_probs(text), engine.token_scores(text).log_probs)
    assert np.array_equal(engine.token_scores(text).log_probs, whole.log_probs)
    assert np.array_equal(engine.logits(text), logits)


@pytest.mark.parametrize("lora", [LORA, replace(LORA, dora=True)], ids=["lora", "dora"])
@pytest.mark.parametrize("names", [(Q_PROJ,), (DOWN, Q_PROJ)], ids=len)
def test_adapters_taken_away_equal_those_that_peft_disables(
    engine: Engine,
    config: Gemma3Config,
    folder: Path,
    tokens: Tokens,
    reference_model: Callable[[Path], Any],
    tmp_path: Path,
    lora: LoRASettings,
    names: tuple[str, ...],
) -> None:
    from peft import PeftModel

    text, place = tokens(40, 2), tmp_path / "adapter"
    write_adapter(place, random_factors(config, lora), lora, config, str(folder))
    engine.load(folder, "float32")
    base = engine.logits(text)
    engine.load_adapter(place)
    whole = engine.logits(text)
    theirs = PeftModel.from_pretrained(reference_model(folder), str(place)).eval()
    before = log_probs(theirs, text)
    for name in names:
        theirs.get_submodule(f"base_model.model.{name}").enable_adapters(False)
    expected = log_probs(theirs, text)
    assert np.abs(expected - before).max() > 0.01
    with engine.without(Removal(adapters=names)):
        close(engine.token_scores(text).log_probs, expected, TOLERANCE[engine.name])
    assert len(engine.adapters()) == 7 * config.num_hidden_layers
    assert np.array_equal(engine.logits(text), whole)
    with engine.without(Removal(adapters=engine.adapters())):
        assert np.array_equal(engine.logits(text), base), "without any adapter it is the base, bit for bit"
    assert np.array_equal(engine.logits(text), whole)


def test_a_model_is_whole_again_after_an_error_and_refuses_much_before(
    engine: Engine, config: Gemma3Config, folder: Path, adapter: Path, tokens: Tokens, tmp_path: Path
) -> None:
    text, every = tokens(12), replace(HEADS, mlps=(1,), adapters=(Q_PROJ,))
    engine.load(folder, "float32")
    assert engine.adapters() == ()
    engine.load_adapter(adapter)
    before = engine.logits(text)
    refused: list[Callable[[], Any]] = [
        lambda: engine.inspect(text[0]),
        lambda: engine.start_training(TrainingSettings(LORA)),
        lambda: engine.merge("keep", 0),
        lambda: list(engine.updates()),
        lambda: engine.save_model(tmp_path / "model", config.to_dict()),
        lambda: engine.save_adapter(tmp_path / "other", str(folder)),
        lambda: engine.load_adapter(adapter),
        lambda: engine.without(MLPS).__enter__(),
    ]
    with engine.without(every):
        for call in refused:
            with pytest.raises(UnsupportedError, match="are taken away"):
                call()
        assert np.abs(engine.logits(text) - before).max() > 0.1
    broken = pytest.raises(ZeroDivisionError)
    with broken, engine.without(every):
        raise ZeroDivisionError
    assert np.array_equal(engine.logits(text), before)
    assert engine.inspect(text[0]).tokens.shape == (12,)


@pytest.mark.parametrize(
    ("removal", "words"),
    [
        (Removal(heads={0: (4,)}), "head L0.H4 is not there"),
        (Removal(heads={0: ()}), "no head is named"),
        (Removal(heads={0: (1,)}, mlps=(3,)), "layer 3 is not there"),
        (Removal(adapters=(Q_PROJ,)), "has no adapter"),
    ],
    ids=str,
)
def test_what_is_not_there_is_not_taken_away(
    engine: Engine, folder: Path, tokens: Tokens, removal: Removal, words: str
) -> None:
    engine.load(folder, "float32")
    before = engine.logits(tokens(8))
    with pytest.raises(UnsupportedError, match=words), engine.without(removal):
        pass
    assert np.array_equal(engine.logits(tokens(8)), before)
