"""A run's events as they come: each reading gives those that are new."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_tui.runs.store import Row, RunStore

ROWS_PER_READ = 10_000


@dataclass
class Tail:
    """Where the reading of a run's events goes on."""

    run: str
    _cursor: int = 0

    def read(self, store: RunStore) -> list[Row]:
        """The events since the last reading, all of them."""
        found: list[Row] = []
        while new := store.events(self.run, self._cursor, ROWS_PER_READ):
            self._cursor = new[-1].cursor
            found += new
        return found
