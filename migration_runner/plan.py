"""`--sql`: the same steps as a run's, with the same settings and refusals, as SQL that psql executes."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn, cast

from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo, MigrationStep
from alembic.util import CommandError
from sqlalchemy import Insert, TextClause
from sqlalchemy.engine.mock import MockConnection
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.schema import CreateTable

from migration_runner import revisions, sql
from migration_runner.command import Command
from migration_runner.errors import unbound_parameter
from migration_runner.session import LOCK_TIMEOUT
from migration_runner.settings import Settings
from migration_runner.step import SAVEPOINT, title


class NeedsConnection(AttributeError):
    """A revision asks the database, and a plan has none."""


class UnboundParameter(Exception):
    """`:name` in the text of a statement, and no value for it."""


def write(command: Command, settings: Settings) -> None:
    """Write the plan to Alembic's output, all or nothing; raise CommandError with one line."""
    plan = _Plan(command, settings)
    try:
        plan.make()
    except CommandError:
        raise
    except (Exception, SystemExit) as error:
        raise _refusal(command, plan.step, error) from error
    output = command.environment.config.output_buffer or sys.stdout
    try:
        print(plan.output.getvalue(), end="", file=output, flush=True)
    except (OSError, UnicodeError) as error:
        if output is sys.stdout:  # else Python tries again, at its own end
            os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        reason = getattr(error, "strerror", error)
        raise CommandError(f"the SQL output is incomplete, do not run it: {reason}") from error


def _refusal(command: Command, step: MigrationStep | None, error: BaseException) -> CommandError:
    where = revisions.error_location(error, command.script)
    at = f", at {where}" if where else ""
    if step and isinstance(error, NeedsConnection | NoInspectionAvailable):
        return CommandError(
            f"{title(step)} reads the database or depends on its answers, so there is no plan of it; run it without"
            f" --sql{at}"
        )
    if step and isinstance(error, UnboundParameter):
        return CommandError(f"{title(step)} failed: {unbound_parameter(str(error))}{at}")
    return revisions.revision_error(command.script, error)


