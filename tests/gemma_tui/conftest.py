"""A data folder for every test, and a tiny Gemma-3 with a tokenizer and a corpus of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from samples import TEXTS, write_rows
from stand_in_hub import Repo, StandInHub, serving

from engines.checkpoints import write_arrays, write_json
from engines.gemma3 import parse_config
from engines.initialisation import gemma3_weights
from gemma_tui import paths
from gemma_tui.cli import main
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.plan import build
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.tokenizer import Tokenizer, train_tokenizer

SHAPE = {
    "model_type": "gemma3_text",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "max_position_embeddings": 256,
}

Tiny = dict[str, Any]
Plan = Callable[..., TrainingPlan]
Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing a test does reaches the user's own models and runs, nor the network."""
    folder = tmp_path / "home"
    monkeypatch.setenv("GEMMA_TUI_HOME", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """363 special tokens and bytes, and some letters and syllables."""
    return train_tokenizer(TEXTS, 450)


@pytest.fixture(scope="session")
def prepared_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "tiny"
    folder.mkdir()
    config = parse_config({**SHAPE, "vocab_size": tokenizer.size})
    write_arrays(folder / "model.safetensors", dict(gemma3_weights(config, seed=1)))
    write_json(folder / "config.json", config.to_dict())
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def tiny(prepared_model: Path, home: Path) -> str:
    """The name of a model in the data folder: two layers, 450 tokens."""
    shutil.copytree(prepared_model, paths.models() / "tiny")
    return "tiny"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``train.jsonl`` and ``valid.jsonl``."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, texts in (("train", TEXTS[:20]), ("valid", TEXTS[20:])):
        write_rows(folder / f"{name}.jsonl", texts)
    return folder


@pytest.fixture
def plan(tiny: str, corpus: Path) -> Plan:
    """``plan(steps=3, ...)``: a training plan for the tiny model and corpus."""

    def make(**values: Any) -> TrainingPlan:
        small = {"steps": 3, "batch_size": 2, "sequence_length": 32, "evaluate_every": 2, "evaluate_batches": 2}
        rates = {"learning_rate": 1e-2, "warmup": 0, "rank": 2}
        return build(TrainingPlan, {"model": tiny, "data": str(corpus), **small, **rates, **values})

    return make


@pytest.fixture
def store() -> Iterator[RunStore]:
    store = RunStore()
    yield store
    store.close()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Commands:
    """``command("runs", "list")``: exit code, the JSON rows of stdout, and stderr."""

    def run(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
        capsys.readouterr()
        try:
            code = main([*arguments, "--json"])
        except SystemExit as left:
            code = int(str(left.code))
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err
        return code, [json.loads(line) for line in shown.out.splitlines()], shown.err

    return run


@pytest.fixture
def spoken(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``spoken("runs", "list")``: exit code, stdout and stderr as a person sees them."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as left:
            code = int(str(left.code))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def empty_hub_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has fetched from the hub is not listed."""
    from huggingface_hub import constants

    (home / "hub").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))


@pytest.fixture
def hub(home: Path, prepared_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A stand-in for the hub with one model, ``org/gemma-3-tiny``, and an empty cache; for child processes, too."""
    from huggingface_hub import constants

    with serving() as hub:
        hub.repos["org/gemma-3-tiny"] = Repo({p.name: p.read_bytes() for p in prepared_model.iterdir()})
        cache = home / "hf" / "hub"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "hf" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("HF_TOKEN_PATH", str(home / "hf" / "token"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield hub
