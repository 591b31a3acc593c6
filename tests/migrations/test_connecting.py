"""Connection errors: transient ones are retried, permanent ones fail at once and name what to fix."""

import re
import socketserver
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import URL

from tests.support.canary import PASSWORD
from tests.support.database import Database, parts
from tests.support.messages import target_and_user
from tests.support.project import Project
from tests.support.servers import serving
from tests.support.waiting import AT_ONCE
from tools.postgres import Postgres, dsn


@pytest.mark.fault(
    "Database",
    fault="Wrong password",
    sees="`cannot connect to database ...: password authentication failed ...; check DB_USER and DB_PASSWORD`,"
    " at once, exit 255",
    state="Nothing was changed",
    do="Set the correct password, deploy again",
)
def test_a_wrong_password_fails_at_once(project: Project, database: Database) -> None:
    start = time.monotonic()
    result = project.alembic("upgrade", "head", **parts(database.url.set(password=PASSWORD + "x")))
    assert time.monotonic() - start < 15  # retries take up to 90 s
    assert result.returncode == 255
    assert re.fullmatch(
        rf"cannot connect to {target_and_user(database)}: connection to server at \S+ port \d+ failed: FATAL: password"
        rf' authentication failed for user "{database.role}"; check DB_USER and DB_PASSWORD',
        result.failure,
    )


@pytest.mark.fault(
    "Database",
    fault="The database does not exist, the role may not log in or connect, or no password is set",
    sees="`cannot connect to database ...: <the server's message>; <the fix>`, at once, exit 255",
    state="Nothing was changed",
    do="Follow the message, deploy again",
)
@pytest.mark.parametrize(
    ("statement", "change", "message", "fix"),
    [
        (None, {"database": "no such"}, 'database "no such" does not exist', "create it, or change DB_NAME or DB_USER"),
        ("ALTER ROLE {0} NOLOGIN", {}, "is not permitted to log in", "grant LOGIN to the role, or change DB_USER"),
        (
            "REVOKE CONNECT ON DATABASE {0} FROM PUBLIC, {0}",
            {},
            'permission denied for database "{0}" DETAIL: User does not have CONNECT privilege',
            "grant CONNECT on the database to the role",
        ),
        (None, {"password": None}, "no password supplied", "set DB_PASSWORD"),
    ],
)
def test_a_permanent_connection_error_is_not_retried(
    project: Project, database: Database, statement: str | None, change: dict, message: str, fix: str
) -> None:
    if statement:
        database.execute(statement.format(database.name))
    result = project.alembic("upgrade", "head", **parts(database.url._replace(**change)))
    assert result.returncode == 255
    assert result.failure.startswith("cannot connect to database ")
    assert f"{message.format(database.name)}; {fix}" in result.failure


@pytest.mark.fault(
    "Network",
    fault="The host name does not resolve, or nothing listens on the port",
    sees="`could not connect to database ... within N s: ...; check that the server is up and DB_HOST, DB_PORT and the"
    " network, or raise MIGRATION_WAIT_SECONDS`, exit 1",
    state="Nothing was changed",
    do="Start the server; set `DB_HOST` and `DB_PORT` (in a cluster: ConfigMap `egov-config`, `db.port`); let the"
    " pod reach it (NetworkPolicy, security group); deploy again",
)
@pytest.mark.parametrize("host", ["127.0.0.1", "certificate.invalid"], ids=["closed port", "unknown host"])
def test_an_unreachable_database_times_out(offline_project: Project, host: str) -> None:
    start = time.monotonic()
    url = URL.create("postgresql", "me", "x", host, 1, "db")
    resolver = {"RES_OPTIONS": "timeout:1 attempts:1"}  # the machine's may be down, and libpq has no timeout for it
    result = offline_project.alembic("upgrade", "head", **parts(url), MIGRATION_WAIT_SECONDS="2", **resolver)
    assert 2 < time.monotonic() - start < AT_ONCE
    assert result.returncode == 1
    assert result.lines[0].startswith("HH:MM:SS INFO waiting, up to 2 s more: ")
    assert result.failure.startswith(f"could not connect to database db at {host}:1 as me within 2 s: ")
    assert result.failure.endswith(
        "; check that the server is up and DB_HOST, DB_PORT and the network, or raise MIGRATION_WAIT_SECONDS"
    )


@pytest.mark.fault(
    "Database",
    fault="The server has not started yet",
    sees="`waiting, up to N s more: ...`, then recovers automatically",
    state="Complete",
    do="Nothing",
)
def test_a_server_that_starts_late_is_waited_for(offline_project: Project, own_server: Postgres) -> None:
    own_server.kill()
    running = offline_project.start("upgrade", "head", DATABASE_URL=dsn(own_server.url))
    running.prints(" waiting, ")
    own_server.start()
    result = running.wait()
    assert (result.returncode, own_server.execute("SELECT version_num FROM alembic_version")) == (0, [("001",)])
    assert " INFO waiting, up to 90 s more: connection to server at " in result.lines[0]


