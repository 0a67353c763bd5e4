from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from engines import ENGINES, available_engines
from gemma_tui import VERSION, paths
from gemma_tui.cli import main
from gemma_tui.output import Output
from gemma_tui.studies.events import Event

Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]
SHORT = ("--steps", "2", "--batch-size", "2", "--sequence-length", "32")
SMALL = (*SHORT, "--rank", "2")
SHAPE = shlex.split(
    "--vocab-size 400 --hidden-size 16 --intermediate-size 16 --num-hidden-layers 1 --num-attention-heads 1 "
    "--num-key-value-heads 1 --head-dim 16"
)

pytestmark = pytest.mark.usefixtures("empty_hub_cache")


@pytest.fixture
def trained(command: Commands, tiny: str, corpus: Path) -> str:
    """The name of a run of two steps."""
    code, rows, _ = command("train", "--model", tiny, "--data", str(corpus), *SMALL)
    assert code == 0
    return str(rows[0]["run"])


def process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "gemma_tui", *arguments]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, **options)


def kinds(rows: list[dict[str, Any]]) -> list[str]:
    return [row["kind"] for row in rows]


EVERY_COMMAND = {
    "models list": "model",
    "models info tiny": "model",
    "models info lora-1": "model",
    "models new small --data DATA " + shlex.join(SHAPE): "end",
    "generate tiny --prompt fox --max-tokens 3": "text",
    "generate lora-1 --prompt fox --max-tokens 3 --chat": "text",
    "generate tiny --prompt fox --max-tokens 3 --decoder sbd --gamma 1": "warning",
    "generate lora-1 --data DATA --limit 2 --max-tokens 3 --prefix 4 --gamma 1": "run",
    "roofline tiny --cached 8 --rounds 1": "figure",
    "data tiny --data DATA --packing": "split",
    "train --model tiny --data DATA " + shlex.join(SMALL): "run",
    "adapters list": "adapter",
    "adapters export lora-1 --format peft --out OUT": "end",
    "runs list": "run",
    "runs show lora-1": "run",
    "runs stop lora-1": "end",
    "runs pause lora-1": "end",
    "queue list": "end",
    "queue add --set model=tiny --set data=DATA": "queued",
    "sweep --set model=tiny --set data=DATA --set rank=2,4": "queued",
    "runs compare lora-1": "curve",
    "doctor": "check",
}


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=lambda words: " ".join(words.split()[:3]))
def test_every_command_gives_json_lines_of_which_the_last_is_the_end(
    command: Commands, trained: str, corpus: Path, words: str
) -> None:
    code, rows, errors = command(*words.replace("DATA", str(corpus)).replace("OUT", str(paths.home() / "out")).split())
    assert (code, errors) == (0, "")
    assert rows[0]["kind"] == EVERY_COMMAND[words]
    assert kinds(rows).count("end") == 1
    assert rows[-1]["kind"] == "end"
    assert rows[-1]["status"] == "done"


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=lambda words: " ".join(words.split()[:3]))
def test_every_command_speaks_to_a_person_without_colour_in_a_pipe(
    spoken: Callable[..., tuple[int, str, str]], trained: str, corpus: Path, words: str
) -> None:
    code, text, errors = spoken(*words.replace("DATA", str(corpus)).replace("OUT", str(paths.home() / "out")).split())
    assert (code, errors) == (0, "")
    assert text.strip()
    assert "\x1b" not in text
    assert '"kind"' not in text


