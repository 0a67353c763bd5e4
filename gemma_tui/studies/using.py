"""Which runs use a model, so that it is not deleted under them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from engines.errors import EngineError
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub.cache import Removal
from gemma_tui.hub.keeping import folders_of
from gemma_tui.hub.models import no_import, resolve
from gemma_tui.runs.queue import Queue
from gemma_tui.runs.store import RunStore

NAMED = ("model", "reference")
"""Options of plans that name a model."""


def runs_using(folders: Iterable[Path]) -> list[str]:
    """Names of runs that go on, and of plans that wait, whose model lies in one of these folders."""
    going = set(folders)
    with closing(RunStore()) as store:
        plans = [(run.run_id, run.plan, "") for run in store.runs() if run.active]
    with closing(Queue()) as queue:
        plans += [(f"plan {item.id} of the queue", item.plan, item.folder) for item in queue.queued()]
    return [
        name for name, plan, place in plans
        if any(folder in going for key in NAMED for folder in _folders(str(plan.get(key) or ""), place))
    ]  # fmt: skip


def refuse_in_use(found: Removal) -> None:
    """Refuse to delete what a run that goes on, or a plan that waits, is made from.

    Raises:
        GemmaTuiError: it is so.
    """
    if busy := runs_using(folders_of(found)):
        raise GemmaTuiError(f"{found.what}: in use by {', '.join(busy[:3])}, which has not ended: stop it first")


def _folders(name: str, place: str) -> Iterator[Path]:
    """Where the model of that name lies; a relative path begins at ``place``, or here if that is empty."""
    for meant in (name, str(Path(place, name))) if name else ():
        with suppress(EngineError):
            model = resolve(meant, no_import)
            if not place or model.source != "folder" or Path(meant).expanduser().is_absolute():
                yield model.folder.resolve()
