"""`--sql`: the steps of a run, with the same settings and checks, as SQL for psql."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn, cast

from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo, MigrationStep
from alembic.util import CommandError
from sqlalchemy import Insert, TextClause
from sqlalchemy.engine.mock import MockConnection
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.schema import CreateTable

from migration_runner import plan_sql, record, revisions, sql
from migration_runner.command import Command
from migration_runner.errors import unbound_parameter
from migration_runner.plan_sql import PlanSQL
from migration_runner.session import LOCK_TIMEOUT, qualify_comparisons
from migration_runner.settings import Settings
from migration_runner.step import savepoint, title


class HasNoPlan(AttributeError):
    """A revision cannot be planned: it depends on a live database, or on how a run sends its SQL; the reason."""


READS = "reads the database or depends on its answers"


class UnboundParameter(Exception):
    """`:name` in the text of a statement, and no value for it."""


def write(command: Command, settings: Settings) -> None:
    """Write the plan to Alembic's output, all or nothing; raise CommandError with one line."""
    plan = _Plan(command, settings)
    try:
        plan.write()
    except CommandError:
        raise
    except (Exception, SystemExit) as error:
        raise _refusal(command, plan.step, error) from error
    output = command.environment.config.output_buffer or sys.stdout
    try:
        print(plan.output.getvalue(), end="", file=output, flush=True)
    except (OSError, UnicodeError) as error:
        if output is sys.stdout:  # else Python flushes again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        reason = getattr(error, "strerror", error)
        raise CommandError(f"the SQL output is incomplete, do not run it: {reason}") from error


def _refusal(command: Command, step: MigrationStep | None, error: BaseException) -> CommandError:
    where = revisions.error_location(error, command.script)
    at = f", at {where}" if where else ""
    if step and isinstance(error, HasNoPlan | NoInspectionAvailable):
        return CommandError(
            f"{title(step)} {error if isinstance(error, HasNoPlan) else READS}, so it cannot be planned; run it"
            f" without --sql{at}"
        )
    if step and isinstance(error, UnboundParameter):
        return CommandError(f"{title(step)} failed: {unbound_parameter(str(error))}{at}")
    return revisions.revision_error(command.script, error)