@pytest.mark.parametrize("name", ENGINES)
def test_a_model_is_trained_and_writes(command: Commands, tiny: str, corpus: Path, name: str) -> None:
    if name not in available_engines():
        pytest.skip(f"{name} is not installed")
    arguments = ("--model", tiny, "--data", str(corpus), "--engine", name)
    code, rows, _ = command("train", *arguments, *SMALL, "--name", "mine", "--evaluate-every", "1")
    assert code == 0
    training = ["step", "evaluation", "step", "evaluation"]
    assert kinds(rows) == ["run", "load", "start", *training, "checkpoint", "end"]
    assert rows[0]["run"] == "mine-1"
    assert rows[2]["engine"] == name
    assert rows[-1] == {"kind": "end", "step": 2, "status": "done", "run": "mine-1", "interrupted": False}
    code, rows, _ = command("generate", "mine-1", "--prompt", "The fox", "--engine", name, "--max-tokens", "4")
    assert (code, rows[-1]["engine"]) == (0, name)
    assert "".join(row["text"] for row in rows[:-1]) == rows[-1]["text"]
    assert rows[-1]["tokens"] <= 4


def test_a_plan_file_is_followed_and_an_option_wins(command: Commands, tiny: str, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(f'model = "{tiny}"\ndata = "{corpus}"\nsteps = 5\nrank = 3\nsequence_length = 32\nname = "filed"\n')
    code, rows, _ = command("train", str(path), "--steps", "1")
    assert (code, rows[0]["run"], rows[-1]["step"]) == (0, "filed-1", 1)
    _, rows, _ = command("runs", "show", "filed")
    assert (rows[0]["plan"]["rank"], rows[0]["plan"]["steps"]) == (3, 1)


def test_the_command_a_run_shows_makes_the_same_run(command: Commands, trained: str) -> None:
    _, first, _ = command("runs", "show", trained)
    code, rows, _ = command(*shlex.split(first[0]["command"])[1:])
    assert code == 0
    _, second, _ = command("runs", "show", rows[0]["run"])
    assert second[0]["plan"] == first[0]["plan"]
    assert [row["loss"] for row in second if row["kind"] == "step"] == pytest.approx(
        [row["loss"] for row in first if row["kind"] == "step"], rel=1e-6
    )


def test_a_new_model_is_trained_from_nothing(command: Commands, corpus: Path) -> None:
    code, rows, _ = command("models", "new", "small", "--data", str(corpus), *SHAPE)
    assert code == 0
    assert rows[-1]["parameters"] > 0
    arguments = ("--model", "small", "--data", str(corpus), "--fresh", "--method", "full")
    assert command("train", *arguments, *SHORT)[0] == 0
    code, rows, _ = command("models", "info", "full-1")
    assert (code, rows[0]["config"]["hidden_size"]) == (0, 16)


def test_models_are_listed_with_what_one_can_do_with_them(command: Commands, tiny: str) -> None:
    broken = paths.models() / "torn"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    code, rows, _ = command("models", "list")
    found = {row["name"]: row for row in rows if row["kind"] == "model"}
    assert code == 0
    assert set(found) >= {"nano", "gemma-3-270m", "tiny", "torn"}
    assert (found["tiny"]["state"], found["tiny"]["problem"]) == ("fits", "")
    assert found["torn"]["state"] == "broken"
    assert "config.json" in found["torn"]["problem"]
    assert rows[-1]["models"] == len(found)


def test_runs_are_listed_newest_first_and_shown_whole(command: Commands, trained: str, tiny: str, corpus: Path) -> None:
    command("train", "--model", tiny, "--data", str(corpus), *SHORT, "--method", "full")
    code, rows, _ = command("runs", "list")
    assert [row["run"] for row in rows[:-1]] == ["full-1", "lora-1"]
    code, rows, _ = command("runs", "show", "lora")
    assert code == 0
    assert (rows[0]["state"], rows[0]["step"], rows[0]["steps"]) == ("done", 2, 2)
    assert [row["event"] for row in rows if row["kind"] == "event"] == ["load", "start", "checkpoint"]
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2]
    for group in ("runs", "capacity"):
        code, _, error = command(group, "show", "lora", "--csv", "lora.csv")
        assert (code, error.count("\n")) == (2, 1)
        assert "lora-1 is a training run, which has no figure: `gemma-tui runs export lora-1`" in error


