"""A second connection that samples the run: blockers, waiting sessions, and the progress of a long statement."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psycopg2
from sqlalchemy.exc import DBAPIError

from migration_runner import catalog
from migration_runner.database import Database, SideConnection
from migration_runner.errors import printable
from migration_runner.sql import summarize
from migration_runner.step import StepRun

log = logging.getLogger("migration_runner")

# Seconds from one line of progress to the next: every 10 s in the first minute, then every minute.
INTERVAL = 10
LATER_INTERVAL = 60


class Monitor:
    """Samples the session every second, once a step takes longer than one; a run of short steps opens no connection.

    Without a second connection, only names and progress are missing.
    """

    def __init__(self, database: Database, pid: int, current: Callable[[], StepRun | None]) -> None:
        self.database, self.pid, self.current = database, pid, current
        self.blockers: frozenset[str] = frozenset()  # of the step; after LOCK_TIMEOUT they can no longer be queried
        self.waiters: frozenset[str] = frozenset()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=2)

    def reset(self) -> None:
        """Reset for the next step."""
        self.blockers = self.waiters = frozenset()

    def _run(self) -> None:
        started = time.monotonic()
        step = None
        while (step.elapsed if step else time.monotonic() - started) < 1:
            if self._stop.wait(0.5):
                return
            step = self.current()
        with suppress(DBAPIError, psycopg2.Error, UnicodeDecodeError), self.database.side_connection() as other:
            self._sample(other.as_login_role())
        self._sample(None)  # no connection, or a broken one

    def _sample(self, other: SideConnection | None) -> None:
        logged: tuple[StepRun | None, float] = (None, 0.0)
        while not self._stop.is_set():
            step = self.current()
            blockers = [printable(name) for name in catalog.blockers(other, self.pid)] if other else []
            if blockers:
                self.blockers |= frozenset(blockers)
            if step is not None:
                last = logged[1] if logged[0] is step else 0.0
                if step.elapsed - last >= (INTERVAL if step.elapsed <= 6 * INTERVAL + 1 else LATER_INTERVAL):
                    logged = (step, step.elapsed)
                    doing = f": {'; '.join(self._doing(other, blockers))}" if other else ""
                    log.info("%s still running after %.0f s%s", step.title, step.elapsed, doing)
            self._stop.wait(1)

    def _doing(self, other: SideConnection, blockers: list[str]) -> list[str]:
        doing = catalog.activity(other, self.pid)
        parts = [summarize(doing.statement) if doing.statement else "no statement is running"]
        if doing.progress:
            parts.append(doing.progress)
        if blockers:
            parts.append(f"waiting for {' and '.join(blockers)}")
        elif doing.waits_for:
            parts.append(f"waiting for {doing.waits_for}")
        own = ", a connection opened by the revision"
        self.waiters = frozenset(
            printable(name) + (own if pid in self.database.pids else "")
            for pid, name in catalog.waiters(other, self.pid)
        )
        return [*parts, *(f"{name} waits for this run" for name in sorted(self.waiters))]