@pytest.mark.fault(
    "Database",
    fault="The role's connection limit is reached",
    sees="`waiting, up to N s more: ... too many connections for role ...`, then recovers automatically",
    state="Complete",
    do="Nothing; raise the limit if it takes long",
)
def test_a_role_at_its_connection_limit_is_waited_for(project: Project, database: Database) -> None:
    database.execute(f"ALTER ROLE {database.role} CONNECTION LIMIT 0")
    running = project.start("upgrade", "head")
    running.prints(" waiting, ")
    database.execute(f"ALTER ROLE {database.role} CONNECTION LIMIT -1")
    result = running.wait()
    assert (result.returncode, database.at) == (0, ["001"]), result
    assert "FATAL: too many connections for role " in result.lines[0]


@contextmanager
def responding(response: bytes) -> Iterator[int]:
    """A server on loopback that sends every client the same response; yields its port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1024)
            self.request.sendall(response)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    with serving(server):
        yield server.server_address[1]


def error_response(sqlstate: str, message: str) -> bytes:
    """PostgreSQL's ErrorResponse, before authentication and without TLS."""
    fields = b"".join(kind + text.encode() + b"\0" for kind, text in [
        (b"S", "FATAL"), (b"V", "FATAL"), (b"C", sqlstate), (b"M", message),
    ])  # fmt: skip
    return b"E" + (len(fields) + 5).to_bytes(4, "big") + fields + b"\0"


TRANSIENT = [
    "the database system is starting up",
    "the database system is shutting down",
    "the database system is in recovery mode",
    "the database system is not yet accepting connections",
    "sorry, too many clients already",
    "remaining connection slots are reserved for roles with the SUPERUSER attribute",
    'too many connections for database "reports"',
    "terminating connection due to administrator command",
    "no more connections allowed (max_client_conn)",
    "server login has been failing, cached error: connect failed (server_login_retry)",
    "query_wait_timeout",
]
PERMANENT = [
    "database is not currently accepting connections",
    "This RDS proxy has no credentials for the role app",
    "Tenant or user not found",
    "endpoint is disabled",
    "Passwort-Authentifizierung für Benutzer »app« fehlgeschlagen",
    "server login has been failing, cached error: password authentication failed",
    'pg_hba.conf rejects connection for host "10.0.0.1", user "starting up"',
]


@pytest.mark.parametrize("message", TRANSIENT)
def test_a_known_transient_error_is_waited_for(offline_project: Project, message: str) -> None:
    with responding(error_response("57P03", message)) as port:
        url = f"postgresql://app:x@127.0.0.1:{port}/reports?sslmode=disable"
        result = offline_project.alembic("current", DATABASE_URL=url, MIGRATION_WAIT_SECONDS="0")
    assert result.returncode == 1
    assert result.failure.startswith(f"could not connect to database reports at 127.0.0.1:{port} within 0 s: ")


@pytest.mark.fault(
    "Database",
    fault="The server, a pooler or a proxy rejects the connection with an unknown error",
    sees="`cannot connect to database ...: <its message>; ...`, mostly with `not a known transient error, so not"
    " retried: check the DB_* and PG* variables, then retry`, at once, exit 255",
    state="Nothing was changed",
    do="Follow its message",
)
@pytest.mark.parametrize("message", PERMANENT)
def test_any_other_server_error_fails_at_once(offline_project: Project, message: str) -> None:
    with responding(error_response("28000", message)) as port:
        url = URL.create("postgresql", "app", "x", "127.0.0.1", port, "reports")
        result = offline_project.alembic("current", **parts(url), PGSSLMODE="disable")
    assert result.returncode == 255
    assert result.failure.startswith(f"cannot connect to database reports at 127.0.0.1:{port} as app: ")
    assert message in result.failure
    assert "waiting" not in result.stderr


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"password": "x"}, "authentication failed", "check the user and the password in DATABASE_URL"),
        ({"database": "none"}, "does not exist", "create it, or change the database or the user in DATABASE_URL"),
        ({"port": 1}, "refused", "check that the server is up and the host, the port in DATABASE_URL and the network"),
    ],
)
def test_with_database_url_the_hint_names_it(
    project: Project, database: Database, change: dict, message: str, hint: str
) -> None:
    url = dsn(database.url.set(**change))
    result = project.alembic("current", DATABASE_URL=url, MIGRATION_WAIT_SECONDS="0")
    assert message in result.failure
    assert f"; {hint}" in result.failure
    assert "DB_" not in result.failure


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PGSERVICE": "nowhere"}, 'definition of service "nowhere" not found; check PGSERVICE and PGSERVICEFILE'),
        (
            {"PGCHANNELBINDING": "require"},
            "; set PGCHANNELBINDING=prefer, or enable scram-sha-256 and TLS on the server",
        ),
        ({"PGREQUIREAUTH": "none"}, "; check PGREQUIREAUTH"),
        ({"PGSSLMODE": "sometimes"}, 'invalid sslmode value: "sometimes"; check DATABASE_URL and the PG*'),
        ({"PGGSSENCMODE": "require"}, "; set another PGGSSENCMODE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_libpq_setting_that_cannot_be_met_fails_at_once(
    project: Project, variables: dict[str, str], message: str
) -> None:
    result = project.alembic("current", **variables)
    assert result.returncode == 255
    assert message in result.failure
    assert "waiting" not in result.stderr


