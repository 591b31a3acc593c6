"""`--sql`: the steps of a run, with the same settings and checks, as SQL for psql."""

from __future__ import annotations

import functools
import io
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn, cast

from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo, MigrationStep
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Insert, TextClause
from sqlalchemy.engine.mock import MockConnection
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.schema import CreateTable

from migration_runner import catalog, checksum, record, revisions, sql
from migration_runner.command import Command
from migration_runner.errors import unbound_parameter
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
        self.writer = record.Writer(command.script, settings.origin, "plan", _in_format)

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
        quote = migration.dialect.identifier_preparer.quote
        table = ".".join(quote(name) for name in (self.settings.schema, self.settings.version_table) if name)
        first = _open_record(self.command.script, heads, table, self.settings)
        self.output.emit(
            "-- Run it with psql --set=ON_ERROR_STOP=1: after an error, the rest must not be applied",
            *_settings(self.settings, quote),
            _lock(table, self.settings),
        )
        for step in steps:
            self.step = step
            step.migration_fn = self._around(step.migration_fn, table, _settings(self.settings, quote), first)
            first = ""
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

    def _around(
        self, function: Callable[..., None], table: str, settings: list[str], first: str
    ) -> Callable[..., None]:
        """As StepRun.apply: the same savepoint, the settings reset, the step recorded, the indexes checked."""

        def apply(**options: Any) -> None:
            assert self.step
            self.output.begin_step()
            self.output.emit(_position(table, self.heads), *filter(None, [first]), f"SAVEPOINT {savepoint(self.step)};")
            function(**options)
            if self.connection.unanswered:  # and the revision caught the exception
                raise HasNoPlan(self.connection.unanswered)
            checks = [check for build in self.output.builds if (check := _index(build, title(self.step)))]
            row = _record(self.writer.insert("%I.%I", self.step, DURATION), table, self.settings)
            self.output.emit(f"RELEASE SAVEPOINT {savepoint(self.step)};", *settings, row, *checks)

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


def _settings(settings: Settings, quote: Callable[[str], str]) -> list[str]:
    """What each revision starts with, as Session.defaults; a plan cannot know which names an older server lacks."""
    return [
        "SET SESSION AUTHORIZATION DEFAULT;",
        "RESET ROLE;",
        f"SET search_path = {quote(settings.schema) if settings.schema else 'DEFAULT'};",
        f"SET lock_timeout = '{LOCK_TIMEOUT}';",
        "SET statement_timeout = 0;",
        "SET idle_in_transaction_session_timeout = 0;",
    ]


def _literal(text: str | None) -> str:
    return "NULL" if text is None else "'" + text.replace("'", "''") + "'"


def _in_format(text: str | None) -> str:
    """A literal in a format of pg_catalog.format()."""
    return _literal(text).replace("%", "%%")


def _block(condition: str, message: str) -> str:
    """A statement that fails if the condition holds."""
    raises = f"RAISE EXCEPTION USING MESSAGE = {_literal(message)};"
    return f"DO $plan$ BEGIN IF {condition} THEN\n  {raises}\nEND IF; END $plan$;"


def _schema(table: str, settings: Settings) -> str:
    """The version table's schema, as an expression; without DB_SCHEMA, the server resolves it."""
    if settings.schema:
        return _text(settings.schema)
    found = (
        "(SELECT n.nspname::pg_catalog.text FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n"
        " ON n.oid OPERATOR(pg_catalog.=) c.relnamespace WHERE c.oid OPERATOR(pg_catalog.=)"
        f" pg_catalog.to_regclass({_text(table)})::pg_catalog.oid)"
    )
    return f"coalesce({found}, pg_catalog.current_schema())"


def _lock(table: str, settings: Settings) -> str:
    """The run's lock, under the same key."""
    schema = _schema(table, settings)
    name = f"pg_catalog.concat({schema}, {_text('.' + settings.version_table)})"
    digest = f"pg_catalog.sha256(pg_catalog.convert_to({name}, 'UTF8'))"
    hexadecimal = f"pg_catalog.encode(pg_catalog.substr({digest}, 1, 8), 'hex')"
    key = f"pg_catalog.concat('x', {hexadecimal})::pg_catalog.bit(64)::pg_catalog.int8"
    return _block(f"NOT pg_catalog.pg_try_advisory_lock(\n  {key})", "another migration is running")


# Set if the record cannot be written; it is no longer set after a revision's RESET ALL.
UNRECORDED = "migration_runner.nothing_is_recorded"
# After an autocommit_block, of the last transaction.
DURATION = "pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) pg_catalog.transaction_timestamp()"


