"""One command on one database: plans, applies each step, retries if that is safe, and ends with one line."""

from __future__ import annotations

import copy
import functools
import gc
import logging
from collections.abc import Collection, Iterator, Set
from contextlib import suppress
from typing import Any

import psycopg2
from alembic.runtime.migration import MigrationContext, MigrationStep, RevisionStep
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from migration_runner import catalog, record, revisions
from migration_runner.command import Command, Needs
from migration_runner.database import Database
from migration_runner.errors import (
    WORK_BEFORE_ERROR,
    Interrupted,
    OwnTransaction,
    RetriesExhausted,
    is_transient,
    printable,
    root_cause,
    sqlstate,
)
from migration_runner.headers import Headers
from migration_runner.monitor import Monitor
from migration_runner.outcome import DatabaseState, Outcome, read_state
from migration_runner.retry import RetryBudget
from migration_runner.session import (
    SAFE_PATH,
    Session,
    acquire_lock,
    describe_server,
    open_session,
    qualify_comparisons,
)
from migration_runner.settings import Settings
from migration_runner.signals import StopSignal, interruptible
from migration_runner.step import StepRun

log = logging.getLogger("migration_runner")


class Progress:
    """What is kept over all attempts: the first one's plan, and what was read from the database."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.version_table: tuple[str, str] | None = None  # schema and name, once a session was opened
        self.position: str | None = None  # the database's revision, as last read by an attempt
        self.first_position: str | None = None
        self.last_position: str | None = None  # also read after a failure; None: unknown
        self.steps: list[MigrationStep] | None = None
        self.invalid_before: frozenset[int] = frozenset()
        self.logged: set[str] = set()

    def log(self, line: str, level: int = logging.INFO) -> None:
        """Log a line once, not again in each attempt."""
        if line not in self.logged:
            self.logged.add(line)
            log.log(level, "%s", line)

    def remaining(self, heads: tuple[str, ...], migration: MigrationContext) -> list[MigrationStep]:
        """The remaining steps of the first attempt's plan, so that `+2` stays relative to where the run started."""
        if self.steps is None or not all(isinstance(step, RevisionStep) for step in self.steps):
            self.steps = list(self.command.plan(heads, migration))
            return self.steps
        have = revisions.applied(self.command.script, heads)
        steps = [s for s in self.steps if isinstance(s, RevisionStep) and (s.revision.revision in have) != s.is_upgrade]
        if steps and not have.issuperset(steps[0].from_revisions):
            raise CommandError(f"another run has changed the database, which is now at {join(heads)}; retry")
        return list(steps)

    @property
    def resume(self) -> str:
        """How to resume after an interruption; a relative destination would now mean another revision."""
        last = self.steps[-1] if self.steps else None
        if self.command.is_relative and isinstance(last, RevisionStep):
            name = "upgrade" if last.is_upgrade else "downgrade"
            return f"run 'alembic {name} {join(last.to_revisions_no_deps)}' to resume"
        return "run again to resume"


