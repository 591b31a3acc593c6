"""Running revisions on a database: says what happens, tries again where that is safe, stops when it is told to."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg2
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext, RevisionStep
from alembic.util import CommandError
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, TRANSACTION_STATUS_INERROR
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError

from migrations import revisions, session
from migrations.settings import Settings

log = logging.getLogger(__name__)

# SQLSTATEs that another try may mend: connection, deadlock and serialization, resources (but no limit that is
# configured, 534), a lock, a server that stops.
PASSING = re.compile("08|40|53[0-3]|55P03|57P0[1235]")

# Of these, the time before the error was the revision's own work.
AFTER_WORK = re.compile("40|55P03")

# `+1` and `-1` count from wherever the database stands.
RELATIVE = re.compile(r"(^|@)[+-]\d+$")

# A statement that may end the transaction; `END` also ends a block of PL/pgSQL, so it is then asked.
ENDS_TRANSACTION = re.compile(r"\b(COMMIT|ROLLBACK|END|ABORT|PREPARE)\b", re.I)

# Not with IF NOT EXISTS: then it may have been there before. The index is in its table's schema.
BUILT_INDEX = re.compile(
    r"""\s*CREATE\s+(?:UNIQUE\s+)?INDEX\s+CONCURRENTLY\s+(?P<name>"[^"]+"|\w+)\s+ON\s+(?:ONLY\s+)?"""
    r"""(?P<schema>(?:"[^"]+"|\w+)\.)?""",
    re.I,
)

STOPPING = (signal.SIGTERM, signal.SIGINT)

CURES = {
    "42501": "grant what is missing, see 'Least grants' in README.md",
    "25006": "the server only reads (a standby, or default_transaction_read_only): set DB_HOST to the primary",
    "53100": "the server's disk is full: make room",
    "57014": "it was cancelled on the server",
    "42P07": "made by hand, or by a run that was killed before it was recorded: see 'Troubleshooting' in README.md",
}

# All that a run in Kubernetes has after SIGTERM is its grace period, and a person after Ctrl-C has no patience.
SECONDS_TO_STOP = 1.7

INVALID_INDEXES = text(
    # An index that another session is building is INVALID meanwhile, and none of our business: its builder shows up
    # in the progress view and holds this lock on the table. Only ordinary indexes: a partitioned one may be INVALID
    # by design, until its parts are attached.
    """
    SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS name, c.relname, t.relname AS of_table
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_class t ON t.oid = i.indrelid
    WHERE NOT i.indisvalid AND c.relkind = 'i' AND n.nspname <> 'pg_toast' AND NOT EXISTS (
        SELECT FROM pg_locks l JOIN pg_stat_progress_create_index p USING (pid)
        WHERE l.relation = i.indrelid AND l.mode = 'ShareUpdateExclusiveLock' AND l.pid <> pg_backend_pid())
    ORDER BY 1
    """
)


UNDECIDED = "whether that is committed cannot be told now: see 'alembic current'"


class Interrupted(BaseException):
    """SIGTERM or SIGINT came; not an Exception, so that no revision catches it by accident."""


def offline(context: EnvironmentContext, settings: Settings) -> None:
    """Write the SQL of `--sql`, with the session's settings that matter to whoever runs it with psql."""
    sql = io.StringIO()
    context.configure(
        dialect_name="postgresql",
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},  # psycopg2's own would double every %
        transaction_per_migration=True,
        version_table=settings.version_table,
        version_table_schema=settings.schema,
        output_buffer=sql,  # all or nothing: the first half of a plan must not look like one
    )
    context.execute("-- Run it with psql --set=ON_ERROR_STOP=1: after an error, the rest must not be done")
    context.execute(f"SET lock_timeout = '{session.LOCK_TIMEOUT}'")
    if settings.schema:
        context.execute(
            f"SET search_path = {context.get_context().impl.dialect.identifier_preparer.quote(settings.schema)}"
        )
    try:
        context.run_migrations()
    except CommandError:
        raise
    except (Exception, SystemExit) as error:
        raise revisions.broken(context.script, error) from error
    output = context.config.output_buffer or sys.stdout
    try:
        print(sql.getvalue(), end="", file=output, flush=True)
    except (OSError, UnicodeError) as error:
        if output is sys.stdout:  # else Python tries again, at its own end
            os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        raise CommandError(f"the SQL is not whole, do not run it: {getattr(error, 'strerror', error)}") from error


