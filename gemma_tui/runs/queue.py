"""Plans that wait to be run one after another, and the one process that works through them.

A plan that was claimed belongs to the process that computes it. When that is gone, what became of its run tells what
became of the plan. One that broke off is ``lost`` and not begun again by itself: it may be what ended the machine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_tui.errors import GemmaTuiError
from gemma_tui.runs.database import Database
from gemma_tui.runs.processes import alive, own_start, start_of

OUTCOMES = {"done": "done", "stopped": "cancelled", "failed": "failed", "lost": "failed"}
"""What became of a plan, by the state of its run."""


@dataclass(frozen=True)
class Item:
    """One plan of the queue.

    Attributes:
        group: the name it shares with the plans it is compared with, or nothing.
        plan: the values of a plan that differ from the defaults.
        engine: ``auto``, ``torch`` or ``mlx``.
        folder: where relative paths of the plan begin.
        state: ``queued``, ``running``, ``done``, ``failed``, ``cancelled`` (before or after its beginning) or ``lost``.
        run_id: its run, once that is registered.
        pid: the process that computes it; 0 before.
    """

    id: int
    group: str
    plan: Mapping[str, Any]
    engine: str
    folder: str
    state: str
    run_id: str
    created: float
    error: str
    pid: int


class Queue(Database):
    """One thread's connection to the queue.

    Raises:
        GemmaTuiError: from every method, when the file cannot be read or written.
    """

    def enqueue(self, plans: Sequence[Mapping[str, Any]], engine: str, folder: str, group: str = "") -> list[int]:
        """Append plans, all or none; returns their numbers. Without a group each has its plan's own."""
        now, ids = time.time(), []
        with self._guard(), self._transaction():
            for plan in plans:
                cursor = self._db.execute(
                    "INSERT INTO gt_queue (group_name, plan, engine, folder, state, run_id, created, error, pid,"
                    " pid_started) VALUES (?, ?, ?, ?, 'queued', '', ?, '', 0, 0)",
                    (group or plan.get("group", ""), json.dumps(plan), engine, folder, now),
                )
                ids.append(int(cursor.lastrowid or 0))
        return ids

    def items(self, limit: int = 1000) -> list[Item]:
        """All plans, the newest first."""
        return self._items("ORDER BY q.id DESC LIMIT ?", limit)

    def queued(self) -> list[Item]:
        """Plans that have no run as yet, the next first."""
        waiting = self._items("WHERE q.state IN ('queued', 'running') AND q.run_id = '' ORDER BY q.id")
        return [item for item in waiting if item.state in ("queued", "running")]

    def running(self) -> Item | None:
        """The plan that is computed now, whoever began it."""
        claimed = self._items("WHERE q.state = 'running' ORDER BY q.id")
        return next((item for item in claimed if item.state == "running"), None)

    def item(self, id: int) -> Item:
        """One plan by its number.

        Raises:
            GemmaTuiError: there is none.
        """
        found = self._items("WHERE q.id = ?", id)
        if not found:
            raise GemmaTuiError(f"no plan {id} in the queue: `gemma-tui queue list` numbers them")
        return found[0]

    def cancel(self, id: int) -> Item:
        """Take a plan out of the queue, unless it was claimed; returns it as it is then."""
        with self._guard():
            self._db.execute("UPDATE gt_queue SET state = 'cancelled' WHERE id = ? AND state = 'queued'", (id,))
        return self.item(id)

    def lead(self) -> bool:
        """Become the one process that works through the queue; False while another is."""
        with self._guard(), self._transaction():
            if self._leader() not in (None, os.getpid()):
                return False
            self._db.execute("INSERT OR REPLACE INTO gt_runner VALUES (1, ?, ?)", (os.getpid(), own_start()))
            return True

    def leader(self) -> int | None:
        """The pid of the process that works through the queue, if one does."""
        with self._guard():
            return self._leader()

    def leave(self) -> None:
        """Let another process work through the queue."""
        with self._guard():
            self._db.execute("DELETE FROM gt_runner WHERE pid = ?", (os.getpid(),))

    def claim(self) -> Item | None:
        """The next plan, which is then ours; None when nothing is left, and then we lead no longer.

        Both in one transaction: who adds a plan finds either a leader that will see it, or none.
        """
        with self._guard(), self._transaction():
            row = self._db.execute("SELECT MIN(id) FROM gt_queue WHERE state = 'queued'").fetchone()
            if row[0] is None:
                self._db.execute("DELETE FROM gt_runner WHERE pid = ?", (os.getpid(),))
                return None
            self._own(row[0], os.getpid(), own_start())
        return self.item(row[0])

    def began(self, id: int, pid: int) -> None:
        """A claimed plan is computed by this process from now on."""
        with self._guard():
            self._own(id, pid, start_of(pid))

    def registered(self, id: int, run_id: str) -> None:
        """A claimed plan has its run."""
        with self._guard():
            self._db.execute("UPDATE gt_queue SET run_id = ? WHERE id = ?", (run_id, id))

    def finish(self, id: int, state: str, error: str = "") -> None:
        """Say what became of a claimed plan."""
        with self._guard():
            self._db.execute("UPDATE gt_queue SET state = ?, error = ? WHERE id = ?", (state, error, id))

    def free_group(self, name: str) -> str:
        """The name, with a number behind it if plans or runs have it already."""
        with self._guard():
            taken = {
                row[0]
                for row in self._db.execute("SELECT group_name FROM gt_queue UNION SELECT group_name FROM gt_runs")
            }
        number, free = 1, name
        while free in taken:
            number += 1
            free = f"{name}-{number}"
        return free

    def _own(self, id: int, pid: int, started: float) -> None:
        self._db.execute(
            "UPDATE gt_queue SET state = 'running', pid = ?, pid_started = ? WHERE id = ?", (pid, started, id)
        )

    def _leader(self) -> int | None:
        row = self._db.execute("SELECT pid, pid_started FROM gt_runner").fetchone()
        return int(row[0]) if row is not None and alive(*row) else None

    def _items(self, which: str, *values: Any) -> list[Item]:
        with self._guard():
            rows = self._db.execute(
                "SELECT q.id, q.group_name, q.plan, q.engine, q.folder, q.state, q.run_id, q.created, q.error, q.pid,"
                " q.pid_started, r.state, r.error FROM gt_queue q LEFT JOIN gt_runs r ON r.run_id = q.run_id"
                f" AND q.run_id != '' {which}",
                values,
            ).fetchall()
        return [_item(*row) for row in rows]


def _item(
    id: int, group: str, plan: str, engine: str, folder: str, state: str, run_id: str, created: float, error: str,
    pid: int, started: float, run_state: str | None, run_error: str | None,
) -> Item:  # fmt: skip
    if state == "running" and not alive(pid, started):
        # A run that did not end has died with its process.
        state = OUTCOMES.get(run_state or "", "lost")
        error = run_error or ""
    return Item(id, group, json.loads(plan), engine, folder, state, run_id, created, error, pid)
