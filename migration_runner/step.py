"""One revision being applied: its statements, which are committed, and whether its transaction is still intact."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from enum import Enum
from pathlib import Path

import psycopg2
from alembic.runtime.migration import MigrationStep, RevisionStep
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, TRANSACTION_STATUS_INERROR, TRANSACTION_STATUS_INTRANS
from sqlalchemy.exc import DBAPIError

from migration_runner import catalog, sql
from migration_runner.errors import Incomplete, Interrupted, LockLost, OwnTransaction, printable, server_message
from migration_runner.record import SAVEPOINT, SEE_DOCS, Record, is_refusal
from migration_runner.session import LOCK_TIMEOUT, Session

log = logging.getLogger("migration_runner")

BEGIN_SQL = """SAVEPOINT {};
SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN NULL ELSE pg_catalog.txid_current() END"""


class StatementLog:
    """The statements that finished: the beginnings of the first three and of the last, however many there were."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []
        self.last = ""
        self.partial = ""
        self._committed = (0, "")  # count and last at the last commit

    def add(self, statement: str) -> None:
        """A statement finished."""
        self.count += 1
        self.last = statement[: sql.LONGEST]
        if self.count <= 3:
            self.first.append(self.last)

    def add_partial(self, statement: str) -> None:
        """A statement failed outside the transaction, and may have committed part of its work."""
        self.partial = sql.summarize(statement)

    def commit(self) -> None:
        """All finished statements are committed."""
        self._committed = (self.count, self.last)

    @property
    def committed(self) -> str:
        """What is committed: `CREATE TABLE a; INSERT INTO a; INSERT INTO a; 47 more; INSERT INTO a`, or nothing."""
        return self._text(*self._committed)

    @property
    def all(self) -> str:
        """The same of all statements."""
        return self._text(self.count, self.last)

    def _text(self, count: int, last: str) -> str:
        parts = [sql.summarize(statement) for statement in self.first[:count]]
        if count > 4:
            parts.append(f"{count - 4} more")
        if count > 3:
            parts.append(sql.summarize(last))
        return "; ".join(parts)


class Transaction(Enum):
    """Whose transaction a step is in."""

    OURS = "the runner's, from the start of the step"
    ENTERING_BLOCK = "the runner's, being committed"
    BLOCK = "none, in an autocommit_block"
    AFTER_BLOCK = "the runner's, from the end of an autocommit_block"
    ENDED = "unknown: the revision ended the runner's"


