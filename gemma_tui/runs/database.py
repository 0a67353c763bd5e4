"""The SQLite file of the runs: its tables, and a connection whose faults are one line each.

``metrics`` and ``configs`` have trackio's layout, so its command line and dashboard read them; tables with ``gt_`` in
front are ours. One connection per thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError

SCHEMA = """
CREATE TABLE IF NOT EXISTS metrics (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, timestamp TEXT NOT NULL, run_name TEXT NOT NULL,
    step INTEGER NOT NULL, metrics TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS gt_metrics_run ON metrics (run_id, id);
CREATE TABLE IF NOT EXISTS configs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, run_name TEXT NOT NULL, config TEXT NOT NULL,
    created_at TEXT NOT NULL, UNIQUE (run_id));
CREATE TABLE IF NOT EXISTS gt_runs (
    run_id TEXT PRIMARY KEY, name TEXT NOT NULL, study TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL,
    updated REAL NOT NULL, engine TEXT NOT NULL, plan TEXT NOT NULL, command TEXT NOT NULL, step INTEGER NOT NULL,
    steps INTEGER NOT NULL, pid INTEGER NOT NULL, pid_started REAL NOT NULL, error TEXT NOT NULL,
    request TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS gt_events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, time REAL NOT NULL, kind TEXT NOT NULL,
    step INTEGER NOT NULL, payload TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS gt_events_run ON gt_events (run_id, id);
CREATE TABLE IF NOT EXISTS gt_queue (
    id INTEGER PRIMARY KEY AUTOINCREMENT, group_name TEXT NOT NULL, plan TEXT NOT NULL, engine TEXT NOT NULL,
    folder TEXT NOT NULL, state TEXT NOT NULL, run_id TEXT NOT NULL, created REAL NOT NULL, error TEXT NOT NULL,
    pid INTEGER NOT NULL, pid_started REAL NOT NULL);
CREATE TABLE IF NOT EXISTS gt_runner (
    id INTEGER PRIMARY KEY CHECK (id = 1), pid INTEGER NOT NULL, pid_started REAL NOT NULL);
"""
ADDED = {"gt_runs": {"group_name": "TEXT NOT NULL DEFAULT ''"}}
"""Columns that a database of an earlier version lacks."""


class Database:
    """One thread's connection.

    Raises:
        GemmaTuiError: from every method, when the file cannot be read or written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or paths.runs()
        self._path = self._folder / "gemma-tui.db"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GemmaTuiError(f"{self._folder} cannot be made ({error.strerror}): set GEMMA_TUI_HOME") from None
        with self._guard():
            self._db = sqlite3.connect(self._path, timeout=5, isolation_level=None)
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.executescript(SCHEMA)
                if self._missing():
                    self._add_columns()
            except sqlite3.Error:
                self._db.close()
                raise

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def _missing(self) -> list[tuple[str, str, str]]:
        return [
            (table, name, kind)
            for table, columns in ADDED.items()
            for name, kind in columns.items()
            if name not in {row[1] for row in self._db.execute(f"PRAGMA table_info({table})")}
        ]

    def _add_columns(self) -> None:
        with self._transaction():
            for table, name, kind in self._missing():  # asked again: another process may have been faster
                self._db.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._rollback()
            raise

    def _rollback(self) -> None:
        # A full disk has rolled it back already, and may leave a connection that cannot even say so.
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise GemmaTuiError(
                f"{self._path}: {error}; free some space, or move the file away if it is damaged"
            ) from None
        except UnicodeEncodeError:
            raise GemmaTuiError("a name is not valid Unicode (half a surrogate pair): use another") from None
