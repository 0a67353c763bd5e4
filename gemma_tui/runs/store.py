"""Runs in one SQLite file: plans, states, metrics and events, each written as it comes.

One connection per thread: writers append, readers remember how far they have read.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.runs.database import Database
from gemma_tui.runs.processes import alive, own_start

ACTIVE = ("running", "paused")
METRIC_KINDS = ("step", "evaluation", "diagnosis", "memorized")
KIND_KEYS = {"valid_loss": "evaluation", "diagnosis_seconds": "diagnosis", "memorized_bits": "memorized"}
"""What tells the kinds of metrics apart: trackio's layout has no place for a kind."""
REQUESTS = ("pause", "resume", "stop")
RUN_NAME = re.compile(r"\w[\w.\-]{0,95}")


@dataclass(frozen=True)
class Run:
    """One run as the store knows it.

    Attributes:
        state: ``running``, ``paused``, ``done``, ``stopped``, ``failed`` or ``lost`` (its process is gone).
        step, steps: the last finished optimizer step, and how many were planned.
        request: what another process asked of it and it has not heard yet: ``pause``, ``resume``, ``stop`` or nothing.
        group: the name it shares with the runs it is compared with, or nothing.
    """

    run_id: str
    name: str
    study: str
    state: str
    created: float
    updated: float
    engine: str
    plan: Mapping[str, Any]
    command: str
    step: int
    steps: int
    error: str
    request: str
    group: str

    @property
    def active(self) -> bool:
        """Whether it still computes or waits to."""
        return self.state in ACTIVE

    @property
    def folder(self) -> Path:
        """Where its adapter or model lies."""
        return paths.runs() / self.run_id


@dataclass(frozen=True)
class Row:
    """A metric or event read back; ``cursor`` is where the next read goes on."""

    cursor: int
    kind: str
    step: int
    time: float
    values: Mapping[str, Any]