class StepRun:
    """A step of one attempt; each attempt has its own object."""

    def __init__(
        self,
        session: Session,
        step: MigrationStep,
        check_stopped: Callable[[], None],
        record: Record,
    ) -> None:
        self.session, self.step, self.check_stopped = session, step, check_stopped
        self.record = record
        self.started = time.monotonic()
        self.connections_before = session.database.opened
        self.statements = StatementLog()
        self.transaction = Transaction.OURS
        self.transaction_id: int | None = None
        self.builds: list[catalog.ResolvedBuild] = []
        self.recorded = False  # only the commit is missing

    @property
    def title(self) -> str:
        """`revision 002 (20251202_..._002_add.py)`; a stamp runs no file."""
        return title(self.step)

    @property
    def worked_outside(self) -> bool:
        """Whether the step left its transaction, so that a rollback may not undo all of it."""
        return self.transaction is not Transaction.OURS or self.used_another_connection

    @property
    def used_another_connection(self) -> bool:
        """Whether the revision connected to the database a second time, by the run's engine."""
        return self.session.database.opened > self.connections_before

    def apply(self, function: Callable[[], None], invalid_before: frozenset[int]) -> None:
        """Run the revision's function; raise what it raises, or OwnTransaction, LockLost or Incomplete."""
        self._begin()
        self.session.raw.observer = self
        try:
            function()
        except BaseException:
            self._refuse_own_transaction_after_failure()
            raise
        finally:
            self.session.raw.observer = None
        self._end(invalid_before)
        self.recorded = True

    @contextmanager
    def autocommit_block(self, block: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Alembic's own, which commits: everything before it is permanent, and a new transaction follows it."""
        raw = self.session.raw
        self._require_own_transaction(f"RELEASE SAVEPOINT {savepoint(self.step)}")
        raw.observer = None  # Alembic's own statements are not the revision's
        self.transaction = Transaction.ENTERING_BLOCK
        try:
            with block():
                self.statements.commit()
                self.transaction, self.transaction_id, raw.observer = Transaction.BLOCK, None, self
                try:
                    yield
                finally:
                    self.transaction, raw.observer = Transaction.AFTER_BLOCK, None
        finally:
            if not self.session.lost:
                self._begin()
            raw.observer = self

    def ended_its_transaction(self, status: str | None) -> bool:
        """Whether it did: the transaction is committed, and not by the runner."""
        if status == "committed" and not self.recorded and self.transaction is not Transaction.ENTERING_BLOCK:
            self.transaction = Transaction.ENDED
        return self.transaction is Transaction.ENDED

    def left_invalid(self, indexes: list[catalog.Index], before: frozenset[int]) -> list[catalog.Index]:
        """The INVALID indexes that this step's statements left or found."""
        return [i for i in indexes if not i.valid and any(build.caused(i, before) for build in self.builds)]

    def built(self, indexes: list[catalog.Index]) -> list[catalog.Index]:
        """The valid indexes that this step built outside its transaction."""
        new = {(table, build.index) for build in self.builds if not build.existed for table in build.tables}
        return [index for index in indexes if index.valid and (index.table, index.relname) in new]

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @contextmanager
    def observe(self, statement: str, *, atomic: bool = True) -> Iterator[None]:
        """Called by the connection around each statement."""
        self.check_stopped()
        raw = self.session.raw
        if not raw.in_transaction and self.transaction is not Transaction.BLOCK and not raw.closed:
            raise self._own_transaction()
        waits = self._waits_for_all(statement)
        try:
            yield
        except BaseException as error:
            # Its response may be lost, by a disconnect or a signal; or it committed part of its work.
            undone = not isinstance(error, Interrupted) and not raw.closed and atomic and sql.is_atomic(statement)
            if self.transaction is Transaction.BLOCK and not (
                undone or sql.index_build(statement)
            ):  # the catalog has those
                self.statements.add_partial(statement)
            raise
        finally:
            if waits and not raw.closed and not raw.in_transaction:
                raw.query(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
        self.statements.add(statement)
        if not raw.in_transaction:
            self.statements.commit()
            if self.transaction is not Transaction.BLOCK:
                raise self._own_transaction()

    def _waits_for_all(self, statement: str) -> bool:
        """Whether lock_timeout was lifted: a concurrent build waits for all transactions, and blocks nobody."""
        raw = self.session.raw
        if raw.in_transaction:
            return False
        build = sql.index_build(statement)
        if not (build or sql.detaches(statement)):
            return False
        if build:
            self.builds.append(catalog.resolve(raw, build))
        ours = bool(raw.query("SHOW lock_timeout")[0][0] == LOCK_TIMEOUT)
        if ours:
            raw.query("SET lock_timeout = 0")
        return ours

    def _begin(self) -> None:
        """Mark the transaction by a savepoint, and keep its id for a check after the connection broke."""
        ((self.transaction_id,),) = self.session.raw.query(BEGIN_SQL.format(savepoint(self.step)))

    def _end(self, invalid_before: frozenset[int]) -> None:
        """Check that the transaction is still the same one, reset the settings, and record the step."""
        session = self.session
        end = f"RELEASE SAVEPOINT {savepoint(self.step)}; {session.reset_sql}"
        if self.record.writes:
            insert = (
                f"SAVEPOINT {SAVEPOINT}; {self.record.insert(self.step, self.elapsed)}; RELEASE SAVEPOINT {SAVEPOINT}"
            )
            try:
                ((transaction_id, held),) = self._require_own_transaction(f"{end}; {insert}; {session.checks_sql}")
            except psycopg2.Error as error:
                ((transaction_id, held),) = self._continue_without_record(error)
        else:
            ((transaction_id, held),) = self._require_own_transaction(f"{end}; {session.checks_sql}")
        if transaction_id != self.transaction_id:  # another transaction with a savepoint of that name
            raise self._own_transaction()
        if not held:
            raise LockLost
        if self.builds:
            with self.session.safe_path():
                indexes = catalog.indexes(self.session.raw)
            if self.left_invalid(indexes, invalid_before):
                raise Incomplete

    def _continue_without_record(self, error: psycopg2.Error) -> list[tuple[object, ...]]:
        """After an error: if it was the record's, such as a dropped table, undo that, and return what is checked."""
        raw = self.session.raw
        if not is_refusal(raw, error):
            raise error
        with suppress(psycopg2.Error):  # the error came before the savepoint
            raw.query(f"ROLLBACK TO SAVEPOINT {SAVEPOINT}")
            log.warning("%s is not recorded: %s; %s", self.title, printable(server_message(error)), SEE_DOCS)
            return raw.query(self.session.checks_sql)
        raise error

    def _require_own_transaction(self, query: str) -> list[tuple[object, ...]]:
        try:
            return self.session.raw.query(query)
        except psycopg2.Error as error:
            if error.pgcode in ("3B001", "25P01"):  # no such savepoint; no transaction
                raise self._own_transaction() from error
            raise

    def _own_transaction(self) -> OwnTransaction:
        self.transaction = Transaction.ENDED
        return OwnTransaction()

    def _refuse_own_transaction_after_failure(self) -> None:
        """A failed transaction accepts no other query than this one."""
        raw = self.session.raw
        status = raw.info.transaction_status
        if self.session.lost or self.transaction is Transaction.BLOCK:
            return
        if status == TRANSACTION_STATUS_IDLE:
            raise self._own_transaction()
        if status in (TRANSACTION_STATUS_INERROR, TRANSACTION_STATUS_INTRANS):
            with suppress(DBAPIError, psycopg2.Error):
                self._require_own_transaction(f"ROLLBACK TO SAVEPOINT {savepoint(self.step)}")


def savepoint(step: MigrationStep) -> str:
    """The quoted name of a savepoint that only the step's own transaction has.

    Releasing it, or rolling back to it if the transaction has failed, shows whether the transaction is still the same
    one. The plan (--sql) has the same statements.
    """
    name = step.revision.revision if isinstance(step, RevisionStep) else "stamp"
    return '"migration_runner {}"'.format(name.replace('"', '""'))


def title(step: MigrationStep) -> str:
    """The step's name in messages."""
    if not isinstance(step, RevisionStep):
        return "the stamp"
    revision = step.revision
    return f"{'' if step.is_upgrade else 'the downgrade of '}revision {revision.revision} ({Path(revision.path).name})"


def drop_with(names: list[str]) -> str:
    """The statements that remove these indexes."""
    return "drop with: " + "; ".join(f"DROP INDEX CONCURRENTLY {name}" for name in names)
