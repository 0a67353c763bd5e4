"""Training for set block decoding: what is masked, what is measured, what is kept and what is refused."""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import TEXTS

from engines.base import Engine, Sampling
from engines.blocks import BlockDecoding
from engines.training import IGNORED, Batch, TrainingSettings
from gemma_tui import cli
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.hub.models import resolve
from gemma_tui.hub.set_blocks import SetBlocks, set_blocks_of
from gemma_tui.rows import read_sources
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.data import make_batch, training_batches
from gemma_tui.studies.estimate import estimate
from gemma_tui.studies.events import Control, Event
from gemma_tui.studies.forecast import forecast
from gemma_tui.studies.generation import GenerationPlan, settled
from gemma_tui.studies.recording import record_training
from gemma_tui.studies.set_blocks import WATCHED_TOKENS, Watching, batch_maker, masked_batch, tokens_per_pass
from gemma_tui.studies.tasks import KINDS, TaskPlan, make
from gemma_tui.studies.training_plan import TrainingPlan, settings
from gemma_tui.studies.turns import Window
from gemma_tui.tokenizer import BOS, END_OF_TURN, EOS, MASK, Tokenizer

Plan = Callable[..., TrainingPlan]
Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]
PLAN = TrainingPlan(method="sbd", batch_size=3, seed=5)
SHORT = {"steps": 1, "evaluate_every": 0}


def window(prompt: int, answer: int) -> Window:
    """Distinct ids, of which those after the prompt are learnt, ``<eos>`` the last."""
    ids = np.array([BOS, *range(100, 100 + prompt + answer), EOS], np.int32)
    return Window(ids, np.arange(len(ids)) > prompt)


WINDOWS = [window(4, 9), window(7, 3), window(2, 20)]


def made(rate: float, block: int = 4, plan: TrainingPlan = PLAN) -> Batch:
    return masked_batch(WINDOWS, plan, block, np.full(3, rate), np.random.default_rng(0))


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("block", [2, 4, 5])
def test_a_masked_token_is_its_own_label(rate: float, block: int) -> None:
    batch = made(rate, block)
    noise = batch.noised()
    for row, some in enumerate(WINDOWS):
        whole = len(some) // block * block
        masked = noise.labels[row] != IGNORED
        assert (noise.tokens[row][masked] == PLAN.mask_token).all()
        assert np.array_equal(noise.labels[row][masked], some.ids[:whole][masked[:whole]])
        assert np.array_equal(
            noise.tokens[row][: len(some)][~masked[: len(some)]], some.ids[: masked.size][~masked[: len(some)]]
        )
        assert not masked[whole:].any()
        assert not masked[: len(some)][~some.supervised[: masked.size]].any()
        if rate == 1:
            assert np.array_equal(masked[:whole], some.supervised[:whole])
        if rate == 0:
            assert not masked.any()


def test_the_text_beside_is_the_plain_one_with_its_last_token() -> None:
    batch = made(0.5)
    for row, some in enumerate(WINDOWS):
        assert np.array_equal(batch.tokens[row, : len(some)], some.ids)
        expected = np.where(some.supervised[1:], some.ids[1:], IGNORED)
        assert np.array_equal(batch.labels[row, : len(some) - 1], expected)
        assert (batch.labels[row, len(some) - 1 :] == IGNORED).all()