class Run:
    """One `alembic` command on one database, over as many connections as it takes."""

    def __init__(self, context: EnvironmentContext, settings: Settings, *, read_only: bool) -> None:
        self.context, self.settings, self.read_only = context, settings, read_only
        self.destination = str(getattr(context.config.cmd_opts, "revision", None))
        self.patience = session.Patience(settings.wait_seconds)
        self.function: Any = None  # Alembic's own: from the heads in the database to the steps to take
        self.pid: int | None = None  # of the server's process; None while there was no session yet
        self.at = "base"  # where the database stands, as far as is known
        self.began: tuple[str, ...] | None = None  # where it stood at first
        self.step: RevisionStep | None = None
        self.started = 0.0
        self.statements: list[str] = []  # of the step that runs
        self.patient = False  # the statement that runs has no lock_timeout
        self.transaction: object = None  # when it began, while a statement runs that may end it
        self.finished = 0  # how many of them are done
        self.kept = 0  # how many of them are committed, whatever becomes of the step
        self.left_transaction = False  # the step committed before its end, or ran statements outside a transaction
        self.stamped = False  # the next commit is the step's last
        self.invalid_before: set[str] = set()
        self.said: set[str] = set()
        self.begun = self.rolled_back = False  # a transaction of SQLAlchemy's
        self.schema: str | None = None  # of the version table
        self.blockers: set[str] = set()
        self.signal: signal.Signals | None = None
        self.in_control = threading.Event()  # after a signal: Python code runs again, no statement does

    def __call__(self) -> None:
        """Run the command; raise CommandError (another try is no use) or SystemExit (it may be) with one line."""
        with _stoppable(self):
            while True:
                self.step = None
                try:
                    with (
                        session.connect(self.settings, self.patience) as connection,
                        session.watch_blockers(self.settings, connection, self.blockers),
                    ):
                        self._work(connection)
                    return
                except (CommandError, Interrupted):
                    raise
                except (Exception, SystemExit, KeyboardInterrupt) as caught:
                    if self.signal:
                        raise Interrupted from caught
                    if isinstance(caught, SystemExit) and self.step is None:
                        raise  # ours; one that a revision raises would pass for success
                    error = _cause(caught)
                    if self.step and AFTER_WORK.match(session.sqlstate(error) or ""):
                        self.patience.allow(time.monotonic() - self.started)
                    reason, again = self._reason(error), self._may_try_again(error)
                    if not again:
                        raise CommandError(f"{reason}; mend it, then run again") from error
                if not self.patience.wait(reason):
                    raise SystemExit(f"FAILED: {reason}; gave up after {self.patience.seconds:.0f} s, run again later")

    def _work(self, connection: Connection) -> None:
        self.pid, self.schema = connection.info["pid"], connection.info["schema"]
        self._say(connection.info["report"])
        if not self.read_only:
            session.lock(connection, self.settings, self.patience)
        event.listen(connection, "before_cursor_execute", self._on_statement)
        event.listen(connection, "after_cursor_execute", self._on_finished)
        event.listen(connection, "begin", self._on_begin)
        event.listen(connection, "commit", self._on_commit)
        event.listen(connection, "rollback", self._on_rollback)
        options: dict[str, Any] = {
            "connection": connection,
            "transaction_per_migration": True,
            "version_table": self.settings.version_table,
            "version_table_schema": self.schema,
            "on_version_apply": self._on_stamp,
        }
        if self.read_only:
            options["dont_mutate"] = True  # else Alembic makes its version table for `history`, too
        if self.function is None:
            self.context.configure(**options)
            self.function = self.context.get_context().opts["fn"]
        self.context.configure(**options, fn=self._steps)
        self.context.run_migrations()
        connection.commit()

    def _steps(self, heads: tuple[str, ...], migration: MigrationContext) -> Iterator[RevisionStep]:
        """Yield Alembic's steps, each logged before it begins and after it is committed."""
        connection = migration.connection
        assert connection is not None
        self.at = ", ".join(heads) or "base"
        code_heads = ", ".join(self.context.script.get_heads())
        self._refuse_unknown(heads, code_heads)
        if self.began is None:
            self.began = heads
        elif heads != self.began and RELATIVE.search(self.destination):
            raise CommandError(
                f"the first try brought the database from {', '.join(self.began) or 'base'} to {self.at}, and"
                f" '{self.destination}' would now count from there; name the revision to go to"
            )
        steps = list(self.function(heads, migration))
        if self.read_only:
            if not heads:  # Alembic prints nothing then
                log.info("at %s", self._place(code_heads))
            return
        if not steps:
            log.info("at %s: nothing to do", self._place(code_heads))
            return
        names = [_name(step) for step in steps[:10]] + ["..."] * (len(steps) > 10)
        self._say(f"at {self._place(code_heads)}; to do: {len(steps)} ({', '.join(names)})")
        self.invalid_before = {row.name for row in connection.execute(INVALID_INDEXES)}
        if self.invalid_before:
            log.warning("INVALID already, and not looked at further: %s", ", ".join(sorted(self.invalid_before)))
        connection.commit()  # each step begins a transaction of its own
        for step in steps:
            if not session.settle(connection):
                raise CommandError(
                    f"the revision before {_title(step)} let go of the run's lock, and another run has it; leave"
                    f" advisory locks of the session alone, the database is at {self.at}"
                )
            log.info("running %s", step)
            self.started = time.monotonic()
            self.step, self.statements, self.finished, self.kept = step, [], 0, 0
            self.left_transaction = self.stamped = self.rolled_back = False
            self.blockers.clear()
            yield step
            self.at, self.step = _reached(step), None
            log.info("done in %.2f s", time.monotonic() - self.started)
            self.patience.renew()
        # All is done, whatever comes of this.
        with suppress(DBAPIError), session.engine(self.settings).connect() as other:
            if invalid := {row.name for row in other.execute(INVALID_INDEXES)} - self.invalid_before:
                log.warning("INVALID by now, and in no statement of this run: %s", ", ".join(sorted(invalid)))
        log.info("now at %s", self._place(code_heads))

    def _say(self, line: str) -> None:
        """Log a line that another try would repeat only once."""
        if line not in self.said:
            self.said.add(line)
            log.info("%s", line)

    def _place(self, code_heads: str) -> str:
        return f"{self.at} (head)" if self.at == code_heads else f"{self.at} (the head is {code_heads})"

    def _refuse_unknown(self, heads: tuple[str, ...], code_heads: str) -> None:
        """After `helm rollback` the database is ahead of the code; going back by itself would lose data."""
        if getattr(self.context.config.cmd_opts, "purge", False):
            return
        known = {revision.revision for revision in self.context.script.walk_revisions()}
        unknown = ", ".join(head for head in heads if head not in known)
        if unknown:
            raise CommandError(
                f"the database is at {unknown}, which this code (head {code_heads}) does not know; deploy the code that"
                " knows it, or, where the version table is another project's, set ALEMBIC_VERSION_TABLE or DB_SCHEMA;"
                " see 'Troubleshooting' in README.md"
            )

    def _on_statement(self, _c: Any, cursor: Any, statement: str, _p: Any, _context: Any, _many: bool) -> None:
        if self.signal:  # where the handler's exception is swallowed: in a destructor, in psycopg2's decoder
            raise Interrupted
        raw = cursor.connection
        self.transaction, self.patient = None, False
        if self.step and raw.autocommit:
            # CREATE INDEX CONCURRENTLY and its like hold up no reader and no writer, and wait for all transactions.
            if "CONCURRENTLY" in statement.upper() and _ask(raw, "SHOW lock_timeout") == session.LOCK_TIMEOUT:
                _ask(raw, "SELECT set_config('lock_timeout', '0', false)")
                self.patient = True
        elif self.step:
            ended = raw.info.transaction_status == TRANSACTION_STATUS_IDLE and not self.begun
            self.begun = False
            if ended or self.rolled_back:
                self._refuse_own_transaction()
            if ENDS_TRANSACTION.search(statement) and raw.info.transaction_status != TRANSACTION_STATUS_INERROR:
                self.transaction = _ask(raw, "SELECT now()")
        self.statements.append(statement)

    def _refuse_own_transaction(self) -> None:
        """A revision that commits or rolls back by itself would be stamped as done, or leave a half behind, unseen."""
        assert self.step
        self.left_transaction = True  # no other try
        done = _shown(self.statements) or "nothing"
        self.kept = 0
        raise CommandError(
            f"{_title(self.step)} ended its transaction by itself (COMMIT or ROLLBACK, commit() or rollback()); look"
            f" what stays of: {done}; {'; '.join(self._rest())}; leave that to the run, or use"
            " op.get_context().autocommit_block()"
        )

    def _on_begin(self, _connection: Connection) -> None:
        self.begun = True  # for SQLAlchemy; for the server at the next statement

    def _on_rollback(self, _connection: Connection) -> None:
        self.rolled_back = True

    def _on_finished(self, _c: Any, cursor: Any, _s: str, _p: Any, _context: Any, _many: bool) -> None:
        self.finished = len(self.statements)
        if cursor.connection.autocommit:
            self.kept = self.finished
            if self.patient:
                _ask(cursor.connection, f"SELECT set_config('lock_timeout', '{session.LOCK_TIMEOUT}', false)")
                self.patient = False
        elif self.transaction and self.transaction != _ask(cursor.connection, "SELECT now()"):
            self._refuse_own_transaction()

    def _on_commit(self, _connection: Connection) -> None:
        # An autocommit_block begins with a commit. The step's last one may yet fail, and then nothing is kept.
        if self.step and not self.stamped:
            self.kept, self.left_transaction = self.finished, True

    def _on_stamp(self, ctx: MigrationContext, **_: Any) -> None:
        """Alembic's `on_version_apply`, before the commit: a revision that leaves an INVALID index is not stamped.

        `CREATE INDEX CONCURRENTLY IF NOT EXISTS` succeeds on the INVALID remains of a try that failed.
        """
        assert ctx.connection is not None
        self.stamped = True
        if not (self.step and self.left_transaction):  # an ordinary transaction leaves none behind
            return
        if left := self._left_invalid(ctx.connection.execute(INVALID_INDEXES)):
            raise CommandError(f"{_title(self.step)} is not done: {left}; then run again, the database is at {self.at}")

    def _left_invalid(self, rows: Iterable[Any]) -> str:
        """What to do about the INVALID indexes that a statement of this step names, or new ones of such a table."""
        ran = " ".join(self.statements)

        def named(relation: str) -> bool:
            return re.search(rf"(?<!\w){re.escape(relation)}(?!\w)", ran) is not None

        names = [
            row.name
            for row in rows
            if named(row.relname)
            or named(re.sub(r"_cc(new|old)\d*$", "", row.relname))  # what REINDEX CONCURRENTLY appends
            or (row.name not in self.invalid_before and named(row.of_table))
        ]
        return f"INVALID, and of no use: {', '.join(names)}{_removal(names)}" if names else ""

    def _may_try_again(self, error: Exception) -> bool:
        if not isinstance(error, DBAPIError | psycopg2.Error) or (self.step and self.left_transaction):
            return False
        state = session.sqlstate(error)
        if state == "XX000":  # two sessions that GRANT or ANALYZE at once
            return "tuple concurrently updated" in str(error)
        broken = (OperationalError, InterfaceError, psycopg2.OperationalError, psycopg2.InterfaceError)
        return bool(PASSING.match(state)) if state else isinstance(error, broken)

    def _reason(self, error: BaseException) -> str:
        """Say on one line what failed, why, what is left, and where the database stands now."""
        if isinstance(error, DBAPIError | psycopg2.Error):  # psycopg2's own: the revision took its cursor
            what = session.sentence(error)
            what += "".join(f" ({cure})" for state, cure in CURES.items() if state == session.sqlstate(error))
        else:
            what = revisions.describe(error)
        parts = [f"{_title(self.step)} failed: {what}" if self.step else what]
        if place := revisions.place(error, Path(self.context.script.versions)):
            parts[0] += f", at {place}"
        if self.blockers and session.sqlstate(error) == "55P03":
            parts.append(f"blocked by {' and '.join(sorted(self.blockers))}")
        return "; ".join(parts + self._rest())

    def _rest(self) -> list[str]:
        """What is left of the step that failed, and where the database stands; asked in a session of its own."""
        if self.pid is None:
            return ["no session was begun"]
        parts, known = [], False
        left = self.step is not None and self.left_transaction
        if left and self.kept:
            parts.append(self._kept())
        with suppress(DBAPIError), session.engine(self.settings).connect() as connection:
            if left and (invalid := self._left_invalid(connection.execute(INVALID_INDEXES))):
                parts.append(invalid)
            quote = connection.dialect.identifier_preparer.quote
            table = ".".join(quote(name) for name in (self.schema, self.settings.version_table) if name)
            versions = connection.scalars(text(f"SELECT version_num FROM {table} ORDER BY 1"))  # noqa: S608
            self.at = ", ".join(versions) or "base"
            busy = text("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = :pid AND state = 'active')")
            known = not (self.stamped and connection.scalar(busy, {"pid": self.pid}))
        if not self.step:
            return [*parts, f"the database is at {self.at}"]
        if self.stamped and not known:  # the commit may have arrived, its answer did not
            return [*parts, UNDECIDED]
        if self.stamped and self.at == _reached(self.step):
            return [*parts, f"but it is committed, the database is at {self.at}"]
        return [*parts, f"rolled back at {self.at}"]

    def _kept(self) -> str:
        kept = self.statements[: self.kept]
        built = [(match, kept[after:]) for after, what in enumerate(kept, 1) if (match := BUILT_INDEX.match(what))]
        indexes = [
            f"{match['schema'] or ''}{match['name']}"
            for match, later in built
            if not any(match["name"] in statement for statement in later)  # it may have another name, or be gone
        ]
        return f"outside its transaction it had done, and this stays: {_shown(kept)}{_removal(indexes)}"

    def cut_off(self, number: int) -> str:
        """The one line where a signal did not end the run."""
        left = ""
        if self.step and self.left_transaction:
            left = f"; {self._kept()}" if self.kept else "; look for what it did outside its transaction"
        ends = UNDECIDED if self.step and self.stamped else f"so the database rolls back at {self.at}"
        name = signal.Signals(number).name
        return f"FAILED: interrupted by {name}; it did not end by itself, {ends}{left}; {self._again()}"

    def _again(self) -> str:
        if RELATIVE.search(self.destination):
            return f"'{self.destination}' would count from there, so name the revision to go to"
        return "run again to go on"

    def stopped(self) -> str:
        """The one line for SIGTERM and SIGINT."""
        assert self.signal
        during = f" in {_title(self.step)} after {time.monotonic() - self.started:.0f} s" if self.step else ""
        return (
            f"FAILED: interrupted by {self.signal.name}{during}; {'; '.join(self._rest())}; {self._again()}, and"
            " where the Job's time was up raise 'job.activeDeadlineSeconds' and Helm's --timeout together"
        )


