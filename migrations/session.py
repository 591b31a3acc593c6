"""One database session that is safe to migrate in: how it connects, waits, locks, and sees who is in the way."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg2
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from migrations.settings import Settings

log = logging.getLogger(__name__)

# How long one statement waits for a table. Everyone who comes after it waits behind it, so it is short; the
# transaction is tried again.
LOCK_TIMEOUT = "3s"

# libpq's side: a connection whose other end is gone is noticed within about 10 s (the defaults: over an hour).
CONNECT_ARGS = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "fallback_application_name": "hcm-db-migrations",
}

# The server's side, set in the session because a pooler refuses them at connect. An orphan (its client was killed, or
# its node is lost and sends no FIN) lets go of its locks within seconds. A role's own time limits are for
# applications: a migration's limit is the Job's deadline. Names that the server's version lacks are left out.
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

# At connect psycopg2 gives no SQLSTATE, so the text decides: none of these gets better by waiting. A server that
# speaks another language is waited for, and its words are shown then.
FINAL = {
    "authentication failed": "check DB_USER and DB_PASSWORD",  # of a password, SASL, PAM, LDAP ...
    "no password supplied": "set DB_PASSWORD",
    "is not permitted to log in": "grant LOGIN to the role, or set another DB_USER",
    "certificate": "set PGSSLROOTCERT to the CA's file, and the host to a name in the certificate",
    "does not exist": "create it, or set another DB_NAME or DB_USER",
    "no such database": "add it to the pooler, or set another DB_NAME",
    "permission denied": "grant CONNECT on the database to the role",
    "no encryption": "set PGSSLMODE=require, or allow it in pg_hba.conf",
    "pg_hba.conf": "allow this client, role and database in pg_hba.conf",
    "server does not support SSL": "set another PGSSLMODE, or turn TLS on in the server",
    "invalid": "check DATABASE_URL's query and the PG* variables",
}


class Patience:
    """How long a run still waits, in seconds; one budget for the database, other runs and locked tables."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.renew()

    def renew(self) -> None:
        """Start over: a revision was finished."""
        self.end: float | None = None  # the time runs from the first wait on: a revision's own work is no waiting
        self.pause = 0.25
        self.told = (0.0, "")

    def allow(self, seconds: float) -> None:
        """Take no account of `seconds`, in which a revision did its own work."""
        if self.end is not None:
            self.end += seconds

    def wait(self, reason: str, longest: float = 10) -> bool:
        """Sleep a little longer than the last time, saying why every 10 s, or return False: the time is up."""
        now, (at, what) = time.monotonic(), self.told
        self.end = now + self.seconds if self.end is None else self.end
        left = self.end - now
        if left <= 0:
            return False
        if what != reason or now - at > 10:
            self.told = (now, reason)
            log.info("waiting, up to %.0f s more: %s", left, reason)
        time.sleep(min(self.pause, left))
        self.pause = min(self.pause * 2, longest)
        return True


def engine(settings: Settings) -> Engine:
    """An engine that has not connected yet; what the URL's own query says goes before our defaults."""
    arguments = {name: value for name, value in CONNECT_ARGS.items() if name not in settings.url.query}
    # hide_parameters: the values of a failed statement are the campaigns' data, and the log is not the place for them.
    return create_engine(settings.url, poolclass=NullPool, connect_args=arguments, hide_parameters=True)


def where(settings: Settings) -> str:
    """`database unifieddevdb at db:5432 as postgres`, as a person would name it; never the password."""
    url = settings.url
    host = url.host or url.query.get("host")
    return f"database {url.database} at {host}:{url.port or 5432} as {url.username or 'the default user'}"


@contextmanager
def connect(settings: Settings, patience: Patience) -> Iterator[Connection]:
    """Yield a connection with the session's settings made, or raise CommandError or SystemExit with one line."""
    database = engine(settings)
    with _first_connection(database, settings, patience) as connection:
        _refuse_transaction_pooling(database, connection)  # first: the settings would stay in the pool
        _choose_settings(connection, settings)
        settle(connection)
        connection.commit()  # a rollback would take the settings back
        _choose_schema(connection, settings)
        try:
            yield connection
        finally:
            # Where the driver's own call found it broken, SQLAlchemy does not know that, and would roll back.
            if not connection.invalidated and connection.connection.dbapi_connection.closed:
                connection.invalidate()


