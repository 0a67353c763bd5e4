"""The speed-quality curve: what each way to decode writes, costs and agrees in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import TEXTS

from engines.base import Engine, Sampling
from engines.blocks import BlockDecoding
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.exports.data import figure_json
from gemma_tui.figure_text import cell_text, table_lines
from gemma_tui.rows import ChatRow, Message, PromptRow, TextRow
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.curve import measure
from gemma_tui.studies.curve.measure import record_curve, resume_curve
from gemma_tui.studies.curve.plan import CurvePlan, Way, ways_of
from gemma_tui.studies.curve.questions import drawn, questions
from gemma_tui.studies.curve.results import Curve, curve_figure, half_width, read_curve
from gemma_tui.studies.events import Control
from gemma_tui.studies.plan import build
from gemma_tui.studies.turns import asked
from gemma_tui.studies.writing import agreement
from gemma_tui.tokenizer import BOS, END_OF_TURN, EOS, START_OF_TURN, Tokenizer

Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]
PROMPTS = ["The fox", "The 3rd fox jumps over", "dogs of 7 towns"]
LENGTH = 6
FACTS = {"rows": 1, "answers": 1, "batch_size": 1, "dtype": "float32", "device": "cpu", "engine": "torch"}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def greedy(engine: Engine, prompt: list[int]) -> list[int]:
    return list(engine.generate(prompt, Sampling(LENGTH, stop_ids=(EOS, END_OF_TURN))))


def blocks(engine: Engine, prompt: list[int], block: int, gamma: float) -> tuple[list[int], int]:
    """The tokens, and the passes that they took."""
    said = list(engine.decode([prompt], Sampling(LENGTH, stop_ids=(EOS, END_OF_TURN)), BlockDecoding(block, gamma)))
    found = {
        int(p): int(t) for one in said for p, t in zip(one.places[one.decided], one.tokens[one.decided], strict=True)
    }
    return [found[place] for place in range(len(found))], len(said)


def plan(rows: Path, **values: Any) -> CurvePlan:
    small = {"model": "tiny", "block": "4", "gamma": "0,14", "max_tokens": LENGTH, "prompts": "plain"}
    return build(CurvePlan, {"data": str(rows), **small, **values})


def made(engine: Engine, store: RunStore, plan: CurvePlan) -> tuple[Run, Curve]:
    recorded = record_curve(engine, plan, Control(), store)
    list(recorded.events)
    return recorded.run, read_curve(store, recorded.run)


@pytest.fixture
def data(tmp_path: Path, torch_engine: Engine, prepared_model: Path, tokenizer: Tokenizer) -> Path:
    """Rows of which the model writes the first answer, token by token; and text."""
    torch_engine.load(prepared_model)
    answer = tokenizer.decode(greedy(torch_engine, tokenizer.encode(PROMPTS[0])))
    rows: list[dict[str, Any]] = [{"prompt": text, "completion": f" {answer}\n"} for text in PROMPTS]
    return write_jsonl(tmp_path / "test.jsonl", [*rows, {"text": TEXTS[0]}, {"text": "fox"}])


@pytest.mark.parametrize("size", [1, 3])
def test_each_way_is_counted_and_compared(
    engine: Engine, tiny: str, data: Path, store: RunStore, tokenizer: Tokenizer, size: int
) -> None:
    _, curve = made(engine, store, plan(data, prefix=4, batch_size=size))
    texts = [*PROMPTS, TEXTS[0]]
    prompts = [tokenizer.encode(text) for text in texts]
    prompts[3] = prompts[3][:5]
    base = [greedy(engine, prompt) for prompt in prompts]
    points = {point.way.key: point for point in curve.points()}
    assert list(points) == ["ar", "sbd-4-0", "sbd-4-14"]
    assert curve.rows == [0, 1, 2, 3]
    assert curve.facts["dropped"] == 1
    for way, gamma in (("sbd-4-0", 0.0), ("sbd-4-14", 14.0)):
        wanted = [blocks(engine, prompt, 4, gamma) for prompt in prompts]
        found, agreed = curve.per_row[way], [agreement(w[0], b) for w, b in zip(wanted, base, strict=True)]
        assert found["passes"] == [passes for _, passes in wanted]
        assert found["tokens"] == [len(tokens) for tokens, _ in wanted]
        assert found["first"] == [one.first for one in agreed]
        assert points[way].agreement == sum(a.equal for a in agreed) / sum(a.compared for a in agreed)
        likely = 0.0
        for prompt, (tokens, _) in zip(prompts, wanted, strict=True):
            scores = engine.log_probs(np.array([[*prompt, *tokens]], np.int32))[0]
            likely += float(scores[len(prompt) - 1 :].sum())
        assert points[way].log_likelihood == pytest.approx(likely / points[way].tokens, abs=1e-4)
        assert points[way].fewer_passes == sum(map(len, base)) / sum(passes for _, passes in wanted)
    assert (points["ar"].agreement, points["ar"].same, points["ar"].fewer_passes, points["ar"].speed_up) == (1, 1, 1, 1)
    assert points["ar"].passes == points["ar"].tokens == sum(map(len, base))
    assert points["sbd-4-14"].passes < points["sbd-4-0"].passes
    # Only the first answer is the one that the model gives; text has none.
    right = [tokenizer.decode(tokens).strip() == tokenizer.decode(base[0]).strip() for tokens in base[:3]]
    assert curve.per_row["ar"]["exact"] == [*right, None]
    assert points["ar"].exact == sum(right) / 3 > 0


def test_a_lost_answer_is_told_with_its_interval() -> None:
    per_row = {
        name: {"tokens": [4, 4, 4, 4], "passes": [2] * 4, "exact": exact, "compared": [4] * 4, "equal": [4] * 4,
               "first": [None, 0, None, None], "log_likelihoods": [-1.0] * 4, "texts": [""] * 4, "ended": [""] * 4}
        for name, exact in (("ar", [True, True, True, False]), ("sbd-4-0", [True, False, True, False]),
                            ("sbd-4-inf", [True, True, True, False]))
    }  # fmt: skip
    seconds = {"ar": 4.0, "sbd-4-0": 2.0, "sbd-4-inf": 2.0}
    curve = Curve(CurvePlan(block="4", gamma="0,inf"), FACTS, [0, 1, 2, 3], per_row, seconds)
    ar, sbd, every = curve.points()
    assert [ar.lost, ar.half, sbd.exact, sbd.lost] == [0, 0, 0.5, 0.25]
    assert sbd.half == pytest.approx(3.182 * np.std([0, 1, 0, 0], ddof=1) / 2)
    assert (every.lost, every.half) == (0, half_width(np.zeros(4)))
    assert [sbd.same, sbd.tokens_per_second, sbd.speed_up, sbd.log_likelihood] == [0.75, 8.0, 2.0, -0.25]
    rows = figure_json(curve_figure(curve))["tables"][0]["rows"]
    assert [row[-1] for row in rows] == [None, 0, "inf"], "JSON has no infinity, and next-token decoding no gamma"


def test_rows_that_are_all_alike_are_no_certainty() -> None:
    """A share of other rows that is the half-width leaves n rows alike in 5 of 100 cases."""
    for n in (2, 30, 200):
        share = half_width(np.zeros(n))
        assert (1 - share) ** n == pytest.approx(0.05)
        assert half_width(np.ones(n)) == half_width(-np.ones(n)) == 2 * share, "from an end another row may be two off"
    assert share == pytest.approx(3 / 200, rel=0.01)


def test_what_a_way_costs_and_saves_is_seen_at_once_on_a_small_terminal() -> None:
    per_row = {
        way: {"tokens": [1000], "passes": [passes], "exact": [True], "compared": [1000], "equal": [987], "first": [987],
              "log_likelihoods": [-12.345678], "texts": [""], "ended": [""]}
        for way, passes in (("ar", 1000), ("sbd-16-0.01", 234))
    }  # fmt: skip
    curve = Curve(CurvePlan(gamma="0.01"), FACTS, [0], per_row, {"ar": 1.0, "sbd-16-0.01": 0.3})
    table = curve_figure(curve).tables[0]
    shown = ["way", "exact %", "lost", "± 95 %", "nats/token", "agree", "fewer x", "faster x"]
    ar, way = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert list(way)[: len(shown)] == shown
    assert (way["fewer x"], way["block"], way["gamma"], ar["block"], ar["gamma"]) == (1000 / 234, 16, 0.01, 1, None)
    # A cell of padding on either side, as on the screen, and a bar for scrolling.
    sizes = [2 + max(len(name), *(len(cell_text(row[i])) for row in table.rows)) for i, name in enumerate(shown)]
    assert sum(sizes) <= 78
    head, _, scores = list(table_lines(table, 80))[:3]
    assert head.split()[0] == "way"
    assert head.endswith("faster x")
    assert scores.split()[0] == "sbd-16-0.01"


def test_a_curve_that_was_stopped_goes_on_with_the_batch_after(
    torch_engine: Engine, tiny: str, data: Path, store: RunStore
) -> None:
    control = Control()
    recorded = record_curve(torch_engine, plan(data), control, store)
    for event in recorded.events:
        if event.kind == measure.STUDY:
            control.stop.set()
    half = store.run(recorded.run.run_id)
    assert (half.state, half.step, half.steps) == ("stopped", 1, 3)
    list(resume_curve(torch_engine, half, Control(), store).events)
    whole, (_, once) = read_curve(store, half), made(torch_engine, store, plan(data))
    assert whole.rows == once.rows
    assert whole.per_row == once.per_row
    assert store.run(half.run_id).state == "done"


def test_a_stop_string_ends_the_counting_of_tokens_and_passes(
    torch_engine: Engine, tiny: str, data: Path, store: RunStore, tokenizer: Tokenizer
) -> None:
    _, free = made(torch_engine, store, plan(data))
    text = next(text for text in free.per_row["ar"]["texts"] if len(text) > 3)
    _, curve = made(torch_engine, store, plan(data, stop=text[1:3].replace("\\", "\\\\").replace(",", "\\,")))
    row = free.per_row["ar"]["texts"].index(text)
    assert curve.per_row["ar"]["texts"][row] == text[:1].strip()
    assert curve.per_row["ar"]["ended"][row] == "stop string"
    assert curve.per_row["ar"]["passes"][row] == curve.per_row["ar"]["tokens"][row] < LENGTH


def test_rows_ask_for_their_last_answer(tokenizer: Tokenizer) -> None:
    user, said = Message("user", "fox"), Message("assistant", "dogs")
    rows = [
        PromptRow("fox", "dogs"),
        ChatRow((user, said, user)),
        ChatRow((user, said, user, said)),
        TextRow("The fox"),
    ]
    first, chat, longer, text = questions(rows, tokenizer, "turns", 1)
    assert list(first.prompt) == list(chat.prompt) == asked("fox", tokenizer)
    assert longer.prompt.count(START_OF_TURN) == 4
    assert [q.answer for q in (first, chat, longer, text)] == ["dogs", "dogs", "dogs", None]
    assert text.prompt == tuple(tokenizer.encode("The fox")[:2])
    assert [first.right("dogs\n"), first.right("dog"), text.right("The fox")] == [True, False, None]
    assert questions(rows[:1], tokenizer, "plain", 1)[0].prompt == (BOS, *tokenizer.encode("fox", bos=False))
    chosen = [[q.row for q in drawn([first, chat, longer, text], 2, seed)] for seed in range(8)]
    assert all(len(rows) == 2 and rows == sorted(rows) for rows in chosen)
    assert len({tuple(rows) for rows in chosen}) > 1
    assert len(drawn([first, chat, longer, text], 0, 0)) == 4


def test_ways_are_next_token_decoding_and_all_pairs() -> None:
    ways = ways_of(CurvePlan(data="x", block="8,16", gamma=" inf,0"))
    assert ways == [Way(), Way(8, 0.0), Way(8, math.inf), Way(16, 0.0), Way(16, math.inf)]
    assert [way.key for way in ways[1:3]] == ["sbd-8-0", "sbd-8-inf"]
    assert ways_of(CurvePlan(data="x", decoder="ar")) == [Way()]


@pytest.mark.parametrize(
    ("values", "error", "why"),
    [
        ({"gamma": "0,-1"}, UsageError, "gamma"),
        ({"gamma": "nan"}, UsageError, "gamma"),
        ({"gamma": "0,,1"}, UsageError, "gamma"),
        ({"block": "0"}, UsageError, "block"),
        ({"block": "4,250"}, UsageError, "block: .* 250"),
        ({"max_tokens": 250}, UsageError, "max_tokens"),
        ({"mask_token": 450}, UsageError, "mask_token"),
        ({"decoder": "ar", "block": "16", "gamma": "1"}, UsageError, "gamma"),
        ({"gamma": ",".join(map(str, range(101)))}, UsageError, "ways"),
        ({"model": "nobody"}, GemmaTuiError, "nobody"),
        ({"data": "nowhere.jsonl"}, GemmaTuiError, "nowhere"),
    ],
)
def test_what_cannot_be_decoded_makes_no_run(
    torch_engine: Engine, tiny: str, data: Path, store: RunStore, values: dict[str, Any], error: type, why: str
) -> None:
    with pytest.raises(error, match=why):
        record_curve(torch_engine, plan(data, **values), Control(), store)
    assert store.runs() == []


def test_text_that_is_too_short_is_told_of(torch_engine: Engine, tiny: str, tmp_path: Path, store: RunStore) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "fox"}])
    with pytest.raises(GemmaTuiError, match="--prefix"):
        record_curve(torch_engine, plan(short), Control(), store)


def test_the_command_tells_the_points_and_the_paper_and_writes_files(
    command: Commands, tiny: str, data: Path, tmp_path: Path
) -> None:
    words = ["generate", tiny, "--data", str(data), "--gamma", "0.1", "--max-tokens", "4", "--prompts", "plain"]
    code, rows, errors = command(*words, "--decoder", "sbd", "--html", str(tmp_path / "curve.html"))
    assert (code, errors) == (0, "")
    kinds = [row["kind"] for row in rows]
    assert [row["way"] for row in rows if row["kind"] == "point"] == ["ar", "sbd-16-0.1"]
    assert kinds.count("paper") == 12
    assert "last trained without a mask token" in next(row["text"] for row in rows if row["kind"] == "warning")
    assert (tmp_path / "curve.html").stat().st_size > 1000
    run = rows[-1]["run"]
    shown = command("runs", "show", run, "--html", str(tmp_path / "again.html"))[1]
    assert (tmp_path / "again.html").read_text() == (tmp_path / "curve.html").read_text()
    assert [r for r in shown if r["kind"] == "point"] == [r for r in rows if r["kind"] == "point"]
    assert [row["event"] for row in shown if row["kind"] == "event"].count("curve") == 3
    again = command("runs", "resume", run)[1]
    assert [r for r in again if r["kind"] == "point"] == [r for r in rows if r["kind"] == "point"]


@pytest.mark.parametrize(
    "words",
    [
        ["--data", "x.jsonl", "--temperature", "1"],
        ["--prompt", "a", "--limit", "1"],
        ["--prompt", "a", "--html", "a.html"],
    ],
)
def test_options_of_texts_and_of_rows_do_not_mix(command: Commands, tiny: str, words: list[str]) -> None:
    code, _, errors = command("generate", tiny, *words)
    assert code == 2
    assert words[2] in errors


def test_the_figure_shows_likelihood_where_no_row_has_an_answer(
    torch_engine: Engine, tiny: str, tmp_path: Path, store: RunStore
) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS[:2]])
    _, curve = made(torch_engine, store, plan(texts, prefix=4))
    figure = curve_figure(curve)
    assert "log-likelihood" in figure.charts[0].title
    assert figure.charts[0].series[0].y == [point.log_likelihood for point in curve.points()[1:]]