def test_a_filled_block_goes_on_with_the_end() -> None:
    batch = made(1.0, 8, replace(PLAN, fill_blocks=True))
    labels = batch.noised().labels
    for row, some in enumerate(WINDOWS):
        whole = -(-len(some) // 8) * 8
        assert np.array_equal(labels[row, : len(some)][some.supervised], some.ids[some.supervised])
        assert (labels[row, len(some) : whole] == EOS).all()
        assert (labels[row, whole:] == IGNORED).all()


def test_blocks_are_drawn_once_a_step_and_rates_once_a_row() -> None:
    plan = replace(PLAN, accumulate=2, max_block=6)
    longer = [window(1, 400) for _ in range(3)]
    batches = [batch_maker(plan)(longer, number) for number in range(200)]
    blocks = [batch.noised().block for batch in batches]
    assert blocks[::2] == blocks[1::2]
    assert set(blocks) == set(range(2, 7))
    shares = np.array([(batch.noised().labels != IGNORED).mean(axis=1) for batch in batches])
    # Uniform from 0 to 1: mean 1/2, standard deviation 1/√12, within four standard errors of 600 draws.
    assert abs(shares.mean() - 0.5) < 4 / np.sqrt(12 * 600)
    assert abs(shares.std() - 1 / np.sqrt(12)) < 0.03


def test_masks_are_those_of_the_number_wherever_training_begins() -> None:
    windows = [window(2, n) for n in range(6, 30)]
    whole = list(islice(training_batches(windows, 3, 1, make=batch_maker(PLAN)), 12))
    later = list(islice(training_batches(windows, 3, 1, 7, batch_maker(PLAN)), 5))
    for one, other in zip(whole[7:], later, strict=True):
        assert np.array_equal(one.noised().tokens, other.noised().tokens)
    assert len({batch.noised().tokens.tobytes() for batch in whole}) == len(whole)


def warned(events: list[Event]) -> list[str]:
    return [event.values["text"] for event in events if event.kind == "warning"]


def run(engine: Engine, plan: TrainingPlan, store: RunStore) -> tuple[str, list[Event]]:
    recorded = record_training(engine, plan, Control(), store)
    return recorded.run.run_id, list(recorded.events)


@pytest.mark.parametrize("method", ["sbd", "sbd-lora"])
def test_a_run_tells_the_masked_loss_and_keeps_what_it_was_trained_for(
    engine: Engine, plan: Plan, store: RunStore, method: str
) -> None:
    run_id, events = run(engine, plan(method=method, max_block=8, mask_token=6), store)
    assert all(event.values["masked_loss"] > 0 for event in events if event.kind == "step")
    (*_, last) = [event.values for event in events if event.kind == "evaluation"]
    losses = [last[f"masked_loss_{block}_{share}"] for block in (4, 8) for share in (25, 50, 100)]
    assert last["masked_valid_loss"] == pytest.approx(np.mean(losses))
    assert 0 < last["tokens_per_pass"] <= 8
    assert set_blocks_of(resolve(run_id)) == SetBlocks(6, 8)


@pytest.mark.parametrize(("values", "rows"), [({}, 4), ({"masked_weight": 0.0}, 2), ({"method": "full"}, 2)])
def test_masked_copies_are_foreseen_as_rows(
    torch_engine: Engine, plan: Plan, store: RunStore, values: dict[str, Any], rows: int
) -> None:
    chosen = plan(**{"method": "sbd", **SHORT, **values})
    told = forecast(chosen, "torch", torch_engine.device())
    start = next(event.values for event in run(torch_engine, chosen, store)[1] if event.kind == "start")
    config = resolve(chosen.model).config()
    wanted = estimate(config, settings(chosen), rows, 32, start["dtype"], torch_engine.device())
    assert start["estimate"] == sum(wanted.parts.values())
    assert start["estimated"] == told


def test_the_masked_loss_falls(torch_engine: Engine, plan: Plan, store: RunStore) -> None:
    _, events = run(torch_engine, plan(method="sbd", steps=40, learning_rate=1e-2, evaluate_every=5), store)
    first, *_, last = [event.values["masked_valid_loss"] for event in events if event.kind == "evaluation"]
    assert last < 0.9 * first


@pytest.mark.parametrize(("method", "plain"), [("sbd", "full"), ("sbd-lora", "lora")])
def test_without_weight_a_run_is_that_of_plain_training(
    engine: Engine, plan: Plan, store: RunStore, method: str, plain: str
) -> None:
    """To the last bit."""
    seen = []
    for chosen in (plan(method=method, masked_weight=0.0), plan(method=plain)):
        _, events = run(engine, chosen, store)
        steps = [e.values for e in events if e.kind == "step"]
        assert not any("masked_loss" in values for values in steps)
        losses = [e.values["valid_loss"] for e in events if e.kind == "evaluation"]
        seen.append([(v["loss"], v["grad_norm"]) for v in steps] + losses)
    assert seen[0] == seen[1]


def test_without_weight_a_full_window_is_no_longer_than_in_plain_training() -> None:
    full = window(4, 27)  # 33 tokens, of which the last is only predicted
    batch, plain = batch_maker(replace(PLAN, masked_weight=0.0))([full], 0), make_batch([full])
    assert batch.tokens.shape == (1, 32)
    assert np.array_equal(batch.tokens, plain.tokens)
    assert np.array_equal(batch.labels, plain.labels)


def test_rows_without_a_whole_block_are_trained_on(engine: Engine, tiny: str) -> None:
    engine.load(resolve(tiny).folder, "float32")
    engine.start_training(TrainingSettings())
    batch = masked_batch([window(4, 9)], PLAN, 40, np.ones(1), np.random.default_rng(0))
    assert batch.noised().tokens.size == 0
    result = engine.train_step([batch], 1e-3)
    assert np.isfinite(result.loss)
    assert result.masked_loss is None


def test_both_engines_train_on_the_same_masks(both_engines: tuple[Engine, Engine], plan: Plan, store: RunStore) -> None:
    seen = []
    for engine in both_engines:
        _, events = run(engine, plan(method="sbd", learning_rate=1e-3), store)
        seen.append([(e.values["loss"], e.values["masked_loss"]) for e in events if e.kind == "step"])
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-3)


