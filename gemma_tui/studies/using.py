"""Which runs use a model, so that it is not deleted under them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path

from engines.errors import EngineError
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub.keeping import folders_of
from gemma_tui.hub.models import resolve
from gemma_tui.runs.queue import Queue
from gemma_tui.runs.store import RunStore

NAMED = ("model", "reference")
"""Options of plans that name a model."""


def runs_using(folders: Iterable[Path]) -> list[str]:
    """Names of runs that go on, and of plans that wait, whose model lies in one of these folders."""
    going = set(folders)
    with closing(RunStore()) as store:
        plans = [(run.run_id, run.plan) for run in store.runs() if run.active]
    with closing(Queue()) as queue:
        plans += [(f"plan {item.id} of the queue", item.plan) for item in queue.queued()]
    return [name for name, plan in plans if any(_folder(str(plan.get(key) or "")) in going for key in NAMED)]


def refuse_in_use(name: str) -> None:
    """Refuse to delete what a run that goes on, or a plan that waits, is made from.

    Raises:
        GemmaTuiError: it is so.
    """
    if busy := runs_using(folders_of(name)):
        raise GemmaTuiError(f"{name} is used by {', '.join(busy[:3])}, which has not ended: stop it first")


def _folder(name: str) -> Path | None:
    with suppress(EngineError):
        return resolve(name).folder.resolve() if name else None
    return None