def test_a_run_that_ended_is_not_asked_to_stop(command: Commands, trained: str) -> None:
    assert command("runs", "stop", trained)[1][-1] == {"kind": "end", "status": "done", "run": "lora-1", "asked": False}


TRAIN = ["train", "--model", "tiny", "--data", "DATA"]
BAD: dict[str, tuple[list[str], int, str]] = {
    "no such command": (["paint"], 2, "invalid choice: 'paint'"),
    "no such option": (["models", "list", "--colour"], 2, "--colour"),
    "an abbreviated option": ([*TRAIN, "--step", "3"], 2, "--step"),
    "no subcommand": (["models"], 2, "required"),
    "no prompt": (["generate", "tiny"], 2, "--prompt is needed"),
    "an empty prompt": (["generate", "tiny", "--prompt", ""], 2, "--prompt is needed"),
    "no such engine": (["generate", "tiny", "--prompt", "a", "--engine", "jax"], 2, "invalid choice: 'jax'"),
    "no data": (["train", "--model", "tiny"], 2, "--data is needed"),
    "a wrong number": ([*TRAIN, "--steps", "ten"], 2, "steps is 'ten'"),
    "not a number": ([*TRAIN, "--learning-rate", "nan"], 2, "learning_rate is 'nan'"),
    "out of range": (["generate", "tiny", "--prompt", "a", "--top-p", "0"], 2, "top_p is '0'"),
    "an unknown method": ([*TRAIN, "--method", "magic"], 2, "choose lora | dora | full | relora | rank1"),
    "unknown targets": ([*TRAIN, "--targets", "lm_head"], 2, "targets: lm_head"),
    "fresh adapters": ([*TRAIN, "--fresh"], 2, "fresh"),
    "a run's name with a path": ([*TRAIN, "--name", "../up"], 2, "is no run name"),
    "no such plan file": (["train", "none.toml"], 2, "none.toml cannot be read"),
    "no such model": (["generate", "none", "--prompt", "a"], 1, "no model 'none'"),
    "a model of no one's home": (["models", "info", "~no-such-user/m"], 1, "no model"),
    "a model's name that is too long": (["models", "info", "x" * 5000], 1, "no model"),
    "a model that was not fetched": (["models", "info", "google/gemma-3-270m-none"], 1, "gemma-tui models download"),
    "no such data": (["train", "--model", "tiny", "--data", "none.jsonl"], 1, "none.jsonl does not exist"),
    "no such run to resume": (["runs", "resume", "lora-1"], 1, "no run 'lora-1'"),
    "no plan for the queue": (["queue", "add"], 2, "name a PLAN.toml"),
    "no such plan in the queue": (["queue", "cancel", "3"], 1, "no plan 3"),
    "no such run": (["runs", "show", "none"], 1, "no run 'none'"),
    "a run's name that is not Unicode": (["runs", "show", "\udcff"], 1, "not valid Unicode"),
    "a prompt that is not Unicode": (["generate", "tiny", "--prompt", "\udcff"], 1, "not valid Unicode"),
    "a taken name": (["models", "new", "tiny", "--data", "DATA"], 1, "is there already"),
    "a model's name with a path": (["models", "new", "../up", "--data", "DATA"], 2, "is no name for"),
    "too small a vocabulary": (["models", "new", "a", "--data", "DATA", "--vocab-size", "300"], 2, "vocab-size 300"),
    "an impossible shape": (["models", "new", "a", "--data", "DATA", "--head-dim", "-1"], 1, "head_dim"),
    "a built-in model's name": (["models", "new", "nano", "--data", "DATA"], 1, "nano is a built-in model"),
    "a GGUF with a built-in model's name": (["models", "import", "gemma-3-270m.gguf"], 1, "a built-in model"),
    "no such GGUF": (["models", "import", "none.gguf"], 1, "none.gguf"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_mistake_is_one_line_on_stderr_and_leaves_nothing(
    command: Commands, tiny: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    arguments, expected, reason = BAD[kind]
    monkeypatch.chdir(tmp_path)
    code, rows, errors = command(*[a.replace("DATA", str(corpus)) for a in arguments])
    assert code == expected
    assert errors.count("\n") == 1
    assert errors.startswith("gemma-tui: ")
    assert reason in errors
    assert len(errors) < 450
    if rows:
        assert (rows[-1]["kind"], rows[-1]["status"]) == ("end", "failed")
        assert reason in rows[-1]["error"]
    assert [p.name for p in paths.models().iterdir()] == ["tiny"]
    assert not (tmp_path / "up").exists()


def test_a_traceback_is_shown_when_asked_for(spoken: Callable[..., tuple[int, str, str]]) -> None:
    assert spoken("runs", "show", "none")[2].count("\n") == 1
    code, text, errors = spoken("runs", "show", "none", "--debug")
    assert (code, text) == (1, "")
    assert errors.startswith("Traceback (most recent call last):\n")
    assert errors.splitlines()[-1].startswith("gemma-tui: no run 'none'")


def test_a_failed_run_is_kept_with_its_reason(command: Commands, tiny: str) -> None:
    code, rows, _ = command("train", "--model", tiny, "--data", "none.txt")
    assert (code, kinds(rows)) == (1, ["run", "load", "end"])
    _, rows, _ = command("runs", "list")
    assert (rows[0]["state"], rows[0]["error"]) == ("failed", "none.txt does not exist: name a data file or folder")


def test_an_interrupt_while_a_command_works_is_told(command: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gemma_tui.commands.models.local_models", interrupt)
    code, rows, errors = command("models", "list")
    assert (code, rows, errors) == (130, [{"kind": "end", "status": "interrupted"}], "")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")])
def test_memory_that_does_not_suffice_is_one_line(
    command: Commands, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def exhaust(*given: object) -> None:
        raise error

    monkeypatch.setattr("gemma_tui.commands.models.local_models", exhaust)
    code, rows, errors = command("models", "list")
    assert (code, kinds(rows), errors.count("\n")) == (1, ["end"], 1)
    assert "not enough memory: choose a smaller model" in errors


def test_a_run_broken_off_between_two_events_does_not_stay_running(
    command: Commands, tiny: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(output: object, event: Event, plan: object) -> None:
        if event.kind == "step":
            raise KeyboardInterrupt

    monkeypatch.setattr("gemma_tui.commands.train._say", interrupt)
    code, rows, errors = command("train", "--model", tiny, "--data", str(corpus), *SMALL)
    assert (code, rows[-1], errors) == (130, {"kind": "end", "status": "interrupted"}, "")
    _, rows, _ = command("runs", "list")
    assert (rows[0]["state"], rows[0]["error"]) == ("failed", "broken off")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_saves_and_its_exit_code_tells_the_signal(
    command: Commands, tiny: str, corpus: Path, number: signal.Signals
) -> None:
    arguments = ("--model", tiny, "--data", str(corpus), *SMALL, "--steps", "1000000", "--evaluate-every", "0")
    with process("train", *arguments, "--json") as child:
        assert child.stdout is not None
        try:
            next(line for line in child.stdout if '"kind": "step"' in line)
            child.send_signal(number)
            rows = [json.loads(line) for line in child.stdout]
        finally:
            child.kill()
    assert child.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert kinds(rows[-2:]) == ["checkpoint", "end"]
    assert (rows[-1]["status"], rows[-1]["interrupted"]) == ("stopped", True)
    assert (Path(rows[-2]["path"]) / "adapter_model.safetensors").is_file()
    _, listed, _ = command("runs", "list")
    assert (listed[0]["state"], listed[0]["step"]) == ("stopped", rows[-1]["step"])


def test_a_detached_training_goes_on_alone_and_can_be_stopped(command: Commands, tiny: str, corpus: Path) -> None:
    arguments = ("--model", tiny, "--data", str(corpus), *SMALL, "--steps", "1000000", "--evaluate-every", "0")
    with process("train", *arguments, "--detach", "--json") as front:
        rows = [json.loads(line) for line in front.communicate()[0].splitlines()]
    assert (front.returncode, kinds(rows), rows[-1]["status"]) == (0, ["end"], "detached")
    child = psutil.Process(rows[-1]["pid"])
    try:
        assert os.getsid(child.pid) == child.pid
        code, asked, _ = command("runs", "stop", rows[-1]["run"])
        assert (code, asked[-1]["asked"]) == (0, True)
        child.wait(timeout=60)
    finally:
        if child.is_running():
            child.kill()
    _, shown, _ = command("runs", "show", rows[-1]["run"])
    assert shown[0]["state"] == "stopped"
    assert (Path(shown[0]["folder"]) / "adapter" / "adapter_model.safetensors").is_file()
    last = Path(rows[-1]["log"]).read_text().splitlines()[-1]
    assert json.loads(last)["kind"] == "end"


def test_a_detached_training_that_cannot_start_says_why(tiny: str, corpus: Path) -> None:
    arguments = ("--model", tiny, "--data", str(corpus), "--name", "../up", "--detach")
    with process("train", *arguments, stderr=subprocess.PIPE) as front:
        text, errors = front.communicate()
    assert (front.returncode, text, errors.count("\n")) == (2, "", 1)
    assert "is no run name" in errors


def test_without_a_terminal_the_app_does_not_hang_and_names_the_commands() -> None:
    with process(stderr=subprocess.PIPE) as child:
        text, errors = child.communicate(timeout=60)
    assert (child.returncode, text, errors.count("\n")) == (2, "", 1)
    for name in ("models list", "generate", "train", "runs list", "doctor", "--help"):
        assert name in errors


def test_a_reader_that_leaves_is_no_error() -> None:
    with process("models", "list", "--json", stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 1


def imported(code: str) -> set[str]:
    """The heavy modules that a fresh interpreter has after running code."""
    heavy = ("textual", "torch", "mlx", "numpy", "transformers", "tokenizers", "huggingface_hub", "plotext", "rich")
    show = f"\nimport sys; print({heavy} and ' '.join(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code + show], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()) if done.stdout.splitlines()[-1] else set()


@pytest.mark.parametrize(
    "words", [["--help"], ["models", "--help"], ["adapters", "--help"], ["doctor", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"from gemma_tui.cli import main\ntry:\n    main({words})\nexcept SystemExit:\n    print()"
    assert imported(code) == set()


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_the_help_of_what_computes_imports_no_framework(verb: str) -> None:
    code = f"from gemma_tui.cli import main\ntry:\n    main(['{verb}', '--help'])\nexcept SystemExit:\n    print()"
    assert not imported(code) & {"torch", "mlx", "textual", "transformers"}


def test_the_app_imports_no_framework() -> None:
    found = imported("import gemma_tui.app\nprint()")
    assert "textual" in found
    assert not found & {"torch", "mlx", "transformers"}


def test_help_names_every_option_with_its_range(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    assert (
        "--learning-rate X peak learning rate; 0 to 100 (default lora 2e-4, full 2e-5, relora 4e-4, rank1 0.1 or 2e-3)"
        in text
    )
    assert "--checkpoint-activations, --no-checkpoint-activations" in text


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert (left.value.code, capsys.readouterr().out) == (0, f"gemma-tui {VERSION}\n")


def test_a_passing_line_gives_way_to_the_next(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(as_json=False)
    output.passing("not on a terminal")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    output.passing("evaluating 1/32\x1b[31m")
    output.passing("evaluating 2/32")
    output.say("done")
    Output(as_json=True).passing("not in JSON")
    parts = capsys.readouterr().out.split("\r")
    assert parts[0].startswith("evaluating 1/32")
    assert "\x1b" not in parts[0]
    assert [part.strip() for part in parts[1:]] == ["", "evaluating 2/32", "", "done"]
    assert len(parts[1]) == len(parts[0])
