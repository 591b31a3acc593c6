"""Connections to one database: how they are made, and the runner's own queries, which nobody's objects can divert."""

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

# libpq's side: a connection whose other end is gone is noticed within about 10 s (the defaults: over an hour).
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
    """The driver's connection, with somebody who may look on."""

    observer: Observer | None = None
    pid = 0  # of the server's process, by its own word: a pooler makes up another one for the driver

    @property
    def in_transaction(self) -> bool:
        """Whether the server has a transaction open, as it said with its last answer."""
        return self.get_transaction_status() not in (
            psycopg2.extensions.TRANSACTION_STATUS_IDLE,
            psycopg2.extensions.TRANSACTION_STATUS_UNKNOWN,
        )

    def cursor(  # type: ignore[override]
        self, name: Any = None, cursor_factory: Any = None, **options: Any
    ) -> Any:
        """A cursor of the driver or of the caller's own class, which passes the observer in either case."""
        factory = cursor_factory or getattr(self, "cursor_factory", None) or psycopg2.extensions.cursor
        return super().cursor(name, cursor_factory=_observed_class(factory), **options)

    def ask(self, query: str | bytes, *parameters: object) -> list[Row]:
        """The rows of one of the runner's own queries, unseen by the observer and by SQLAlchemy."""
        with super().cursor(cursor_factory=psycopg2.extensions.cursor) as cursor:
            cursor.execute(query, parameters or None)
            return cursor.fetchall() if cursor.description else []


class Observed:
    """Mixed into a cursor class: each way to run a statement passes the connection's observer."""

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
            with suppress(Exception):  # the statement itself will say what is wrong
                query = self.mogrify(query, parameters)  # type: ignore[attr-defined]
        if not isinstance(query, str | bytes):
            query = query.as_string(self)
        return observer.observe(query.decode(errors="replace") if isinstance(query, bytes) else query, atomic=atomic)


@functools.cache
def _observed_class(factory: Any) -> Any:
    """The cursor class with Observed before it; a factory that is no class is taken as it is."""
    if not isinstance(factory, type) or issubclass(factory, Observed):
        return factory
    return type(factory.__name__, (Observed, factory), {})


class Database:
    """The database of a run, and the connections to it that are open: the run's, and those of its revisions."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.connections: list[weakref.ref[RawConnection]] = []  # no WeakSet: two threads read it
        self.opened = 0  # how many there were in all
        self.aside = threading.local()
        self.engine = self._engine()

    @property
    def pids(self) -> list[int]:
        """The server's processes of these connections."""
        there = [reference() for reference in tuple(self.connections)]
        return [connection.pid for connection in there if connection is not None and not connection.closed]

    def _engine(self) -> Engine:
        arguments: dict[str, Any] = {n: v for n, v in CONNECT_ARGS.items() if n not in self.settings.url.query}
        arguments["connection_factory"] = RawConnection
        # hide_parameters: the values of a failed statement are the campaigns' data, and the log is no place for them.
        engine = create_engine(self.settings.url, poolclass=NullPool, connect_args=arguments, hide_parameters=True)

        # Before SQLAlchemy's and psycopg2's own queries, whose functions and operators are not qualified ...
        @event.listens_for(engine, "connect", insert=True)
        def _begin(connection: RawConnection, _record: object) -> None:
            rows = connection.ask("SET LOCAL search_path = pg_catalog; SELECT pg_backend_pid()")
            connection.pid = rows[0][0]
            if not getattr(self.aside, "connecting", False):
                self.connections.append(weakref.ref(connection))
                self.opened += 1

        # ... and after them, for whoever uses the connection.
        @event.listens_for(engine, "connect")
        def _end(connection: RawConnection, _record: object) -> None:
            connection.rollback()

        return engine

    def connect(self) -> Connection:
        """A connection as role and database set it up; may raise DBAPIError, psycopg2.Error, UnicodeDecodeError."""
        return self.engine.connect()

    def side_connection(self) -> SideConnection:
        """A connection for the runner's own questions, which counts for none of the run's."""
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
            # What cannot be learned at once is not known: the table may be locked.
            self.raw.ask("SET search_path = pg_catalog; SET lock_timeout = '1s'; SET statement_timeout = '5s'")
        except BaseException:
            self.__exit__()
            raise

    def as_login_role(self) -> SideConnection:
        """As the role that logged in: an `ALTER ROLE ... SET role` hides its own sessions from the other one."""
        self.raw.ask("SET ROLE NONE")
        return self

    def ask(self, query: str, *parameters: object) -> Sequence[Row]:
        return self.raw.ask(query, *parameters)

    def __enter__(self) -> SideConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()
        self.connection.invalidate()
        self.connection.close()


def raw(connection: Connection) -> RawConnection:
    """The driver's connection of SQLAlchemy's."""
    found = connection.connection.dbapi_connection
    assert isinstance(found, RawConnection)
    return found
