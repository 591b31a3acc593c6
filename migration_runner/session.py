"""The migrating session: connects with retries, applies its settings, locks, and checks its schemas' owners."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import psycopg2
from alembic.util import CommandError
from sqlalchemy import ColumnElement, Connection, String, Table
from sqlalchemy.exc import DBAPIError

from migration_runner import catalog
from migration_runner.database import Database, RawConnection, raw
from migration_runner.errors import (
    PERMANENT_CONNECT_ERRORS,
    TRANSIENT_CONNECT_ERRORS,
    RetriesExhausted,
    in_given_settings,
    printable,
    server_message,
)
from migration_runner.retry import RetryBudget
from migration_runner.settings import Settings, password_hint

log = logging.getLogger("migration_runner")

# How long one statement waits for a table. Later statements queue behind it, so it is short; the transaction is
# retried.
LOCK_TIMEOUT = "3s"

# Set in the session because a pooler refuses them on connect. An orphaned session (its client was killed, or its node
# is lost and sends no FIN) releases its locks within seconds. A role's own time limits are for applications: a
# migration's limit is the Job's deadline. Names that the server's version lacks are omitted.
SERVER_SETTINGS = {
    "lock_timeout": LOCK_TIMEOUT,
    "statement_timeout": "0",
    "transaction_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "client_connection_check_interval": "2s",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10s",
}

# What a revision may change permanently (SET SESSION CHARACTERISTICS); reset to the role's own for the next one.
OWN_SETTINGS = ("default_transaction_read_only", "default_transaction_isolation", "default_transaction_deferrable")

# The queries of SQLAlchemy and the runner are not qualified, so they must not be resolved in the role's schemas.
SAFE_PATH = "pg_catalog"


class Session:
    """One connection and its settings."""

    def __init__(self, connection: Connection, database: Database) -> None:
        self.connection = connection
        self.database = database
        self.raw: RawConnection = raw(connection)
        self.schema = ""  # of the version table; fixed for the run, since a revision may change the search_path
        self.search_path = ""  # of the revisions
        self.schemas: tuple[str, ...] = ()  # in the search_path
        self.defaults: dict[str, str] = {}
        self.lock_key: int | None = None

    @property
    def settings(self) -> Settings:
        """Of the run."""
        return self.database.settings

    @property
    def lost(self) -> bool:
        """Whether the connection is broken, according to the driver."""
        return self.connection.invalidated or bool(self.raw.closed)

    @property
    def settings_sql(self) -> str:
        """The query that applies the session's settings."""
        calls = ", ".join(["pg_catalog.set_config(%s, %s, false)"] * len(self.defaults))
        with self.raw.cursor() as cursor:
            query = cursor.mogrify(f"SELECT {calls}", [text for pair in self.defaults.items() for text in pair])
            return str(query.decode(self.raw.codec))

    @cached_property
    def reset_sql(self) -> str:
        """The same, run after each revision."""
        return self.settings_sql

    @cached_property
    def checks_sql(self) -> str:
        """What is checked after each revision: the transaction's id, and whether the run's lock is held."""
        held = "true" if self.lock_key is None else f"pg_catalog.pg_try_advisory_lock({self.lock_key})"
        return f"SELECT pg_catalog.txid_current_if_assigned(), {held}"

    def use_search_path(self, path: str) -> None:
        """Resolve names as the revisions do, or as the runner does."""
        self.raw.query("SELECT pg_catalog.set_config('search_path', %s, false)", path)

    @contextmanager
    def safe_path(self) -> Iterator[None]:
        """For the runner's queries between revisions."""
        self.use_search_path(SAFE_PATH)
        yield
        self.use_search_path(self.search_path)

    def query(self, statement: str | bytes, *parameters: object) -> list[tuple[object, ...]]:
        """Run one of the runner's own queries in its own transaction and round trip, outside of any other."""
        self.raw.autocommit = True
        try:
            return self.raw.query(statement, *parameters)
        finally:
            if not self.raw.closed:
                self.raw.autocommit = False


@contextmanager
def open_session(database: Database, budget: RetryBudget) -> Iterator[Session]:
    """Yield a session with its settings applied, or raise CommandError or RetriesExhausted with one line."""
    with _first_connection(database, budget) as connection:
        session = Session(connection, database)
        try:
            _reject_transaction_pooling(session, database)  # first: the settings would leak into the pool
            _set_defaults(session)
            _choose_schema(session)
            yield session
        finally:
            # If the driver's own call found it broken, SQLAlchemy does not know, and would roll back.
            if session.raw.closed and not connection.closed and not connection.invalidated:
                connection.invalidate()


def _first_connection(database: Database, budget: RetryBudget) -> Connection:
    settings = database.settings
    while True:
        try:
            return database.connect()
        except (DBAPIError, psycopg2.Error, UnicodeDecodeError) as error:
            reason = printable(settings.without_user(server_message(error)))
            if hint := _permanent(reason):
                raise CommandError(f"cannot connect to {printable(settings.target)}: {reason}; {hint}") from None
            if not budget.wait(reason):
                hint = in_given_settings("check that the server is up and DB_HOST, DB_PORT and the network")
                raise RetriesExhausted(
                    f"could not connect to {printable(settings.target)} within {budget.seconds:.0f} s: {reason};"
                    f" {hint}, or raise MIGRATION_WAIT_SECONDS"
                ) from None


def _permanent(reason: str) -> str | None:
    """What to do if no retry is known to help; None for a transient error."""
    text = re.sub('"[^"]*"', "", reason)  # a host or a role may be called `invalid`
    for part, hint in PERMANENT_CONNECT_ERRORS.items():
        if part in text:
            password = part in ("authentication failed", "no password supplied")
            return f"{in_given_settings(hint)}{password_hint() if password else ''}"
    if TRANSIENT_CONNECT_ERRORS.search(text):
        return None
    hint = in_given_settings("check the DB_* and PG* variables, then retry")
    return f"not a known transient error, so not retried: {hint}"