class _Plan:
    """The plan while it is made; `output` has what is written so far."""

    def __init__(self, command: Command, settings: Settings) -> None:
        self.command, self.settings = command, settings
        self.output = _Statements()
        self.step: MigrationStep | None = None
        self.heads: tuple[str, ...] = ()  # where the database stands before the step

    def make(self) -> None:
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
        dialect: Any = migration.dialect
        dialect.statement_compiler = type("PlanCompiler", (_RefusesUnbound, dialect.statement_compiler), {})
        migration.connection = migration.impl.connection = cast("Any", _PlanConnection(migration))
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
        quote = migration.dialect.identifier_preparer.quote
        table = ".".join(quote(name) for name in (self.settings.schema, self.settings.version_table) if name)
        self.output.emit(
            "-- Run it with psql --set=ON_ERROR_STOP=1: after an error, the rest must not be applied",
            *_settings(self.settings, quote),
            _lock(table, self.settings),
        )
        for step in steps:
            self.step = step
            step.migration_fn = self._around(step.migration_fn, table, _settings(self.settings, quote))
            yield step

    @contextmanager
    def _autocommit_block(self, block: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """As StepRun.autocommit_block."""
        self.output.emit(f"RELEASE SAVEPOINT {SAVEPOINT};")
        with block():
            yield
        self.output.emit(f"SAVEPOINT {SAVEPOINT};")

    def _around(self, function: Callable[..., None], table: str, settings: list[str]) -> Callable[..., None]:
        """As StepRun.apply: the same savepoint, the settings made anew, the same look at what an index became."""

        def apply(**options: Any) -> None:
            self.output.begin_step()
            self.output.emit(_position(table, self.heads), f"SAVEPOINT {SAVEPOINT};")
            function(**options)
            assert self.step
            checks = [check for build in self.output.builds if (check := _index(build, title(self.step)))]
            self.output.emit(f"RELEASE SAVEPOINT {SAVEPOINT};", *settings, *checks)

        return apply


class _Statements(io.StringIO):
    """Alembic's output buffer: each write is one statement."""

    def __init__(self) -> None:
        super().__init__()
        self.begin_step()

    def begin_step(self) -> None:
        self.builds: list[sql.IndexBuild] = []
        self.own_lock_timeout = False

    def emit(self, *lines: str) -> None:
        """The runner's own."""
        super().write("\n".join(lines) + "\n\n")

    def write(self, statement: str) -> int:
        statement = _terminated(statement)
        self.own_lock_timeout |= sql.sets_lock_timeout(statement)
        build = sql.index_build(statement)
        if build is None:
            return super().write(statement)
        self.builds.append(build)
        if self.own_lock_timeout:
            return super().write(statement)
        # It holds up no reader and no writer, and waits for all transactions.
        return super().write(f"SET lock_timeout = 0;\n{statement.rstrip()}\nSET lock_timeout = '{LOCK_TIMEOUT}';\n\n")


def _terminated(statement: str) -> str:
    """The statement with its semicolon, which Alembic writes into a comment where the SQL ends with one."""
    text = statement.rstrip()
    if text.endswith(";") and "--" in text.rsplit("\n", 1)[-1]:
        last = [token.text for token in sql.tokens(text)][-1:]
        if last not in ([], [";"]):
            return f"{text[:-1]}\n;\n\n"
    return statement


class _RefusesUnbound:
    """Mixed into the dialect's compiler, which would print NULL."""

    def render_literal_bindparam(self, bindparam: Any, *arguments: Any, **options: Any) -> str:
        if bindparam.required and bindparam.value is None and bindparam.callable is None:
            raise UnboundParameter(bindparam.key)
        text: str = super().render_literal_bindparam(bindparam, *arguments, **options)  # type: ignore[misc]
        return text


class _PlanConnection(MockConnection):
    """What `op.get_bind()` is in a plan: it writes what is executed, and has no answers."""

    def __init__(self, migration: MigrationContext) -> None:
        super().__init__(migration.dialect, self._write)
        self.migration = migration

    def _write(self, construct: Any, *_: Any, **__: Any) -> None:
        version_table = self.migration._version
        if isinstance(construct, CreateTable) and construct.element is version_table:
            construct.if_not_exists = True  # after `downgrade base` it is there, and empty
        self.migration.impl._exec(construct)

    def execute(self, obj: Any, parameters: Any = None, execution_options: Any = None) -> Any:
        for row in parameters if isinstance(parameters, list | tuple) else [parameters]:
            if row is None:
                self._write(obj)
            elif isinstance(obj, TextClause):
                self._write(obj.bindparams(**row))
            elif isinstance(obj, Insert):
                self._write(obj.values(**row))
            else:
                raise NeedsConnection
        return _NoResult()

    def exec_driver_sql(self, statement: str, parameters: Any = None, **_: Any) -> Any:
        if parameters:
            raise NeedsConnection
        self.migration.impl.static_output(f"{statement.rstrip().rstrip(';')};")
        return _NoResult()

    def __getattr__(self, name: str) -> NoReturn:
        raise NeedsConnection(name)


class _NoResult:
    def __getattr__(self, name: str) -> NoReturn:
        raise NeedsConnection(name)

    def __iter__(self) -> NoReturn:
        raise NeedsConnection


def _settings(settings: Settings, quote: Callable[[str], str]) -> list[str]:
    """What each revision begins with, as Session.defaults; a plan cannot know which names an older server lacks."""
    return [
        "SET SESSION AUTHORIZATION DEFAULT;",
        "RESET ROLE;",
        f"SET search_path = {quote(settings.schema) if settings.schema else 'DEFAULT'};",
        f"SET lock_timeout = '{LOCK_TIMEOUT}';",
        "SET statement_timeout = 0;",
        "SET idle_in_transaction_session_timeout = 0;",
    ]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _block(condition: str, message: str) -> str:
    """A statement that fails where the condition holds."""
    raises = f"RAISE EXCEPTION USING MESSAGE = {_literal(message)};"
    return f"DO $plan$ BEGIN IF {condition} THEN\n  {raises}\nEND IF; END $plan$;"


def _lock(table: str, settings: Settings) -> str:
    """The run's own lock, under the same key; the schema is what the server finds, where none is set."""
    schema = (
        _literal(settings.schema)
        if settings.schema
        else f"coalesce((SELECT relnamespace::regnamespace::name::text FROM pg_class WHERE oid ="
        f" to_regclass({_literal(table)})),"
        " current_schema)"
    )
    name = f"{schema} || {_literal('.' + settings.version_table)}"
    key = f"('x' || encode(substring(sha256(convert_to({name}, 'UTF8')) FROM 1 FOR 8), 'hex'))::bit(64)::bigint"
    return _block(f"NOT pg_try_advisory_lock(\n  {key})", "another migration is running")


def _position(table: str, heads: Iterable[str]) -> str:
    there = ", ".join(map(_literal, sorted(heads)))
    found = f'ARRAY(SELECT version_num::text COLLATE "C" FROM {table} ORDER BY 1)'
    at = ", ".join(sorted(heads)) or "base"
    return _block(f"{found} <> ARRAY[{there}]::text[]", f"the database is not at {at}, where this plan begins")


def _index(build: sql.IndexBuild, name: str) -> str | None:
    """The check of a run's, for whoever applies the plan; names are resolved by the server then."""
    if build.table:
        table = f"to_regclass({_literal(build.table)})"
    elif build.index and build.rebuilds:
        table = f"(SELECT indrelid FROM pg_index WHERE indexrelid = to_regclass({_literal(build.index)}))"
    else:
        return None
    found = (
        "SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        f" WHERE NOT i.indisvalid AND i.indrelid = {table}"
    )
    if build.index and not build.rebuilds:
        found += f" AND c.relname = (parse_ident({_literal(build.index)}))[1]::name"
    return _block(
        f"EXISTS (\n  {found})",
        f"{name} is incomplete: it left an INVALID index; DROP INDEX CONCURRENTLY it, then run the rest again",
    )