def _cause(error: Exception) -> Exception:
    """What broke the connection: leaving a transaction or an autocommit_block then fails, too, and hides it."""
    hides = (PendingRollbackError, InterfaceError, psycopg2.InterfaceError)
    while isinstance(error, hides) and isinstance(error.__context__, Exception):
        error = error.__context__
    return error


def _ask(raw: Any, query: str) -> object:
    """One value from the server, unseen by SQLAlchemy's events."""
    with raw.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchone()[0]


def _shown(statements: list[str]) -> str:
    """Statements for a person: the first three and the last, without what is quoted, which may be data or a secret."""
    short = [re.sub(r"'(?:[^']|'')*'|(\$\w*\$).*?\1", "'...'", statement, flags=re.S) for statement in statements]
    short = [" ".join(statement.split()) for statement in short]
    short = [statement if len(statement) <= 150 else f"{statement[:150]}..." for statement in short]
    if len(short) > 4:
        short[3:-1] = [f"{len(short) - 4} more"]
    return "; ".join(short)


def _removal(indexes: list[str]) -> str:
    return "; remove with: " + "; ".join(f"DROP INDEX CONCURRENTLY {name}" for name in indexes) if indexes else ""


def _reached(step: RevisionStep) -> str:
    """Where the database stands after the step."""
    return ", ".join(step.to_revisions_no_deps) or "base"