class RunStore(Database):
    """One thread's connection to the runs.

    Raises:
        GemmaTuiError: from every method, when the file cannot be read or written.
    """

    def create(
        self, name: str, study: str, engine: str, plan: Mapping[str, Any], command: str, steps: int, group: str = ""
    ) -> Run:
        """Register a run of this process and make its folder.

        Raises:
            UsageError: the name could not be that of a folder.
        """
        check_name(name)
        now, text = time.time(), json.dumps(plan)
        with self._guard(), self._transaction():
            run_id = self._free_id(name)
            self._db.execute(
                f"INSERT INTO gt_runs ({_COLUMNS}) VALUES (?, ?, ?, 'running', ?, ?, ?, ?, ?, 0, ?, '', '', ?, ?, ?)",
                (run_id, name, study, now, now, engine, text, command, steps, group, os.getpid(), own_start()),
            )
            self._db.execute(
                "INSERT INTO configs (run_id, run_name, config, created_at) VALUES (?, ?, ?, ?)",
                (run_id, run_id, text, _iso(now)),
            )
        run = self.run(run_id)
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GemmaTuiError(f"{run.folder} cannot be made ({error.strerror}): free some space") from None
        return run

    def adopt(self, run_id: str) -> Run:
        """Take over a run that ended, or whose process is gone: it runs in this process from now on.

        Raises:
            GemmaTuiError: there is none, or another process computes it.
        """
        with self._guard(), self._transaction():
            if (run := self.run(run_id)).active:
                raise GemmaTuiError(f"{run.run_id} is {run.state} in another process: stop it there first")
            self._db.execute(
                "UPDATE gt_runs SET state = 'running', error = '', request = '', updated = ?, pid = ?, pid_started = ?"
                " WHERE run_id = ?",
                (time.time(), os.getpid(), own_start(), run.run_id),
            )
        return self.run(run.run_id)

    def record(self, run_id: str, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a metric (``METRIC_KINDS``) or an event; on disk when this returns."""
        now = time.time()
        with self._guard(), self._transaction():
            if kind in METRIC_KINDS:
                self._db.execute(
                    "INSERT INTO metrics (run_id, timestamp, run_name, step, metrics) VALUES (?, ?, ?, ?, ?)",
                    (run_id, _iso(now), run_id, step, _finite_json(values)),
                )
            else:
                self._db.execute(
                    "INSERT INTO gt_events (run_id, time, kind, step, payload) VALUES (?, ?, ?, ?, ?)",
                    (run_id, now, kind, step, _finite_json(values)),
                )
            self._db.execute(
                "UPDATE gt_runs SET updated = ?, step = MAX(step, ?) WHERE run_id = ?", (now, step, run_id)
            )

    def replan(self, run_id: str, plan: Mapping[str, Any], command: str, steps: int) -> None:
        """Give a run more to do: its plan, command and steps are these from now on."""
        text = json.dumps(plan)
        with self._guard(), self._transaction():
            self._db.execute(
                "UPDATE gt_runs SET plan = ?, command = ?, steps = ? WHERE run_id = ?", (text, command, steps, run_id)
            )
            self._db.execute("UPDATE configs SET config = ? WHERE run_id = ?", (text, run_id))

    def set_state(self, run_id: str, state: str, error: str = "") -> None:
        """Change a run's state."""
        with self._guard():
            self._db.execute(
                "UPDATE gt_runs SET state = ?, error = ?, updated = ? WHERE run_id = ?",
                (state, error, time.time(), run_id),
            )

    def request(self, run_id: str, what: str) -> None:
        """Ask the process of a run to ``pause``, ``resume`` or ``stop``; it looks about once a second.

        A later request takes the place of one that was not heard yet, but nothing takes that of ``stop``.
        """
        if what not in REQUESTS:
            raise UsageError(f"a run cannot be asked to {what!r}: choose {' | '.join(REQUESTS)}")
        with self._guard():
            self._db.execute("UPDATE gt_runs SET request = ? WHERE run_id = ? AND request != 'stop'", (what, run_id))

    def take_request(self, run_id: str) -> str:
        """What was asked of a run of this process since the last call, or nothing; heard once."""
        with self._guard():
            row = self._db.execute("SELECT request FROM gt_runs WHERE run_id = ?", (run_id,)).fetchone()
            what = str(row[0]) if row is not None else ""
            if what:  # if another one came meanwhile, that is left for the next look
                self._db.execute("UPDATE gt_runs SET request = '' WHERE run_id = ? AND request = ?", (run_id, what))
            return what

    def run(self, run_id: str) -> Run:
        """One run, by its id or a beginning of it that fits no other.

        Raises:
            GemmaTuiError: none or several fit.
        """
        pattern = run_id.replace("\\", "\\\\").replace("%", r"\%").replace("_", r"\_") + "%"
        with self._guard():
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM gt_runs"
                " WHERE run_id = ? OR run_id LIKE ? ESCAPE '\\' ORDER BY run_id = ? DESC",
                (run_id, pattern, run_id),
            ).fetchall()
        if not rows:
            raise GemmaTuiError(f"no run {run_id[:60]!r}: `gemma-tui runs list` names them")
        if rows[0][0] != run_id and len(rows) > 1:
            raise GemmaTuiError(f"{run_id!r} fits {len(rows)} runs: give more of the name")
        return _run(rows[0])

    def runs(self, limit: int = 1000, studies: Sequence[str] = ()) -> list[Run]:
        """The runs of some studies, or all, the newest first."""
        some = f"WHERE study IN ({', '.join('?' * len(studies))})" if studies else ""
        with self._guard():
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM gt_runs {some} ORDER BY created DESC LIMIT ?", (*studies, limit)
            ).fetchall()
        return [_run(row) for row in rows]

    def group(self, name: str) -> list[Run]:
        """The runs of a group, the oldest first."""
        with self._guard():
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM gt_runs WHERE group_name = ? ORDER BY created", (name,)
            ).fetchall()
        return [_run(row) for row in rows]

    def metrics(self, run_id: str, after: int = 0, limit: int = 100_000) -> list[Row]:
        """Metrics after a cursor; a number that was not finite comes back as None."""
        with self._guard():
            rows = self._db.execute(
                "SELECT id, step, timestamp, metrics FROM metrics WHERE run_id = ? AND id > ? ORDER BY id LIMIT ?",
                (run_id, after, limit),
            ).fetchall()
        return [_metric(*row) for row in rows]

    def peak_memory(self, run_id: str) -> int:
        """The most bytes that a run took at once, beyond what was there before its model; 0 if no step told."""
        with self._guard():
            peak = self._db.execute(
                "SELECT MAX(json_extract(metrics, '$.peak_memory')) FROM metrics WHERE run_id = ?", (run_id,)
            ).fetchone()[0]
        return int(peak) if isinstance(peak, int | float) else 0

    def last_steps(self, run_id: str) -> dict[str, int]:
        """The newest step of each kind of metric that a run has."""
        marks = " ".join(f"WHEN metrics LIKE '%\"{key}\"%' THEN '{kind}'" for key, kind in KIND_KEYS.items())
        with self._guard():
            rows = self._db.execute(
                f"SELECT CASE {marks} ELSE 'step' END AS kind, MAX(step) FROM metrics WHERE run_id = ? GROUP BY kind",
                (run_id,),
            ).fetchall()
        return dict(rows)

    def events(self, run_id: str, after: int = 0, limit: int = 10_000) -> list[Row]:
        """Events after a cursor."""
        with self._guard():
            rows = self._db.execute(
                "SELECT id, kind, step, time, payload FROM gt_events WHERE run_id = ? AND id > ? ORDER BY id LIMIT ?",
                (run_id, after, limit),
            ).fetchall()
        return [Row(i, kind, step, when, json.loads(payload)) for i, kind, step, when, payload in rows]

    def check(self) -> str:
        """SQLite's own verdict on the file: ``ok`` or what is wrong."""
        with self._guard():
            return str(self._db.execute("PRAGMA quick_check").fetchone()[0])

    def _free_id(self, name: str) -> str:
        taken = {row[0] for row in self._db.execute("SELECT run_id FROM gt_runs WHERE run_id LIKE ? || '-%'", (name,))}
        number = len(taken) + 1
        while f"{name}-{number}" in taken:
            number += 1
        return f"{name}-{number}"


def check_name(name: str) -> None:
    """Refuse a name that could not be that of a run's folder.

    Raises:
        UsageError: it could not.
    """
    if not RUN_NAME.fullmatch(name):
        raise UsageError(f"{name[:60]!r} is no run name: use letters, digits, dots and dashes")


_COLUMNS = (
    "run_id, name, study, state, created, updated, engine, plan, command, step, steps, error, request,"
    " group_name, pid, pid_started"
)


def _run(row: tuple[Any, ...]) -> Run:
    *facts, pid, started = row
    values = dict(zip((f.name for f in fields(Run)), facts, strict=True))
    values["plan"] = json.loads(values["plan"])
    if values["state"] in ACTIVE and not alive(pid, started):
        values["state"] = "lost"
    return Run(**values)


def _metric(cursor: int, step: int, timestamp: str, text: str) -> Row:
    values = json.loads(text)
    kind = next((kind for key, kind in KIND_KEYS.items() if key in values), "step")
    return Row(cursor, kind, step, datetime.fromisoformat(timestamp).timestamp(), values)


def _finite_json(values: Mapping[str, Any]) -> str:
    """JSON without NaN and infinities, which no other reader takes."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()})


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
