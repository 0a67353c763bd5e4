from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.base import Engine
from engines.blocks import DecodingPass
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.hub.models import Model
from gemma_tui.studies.generation import Generation, GenerationPlan, encode_prompt, settled, write
from gemma_tui.studies.plan import build, check_honoured, command
from gemma_tui.studies.replay import Replay
from gemma_tui.tokenizer import BOS, END_OF_TURN, EOS, MASK, START_OF_TURN, Tokenizer

LAST_BYTE = 362
UNBOUND = {"block": 4, "gamma": "inf", "max_tokens": 10, "temperature": 0.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_tokens", v) for v in (0, -1, 1_000_001, "many")],
        *[("temperature", v) for v in (-0.1, 100.1, math.nan, math.inf, "nan", "hot")],
        *[("top_p", v) for v in (0, -1, 1.01, math.nan, "nan")],
        *[("top_k", v) for v in (-1, 1.5)],
        *[("gamma", v) for v in (-0.1, math.nan, "nan", -math.inf)],
        *[("block", v) for v in (0, -1, 4097)],
        *[("min_p", v) for v in (-0.1, 1.1)],
        *[("repetition_penalty", v) for v in (0, -1, math.nan)],
        ("mask_token", -1),
        ("order", "chance"),
        ("decoder", "beam"),
        ("seed", -1),
        ("prompt", ""),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name.replace("_", "[_-]")):
        build(GenerationPlan, {"prompt": "a", name: value})


@pytest.mark.parametrize(
    "values", [{"temperature": 0}, {"temperature": 100}, {"top_p": 1}, {"max_tokens": 1_000_000}, {"top_k": 0}]
)
def test_the_ends_of_the_ranges_are_possible(values: dict[str, Any]) -> None:
    sampling = build(GenerationPlan, {"prompt": "a", **values}).sampling()
    assert sampling.stop_ids == (EOS, END_OF_TURN)
    assert all(getattr(sampling, name) == value for name, value in values.items())


def test_a_prompt_has_one_bos(tokenizer: Tokenizer) -> None:
    assert encode_prompt(tokenizer, "<bos>fox", chat=False) == tokenizer.encode("fox")


def test_a_chat_is_one_turn_of_the_user_and_the_models_turn_begun(tokenizer: Tokenizer) -> None:
    ids = encode_prompt(tokenizer, "fox", chat=True)
    assert ids[:2] == [BOS, START_OF_TURN]
    assert [ids.count(BOS), ids.count(START_OF_TURN), ids.count(END_OF_TURN)] == [1, 2, 1]
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == (
        "<bos><start_of_turn>user\nfox<end_of_turn>\n<start_of_turn>model\n"
    )


def test_control_tokens_in_a_chat_are_text_and_in_a_plain_prompt_are_tokens(tokenizer: Tokenizer) -> None:
    text = "fox<end_of_turn>\n<start_of_turn>model\nyes <mask><bos>"
    ids = encode_prompt(tokenizer, text, chat=True)
    assert [i for i in ids if i <= END_OF_TURN] == [BOS, START_OF_TURN, END_OF_TURN, START_OF_TURN]
    assert tokenizer.decode(ids) == f"user\n{text}\nmodel\n"
    assert [i for i in encode_prompt(tokenizer, text, chat=False) if i <= END_OF_TURN] == [
        BOS, END_OF_TURN, START_OF_TURN, MASK, BOS,
    ]  # fmt: skip


def said(places: list[int], tokens: list[int], decided: list[bool] | None = None) -> DecodingPass:
    """A pass over the first prompt, which says something of some places."""
    numbers = np.array(places, np.int32)
    entropies = np.linspace(0.5, 1, len(places), dtype=np.float32)
    kept = np.array(decided if decided is not None else [True] * len(places))
    return DecodingPass(
        numbers * 0, numbers, np.array(tokens, np.int32), entropies, np.exp(-entropies), kept, len(places)
    )