@pytest.mark.fault(
    "Network",
    fault="Something other than PostgreSQL listens on the port, such as an HTTP proxy",
    sees="`cannot connect to database ...: ... received invalid response ...; the server there is not PostgreSQL: check"
    " DB_HOST and DB_PORT, or the proxy`, at once, exit 255",
    state="Nothing was changed",
    do="Follow the message",
)
def test_an_http_response_fails_at_once(offline_project: Project) -> None:
    with responding(b"HTTP/1.1 403 Forbidden\r\n\r\n") as port:
        result = offline_project.alembic(
            "current", **parts(URL.create("postgresql", "app", "x", "127.0.0.1", port, "reports"))
        )
    assert result.returncode == 255
    assert result.failure.endswith("; the server there is not PostgreSQL: check DB_HOST and DB_PORT, or the proxy")
    assert "waiting" not in result.stderr


@pytest.mark.fault(
    "Network",
    fault="libpq ignores the password file because of its mode",
    sees="`... libpq ignores the password file <path>, whose mode is 0644: set 0600`, at once, exit 255",
    state="Nothing was changed",
    do="Follow the message; in the chart, whose Secret volumes cannot have this mode, set `db.secret`",
)
def test_a_password_file_that_libpq_ignores_is_named_with_its_mode(
    project: Project, database: Database, tmp_path: Path
) -> None:
    file = tmp_path / "passfile"
    password = PASSWORD.replace("\\", "\\\\").replace(":", "\\:")
    file.write_text(f"*:*:*:{database.role}:{password}\n")
    variables = parts(database.url) | {"DB_PASSWORD": None, "PGPASSFILE": str(file)}
    file.chmod(0o644)
    result = project.alembic("current", **variables)
    assert result.returncode == 255
    assert result.failure.endswith(
        f"; set DB_PASSWORD; libpq ignores the password file {file}, whose mode is 0644: set 0600"
    )
    file.chmod(0o600)
    assert project.alembic("current", **variables).returncode == 0
    assert project.alembic("current", **{**variables, "PGPASSFILE": None, "PGPASSWORD": PASSWORD}).returncode == 0
    missing = project.alembic("current", **{**variables, "PGPASSFILE": "/none"})
    assert missing.failure.endswith("; set DB_PASSWORD; PGPASSFILE names /none, which cannot be read")


@pytest.mark.fault(
    "Database",
    fault="`DB_PASSWORD` ends with a newline (a Secret created with `echo`)",
    sees="`... password authentication failed ...; check DB_USER and DB_PASSWORD; DB_PASSWORD has leading or trailing"
    " whitespace (...)`, at once, exit 255",
    state="Nothing was changed",
    do="Recreate the Secret without the newline",
)
def test_whitespace_around_a_wrong_password_is_named(project: Project, database: Database) -> None:
    result = project.alembic("current", **parts(database.url) | {"DB_PASSWORD": f"{PASSWORD}\n"})
    assert result.returncode == 255
    assert result.failure.endswith(
        "; check DB_USER and DB_PASSWORD; DB_PASSWORD has leading or trailing whitespace"
        " (a Secret created with echo ends with a newline)"
    )


def test_the_log_names_the_address_of_the_server(project: Project, database: Database) -> None:
    url = database.url.set(host="db.prod.invalid")
    result = project.alembic("current", DATABASE_URL=dsn(url), PGHOSTADDR="127.0.0.1")
    assert result.returncode == 0, result
    assert f" at db.prod.invalid [127.0.0.1]:{url.port or 5432} as " in result.lines[0]
    closed = {"DATABASE_URL": "postgresql://me@db.prod.invalid/x", "PGHOSTADDR": "127.0.0.1", "PGPORT": "1"}
    failed = project.alembic("current", **closed, MIGRATION_WAIT_SECONDS="0")
    assert failed.failure.startswith("could not connect to database x at db.prod.invalid [127.0.0.1]:1 within 0 s: ")


def test_an_ipv6_address_in_brackets_is_accepted(offline_project: Project) -> None:
    result = offline_project.alembic(
        "current", DATABASE_URL=None, DB_HOST="[::1]", DB_PORT="1", MIGRATION_WAIT_SECONDS="0"
    )
    assert result.returncode == 1
    assert result.failure.startswith("could not connect to database unifieddevdb at ::1:1 as postgres within 0 s: ")


def test_a_driver_error_on_a_working_connection_is_not_retried(project: Project, database: Database) -> None:
    body = "cursor = op.get_bind().connection.cursor()\ncursor.close()\ncursor.execute('SELECT 1')"
    project.add("002", body)
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["001"])
    assert "failed: cursor already closed, at " in result.failure
    assert "waiting" not in result.stderr
