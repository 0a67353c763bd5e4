"""What ``make run`` starts: the app in a terminal; without one the same tour as commands."""

from __future__ import annotations

import shlex
import sys

from gemma_tui import paths
from gemma_tui.cli import main

STEPS = 30


def tour() -> int:
    """Start the app, or without a terminal load a model, train it for a moment and let it write; the exit code."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return main([])
    print("no terminal: the tour runs as commands\n")
    plan = ["--model", "nano", "--data", str(paths.assets() / "corpus"), "--method", "lora", "--name", "tour"]
    size = ["--steps", str(STEPS), "--batch-size", "4", "--evaluate-every", "10", "--learning-rate", "1e-3"]
    return _run(["models", "list"]) or _run(["train", *plan, *size]) or _write()


def _write() -> int:
    """Let the newest run write."""
    from gemma_tui.runs.store import RunStore

    run = RunStore().runs(1)[0].run_id
    return _run(["generate", run, "--prompt", "It is a truth universally acknowledged, that", "--max-tokens", "60"])


def _run(arguments: list[str]) -> int:
    print("$ gemma-tui " + shlex.join(arguments), flush=True)
    code = main(arguments)
    print(flush=True)
    return code


if __name__ == "__main__":
    sys.exit(tour())
