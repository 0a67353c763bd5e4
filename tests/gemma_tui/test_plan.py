from __future__ import annotations

import math
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gemma_tui import paths
from gemma_tui.cli import _parser
from gemma_tui.commands.plans import plan_from
from gemma_tui.errors import UsageError
from gemma_tui.studies.capacity.plan import CapacityPlan, cells_of
from gemma_tui.studies.generation import GenerationPlan
from gemma_tui.studies.plan import Option, build, command, honoured, options, read_toml
from gemma_tui.studies.queueing import check, variations
from gemma_tui.studies.training_plan import LINEARS, TrainingPlan, settings

NEEDED = {"model": "nano", "data": "data.txt"}
PLANS = {"train": TrainingPlan, "generate": GenerationPlan}
BY_NAME = {o.name: o for o in options(TrainingPlan)}


@pytest.mark.parametrize("plan", PLANS.values())
def test_the_options_are_the_fields_in_their_order_and_each_has_help(plan: type) -> None:
    found = options(plan)
    assert [o.name for o in found] == [f.name for f in fields(plan)]
    assert all(len(o.help) > 5 for o in found)


@pytest.mark.parametrize("o", options(TrainingPlan), ids=lambda o: o.name)
def test_an_option_that_may_stay_open_says_what_happens_then(o: Option) -> None:
    assert o.optional == (o.default is None) == bool(o.open_means)
    assert o.group


@pytest.mark.parametrize("plan", PLANS.values())
def test_every_fraction_is_bounded_on_both_sides_and_every_count_below(plan: type) -> None:
    assert all(o.low is not None and o.high is not None for o in options(plan) if o.kind is float)
    assert all(o.low is not None for o in options(plan) if o.kind is int)


def test_what_is_not_given_keeps_its_default() -> None:
    assert build(TrainingPlan, NEEDED) == TrainingPlan("nano", "data.txt")


def test_texts_as_a_form_gives_them_are_read_as_their_type() -> None:
    given = {"steps": "1_000", "alpha": "8", "fresh": "yes", "learning_rate": "", "warmup": "7", "batch_size": "2,000"}
    plan = build(TrainingPlan, NEEDED | given)
    assert (plan.steps, plan.alpha, plan.fresh, plan.learning_rate) == (1000, 8.0, True, None)
    assert (plan.warmup, plan.batch_size) == (7, 2000)


@pytest.mark.parametrize("needed", NEEDED)
def test_what_is_required_is_asked_for(needed: str) -> None:
    for values in ({k: v for k, v in NEEDED.items() if k != needed}, NEEDED | {needed: ""}):
        with pytest.raises(UsageError, match=f"--{needed} is needed"):
            build(TrainingPlan, values)


def test_an_unknown_option_is_refused_with_one_that_is_near() -> None:
    with pytest.raises(UsageError, match="unknown option 'learning'; perhaps learning_rate"):
        build(TrainingPlan, NEEDED | {"learning": 1})