class Runner:
    """Runs a command, over as many connections as needed."""

    def __init__(self, command: Command, settings: Settings, headers: Headers | None) -> None:
        self.command = command
        self.headers = headers  # None: the revision files are loaded
        self.database = Database(settings)
        self.budget = RetryBudget(settings.wait_seconds, self.load_revisions)
        self.stop = StopSignal()
        self.progress = Progress(command)
        self.attempt: Attempt | None = None

    def run(self) -> None:
        """Run the command; raise CommandError (no retry helps) or RetriesExhausted (one may) with one line."""
        gc.freeze()  # the revisions' modules stay, and each collection would scan all of them
        try:
            with interruptible(self.stop, self._cancel, self._interrupted_line, self._killed_line):
                while not self._succeeds():
                    pass
        finally:
            gc.unfreeze()
            self.write_positions(self.progress.last_position)

    def load_revisions(self) -> None:
        """Called before a wait, a failure and the first step, as a broken file is reported instead."""
        headers, self.headers = self.headers, None
        if headers:
            try:
                revisions.validate(self.command.script, headers.sources)
                revisions.validate_runnable(self.command.script, self.command.destination)
            finally:
                self.stop.check()
            gc.freeze()

    def write_positions(self, after: str | None = None) -> None:
        """For the report of several targets; what is unknown is empty."""
        if file := self.database.settings.position_file:
            line = printable(f"{self.progress.first_position or ''} -> {after or ''}")
            with suppress(OSError):  # a full disk
                file.write_text(f"{line}\n", encoding="utf-8")

    def _succeeds(self) -> bool:
        """Whether the command is done; False after a transient failure and a wait."""
        self.attempt = None
        try:
            with open_session(self.database, self.budget) as session:
                self.attempt = Attempt(self, session)
                self.attempt.run()
        except Interrupted:
            raise
        except BaseException as caught:
            self.stop.check()
            self.load_revisions()
            # The connection may break on leaving, and hide the attempt's own error.
            error = self.attempt.error if self.attempt and self.attempt.error else caught
            ours = isinstance(error, CommandError | RetriesExhausted)
            if ours and not (self.attempt and self.attempt.step):  # one raised by a revision is that revision's failure
                raise error from None
            self._wait_or_raise(root_cause(error))
            return False
        return True

    def _wait_or_raise(self, error: BaseException) -> None:
        step = self.attempt.step if self.attempt else None
        if step and WORK_BEFORE_ERROR.match(sqlstate(error) or ""):
            self.budget.extend(step.elapsed)
        outcome = self._outcome(error)
        lost = self.attempt is None or self.attempt.lost
        if (step and step.worked_outside) or not is_transient(error, connection_lost=lost):
            raise CommandError(outcome.fix_line) from error
        if not self.budget.wait(outcome.reason):
            raise RetriesExhausted(outcome.timed_out_line(self.budget.seconds)) from error

    def _outcome(self, error: BaseException | None, *, signal: str | None = None, read: bool = True) -> Outcome:
        progress, attempt = self.progress, self.attempt
        step = attempt.step if attempt else None
        state = DatabaseState()
        if read:
            state = read_state(self.database, step, progress.version_table, progress.invalid_before)
        progress.last_position = state.position
        if step and step.ended_its_transaction(state.transaction) and error is not None:
            error = OwnTransaction()
        return Outcome(
            error=error,
            signal=signal or self.stop.name,
            step=step,
            connected=progress.version_table is not None,
            location=revisions.error_location(error, self.command.script) if error else None,
            blockers=attempt.monitor.blockers if attempt else (),
            waiters=attempt.monitor.waiters if attempt else (),
            state=state,
            position_before=progress.position,
            resume=progress.resume,
        )

    def _interrupted_line(self) -> str:
        return self._outcome(None).interrupted_line

    def _killed_line(self, signal: str) -> str:
        return self._outcome(None, signal=signal, read=False).killed_line  # no time left, and possibly no network

    def _cancel(self) -> None:
        """Cancel statements on the run's connections, including the revision's own, until the run is in control."""
        with suppress(DBAPIError, psycopg2.Error, UnicodeDecodeError), self.database.side_connection() as other:
            other.as_login_role()
            while not self.stop.in_control.wait(0.1):
                other.query("SELECT pg_cancel_backend(pid) FROM unnest(%s::int[]) AS pid", self.database.pids)