def _open_record(script: ScriptDirectory, heads: Iterable[str], table: str, settings: Settings) -> str:
    """As Record: find or create it, and refuse a database that has another revision under one of these names."""
    checksums = record.checksums(script, revisions.applied(script, heads))
    return f"""DO $plan$ DECLARE
  path pg_catalog.text := pg_catalog.current_setting('search_path');
  home pg_catalog.text := {_schema(table, settings)};
  history pg_catalog.text := {_text(record.table_name(settings.version_table))};
  found pg_catalog.text;
  problem pg_catalog.text := 'no privileges on it, or it is another table';
  changed pg_catalog.text;
BEGIN
  PERFORM pg_catalog.set_config('search_path', 'pg_catalog', true);
  BEGIN
    IF to_regclass(format('%I.%I', home, history)) IS NULL THEN
      EXECUTE format({_literal(record.create_sql("%I.%I"))}, home, history);
    END IF;
  EXCEPTION WHEN syntax_error_or_access_rule_violation THEN
    problem := sqlerrm;
  END;
  SELECT t.name INTO found FROM ({catalog.TABLES.strip()}
    WHERE n.nspname = home AND c.relname = history) t
  WHERE t.problem IS NULL AND t.columns = {_literal(record.TYPES_JSON)}
    AND has_table_privilege(t.oid, 'SELECT') AND has_table_privilege(t.oid, 'INSERT');
  IF found IS NULL THEN
    PERFORM set_config('{UNRECORDED}', 'true', false);
    RAISE WARNING 'nothing is recorded in %.%: %', home, history, problem;
  ELSE
    EXECUTE format({_literal(CHANGED)}, found) INTO changed USING {_literal(json.dumps(checksums))}::jsonb;
    IF changed IS NOT NULL THEN
      RAISE EXCEPTION 'revision % was changed after it was applied: ''alembic upgrade head'' names both files', changed;
    END IF;
  END IF;
  PERFORM set_config('search_path', path, true);
END $plan$;"""


# The last row of each revision has its checksum; $1 has the code's.
CHANGED = f"""SELECT revision FROM (SELECT DISTINCT ON (revision) id, revision, direction, checksum FROM %s
  ORDER BY revision, id DESC) r WHERE direction <> 'downgrade' AND starts_with(checksum, '{checksum.VERSION}')
  AND checksum <> ($1 ->> revision) ORDER BY id LIMIT 1"""


def _record(insert: str, table: str, settings: Settings) -> str:
    """Run the INSERT, unless the record cannot be written."""
    name = f"{_schema(table, settings)}, {_text(record.table_name(settings.version_table))}"
    written = f"pg_catalog.concat(pg_catalog.current_setting('{UNRECORDED}', true)) OPERATOR(pg_catalog.=) ''"
    statement = f"EXECUTE pg_catalog.format({_literal(insert)},\n  {name});"
    return f"DO $plan$ BEGIN IF {written} THEN\n  {statement}\nEND IF; END $plan$;"


def _position(table: str, heads: Iterable[str]) -> str:
    there = ", ".join(map(_text, sorted(heads)))
    found = f'ARRAY(SELECT version_num::pg_catalog.text COLLATE "C" FROM {table} ORDER BY 1)'
    differs = f"{found} OPERATOR(pg_catalog.<>) ARRAY[{there}]::pg_catalog.text[]"
    at = ", ".join(sorted(heads)) or "base"
    return _block(differs, f"the database is not at {at}, where this plan starts")


def _index(build: sql.IndexBuild, name: str) -> str | None:
    """The run's check of an index build; the server resolves the names when the plan is applied."""
    if build.index is None or (build.table is None and not build.rebuilds):
        return None
    if any(
        name and name.upper().startswith("U&") for name in (build.index, build.table)
    ):  # only the parser can read it
        return None
    table = f"pg_catalog.to_regclass({_text(build.table or build.index)})::pg_catalog.oid"
    if build.table is None:
        same = f"indexrelid OPERATOR(pg_catalog.=) {table}"
        table = f"(SELECT indrelid FROM pg_catalog.pg_index WHERE {same})"
    parts = f"pg_catalog.parse_ident({_text(build.index)})"
    added = sql.REINDEX_SUFFIX if build.rebuilds else "$"
    found = (
        "SELECT FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) i.indexrelid"
        f"\n  WHERE NOT i.indisvalid AND i.indrelid OPERATOR(pg_catalog.=) {table}"
        f"\n  AND pg_catalog.regexp_replace(c.relname::pg_catalog.text, {_text(added)}, {_text('')})"
        f"\n  OPERATOR(pg_catalog.=) ({parts})[pg_catalog.array_upper({parts}, 1)]::pg_catalog.name::pg_catalog.text"
    )
    return _block(
        f"EXISTS (\n  {found})",
        f"{name} is incomplete: it left an INVALID index; DROP INDEX CONCURRENTLY it, then run the rest again",
    )


def _text(text: str) -> str:
    """A literal of type text: an untyped one could match a function that another role has created."""
    return f"{_literal(text)}::pg_catalog.text"