def settle(connection: Connection) -> bool:
    """Make the session's settings, at its start and before each revision: the one before may have changed them.

    Returns whether the session holds the run's lock, which a revision may have let go of, too.
    """
    made = text(
        "SELECT bool_and(set_config(key, value, false) IS NOT NULL) AND coalesce(pg_try_advisory_lock(:lock), true)"
        " FROM json_each_text(:settings)"
    )
    values = {"settings": json.dumps(connection.info["settings"]), "lock": connection.info.get("lock")}
    return bool(connection.scalar(made, values))


def _choose_settings(connection: Connection, settings: Settings) -> None:
    """Put SERVER_SETTINGS, as far as the server has them, and what the role begins with into `info["settings"]`."""
    if settings.schema and not connection.scalar(
        text("SELECT to_regnamespace(quote_ident(:name))"), {"name": settings.schema}
    ):
        raise CommandError(f"DB_SCHEMA is '{settings.schema}', a schema that does not exist; create it, or set another")
    known = connection.scalars(
        text("SELECT name FROM pg_settings WHERE name = ANY (:names)"), {"names": [*SERVER_SETTINGS]}
    )
    begins = connection.execute(
        text(
            "SELECT current_setting('role') AS role,"
            " coalesce(quote_ident(:schema), current_setting('search_path')) AS search_path"
        ),
        {"schema": settings.schema},
    ).one()
    connection.info["settings"] = {name: SERVER_SETTINGS[name] for name in known} | begins._asdict()


def _first_connection(database: Engine, settings: Settings, patience: Patience) -> Connection:
    while True:
        try:
            return database.connect()
        except (DBAPIError, psycopg2.Error, UnicodeDecodeError) as error:
            reason = sentence(error)
            said = re.sub('"[^"]*"', "", reason)  # a host or a role may be called `invalid`
            for words, cure in FINAL.items():
                if words in said:
                    raise CommandError(f"cannot connect to {where(settings)}: {reason}; {cure}") from None
            if not patience.wait(reason):
                raise SystemExit(
                    f"FAILED: no connection to {where(settings)} in {patience.seconds:.0f} s: {reason}; check that the"
                    " server runs and DB_HOST, DB_PORT and the network, or raise MIGRATION_WAIT_SECONDS"
                ) from None


def _choose_schema(connection: Connection, settings: Settings) -> None:
    """Put the version table's schema into `info["schema"]`, and the line that says what database this is.

    The name is fixed for the whole run, since a revision may change the search_path.
    """
    row = connection.execute(
        text(
            "SELECT current_user, current_schema(), current_setting('search_path') AS search_path,"
            " current_setting('server_version') AS version,"
            " (SELECT relnamespace::regnamespace::name FROM pg_class"
            "  WHERE oid = to_regclass(quote_ident(:table))) AS found"
        ),
        {"table": settings.version_table},
    ).one()
    connection.commit()
    if row.current_schema is None:
        raise CommandError(
            f"the role {row.current_user} may use no schema of its search_path ({row.search_path}); grant USAGE on one,"
            " set DB_SCHEMA, or mend the role's search_path"
        )
    connection.info["schema"] = settings.schema or row.found or row.current_schema
    server = connection.connection.dbapi_connection.info  # of several hosts in the URL, the one that answered
    connection.info["report"] = (
        f"database {server.dbname} at {server.host}:{server.port} as {server.user}, schema {row.current_schema},"
        f" PostgreSQL {row.version}"
    )


def _refuse_transaction_pooling(database: Engine, connection: Connection) -> None:
    """A pooler in transaction mode hands out another backend for each transaction, so a session's lock guards nothing.

    A pooler makes up the pid that the protocol gives the client. Only where that differs from the backend's own is a
    second connection asked for: while it holds a transaction open, the first one gets another backend in transaction
    mode and keeps its own in session mode.
    """
    ask = text("SELECT pg_backend_pid()")
    first = connection.scalar(ask)
    connection.commit()
    connection.info["pid"] = first
    if connection.connection.dbapi_connection.info.backend_pid == first:
        return
    with database.connect() as other:
        other.execute(ask)
        second = connection.scalar(ask)
        connection.commit()
    if first != second:
        raise CommandError(
            "the connection goes through a pooler in transaction mode (PgBouncer's pool_mode=transaction), where no"
            " lock holds; set DB_HOST and DB_PORT to the server itself, or to a pool in session mode"
        )