def test_a_watched_model_is_measured_alike_every_time(torch_engine: Engine, plan: Plan, store: RunStore) -> None:
    chosen = plan(method="sbd", max_block=4)
    run(torch_engine, chosen, store)
    watching = Watching(chosen, [window(4, 9)] * 5)
    assert list(watching.measures(torch_engine)) == list(watching.measures(torch_engine))


def test_prompts_side_by_side_take_the_passes_of_each_alone(
    torch_engine: Engine, plan: Plan, store: RunStore, tokenizer: Tokenizer
) -> None:
    chosen = plan(method="sbd", max_block=4, steps=60, fill_blocks=True, evaluate_every=0)
    run(torch_engine, chosen, store)
    stops, prompts = (EOS, END_OF_TURN), [tokenizer.encode(text)[: -2 - 3 * n] for n, text in enumerate(TEXTS[:4])]
    written, passes = 0, 0
    for prompt in prompts:
        text: dict[int, int] = {}
        for said in torch_engine.decode([prompt], Sampling(WATCHED_TOKENS, stop_ids=stops), BlockDecoding(4, 0.1)):
            passes += 1
            text |= dict(zip(said.places[said.decided].tolist(), said.tokens[said.decided].tolist(), strict=True))
        ends = [place for place, token in text.items() if token in stops]
        written += min(ends) + 1 if ends else len(text)
    assert written < len(prompts) * WATCHED_TOKENS  # some have ended
    assert tokens_per_pass(torch_engine, prompts, chosen) == pytest.approx(written / passes)


def test_a_mask_token_that_cannot_be_one_is_refused(
    torch_engine: Engine, plan: Plan, store: RunStore, tokenizer: Tokenizer
) -> None:
    for token, said in ((tokenizer.size, "no token"), (EOS, "data hold token 1"), (BOS, "data hold token 2")):
        with pytest.raises(UsageError, match=said):
            run(torch_engine, plan(method="sbd", mask_token=token), store)


def test_what_an_adapter_was_trained_for_goes_where_it_goes(
    torch_engine: Engine, plan: Plan, store: RunStore, command: Commands, tmp_path: Path
) -> None:
    one, two, other = (
        run(torch_engine, plan(method="sbd-lora", steps=1, evaluate_every=0, mask_token=6, **values), store)[0]
        for values in ({}, {"seed": 1}, {"max_block": 8})
    )
    plain, _ = run(torch_engine, plan(steps=1, evaluate_every=0), store)
    out = str(tmp_path / "exported")
    for words in (
        ("export", one, "--format", "peft", "--out", out),
        ("import", out, "--name", "imported"),
        ("fuse", "imported", "--name", "fused"),
        ("blend", one, two, "--weights", "1", "1", "--name", "blended"),
        ("blend", one, plain, "--weights", "1", "1", "--name", "half"),
        ("blend", one, other, "--weights", "1", "1", "--name", "mixed"),
    ):
        code, _, error = command("adapters", *words)
        assert code == 0, error
    assert command("models", "convert", "fused", "--dtype", "bfloat16", "--name", "converted")[0] == 0
    for name in (out, "imported", "fused", "blended", "half", "converted"):
        assert set_blocks_of(resolve(name)) == SetBlocks(6, 16), name
    assert set_blocks_of(resolve("mixed")) is None
    assert set_blocks_of(resolve(plain)) is None