WRONG = [
    *[("steps", v) for v in (0, -1, 10_000_001, 1.5, "ten", "", None, True, [3], {"n": 3}, math.nan, 16**5000)],
    *[("learning_rate", v) for v in (-1e-9, 100.1, math.nan, math.inf, -math.inf, "nan", "inf", "fast", 10**400)],
    *[("dropout", v) for v in (1.0, -0.1, "nan", False)],
    *[("fresh", v) for v in ("maybe", 2, "", None, [])],
    *[("method", v) for v in ("sgd", "", "LORA", ["lora"])],
    *[("dtype", v) for v in ("float16", 1)],
    *[("name", v) for v in (["a"], {"a": 1}, True)],
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}-{n}" for n, (name, _) in enumerate(WRONG)])
def test_a_wrong_value_is_refused_by_name_in_one_short_line(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^here: {name} is ") as refused:
        build(TrainingPlan, NEEDED | {name: value}, "here")
    assert len(str(refused.value)) < 200
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("o", [o for o in BY_NAME.values() if o.low is not None], ids=lambda o: o.name)
def test_both_ends_of_a_range_are_possible_and_what_lies_beyond_is_not(o: Option) -> None:
    for end, beyond in ((o.low, -1), (o.high, 1)):
        if end is not None:
            assert getattr(build(TrainingPlan, NEEDED | {o.name: o.kind(end)}), o.name) == end
            with pytest.raises(UsageError, match=o.name):
                build(TrainingPlan, NEEDED | {o.name: o.kind(end + beyond)})


def value_of(o: Option) -> st.SearchStrategy[Any]:
    if o.choices:
        values: st.SearchStrategy[Any] = st.sampled_from(o.choices)
    elif o.kind is bool:
        values = st.booleans()
    elif o.kind is str:
        values = st.text(st.characters(exclude_categories=("Cs",)), min_size=1 if o.required else 0, max_size=12)
    elif o.kind is int:
        values = st.integers(int(o.low or 0), int(o.high or 2**40))
    else:
        values = st.floats(o.low, o.high, allow_subnormal=False)
    return st.none() | values if o.optional and not (o.kind is str and not o.choices) else values


def plans(plan: type) -> st.SearchStrategy[Any]:
    found = {o.name: o for o in options(plan)}
    always = {name: value_of(o) for name, o in found.items() if o.required}
    return st.fixed_dictionaries(always, optional={n: value_of(o) for n, o in found.items() if n not in always}).map(
        lambda values: plan(**values)
    )


@given(st.one_of(*[st.tuples(st.just(verb), plans(plan)) for verb, plan in PLANS.items()]))
@example(("generate", GenerationPlan(prompt="--")))
def test_the_command_of_a_plan_makes_the_same_plan(case: tuple[str, Any]) -> None:
    verb, plan = case
    words = shlex.split(command((verb, "nano") if verb == "generate" else (verb,), plan))
    assert words[0] == "gemma-tui"
    args = _parser(words[1:]).parse_args(words[1:])
    assert plan_from(type(plan), args, {}, verb) == plan


def test_a_command_names_only_what_differs_from_the_defaults() -> None:
    plan = TrainingPlan("nano", "my data.txt", steps=7, learning_rate=3e-4, fresh=True)
    assert command(("train",), plan) == (
        "gemma-tui train --model nano --data 'my data.txt' --fresh --steps 7 --learning-rate 0.0003"
    )


def test_an_option_on_the_command_line_wins_over_the_file() -> None:
    args = _parser(["train"]).parse_args(["train", "--steps", "9", "--no-fresh"])
    plan = plan_from(TrainingPlan, args, NEEDED | {"steps": 5, "rank": 3, "fresh": True}, "plan.toml")
    assert (plan.steps, plan.rank, plan.fresh) == (9, 3, False)


def test_a_plan_file_is_read_with_its_types(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('model = "nano"\nsteps = 7\nlearning_rate = 1e-3\nfresh = true\n# é\n', encoding="utf-8")
    assert read_toml(path) == {"model": "nano", "steps": 7, "learning_rate": 1e-3, "fresh": True}


BROKEN = {
    "no TOML": b"steps: 7\n",
    "cut": b'model = "na',
    "a key twice": b"steps = 1\nsteps = 2\n",
    "not UTF-8": b'model = "\xff"\n',
    "nested": b"a = " + b"[" * 100_000,
    "nested tables": b"a = " + b"{a=" * 50_000,
    "a number of 5000 digits": b"steps = " + b"1" * 5000,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plan_file_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(UsageError, match=r"plan\.toml is no TOML .*: mend the file") as refused:
        read_toml(path)
    assert "\n" not in str(refused.value)


def test_a_huge_plan_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(UsageError, match="over 1 MiB"):
        read_toml(path)


@pytest.mark.parametrize("name", ["none.toml", "."])
def test_a_plan_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_toml(tmp_path / name)


@pytest.mark.parametrize("targets", ["q_proj", " q_proj , v_proj,", ",".join(LINEARS)])
def test_targets_are_names_with_commas_between(targets: str) -> None:
    lora = settings(build(TrainingPlan, NEEDED | {"targets": targets})).lora
    assert lora is not None
    assert lora.targets == tuple(name.strip() for name in targets.split(",") if name.strip())


@pytest.mark.parametrize("targets", ["", ",", "lm_head", "q_proj,nothing"])
def test_targets_that_are_no_linears_are_refused(targets: str) -> None:
    with pytest.raises(UsageError, match=r"targets: .*choose from q_proj"):
        settings(build(TrainingPlan, NEEDED | {"targets": targets}))


def test_adapters_on_weights_that_no_file_keeps_are_refused() -> None:
    with pytest.raises(UsageError, match="fresh"):
        settings(build(TrainingPlan, NEEDED | {"fresh": True, "method": "lora"}))
    assert settings(build(TrainingPlan, NEEDED | {"fresh": True, "method": "full"})).lora is None


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"method": "full", "rank": 16}, "rank: --rank makes no difference with --method full"),
        ({"method": "lora", "reset_every": 5}, "--reset-every makes no difference with --method lora"),
        ({"method": "lora", "momentum": 0.5}, "--momentum makes no difference with --optimizer adamw"),
        ({"method": "rank1", "mode": "sketch", "iterations": 3}, "--iterations makes no difference with --mode sketch"),
        ({"method": "rank1", "mode": "alternate", "error_feedback": True}, "with --mode alternate"),
        ({"method": "rank1", "optimizer": "sgd"}, "rank-1 updates have none"),
        ({"method": "full", "window": 8}, "window: --window is for new weights: add --fresh"),
        ({"method": "full", "global_every": 0}, "global_every: --global-every is for new weights: add --fresh"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(chosen: dict, words: str) -> None:
    plan = TrainingPlan(**{"data": "d", **chosen})
    with pytest.raises(UsageError) as caught:
        check(plan)
    assert words in str(caught.value)
    if "optimizer" not in chosen:
        check(honoured(plan))


def test_a_sweep_over_methods_leaves_out_what_a_method_ignores() -> None:
    plans = variations({**NEEDED, "rank": 16}, {"method": "full,lora"}, "sweep")
    assert [plan.rank for plan in plans] == [8, 16]
    with pytest.raises(UsageError, match="makes no difference"):
        variations({**NEEDED, "rank": 16, "method": "full"}, {"seed": "1,2"}, "sweep")


EVERY_PLAN = sorted((paths.assets() / "plans").glob("*.toml"))
PLAN_FILES = [path for path in EVERY_PLAN if not path.stem.startswith("capacity")]


@pytest.mark.parametrize("path", PLAN_FILES, ids=lambda path: path.stem)
def test_the_plans_of_the_results_can_be_run(path: Path) -> None:
    plan = build(TrainingPlan, read_toml(path), path.name)
    check(plan)
    assert plan.name == path.stem


def test_the_second_plan_of_the_records_goes_on_from_the_result_of_the_first() -> None:
    files = {path.stem: path for path in PLAN_FILES}
    first, second = (build(TrainingPlan, read_toml(files[name])) for name in ("records", "records-more"))
    assert second.model == f"{first.name}-1"
    assert (first.method, first.steps, first.learning_rate) == ("sbd", 800, 2e-3)
    moved = {"model": second.model, "name": "records-more", "steps": 500, "learning_rate": 1e-3, "seed": 1}
    assert second == replace(first, evaluate_every=250, **moved)


@pytest.mark.parametrize("path", sorted(set(EVERY_PLAN) - set(PLAN_FILES)), ids=lambda path: path.stem)
def test_the_sweeps_of_the_results_have_cells(path: Path) -> None:
    assert cells_of(build(CapacityPlan, read_toml(path), path.name))


def test_the_results_compare_at_equal_data_and_tokens() -> None:
    assert len(PLAN_FILES) == 12
    for group in ("scratch", "tune"):
        plans = [build(TrainingPlan, read_toml(path)) for path in PLAN_FILES if path.stem.startswith(group)]
        assert len({(p.model, p.data, p.steps, p.batch_size, p.sequence_length, p.seed, p.group) for p in plans}) == 1
