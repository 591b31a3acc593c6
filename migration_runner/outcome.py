"""The last line of a failed run: what failed, why, what remains, the database's revision, what to do."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace

import psycopg2
from sqlalchemy.exc import DBAPIError

from migration_runner import catalog
from migration_runner.database import Database
from migration_runner.errors import Incomplete, LockLost, OwnTransaction, describe, printable, sqlstate
from migration_runner.step import StepRun, Transaction, drop_with

CHECK_CURRENT = "check with 'alembic current'"
REFUSALS: dict[type[BaseException], str] = {
    OwnTransaction: "committed or rolled back its own transaction (COMMIT or ROLLBACK, commit() or rollback());"
    " transactions are managed by the runner: use op.get_context().autocommit_block()",
    LockLost: "released the migration lock, which another run has acquired; do not release session-level advisory"
    " locks",
    Incomplete: "is incomplete",
}


@dataclass(frozen=True)
class DatabaseState:
    """The database after a failure, read on a separate connection; None is unknown."""

    position: str | None = None  # `002`, `base`
    transaction: str | None = None  # committed, aborted, in progress
    invalid: list[str] = field(default_factory=list)  # indexes of the step, quoted, with their schema
    built: list[str] = field(default_factory=list)


def read_state(
    database: Database,
    step: StepRun | None,
    version_table: tuple[str, str] | None,
    invalid_before: frozenset[int],
) -> DatabaseState:
    """Read the database's revision and what remains of a step; never raises."""
    state = DatabaseState()
    if version_table is None:
        return state
    with suppress(DBAPIError, psycopg2.Error, UnicodeDecodeError), database.side_connection() as other:
        # The transaction first: it may still change the version table.
        transaction_id = step.transaction_id if step else None
        transaction = catalog.transaction_status(other, transaction_id) if transaction_id else None
        state = replace(state, transaction=transaction, position=_position(other, version_table))
        if step and step.builds:
            found = catalog.indexes(other, [table for build in step.builds for table in build.tables])
            invalid = [index.name for index in step.left_invalid(found, invalid_before)]
            state = replace(state, invalid=invalid, built=[index.name for index in step.built(found)])
    return state


def _position(other: catalog.Queryable, version_table: tuple[str, str]) -> str:
    rows = other.query(
        "SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) FROM pg_class c JOIN pg_namespace n"
        " ON n.oid = c.relnamespace WHERE n.nspname = %s::name AND c.relname = %s::name AND c.relkind = 'r'",
        *version_table,
    )
    heads = other.query(f"SELECT version_num FROM {rows[0][0]} ORDER BY 1") if rows else []
    return ", ".join(str(head) for (head,) in heads) or "base"


@dataclass(frozen=True)
class Outcome:
    """Why an attempt ended, and what is known of the resulting state."""

    error: BaseException | None  # None: a signal ended it
    signal: str | None = None
    step: StepRun | None = None
    connected: bool = True  # at any time during the run
    location: str | None = None
    blockers: Collection[str] = ()
    waiters: Collection[str] = ()
    state: DatabaseState = DatabaseState()
    position_before: str | None = None
    resume: str = "run again to resume"

    @property
    def reason(self) -> str:
        """What happened and the database's revision, without what to do about it."""
        return printable("; ".join([self._what(), *self._blocking(), *self._resulting_state()]))

    @property
    def fix_line(self) -> str:
        """For an error that is not retryable."""
        return f"{self.reason}; fix it, then retry"

    def timed_out_line(self, seconds: float) -> str:
        """For a transient error."""
        return f"{self.reason}; timed out after {seconds:.0f} s; retry later"

    @property
    def interrupted_line(self) -> str:
        """For SIGTERM and SIGINT."""
        return (
            f"{self.reason}; {self.resume}; if the Job's deadline was exceeded, raise 'job.activeDeadlineSeconds' and"
            " Helm's --timeout together"
        )

    @property
    def killed_line(self) -> str:
        """For a run that does not stop; the database can no longer be queried."""
        parts = [f"interrupted by {self.signal}; did not stop in time and was killed", *self._blocking()]
        step = self.step
        if step and step.recorded:
            parts.append(f"commit status unknown: {CHECK_CURRENT}")
        elif self.position_before is not None:
            parts.append(f"the database was at revision {self.position_before} before: {CHECK_CURRENT}")
        if step and step.worked_outside:
            kept = step.statements.committed
            parts.append(
                f"committed outside the transaction and not rolled back: {kept}"
                if kept
                else "check for changes made outside its transaction"
            )
        return printable("; ".join([*parts, self.resume]))

    def _what(self) -> str:
        where = f", at {self.location}" if self.location else ""
        if self.error is None:
            during = f" in {self.step.title} after {self.step.elapsed:.0f} s" if self.step else ""
            return f"interrupted by {self.signal}{during}"
        if self.step and type(self.error) in REFUSALS:
            return f"{self.step.title} {REFUSALS[type(self.error)]}{where}"
        return f"{f'{self.step.title} failed: ' if self.step else ''}{describe(self.error)}{where}"

    def _blocking(self) -> list[str]:
        parts = []
        if self.blockers and self.error is not None and sqlstate(self.error) == "55P03":
            parts.append(f"blocked by {' and '.join(sorted(self.blockers))}")
        if self.waiters:
            parts.append(f"waiting for this run: {' and '.join(sorted(self.waiters))}")
        return parts

    def _resulting_state(self) -> list[str]:
        """What remains of the step, and the database's revision: only what was read."""
        if not self.connected:
            return ["nothing was changed"]
        remains = self._remains()
        drops = [*self.state.invalid, *self.state.built]
        return [*remains, *([drop_with(drops)] if drops else []), self._revision(rolled_back=not remains)]

    def _remains(self) -> list[str]:
        parts: list[str] = []
        state, step = self.state, self.step
        if step and step.transaction is Transaction.ENDED:
            parts.append(f"check which of these were committed: {step.statements.all or 'no statement was recorded'}")
        elif step and step.transaction is Transaction.ENTERING_BLOCK and step.statements.all:
            if state.transaction != "aborted":
                parts.append(f"check which of these were committed: {step.statements.all}")
        elif step and step.statements.committed:
            parts.append(f"committed outside the transaction and not rolled back: {step.statements.committed}")
        if step and step.statements.partial:
            parts.append(f"check what was committed by: {step.statements.partial}")
        if step and step.used_another_connection:
            parts.append("check for changes committed on the revision's second connection")
        if state.invalid:
            parts.append(f"left INVALID: {', '.join(state.invalid)}")
        return parts

    def _revision(self, *, rolled_back: bool) -> str:
        state, step = self.state, self.step
        commit_unknown = f"commit status unknown: {CHECK_CURRENT}"
        if state.position is None:
            return commit_unknown if step and step.recorded else f"the database's revision is unknown: {CHECK_CURRENT}"
        position = f"the database is at revision {state.position}"
        if not step:
            return position
        if state.transaction == "committed" and step.transaction is not Transaction.ENDED:
            return f"but the commit succeeded; {position}" if step.recorded else position
        if step.recorded and state.transaction != "aborted":
            return commit_unknown
        if not rolled_back:
            return position
        if state.transaction == "in progress":
            return f"rollback still in progress on the server; {position}"
        return f"rolled back; {position}"
