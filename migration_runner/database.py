"""Connections to one database, and the runner's own queries, which no other role's objects can hijack."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Protocol

import psycopg2.extensions
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.pool import NullPool

from migration_runner.settings import Settings

Row = tuple[Any, ...]

# libpq detects a dead connection within about 10 s (by default: after more than an hour).
CONNECT_ARGS = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "fallback_application_name": "hcm-db-migrations",
}


class Observer(Protocol):
    """Sees each statement of a connection, whoever sends it: `op`, SQLAlchemy, or the driver's own cursor."""

    def observe(self, statement: str, *, atomic: bool) -> AbstractContextManager[None]:
        """Enter before the statement, which may be run for many rows; leave after it, or with its error."""


class RawConnection(psycopg2.extensions.connection):
    """The driver's connection, with an optional observer."""

    observer: Observer | None = None
    pid = 0  # the backend's own; a pooler reports another one to the driver

    @property
    def in_transaction(self) -> bool:
        """Whether the server has a transaction open, as of its last response."""
        return self.get_transaction_status() not in (
            psycopg2.extensions.TRANSACTION_STATUS_IDLE,
            psycopg2.extensions.TRANSACTION_STATUS_UNKNOWN,
        )

    @property
    def codec(self) -> str:
        """Python's name of the client encoding."""
        return str(psycopg2.extensions.encodings[self.encoding])

    def cursor(  # type: ignore[override]
        self, name: Any = None, cursor_factory: Any = None, **options: Any
    ) -> Any:
        """A cursor of the driver's or the caller's class; the observer sees its statements in either case."""
        factory = cursor_factory or getattr(self, "cursor_factory", None) or psycopg2.extensions.cursor
        return super().cursor(name, cursor_factory=_observed_class(factory), **options)

    def query(self, statement: str | bytes, *parameters: object) -> list[Row]:
        """The rows of one of the runner's own queries, bypassing the observer and SQLAlchemy."""
        with super().cursor(cursor_factory=psycopg2.extensions.cursor) as cursor:
            cursor.execute(statement, parameters or None)
            return cursor.fetchall() if cursor.description else []


class Observed:
    """Mixed into a cursor class: every way to run a statement goes through the connection's observer."""

    connection: RawConnection

    def execute(self, query: Any, vars: Any = None) -> None:
        with self._observed(query, vars):
            super().execute(query, vars)  # type: ignore[misc]

    def executemany(self, query: Any, vars_list: Any) -> None:
        with self._observed(query, atomic=False):  # outside a transaction, each row is committed
            super().executemany(query, vars_list)  # type: ignore[misc]

    def callproc(self, procname: Any, parameters: Any = None) -> None:
        with self._observed(f"SELECT {procname}"):
            super().callproc(procname, parameters)  # type: ignore[misc]

    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> None:
        with self._observed(sql):
            super().copy_expert(sql, file, size)  # type: ignore[misc]

    def copy_from(self, file: Any, table: Any, *arguments: Any, **options: Any) -> None:
        with self._observed(f"COPY {table} FROM STDIN"):
            super().copy_from(file, table, *arguments, **options)  # type: ignore[misc]

    def copy_to(self, file: Any, table: Any, *arguments: Any, **options: Any) -> None:
        with self._observed(f"COPY {table} TO STDOUT"):
            super().copy_to(file, table, *arguments, **options)  # type: ignore[misc]

    def _observed(self, query: Any, parameters: Any = None, *, atomic: bool = True) -> AbstractContextManager[None]:
        observer = self.connection.observer
        if observer is None:
            return nullcontext()
        if parameters:  # AsIs() may be any part of the statement
            with suppress(Exception):  # running the statement reports what is wrong
                query = self.mogrify(query, parameters)  # type: ignore[attr-defined]
        if not isinstance(query, str | bytes):
            query = query.as_string(self)
        return observer.observe(query.decode(errors="replace") if isinstance(query, bytes) else query, atomic=atomic)


@functools.cache
def _observed_class(factory: Any) -> Any:
    """The cursor class with Observed mixed in; a factory that is not a class is returned unchanged."""
    if not isinstance(factory, type) or issubclass(factory, Observed):
        return factory
    return type(factory.__name__, (Observed, factory), {})


class Database:
    """The database of a run, and the open connections of the run and of its revisions."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.connections: list[weakref.ref[RawConnection]] = []  # not a WeakSet: two threads read it
        self.opened = 0  # how many in total
        self.aside = threading.local()
        self.engine = self._engine()

    @property
    def pids(self) -> list[int]:
        """The backends of these connections."""
        there = [reference() for reference in tuple(self.connections)]
        return [connection.pid for connection in there if connection is not None and not connection.closed]

    def _engine(self) -> Engine:
        arguments: dict[str, Any] = {n: v for n, v in CONNECT_ARGS.items() if n not in self.settings.url.query}
        arguments["connection_factory"] = RawConnection
        # hide_parameters: the values of a failed statement are campaign data, which must not be logged.
        engine = create_engine(self.settings.url, poolclass=NullPool, connect_args=arguments, hide_parameters=True)

        # Before SQLAlchemy's and psycopg2's own queries, whose functions and operators are not qualified ...
        @event.listens_for(engine, "connect", insert=True)
        def _begin(connection: RawConnection, _record: object) -> None:
            rows = connection.query("SET LOCAL search_path = pg_catalog; SELECT pg_backend_pid()")
            connection.pid = rows[0][0]
            if not getattr(self.aside, "connecting", False):
                self.connections.append(weakref.ref(connection))
                self.opened += 1

        # ... and after them, for the user of the connection.
        @event.listens_for(engine, "connect")
        def _end(connection: RawConnection, _record: object) -> None:
            connection.rollback()

        return engine

    def connect(self) -> Connection:
        """A connection with the settings of role and database; raises DBAPIError, psycopg2.Error or UnicodeError."""
        return self.engine.connect()

    def side_connection(self) -> SideConnection:
        """A connection for the runner's own queries, not counted as one of the run's."""
        self.aside.connecting = True
        try:
            return SideConnection(self.connect())
        finally:
            self.aside.connecting = False


class SideConnection:
    """A second connection beside the run's, in autocommit; a context manager that closes it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.raw = raw(connection)
        try:
            self.raw.autocommit = True
            # A table may be locked: these queries are not worth waiting for.
            self.raw.query("SET search_path = pg_catalog; SET lock_timeout = '1s'; SET statement_timeout = '5s'")
        except BaseException:
            self.__exit__()
            raise

    def as_login_role(self) -> SideConnection:
        """Use the login role: after `ALTER ROLE ... SET role`, the other role cannot see its sessions."""
        self.raw.query("SET ROLE NONE")
        return self

    def query(self, statement: str, *parameters: object) -> Sequence[Row]:
        return self.raw.query(statement, *parameters)

    def __enter__(self) -> SideConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()
        self.connection.invalidate()
        self.connection.close()


def raw(connection: Connection) -> RawConnection:
    """The driver's connection behind SQLAlchemy's."""
    found = connection.connection.dbapi_connection
    assert isinstance(found, RawConnection)
    return found