class _Plan:
    """The plan being written; `output` has the SQL so far."""

    def __init__(self, command: Command, settings: Settings) -> None:
        self.command, self.settings = command, settings
        self.output = _Statements()
        self.step: MigrationStep | None = None
        self.heads: tuple[str, ...] = ()  # of the database before the step
        self.writer = record.Writer(command.script, settings.origin, "plan", plan_sql.literal)

    def write(self) -> None:
        context.configure(
            dialect_name="postgresql",
            literal_binds=True,
            dialect_opts={"paramstyle": "named"},  # psycopg2's own would double every %
            transaction_per_migration=True,
            version_table=self.settings.version_table,
            version_table_schema=self.settings.schema,
            output_buffer=self.output,
            on_version_apply=self._on_version_apply,
            fn=self._steps,
        )
        migration = context.get_context()
        qualify_comparisons(migration._version)
        dialect: Any = migration.dialect
        dialect.statement_compiler = type("PlanCompiler", (_LiteralValues, dialect.statement_compiler), {})
        dialect._backslash_escapes = False  # as SQLAlchemy sets it for a server with standard_conforming_strings on
        self.connection = _PlanConnection(migration)
        migration.connection = migration.impl.connection = cast("Any", self.connection)
        block = functools.partial(MigrationContext.autocommit_block, migration)
        migration.autocommit_block = functools.partial(self._autocommit_block, block)  # type: ignore[method-assign]
        context.run_migrations()

    def _on_version_apply(
        self, ctx: MigrationContext, step: MigrationInfo, heads: Collection[Any], run_args: Mapping[str, Any]
    ) -> None:
        self.heads = tuple(sorted(heads))

    def _steps(self, heads: tuple[str, ...], migration: MigrationContext) -> Iterator[MigrationStep]:
        self.heads = heads
        steps = list(self.command.plan(heads, migration))
        self.sql = PlanSQL(self.settings, migration.dialect.identifier_preparer.quote)
        self.output.emit(
            "-- Run it with psql --set=ON_ERROR_STOP=1: after an error, the rest must not be applied",
            *self.sql.settings,
            self.sql.lock,
        )
        opens = [self.sql.open_record(revisions.applied(self.command.script, heads), self.writer)]
        for step in steps:
            self.step = step
            step.migration_fn = self._around(step.migration_fn, opens)
            opens = []
            yield step

    @contextmanager
    def _autocommit_block(self, block: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """As StepRun.autocommit_block."""
        assert self.step
        self.output.emit(f"RELEASE SAVEPOINT {savepoint(self.step)};")
        unanswered = self.connection.unanswered  # Alembic itself checks whether a transaction is open
        try:
            with block():
                self.connection.unanswered, self.output.in_block = unanswered, True
                try:
                    yield
                finally:
                    self.output.in_block = False
        finally:
            self.output.emit(f"SAVEPOINT {savepoint(self.step)};")

    def _around(self, function: Callable[..., None], opens: list[str]) -> Callable[..., None]:
        """As StepRun.apply: the same savepoint, the settings reset, the step recorded, the indexes checked."""

        def apply(**options: Any) -> None:
            assert self.step
            self.output.begin_step()
            self.output.emit(self.sql.position(self.heads), *opens, f"SAVEPOINT {savepoint(self.step)};")
            function(**options)
            if self.connection.unanswered:  # and the revision caught the exception
                raise HasNoPlan(self.connection.unanswered)
            checks = [check for build in self.output.builds if (check := plan_sql.index(build, title(self.step)))]
            rows = map(plan_sql.record_row, self.writer.rows(self.step))
            self.output.emit(f"RELEASE SAVEPOINT {savepoint(self.step)};", *self.sql.settings, *rows, *checks)

        return apply


class _Statements(io.StringIO):
    """Alembic's output buffer: each write is one statement."""

    def __init__(self) -> None:
        super().__init__()
        self.in_block = False
        self.begin_step()

    def begin_step(self) -> None:
        self.builds: list[sql.IndexBuild] = []
        self.own_lock_timeout = False

    def emit(self, *lines: str) -> None:
        """Write the runner's own SQL."""
        super().write("\n".join(lines) + "\n\n")

    def write(self, statement: str) -> int:
        if self.in_block and sql.is_script(statement):
            raise HasNoPlan("has several statements in one op.execute() of an autocommit_block")
        statement = _terminated(statement)
        self.own_lock_timeout |= sql.sets_lock_timeout(statement)
        build = sql.index_build(statement)
        if build:
            self.builds.append(build)
        if self.own_lock_timeout or not (build or sql.detaches(statement)):
            return super().write(statement)
        # It blocks no reader and no writer, and waits for all transactions.
        return super().write(f"SET lock_timeout = 0;\n{statement.rstrip()}\nSET lock_timeout = '{LOCK_TIMEOUT}';\n\n")


def _terminated(statement: str) -> str:
    """The statement with its semicolon, which Alembic puts into a comment if the SQL ends with one."""
    text = statement.rstrip()
    if text.endswith(";") and "--" in text.rsplit("\n", 1)[-1]:
        last = [token.text for token in sql.tokens(text)][-1:]
        if last not in ([], [";"]):
            return f"{text[:-1]}\n;\n\n"
    return statement


class _LiteralValues:
    """Mixed into the dialect's compiler: what it would print as NULL, or leave unbound, is refused."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if getattr(self, "insert_prefetch", ()) or getattr(self, "update_prefetch", ()):
            raise HasNoPlan("uses a default that Python computes for each row")

    def render_literal_bindparam(self, bindparam: Any, *arguments: Any, **options: Any) -> str:
        if bindparam.required and bindparam.value is None and bindparam.callable is None:
            raise UnboundParameter(bindparam.key)
        text: str = super().render_literal_bindparam(bindparam, *arguments, **options)  # type: ignore[misc]
        return text

    def render_literal_value(self, value: Any, type_: Any) -> str:
        if isinstance(value, bytes | bytearray | memoryview):
            return f"'\\x{bytes(value).hex()}'"
        text: str = super().render_literal_value(value, type_)  # type: ignore[misc]
        return text

    def bindparam_string(self, _name: str, **_: Any) -> NoReturn:
        raise HasNoPlan("has a parameter without a value")


class _PlanConnection(MockConnection):
    """What `op.get_bind()` returns in a plan: it writes what is executed, and returns no results."""

    unanswered = ""  # what it could not answer, even if the revision caught the exception

    def __init__(self, migration: MigrationContext) -> None:
        super().__init__(migration.dialect, self._write)
        self.migration = migration

    def _write(self, construct: Any, *_: Any, **__: Any) -> None:
        version_table = self.migration._version
        if isinstance(construct, CreateTable) and construct.element is version_table:
            construct.if_not_exists = True  # after `downgrade base` it exists, and is empty
        self.migration.impl._exec(construct)

    def execute(self, obj: Any, parameters: Any = None, execution_options: Any = None) -> Any:
        for row in parameters if isinstance(parameters, list | tuple) and parameters else [parameters or None]:
            if row is None:
                self._write(obj)
            elif isinstance(obj, TextClause):
                self._write(obj.bindparams(**row))
            elif isinstance(obj, Insert):
                self._write(obj.values(**row))
            else:
                raise self.refusal()
        return _NoResult(self)

    def exec_driver_sql(self, statement: str, parameters: Any = None, **_: Any) -> Any:
        if parameters:
            raise self.refusal()
        self.migration.impl.static_output(f"{(statement % ()).rstrip().rstrip(';')};")
        return _NoResult(self)

    def refusal(self) -> HasNoPlan:
        """The exception for what only a database can answer."""
        self.unanswered = READS
        return HasNoPlan(READS)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.refusal()


class _NoResult:
    def __init__(self, connection: _PlanConnection) -> None:
        self.connection = connection

    def __getattr__(self, name: str) -> NoReturn:
        raise self.connection.refusal()

    def __iter__(self) -> NoReturn:
        raise self.connection.refusal()
