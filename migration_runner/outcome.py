"""The last line of a run that failed: what, why, what stays, where the database stands, what to do; worded here."""

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

UNKNOWN = "check with 'alembic current'"
REFUSALS: dict[type[BaseException], str] = {
    OwnTransaction: "committed or rolled back its own transaction (COMMIT or ROLLBACK, commit() or rollback());"
    " transactions are managed by the runner: use op.get_context().autocommit_block()",
    LockLost: "released the migration lock, which another run has acquired; do not release session-level advisory"
    " locks",
    Incomplete: "is incomplete",
}


@dataclass(frozen=True)
class DatabaseState:
    """What the database said after a failure, in a connection of its own; each None was not to be learned."""

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
    """Ask where the database stands and what a step left; never raises."""
    state = DatabaseState()
    if version_table is None:
        return state
    with suppress(DBAPIError, psycopg2.Error, UnicodeDecodeError), database.side_connection() as other:
        # The transaction first: what it made of the version table is to be read afterwards.
        transaction_id = step.transaction_id if step else None
        transaction = catalog.transaction_status(other, transaction_id) if transaction_id else None
        state = replace(state, transaction=transaction, position=_position(other, version_table))
        if step and step.builds:
            found = catalog.indexes(other, [table for build in step.builds for table in build.tables])
            invalid = [index.name for index in step.left_invalid(found, invalid_before)]
            state = replace(state, invalid=invalid, built=[index.name for index in step.built(found)])
    return state


def _position(other: catalog.Asks, version_table: tuple[str, str]) -> str:
    rows = other.ask(
        "SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) FROM pg_class c JOIN pg_namespace n"
        " ON n.oid = c.relnamespace WHERE n.nspname = %s::name AND c.relname = %s::name AND c.relkind = 'r'",
        *version_table,
    )
    heads = other.ask(f"SELECT version_num FROM {rows[0][0]} ORDER BY 1") if rows else []
    return ", ".join(str(head) for (head,) in heads) or "base"


@dataclass(frozen=True)
class Outcome:
    """Why a try ended, and all that is known of what it left."""

    error: BaseException | None  # None: a signal ended it
    signal: str | None = None
    step: StepRun | None = None
    connected: bool = True  # at some time of the run
    location: str | None = None
    blockers: Collection[str] = ()
    waiters: Collection[str] = ()
    state: DatabaseState = DatabaseState()
    position_before: str | None = None
    resume: str = "run again to resume"

    @property
    def reason(self) -> str:
        """What happened and where the database stands; without what to do about it."""
        return printable("; ".join([self._what(), *self._in_the_way(), *self._left()]))

    @property
    def fix_line(self) -> str:
        """For an error that no retry helps."""
        return f"{self.reason}; fix it, then retry"

    def timed_out_line(self, seconds: float) -> str:
        """For an error that may pass."""
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
        """For a run that does not stop; nothing can be asked any more."""
        parts = [f"interrupted by {self.signal}; did not stop in time and was killed", *self._in_the_way()]
        step = self.step
        if step and step.recorded:
            parts.append(f"commit status unknown: {UNKNOWN}")
        elif self.position_before is not None:
            parts.append(f"the database was at revision {self.position_before} before: {UNKNOWN}")
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

    def _in_the_way(self) -> list[str]:
        parts = []
        if self.blockers and self.error is not None and sqlstate(self.error) == "55P03":
            parts.append(f"blocked by {' and '.join(sorted(self.blockers))}")
        if self.waiters:
            parts.append(f"waiting for this run: {' and '.join(sorted(self.waiters))}")
        return parts

    def _left(self) -> list[str]:
        """What stays of the step, and where the database stands: nothing that was not asked."""
        parts: list[str] = []
        state, step = self.state, self.step
        if not self.connected:
            return ["nothing was changed"]
        own = step is not None and step.transaction is Transaction.ENDED
        stays = own
        if step and own:
            parts.append(f"check which of these were committed: {step.statements.all or 'no statement was recorded'}")
        elif step and step.transaction is Transaction.ENTERING_BLOCK and step.statements.all:
            stays = state.transaction != "aborted"
            if stays:
                parts.append(f"check which of these were committed: {step.statements.all}")
        elif step and step.statements.committed:
            stays = True
            parts.append(f"committed outside the transaction and not rolled back: {step.statements.committed}")
        if step and step.statements.partial:
            stays = True
            parts.append(f"check what was committed by: {step.statements.partial}")
        if step and step.used_another_connection:
            stays = True
            parts.append("check for changes committed on the revision's second connection")
        if state.invalid:
            stays = True
            parts.append(f"left INVALID: {', '.join(state.invalid)}")
        if drops := [*state.invalid, *state.built]:
            parts.append(drop_with(drops))
        if state.position is None:
            committing = step is not None and step.recorded
            unknown = "commit status unknown" if committing else "the database's revision is unknown"
            return [*parts, f"{unknown}: {UNKNOWN}"]
        position = f"the database is at revision {state.position}"
        if not step:
            return [*parts, position]
        if state.transaction == "committed" and not own:
            return [*parts, f"but the commit succeeded; {position}"] if step.recorded else [*parts, position]
        if step.recorded and state.transaction != "aborted":
            return [*parts, f"commit status unknown: {UNKNOWN}"]
        if stays:
            return [*parts, position]
        if state.transaction == "in progress":
            return [*parts, f"rollback still in progress on the server; {position}"]
        return [*parts, f"rolled back; {position}"]