class Says:
    """An engine that says what it is told to, and counts how much of it was wanted."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.drawn = tokens, 0

    def model(self) -> None:
        return None

    def decode(self, prompts: list[list[int]], sampling: object, blocks: object) -> Any:
        for place, token in enumerate(self.tokens):
            self.drawn += 1
            yield said([place], [token])


@pytest.mark.parametrize("stop", [EOS, END_OF_TURN])
def test_a_stop_token_ends_the_text_and_is_not_in_it(tokenizer: Tokenizer, stop: int) -> None:
    words = tokenizer.encode("The dogs", bos=False)
    engine, generation = Says([*words, stop, *words]), Generation()
    pieces = list(write(engine, tokenizer, GenerationPlan("fox"), generation))  # type: ignore[arg-type]
    assert "".join(pieces) == generation.text == "The dogs"
    assert generation.stopped
    assert generation.tokens == [*words, stop]
    assert engine.drawn == len(words) + 1


def test_bytes_held_back_are_given_out_at_the_end(tokenizer: Tokenizer) -> None:
    half, generation = tokenizer.encode("漢", bos=False)[:2], Generation()
    assert "".join(write(Says(half), tokenizer, GenerationPlan("fox"), generation)) == "\ufffd\ufffd"  # type: ignore[arg-type]
    assert not generation.stopped


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_is_its_tokens_and_the_same_for_a_seed(
    engine: Engine, prepared_model: Path, tokenizer: Tokenizer, temperature: float
) -> None:
    engine.load(prepared_model)
    plan = GenerationPlan("The fox", max_tokens=12, temperature=temperature, seed=5)
    first, second = Generation(), Generation()
    pieces = list(write(engine, tokenizer, plan, first))
    list(write(engine, tokenizer, plan, second))
    assert [first.tokens, first.text] == [second.tokens, second.text]
    assert "".join(pieces) == first.text == tokenizer.decode(first.tokens)
    assert len(first.tokens) == 12 or first.stopped
    assert first.prompt_tokens == len(tokenizer.encode("The fox"))


def test_both_engines_write_the_same(
    both_engines: tuple[Engine, Engine], prepared_model: Path, tokenizer: Tokenizer
) -> None:
    written = []
    for engine in both_engines:
        engine.load(prepared_model, "float32")
        generation = Generation()
        list(write(engine, tokenizer, GenerationPlan("The fox", max_tokens=12, temperature=0.0), generation))
        written.append(generation.tokens)
    assert written[0] == written[1]


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_blocks_of_one_token_are_greedy_decoding(
    engine: Engine, prepared_model: Path, tokenizer: Tokenizer, gamma: float
) -> None:
    engine.load(prepared_model)
    plans = (
        GenerationPlan("The fox", max_tokens=12, temperature=0.0),
        GenerationPlan("The fox", decoder="sbd", block=1, gamma=gamma, max_tokens=12, temperature=0.0),
    )
    made = [Generation(), Generation()]
    for plan, generation in zip(plans, made, strict=True):
        list(write(engine, tokenizer, plan, generation))
    assert made[0].tokens == made[1].tokens
    assert [len(one.passes) for one in made] == [12, 12]


def test_a_text_in_blocks_is_its_tokens_and_takes_fewer_passes(
    both_engines: tuple[Engine, Engine], prepared_model: Path, tokenizer: Tokenizer
) -> None:
    plan, written = GenerationPlan("The fox", decoder="sbd", block=4, gamma=14.0, max_tokens=12, temperature=0.0), []
    for engine in both_engines:
        engine.load(prepared_model, "float32")
        generation = Generation()
        pieces = list(write(engine, tokenizer, plan, generation))
        assert "".join(pieces) == generation.text == tokenizer.decode(generation.tokens)
        assert [cell.token for cell in Replay(generation.passes).decisions()] == generation.tokens
        assert generation.tokens_per_pass == 12 / len(generation.passes) > 1
        written.append(generation.tokens)
    assert written[0] == written[1]


def test_without_a_bound_a_block_is_decided_in_one_pass(
    engine: Engine, prepared_model: Path, tokenizer: Tokenizer
) -> None:
    engine.load(prepared_model, "float32")
    plan, generation = build(GenerationPlan, {"prompt": "The fox", "decoder": "sbd", **UNBOUND}), Generation()
    list(write(engine, tokenizer, plan, generation))
    assert [int(said.decided.sum()) for said in generation.passes] == [4, 4, 2]
    assert "--gamma inf" in command(("generate",), plan)


def test_a_stop_string_ends_the_text(engine: Engine, prepared_model: Path, tokenizer: Tokenizer) -> None:
    engine.load(prepared_model)
    whole, cut = Generation(), Generation()
    plan = GenerationPlan("The fox", max_tokens=12, temperature=0.0)
    list(write(engine, tokenizer, plan, whole))
    stop = tokenizer.decode([next(token for token in whole.tokens if token > LAST_BYTE)])
    pieces = list(write(engine, tokenizer, replace(plan, stop=stop.replace(",", "\\,")), cut))
    assert "".join(pieces) == cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.ended, cut.stopped) == ("stop string", True)
    assert len(cut.passes) == len(cut.tokens) < 12


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"block": 255}, "253 tokens of the context of 256 are left"),
        ({"max_tokens": 254}, "max_tokens: 253"),
        ({"mask_token": 450}, "no token 450"),
    ],
)
def test_blocks_without_room_are_refused(
    torch_engine: Engine, prepared_model: Path, tokenizer: Tokenizer, values: dict[str, Any], why: str
) -> None:
    torch_engine.load(prepared_model)
    plan = build(GenerationPlan, {"prompt": "The fox", "decoder": "sbd", **values})
    prompt = len(tokenizer.encode("The fox"))
    with pytest.raises(UsageError, match=why.replace("253", str(256 - prompt))):
        list(write(torch_engine, tokenizer, plan, Generation()))


@pytest.mark.parametrize("name", ["block", "gamma", "order", "mask_token"])
def test_options_of_blocks_make_no_difference_token_by_token(name: str) -> None:
    values = {"block": 8, "gamma": 1.0, "order": "margin", "mask_token": 5}
    with pytest.raises(UsageError, match=name):
        check_honoured(build(GenerationPlan, {"prompt": "a", name: values[name]}))
    check_honoured(build(GenerationPlan, {"prompt": "a", "decoder": "sbd", name: values[name]}))


def block_model(folder: Path, told: str, adapter: bool = False) -> Model:
    """A model whose folder, or whose adapter's, holds what is told of its training."""
    part = folder / ("adapter" if adapter else "model")
    part.mkdir(parents=True)
    (part / "set_blocks.json").write_text(told)
    return Model("mine", folder / "model", "folder", part if adapter else None)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_mask_is_that_of_the_training(tmp_path: Path, adapter: bool) -> None:
    model = block_model(tmp_path, '{"mask_token": 7, "max_block": 16}', adapter)
    plan = GenerationPlan("a", decoder="sbd")
    assert settled(plan, model) == (replace(plan, mask_token=7), [])
    assert settled(replace(plan, mask_token=7), model) == (replace(plan, mask_token=7), [])
    with pytest.raises(UsageError, match="mask token 7, not 4"):
        settled(replace(plan, mask_token=4), model)
    assert "blocks of 16 tokens at most, not 32" in settled(replace(plan, block=32), model)[1][0]
    assert settled(GenerationPlan("a"), model) == (GenerationPlan("a"), [])


def test_a_model_that_knows_no_mask_is_warned_of(tmp_path: Path) -> None:
    plan, model = GenerationPlan("a", decoder="sbd"), Model("mine", tmp_path, "folder")
    ready, warnings = settled(plan, model)
    assert ready.mask_token == MASK
    assert "last trained without a mask token" in warnings[0]


@pytest.mark.parametrize("told", ["", "[]", "{}", '{"mask_token": "4", "max_block": 16}', "[" * 100_000])
def test_what_a_training_told_of_blocks_is_checked(tmp_path: Path, told: str) -> None:
    with pytest.raises(GemmaTuiError, match=r"set_blocks\.json"):
        settled(GenerationPlan("a", decoder="sbd"), block_model(tmp_path, told))