@pytest.mark.parametrize(
    ("trained", "method"), [("sbd", "full"), ("sbd", "rank1"), ("sbd", "lora"), ("sbd-lora", "full")]
)
def test_plain_training_says_that_its_result_does_not_count_as_trained_for_blocks(
    torch_engine: Engine, plan: Plan, store: RunStore, trained: str, method: str
) -> None:
    before, _ = run(torch_engine, plan(method=trained, mask_token=6, **SHORT), store)
    after, events = run(torch_engine, plan(model=before, method=method, **SHORT), store)
    (said,) = warned(events)
    assert f"{before} was trained for blocks of 16 tokens" in said
    assert f"--method {'sbd-lora' if method == 'lora' else 'sbd'} trains on both" in said
    assert set_blocks_of(resolve(after)) is None
    ready, (why,) = settled(GenerationPlan("a", decoder="sbd"), resolve(after))
    assert "last trained without a mask token" in why
    # The base of an adapter still has its own.
    assert ready.mask_token == (6 if method == "lora" else MASK)


def test_training_for_blocks_goes_on_with_its_mask_token_or_says_that_it_does_not(
    torch_engine: Engine, plan: Plan, store: RunStore
) -> None:
    before, events = run(torch_engine, plan(method="sbd", mask_token=6, **SHORT), store)
    assert not warned(events)
    assert not warned(run(torch_engine, plan(model=before, method="sbd-lora", mask_token=6, **SHORT), store)[1])
    other, events = run(torch_engine, plan(model=before, method="sbd-lora", **SHORT), store)
    assert warned(events) == [
        f"{before} was trained with mask token 6, and learns 4 in its place: --mask-token 6 goes on with it"
    ]
    assert set_blocks_of(resolve(other)) == SetBlocks(4, 16)
    _, events = run(torch_engine, plan(model=before, method="full", fresh=True, **SHORT), store)
    assert not warned(events)


@pytest.mark.parametrize(
    ("values", "said"),
    [({"packing": True}, "packing"), ({"masked_weight": 0.0, "next_token_weight": 0.0}, "masked_weight")],
)
def test_what_does_not_go_with_blocks_is_refused(plan: Plan, values: dict[str, float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        settings(plan(method="sbd", **values))


@pytest.mark.parametrize("text", ["{", "[]", '{"mask_token": 4}', '{"mask_token": "4", "max_block": 8}', "[" * 99999])
def test_a_broken_note_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "set_blocks.json").write_text(text)
    with pytest.raises(GemmaTuiError, match=r"set_blocks\.json"):
        set_blocks_of(replace(resolve("nano"), folder=tmp_path))


@pytest.mark.parametrize("kind", list(KINDS))
def test_answers_follow_from_questions(kind: str) -> None:
    splits = make(TaskPlan(kind, 300, 1))
    rows = [row for split in splits.values() for row in split]
    assert {name: len(split) for name, split in splits.items()} == {"train": 270, "valid": 15, "test": 15}
    assert len({row.prompt for row in rows}) == 300
    for row in rows:
        numbers = [int(n) for n in re.findall(r"\d+", row.prompt)]
        if kind == "records":
            person, goods, place, *_ = row.prompt.split(", ")
            assert {str(numbers[0]), str(numbers[1]), str(numbers[0] + 1)} == set(re.findall(r"\d+", row.completion))
            assert [row.completion.count(word) for word in (f"The {person} ", f"the {place}", goods)] == [2, 2, 3]
        else:
            assert row.completion.endswith(
                f"The answer is {sum(int(n) for n in row.prompt.replace('- ', '-').replace('+ ', '').split())}."
            )
    assert make(TaskPlan(kind, 300, 1)) == splits
    assert make(TaskPlan(kind, 300, 2)) != splits


def test_a_task_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "task")
    assert cli.main(["task", target, "--kind", "chains", "--rows", "100", "--json"]) == 0
    rows = read_sources(target)
    assert (len(rows.train), len(rows.valid), len(rows.test)) == (80, 10, 10)
    assert cli.main(["task", target]) == 2
    assert "there already" in capsys.readouterr().err


def test_a_task_that_has_no_room_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[Path] = []

    def short(path: Path, text: str, encoding: str) -> int:
        written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, text, encoding=encoding)

    write_text, target = Path.write_text, tmp_path / "within" / "task"
    monkeypatch.setattr(Path, "write_text", short)
    assert cli.main(["task", str(target), "--rows", "100"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert len(written) == 3
    assert list((tmp_path / "within").iterdir()) == []


def test_more_questions_than_there_are_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    one = KINDS["records"](random.Random(1))
    monkeypatch.setitem(KINDS, "records", lambda draw: one)
    with pytest.raises(UsageError, match="ask for fewer"):
        make(TaskPlan(rows=100))