def _reject_transaction_pooling(session: Session, database: Database) -> None:
    """A pooler in transaction mode assigns a backend per transaction, so a session-level lock protects nothing.

    The pid that a pooler reports to the client is not the backend's. Only if they differ is a second connection opened:
    while it holds a transaction open, the first one gets another backend in transaction mode and keeps its own in
    session mode.
    """
    if session.raw.info.backend_pid == session.raw.pid:
        return
    query = "SELECT pg_catalog.pg_backend_pid()"
    with database.connect() as other:
        raw(other).query(query)
        second = session.query(query)[0][0]
    if second != session.raw.pid:
        hint = in_given_settings("set DB_HOST and DB_PORT to the server itself, or to a pool in session mode")
        raise CommandError(
            "the connection goes through a pooler in transaction mode (PgBouncer's pool_mode=transaction), where"
            f" session-level locks do not work; {hint}"
        )


def _set_defaults(session: Session) -> None:
    """What each revision starts with: SERVER_SETTINGS, as far as the server has them, and the role's own."""
    names = ["session_authorization", "role", *OWN_SETTINGS, *SERVER_SETTINGS]  # the first one resets the second
    columns = ", ".join(f"pg_catalog.current_setting('{name}', true)" for name in ["search_path", *names])
    path, *values = session.query(f"SELECT {columns}")[0]
    session.search_path = str(path)
    known = {name: str(value) for name, value in zip(names, values, strict=True) if value is not None}
    session.defaults = known | {name: value for name, value in SERVER_SETTINGS.items() if name in known}
    session.defaults["search_path"] = SAFE_PATH
    session.query(session.settings_sql)


def _choose_schema(session: Session) -> None:
    """Find the schemas of the run, and refuse one that another role has put first."""
    wanted = session.settings.schema
    if wanted:
        if not session.query("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = %s::name)", wanted)[0][0]:
            raise CommandError(f"DB_SCHEMA is '{wanted}', a schema that does not exist; create it, or set another")
        session.search_path = str(session.query("SELECT quote_ident(%s)", wanted)[0][0])
    found = catalog.resolve_search_path(session, session.search_path, session.settings.version_table)
    if found.current_schema is None:
        raise CommandError(
            f"the role {printable(found.role)} can use no schema in its search_path ({printable(session.search_path)});"
            " create one or grant USAGE on one, set DB_SCHEMA, or fix the role's search_path"
        )
    if not wanted and found.current_schema == found.role and "$user" in session.search_path and found.schema_owner:
        raise CommandError(
            f"the schema {printable(found.current_schema)} comes first only because it has the role's name, and it is"
            f" owned by {printable(found.schema_owner)}; set DB_SCHEMA to the schema of the tables"
        )
    session.schema = wanted or found.table_schema or found.current_schema
    session.schemas = found.schemas
    session.defaults["search_path"] = session.search_path  # after the first revision
    # SQLAlchemy read it under SAFE_PATH; a revision's reflection uses it.
    session.connection.dialect.default_schema_name = found.current_schema


def describe_server(session: Session) -> str:
    """`database app at db:5432 as app, schema public, PostgreSQL 18.1, TLSv1.3`: the server that was connected to."""
    info = session.raw.info  # of several hosts in the URL, the connected one
    host = str(info.host)
    if address := info.dsn_parameters.get("hostaddr"):
        host += f" [{address}]"
    version = info.parameter_status("server_version")
    tls = f", {info.ssl_attribute('protocol')}" if info.ssl_in_use else ""
    target = f"database {info.dbname} at {host}:{info.port} as {info.user}"
    return printable(f"{target}, schema {session.schema}, PostgreSQL {version}{tls}")


def acquire_lock(session: Session, budget: RetryBudget) -> None:
    """Take the lock that keeps a second run of this schema and version table out, for the rest of the session.

    It is polled, not waited for: a waiting statement holds a snapshot, which CREATE INDEX CONCURRENTLY in the first
    run waits for. Each attempt is committed: the caller must start its own transaction.
    """
    key = lock_key(session.schema, session.settings)
    while True:
        taken = session.query("SELECT pg_try_advisory_lock(%s)", key)[0][0]
        if taken:
            session.lock_key = key
            return
        holder = printable(catalog.lock_holder(session.raw, key) or "already finished")
        session.raw.commit()
        if not budget.wait(f"another migration is running ({holder})", max_delay=1):
            raise RetriesExhausted(
                f"another migration was still running after {budget.seconds:.0f} s ({holder}); wait for it to finish,"
                " or terminate it with SELECT pg_terminate_backend(pid), or raise MIGRATION_WAIT_SECONDS"
            )


def lock_key(schema: str, settings: Settings) -> int:
    """The key of the version table: two projects in one database do not wait for each other."""
    digest = hashlib.sha256(f"{schema}.{settings.version_table}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


class _Comparator(String.Comparator[str]):
    def __eq__(self, other: Any) -> ColumnElement[bool]:  # type: ignore[override]
        return cast("ColumnElement[bool]", self.bool_op("OPERATOR(pg_catalog.=)")(other))


class _VersionNumber(String):
    comparator_factory = _Comparator


def qualify_comparisons(version_table: Table) -> None:
    """Make Alembic's own UPDATE and DELETE compare by PostgreSQL's operator, whatever the search_path has.

    So they can run with the revisions' search_path, which an audit trigger needs to find its tables.
    """
    version_table.c.version_num.type = _VersionNumber(32)