def lock(connection: Connection, settings: Settings, patience: Patience) -> None:
    """Take the lock that keeps a second run of this schema and version table out, for the rest of the session.

    It is polled, not waited for: a waiting statement holds a snapshot, which CREATE INDEX CONCURRENTLY in the first
    run waits for. Each try is committed: what the caller begins next must be its own transaction, not ours.
    """
    digest = hashlib.sha256(f"{connection.info['schema']}.{settings.version_table}".encode()).digest()
    key = connection.info["lock"] = int.from_bytes(digest[:8], "big", signed=True)
    while True:
        taken = connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": key})
        holder = None if taken else _holder(connection, key)
        connection.commit()
        if taken:
            return
        if not patience.wait(f"another run is at work ({holder})", longest=1):
            raise SystemExit(
                f"FAILED: another run was still at work after {patience.seconds:.0f} s ({holder}); let it end, or end"
                " it with SELECT pg_terminate_backend(pid), or raise MIGRATION_WAIT_SECONDS"
            )


WHO = (
    "'pid ' || a.pid || ', ' || coalesce(nullif(a.application_name, ''), 'unnamed')"
    " || ' as ' || coalesce(a.usename, '?') || coalesce(' from ' || host(a.client_addr), '')"
)


def _holder(connection: Connection, key: int) -> str:
    return (
        connection.scalar(
            text(
                f"SELECT {WHO} FROM pg_locks l JOIN pg_stat_activity a USING (pid)"  # noqa: S608
                " WHERE l.locktype = 'advisory' AND l.granted"
                " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                " AND l.objsubid = 1 AND (l.classid::bigint << 32 | l.objid::bigint) = :key"
            ),
            {"key": key},
        )
        or "it has just ended"
    )


@contextmanager
def watch_blockers(settings: Settings, connection: Connection, names: set[str]) -> Iterator[None]:
    """Collect in `names` who blocks the session, asked on a second connection; after LOCK_TIMEOUT nobody can tell.

    Each name is such as `pid 71, psql as report from 10.0.0.7`. A run that ends within a second is not watched.
    """
    stop = threading.Event()
    session = {"pid": connection.info["pid"]}  # gone from there when the connection breaks
    query = text(f"SELECT {WHO} FROM pg_stat_activity a WHERE pid = ANY (pg_blocking_pids(:pid))")  # noqa: S608

    def sample() -> None:
        if stop.wait(1):
            return
        # Where no second connection is to be had, the names are missing, and nothing else.
        with suppress(DBAPIError), engine(settings).connect() as other:
            while True:
                names.update(other.scalars(query, session))
                other.commit()
                if stop.wait(1):
                    return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=2)


def sentence(error: BaseException) -> str:
    """What the server said, on one line, without the statement; or what libpq said."""
    if isinstance(error, UnicodeDecodeError):  # the words of a server that has another encoding
        return " ".join(error.object.decode(errors="replace").split())
    said = getattr(error, "orig", None) or error
    diag = getattr(said, "diag", None)
    parts = [diag.message_primary, diag.message_detail, diag.message_hint] if diag else []
    if (sqlstate(error) or "").startswith("23"):  # the detail of a violated constraint is the row
        del parts[1:]
    if (sqlstate(error) or "").startswith("22"):  # what cannot be read as a number or a date is quoted
        parts = [re.sub('"[^"]*"', '"..."', part or "") for part in parts]
    first, *others = [" ".join(part.split()).rstrip(".") for part in list(filter(None, parts)) or [str(said)]]
    return first + "".join(f" ({other})" for other in others)


def sqlstate(error: BaseException) -> str | None:
    """The five characters that the server gave, or None where the connection broke."""
    return getattr(getattr(error, "orig", error), "pgcode", None)