class Attempt:
    """One attempt, on one session."""

    def __init__(self, runner: Runner, session: Session) -> None:
        self.runner, self.session = runner, session
        self.monitor = Monitor(runner.database, session.raw.pid, lambda: self.step)
        self.step: StepRun | None = None
        self.record: record.Record
        self.heads: tuple[str, ...] = ()  # after the last recorded step
        self.error: BaseException | None = None
        self.lost = False  # the connection, at the end of the attempt
        runner.progress.version_table = (session.schema, session.settings.version_table)

    def run(self) -> None:
        """Run Alembic's command in the session."""
        try:
            with self.monitor:
                self._run()
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.lost = self.session.lost

    def _run(self) -> None:
        command, session, progress = self.runner.command, self.session, self.runner.progress
        progress.log(describe_server(session))
        writes = command.needs is Needs.WRITE
        if writes:
            acquire_lock(session, self.runner.budget)
            self._warn_of_untrusted_creators()
        version_table = session.settings.version_table
        history = record.table_name(version_table)
        tables = catalog.tables(session.raw, session.schema, version_table, history, writes=writes)
        table = tables.get(version_table)
        problem = catalog.version_table_problem(session.raw, table) if table else None
        if table and problem:
            raise CommandError(
                printable(
                    f"the version table {table.name} {problem}; if it is another project's, set ALEMBIC_VERSION_TABLE"
                    " or DB_SCHEMA; see docs/troubleshooting.md"
                )
            )
        self.record = record.Record(session.raw, command.script, session.settings.origin, tables.get(history))
        if table and self._is_done(table):
            return
        self.record.read()
        session.raw.commit()
        self.runner.load_revisions()
        if writes:
            self._warn_if_nothing_is_recorded()
        options: dict[str, Any] = {
            "connection": session.connection,
            "transaction_per_migration": True,
            "version_table": version_table,
            "version_table_schema": session.schema,
            "on_version_apply": self._on_version_apply,
            "fn": functools.partial(self._plan, table),
        }
        if command.needs is Needs.READ:
            options["dont_mutate"] = True  # else Alembic creates its version table for `history`, too
            # Alembic's own takes quadratic time.
            command.script.get_all_current = functools.partial(  # type: ignore[method-assign]
                revisions.branch_heads, command.script
            )
        if command.purges and table and table.has_triggers:  # which run with the revisions' search_path
            session.use_search_path(session.search_path)
            session.raw.commit()
        command.environment.configure(**options)
        qualify_comparisons(command.environment.get_context()._version)
        if command.purges:  # else Alembic commits it before the stamp, which may fail
            session.connection.begin()
        command.environment.run_migrations()
        session.connection.commit()

    def _is_done(self, table: catalog.Table) -> bool:
        """Whether the database is at the head, and the revision files, which are not loaded, are those recorded."""
        headers = self.runner.headers
        if not headers:
            return False
        rows = self.session.raw.query(f"SELECT version_num FROM {table.name}")  # noqa: S608  quoted
        if rows != [(headers.head,)] or not self.record.read_if_unchanged(headers.files):
            return False
        self._warn_if_nothing_is_recorded()
        self._note_position(headers.head)
        self._log_nothing_to_do((headers.head,), headers.files.keys(), f"{headers.head} (head)")
        return True

    def _warn_of_untrusted_creators(self) -> None:
        creators = catalog.untrusted_creators(self.session, self.session.schemas)
        if creators:
            self.runner.progress.log(
                f"untrusted roles may CREATE in {', '.join(map(printable, creators))}, and revisions may call what they"
                " create there: see 'Minimum privileges' in docs/operations.md",
                logging.WARNING,
            )

    def _create_record(self) -> None:
        if self.record.table is None:
            self.record.create(self.session.schema, record.table_name(self.session.settings.version_table))
            self._warn_if_nothing_is_recorded()

    def _warn_if_nothing_is_recorded(self) -> None:
        if problem := self.record.problem:
            line = f"nothing is recorded: {problem}; {record.SEE_DOCS}"
            self.runner.progress.log(printable(line), logging.WARNING)

    def _plan(
        self, table: catalog.Table | None, heads: tuple[str, ...], migration: MigrationContext
    ) -> Iterator[MigrationStep]:
        """Yield Alembic's steps; log each before it starts and after its commit."""
        command, progress, connection = self.runner.command, self.runner.progress, self.session.connection
        script = command.script
        applied: set[str] = set()
        if command.purges:  # Alembic has deleted the rows, and passes no heads
            self.session.use_search_path(SAFE_PATH)
        else:
            self._note_position(join(heads))
            self._refuse_unknown(heads, table)
            applied = revisions.applied(script, heads)
            self._refuse_changed(applied)
        if command.needs is Needs.READ:
            self._log_since(heads, applied)
            self.record.show(applied)
            if command.shows_current and not self._at_head(heads):
                revisions.validate_one_head(script)  # of two, `current` would call either one the head
            if not heads:  # Alembic prints nothing then
                log.info("at %s", self._describe_heads(heads))
            list(command.plan(heads, migration))
            return
        steps = progress.remaining(heads, migration)
        if not steps:
            if command.purges:  # of `stamp --purge base`, Alembic makes no step
                self._create_record()
                self.record.write_purge()
            self._log_nothing_to_do(heads, applied, self._describe_heads(heads))
            return
        names = [_name(step) for step in steps[:10]] + ["..."] * (len(steps) > 10)
        progress.log(f"at {self._describe_heads(heads)}; to do: {len(steps)} ({', '.join(names)})")
        _refuse_long_names(steps, table)
        self._note_invalid_indexes()
        self._create_record()
        if self.record.writes:
            self.record.writer.prepare(steps)
        self.session.use_search_path(self.session.search_path)
        if not command.purges:
            connection.commit()  # each step has its own transaction
        for step in steps:
            yield self._wrap(copy.copy(step), migration)
            assert self.step
            elapsed = self.step.elapsed
            progress.position = progress.last_position = join(self.heads)
            self.step = None
            self.runner.budget.reset()
            log.info("done in %.2f s", elapsed)
        self._log_new_invalid_indexes()
        if self.record.writes:
            with suppress(psycopg2.Error, ValueError):  # the migration is done, even if this fails
                self.record.read_newest()
                self.session.raw.rollback()
        self._log_since(self.heads, revisions.applied(script, self.heads))
        log.info("now at %s", self._describe_heads(self.heads))

    def _note_position(self, position: str) -> None:
        progress = self.runner.progress
        progress.position = progress.last_position = position
        progress.first_position = progress.first_position or position
        self.runner.write_positions()  # it may be killed

    def _wrap(self, step: MigrationStep, migration: MigrationContext) -> MigrationStep:
        """The step with its function wrapped by StepRun."""
        log.info("running %s", printable(str(step)))
        self.monitor.reset()
        run = self.step = StepRun(self.session, step, self.runner.stop.check, self.record)
        function, block = step.migration_fn, functools.partial(MigrationContext.autocommit_block, migration)
        step.migration_fn = lambda **options: run.apply(
            functools.partial(function, **options), self.runner.progress.invalid_before
        )
        migration.autocommit_block = functools.partial(run.autocommit_block, block)  # type: ignore[method-assign]
        return step

    def _on_version_apply(self, *, heads: Collection[Any], **_: Any) -> None:
        """Alembic's callback, before the commit."""
        self.heads = tuple(sorted(heads))

    def _refuse_unknown(self, heads: tuple[str, ...], table: catalog.Table | None) -> None:
        """After `helm rollback` the database is ahead of the code; an automatic downgrade would lose data."""
        script = self.runner.command.script
        if unknown := [head for head in heads if not _known(script, head)]:
            raise CommandError(
                f"the database is at {printable(join(tuple(unknown)))}, which this code (head"
                f" {join(tuple(revisions.code_heads(script)))}) does not know; deploy the code that knows it or, if the"
                " version table is another project's, set ALEMBIC_VERSION_TABLE or DB_SCHEMA; see"
                " docs/troubleshooting.md"
            )
        if table and (stale := revisions.superseded(script, heads)):
            delete = f"DELETE FROM {table.name} WHERE version_num = '{stale}'"  # noqa: S608
            raise CommandError(
                f"the version table has {join(heads)}, and {stale} is an ancestor of another; delete the stale row:"
                f" {delete}"
            )

    def _refuse_changed(self, applied: set[str]) -> None:
        """Of two files with one number, one was applied; without the record, a run would take it for the other."""
        if not (line := self.record.changed(applied)):
            return
        if self.runner.command.needs is Needs.WRITE:
            raise CommandError(line)
        self.runner.progress.log(line, logging.WARNING)

    def _log_nothing_to_do(self, heads: tuple[str, ...], applied: Set[str], position: str) -> None:
        self._log_since(heads, applied)
        log.info("at %s: nothing to do", position)

    def _log_since(self, heads: tuple[str, ...], applied: Set[str]) -> None:
        if entry := self.record.since(heads, applied):
            log.info("since %s", entry.summary)

    def _at_head(self, heads: tuple[str, ...]) -> bool:
        script = self.runner.command.script
        wanted = revisions.code_heads(script)
        return sorted(heads) == wanted or (len(wanted) > 1 and revisions.applied(script, heads).issuperset(wanted))

    def _describe_heads(self, heads: tuple[str, ...]) -> str:
        if self._at_head(heads):
            return f"{join(heads)} (head)"
        wanted = revisions.code_heads(self.runner.command.script)
        return f"{join(heads)} (the {'heads are' if len(wanted) > 1 else 'head is'} {', '.join(wanted)})"

    def _note_invalid_indexes(self) -> None:
        invalid = catalog.indexes(self.session.raw)
        self.runner.progress.invalid_before |= {index.oid for index in invalid}
        if invalid:
            names = ", ".join(index.name for index in invalid)
            self.runner.progress.log(printable(f"ignoring pre-existing INVALID indexes: {names}"), logging.WARNING)

    def _log_new_invalid_indexes(self) -> None:
        # The migration is done, even if this fails.
        with suppress(psycopg2.Error):
            before = self.runner.progress.invalid_before
            with self.session.safe_path():
                names = [index.name for index in catalog.indexes(self.session.raw) if index.oid not in before]
            self.session.raw.rollback()
            if names:
                log.warning("became INVALID during the run, not caused by it: %s", printable(", ".join(names)))


def join(heads: tuple[str, ...]) -> str:
    """`001, b2`, or `base`."""
    return ", ".join(sorted(heads)) or "base"


def _known(script: ScriptDirectory, head: str) -> bool:
    try:
        found = script.get_revision(head)
    except CommandError:
        return False
    return found is not None and found.revision == head


def _name(step: MigrationStep) -> str:
    revision = ", ".join(step.to_revisions_no_deps if step.is_upgrade else step.from_revisions_no_deps) or "base"
    return printable(f"{revision} {step.doc or ''}".rstrip())


def _refuse_long_names(steps: list[MigrationStep], table: catalog.Table | None) -> None:
    longest = table.max_length("version_num") if table else 32  # Alembic's own
    for step in steps:
        for name in step.to_revisions_no_deps:
            if longest and len(name) > longest:
                widen = f", or widen the column: ALTER TABLE {table.name} ALTER version_num TYPE text" if table else ""
                raise CommandError(
                    f"revision {name} has {len(name)} characters, and the version table holds {longest};"
                    f" shorten it{widen}; {revisions.SEE_DOCS}"
                )
