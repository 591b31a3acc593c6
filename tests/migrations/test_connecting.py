"""Databases that cannot be reached: waited for where that may help, and named at once where it cannot."""

import re
import time

import pytest

from tests.migrations.audit import target
from tests.migrations.helpers import PASSWORD, Database, Project
from tools.postgres import Postgres, dsn


@pytest.mark.fault(
    "Database",
    fault="Wrong password",
    sees="`cannot connect to database ...: password authentication failed ...; check DB_USER and DB_PASSWORD`, at "
    "once, exit 255",
    state="Nothing was changed",
    do="Set the right one, deploy again",
)
def test_a_wrong_password_fails_at_once(project: Project, database: Database) -> None:
    start = time.monotonic()
    result = project.alembic("upgrade", "head", DATABASE_URL=dsn(database.url.set(password=PASSWORD + "x")))
    assert time.monotonic() - start < 15  # of 90
    assert result.returncode == 255
    assert re.fullmatch(
        rf"cannot connect to {target(database)}: connection to server at \S+ port \d+ failed: FATAL: password"
        rf' authentication failed for user "{database.role}"; check DB_USER and DB_PASSWORD',
        result.failure,
    )


@pytest.mark.fault(
    "Database",
    fault="The database is missing, the role may not log in or not connect, no password is set",
    sees="`cannot connect to database ...: <the server's words>; <the cure>`, at once, exit 255",
    state="Nothing was changed",
    do="What the line says, deploy again",
)
@pytest.mark.parametrize(
    ("statement", "change", "said", "cure"),
    [
        (None, {"database": "no such"}, 'database "no such" does not exist', "create it, or set another DB_NAME or"),
        ("ALTER ROLE {0} NOLOGIN", {}, "is not permitted to log in", "grant LOGIN to the role, or set another DB_USER"),
        (
            "REVOKE CONNECT ON DATABASE {0} FROM PUBLIC, {0}",
            {},
            'permission denied for database "{0}" DETAIL: User does not have CONNECT privilege',
            "grant CONNECT on the database to the role",
        ),
        (None, {"password": None}, "no password supplied", "set DB_PASSWORD"),
    ],
)
def test_what_no_waiting_mends_fails_at_once(
    project: Project, database: Database, statement: str | None, change: dict, said: str, cure: str
) -> None:
    if statement:
        database.execute(statement.format(database.name))
    result = project.alembic("upgrade", "head", DATABASE_URL=dsn(database.url._replace(**change)))
    assert result.returncode == 255
    assert result.failure.startswith("cannot connect to database ")
    assert f"{said.format(database.name)}; {cure}" in result.failure


@pytest.mark.fault(
    "Network",
    fault="The host is unknown, or nothing listens on the port",
    sees="`could not connect to database ... within N s: ...; check that the server is up and DB_HOST, DB_PORT and the "
    "network, or raise MIGRATION_WAIT_SECONDS`, exit 1",
    state="Nothing was changed",
    do="What the line says, deploy again",
)
@pytest.mark.parametrize("host", ["127.0.0.1", "certificate.invalid"], ids=["closed port", "unknown host"])
def test_a_database_that_cannot_be_reached_is_waited_for_in_vain(files: Project, host: str) -> None:
    start = time.monotonic()
    url = f"postgresql://me:x@{host}:1/db"
    resolver = {"RES_OPTIONS": "timeout:1 attempts:1"}  # this machine's may be a dead one, and libpq has no limit there
    result = files.alembic("upgrade", "head", DATABASE_URL=url, MIGRATION_WAIT_SECONDS="2", **resolver)
    assert 2 < time.monotonic() - start < 8
    assert result.returncode == 1
    assert result.lines[0].startswith("HH:MM:SS INFO waiting, up to 2 s more: ")
    assert result.failure.startswith(f"could not connect to database db at {host}:1 within 2 s: ")
    assert result.failure.endswith(
        "; check that the server is up and DB_HOST, DB_PORT and the network, or raise MIGRATION_WAIT_SECONDS"
    )


@pytest.mark.fault(
    "Database",
    fault="The server is not there yet",
    sees="`waiting, up to N s more: ...`, then it goes on by itself",
    state="All done",
    do="Nothing",
)
def test_a_server_that_starts_late_is_waited_for(files: Project, own_server: Postgres) -> None:
    own_server.kill()
    running = files.popen("upgrade", "head", DATABASE_URL=dsn(own_server.url))
    running.says(" waiting, ")
    own_server.start()
    result = running.wait()
    assert (result.returncode, own_server.execute("SELECT version_num FROM alembic_version")) == (0, [("001",)])
    assert " INFO waiting, up to 90 s more: connection to server at " in result.lines[0]


@pytest.mark.fault(
    "Database",
    fault="The role's connection limit is reached",
    sees="`waiting, up to N s more: ... too many connections for role ...`, then it goes on by itself",
    state="All done",
    do="Nothing; raise the limit where it takes long",
)
def test_a_database_that_takes_no_more_connections_is_waited_for(project: Project, database: Database) -> None:
    database.execute(f"ALTER ROLE {database.role} CONNECTION LIMIT 0")
    running = project.popen("upgrade", "head")
    running.says(" waiting, ")
    database.execute(f"ALTER ROLE {database.role} CONNECTION LIMIT -1")
    result = running.wait()
    assert (result.returncode, database.at) == (0, ["001"]), result
    assert "FATAL: too many connections for role " in result.lines[0]