def _name(step: RevisionStep) -> str:
    revision = ", ".join(step.to_revisions if step.is_upgrade else step.from_revisions) or "base"
    return f"{revision} {step.doc or ''}".rstrip()


def _title(step: RevisionStep) -> str:
    """`revision 002 (20251202_..._002_add.py)`; a stamp runs no file."""
    script = getattr(step, "revision", None)
    if script is None:
        return "the stamp"
    return f"{'' if step.is_upgrade else 'the downgrade of '}revision {script.revision} ({Path(script.path).name})"


@contextmanager
def _stoppable(run: Run) -> Iterator[None]:
    """Let SIGTERM and SIGINT end the run within SECONDS_TO_STOP, also in a statement, also on a dead network.

    psycopg2 waits for a statement in C, where no Python handler runs. So the signal's arrival wakes a thread (through
    the wakeup file descriptor), which cancels the statement on a second connection; then the handler's exception
    comes through. PQcancel would do without a connection, but blocks the whole process when the network is dead.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    armed = False  # else the exception could come while the handlers are set or taken away, where nothing catches it

    def on_signal(number: int, _frame: object) -> None:
        if run.signal is None:  # once: a second one would come into the midst of cleaning up
            run.signal = signal.Signals(number)
            if armed:
                raise Interrupted

    unraisable = sys.unraisablehook
    sys.unraisablehook = lambda args: None if args.exc_type is Interrupted else unraisable(args)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {number: signal.signal(number, on_signal) for number in STOPPING}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    ended = threading.Event()
    thread = threading.Thread(target=_stop, args=(run, reader, ended), daemon=True)
    thread.start()
    try:
        try:
            armed = True
            if run.signal:
                raise Interrupted
            yield
        finally:
            armed = False
    except Interrupted:
        run.in_control.set()
        line = run.stopped()
        ended.set()  # of two lines, one
        print(line, file=sys.stderr)
        raise SystemExit(128 + run.signal) from None
    finally:
        run.in_control.set()
        sys.unraisablehook = unraisable
        signal.set_wakeup_fd(wakeup)
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()


def _stop(run: Run, reader: socket.socket, ended: threading.Event) -> None:
    """The thread: wait for a signal, cancel what runs, and end the process if nothing else does."""
    with reader:  # open to the end: a second signal is written, too
        number = reader.recv(1)
        while number and number[0] not in STOPPING:
            number = reader.recv(1)
        if not number:  # the run ended and closed the other end
            return
        threading.Thread(target=_cancel, args=(run,), daemon=True).start()
        if not ended.wait(SECONDS_TO_STOP):
            print(run.cut_off(number[0]), file=sys.stderr, flush=True)
            os._exit(128 + number[0])


def _cancel(run: Run) -> None:
    with suppress(DBAPIError), session.engine(run.settings).connect() as connection:
        while run.pid and not run.in_control.wait(0.1):
            connection.execute(text("SELECT pg_cancel_backend(:pid)"), {"pid": run.pid})
