"""A plugin: one PostgreSQL server for each worker; an empty database and an ordinary role for each test."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from sqlalchemy import URL, make_url

from tests.support.canary import PASSWORD, SECRETS
from tests.support.programs import Program, Result, start
from tools.postgres import Postgres, dsn, execute, programs


@dataclass
class Database:
    """An empty database, and an ordinary role that owns it."""

    admin: URL  # the superuser's, to this database
    url: URL  # the role's
    name: str
    role: str

    def execute(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Execute a statement as superuser."""
        return execute(self.admin, statement, *parameters)

    def scalar(self, statement: str, *parameters: object) -> Any:
        return self.execute(statement, *parameters)[0][0]

    @property
    def at(self) -> list[str]:
        """The revisions in the version table."""
        return [version for (version,) in self.execute("SELECT version_num FROM alembic_version")]

    def history(self, columns: str = "revision, direction") -> list[tuple[Any, ...]]:
        """The record's rows, in their order."""
        return self.execute(f"SELECT {columns} FROM alembic_version_history ORDER BY id")

    @property
    def relations(self) -> list[str]:
        """Everything that the revisions created in public: tables, indexes, sequences."""
        query = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
        return [name for (name,) in self.execute(query) if not name.startswith("alembic_version")]

    @contextmanager
    def session(self) -> Iterator[Any]:
        """A psycopg2 cursor in a dedicated transaction, as superuser; rolled back at the end."""
        connection = psycopg2.connect(dsn(self.admin), application_name="report")
        try:
            yield connection.cursor()
        finally:
            connection.close()

    def dump(self) -> str:
        dump = self._start("pg_dump", "--schema-only", "--restrict-key=test").wait(verbatim=True)
        assert dump.returncode == 0, dump.text
        return dump.stdout

    def start_psql(self, script: str) -> Program:
        """Run a script as the role; stop at the first error."""
        return self._start("psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", stdin=script)

    def psql(self, script: str) -> Result:
        return self.start_psql(script).wait(verbatim=True)

    def _start(self, program: str, *arguments: str, stdin: str = "") -> Program:
        url = self.url  # passed in the environment, because everyone can read the process list
        environment = {"PGHOST": str(url.host), "PGPORT": str(url.port or 5432), "PGDATABASE": self.name}
        environment |= {"PGUSER": self.role, "PGPASSWORD": PASSWORD}
        return start([programs() / program, *arguments], env=environment, stdin=stdin)

    def activity(self) -> list[str]:
        """State and query of the runs' sessions: `active: SELECT pg_sleep(60)`; a starting session has no state."""
        query = (
            "SELECT concat_ws(': ', state, query) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'hcm-db-migrations' AND backend_type = %s"
        )
        return [row for (row,) in self.execute(query, "client backend")]


def parts(url: URL) -> dict[str, str | None]:
    """A URL as DB_* variables."""
    return {
        "DATABASE_URL": None,
        "DB_HOST": url.host,
        "DB_PORT": str(url.port or 5432),
        "DB_NAME": url.database,
        "DB_USER": url.username,
        "DB_PASSWORD": url.password or "",
    }


def env_file(database: Database) -> str:
    """The test's database as a file `.env`."""
    quoted = PASSWORD.replace("\\", "\\\\").replace("'", "\\'")
    url = database.url
    return (
        f"DB_HOST={url.host}\nDB_PORT={url.port or 5432}\nDB_NAME={url.database}\nDB_USER={url.username}\n"
        f"DB_PASSWORD='{quoted}'\n"
    )


@contextmanager
def fresh_database(server: URL) -> Iterator[Database]:
    name = f"test_{secrets.token_hex(6)}"
    quoted = PASSWORD.replace("'", "''")
    execute(server, f"CREATE ROLE {name} LOGIN PASSWORD '{quoted}'")
    execute(server, f"CREATE DATABASE {name} OWNER {name}")
    try:
        admin = server.set(database=name)
        yield Database(admin, admin.set(username=name, password=PASSWORD), name, name)
    finally:
        execute(server, f"DROP DATABASE {name} WITH (FORCE)")
        execute(server, f"DROP ROLE {name}")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[URL]:
    """The superuser's URL of the server that the tests share. tests/e2e has the one in the cluster."""
    if external := request.config.getoption("--postgres-url"):
        yield make_url(external).set(drivername="postgresql")
        return
    with Postgres() as postgres:
        SECRETS.add(postgres.password)
        yield postgres.url


@pytest.fixture
def database(server: URL) -> Iterator[Database]:
    with fresh_database(server) as fresh:
        yield fresh


@pytest.fixture
def server_folder() -> Iterator[Path]:
    """An empty folder that the user of a server that is started with TMPDIR can enter."""
    with tempfile.TemporaryDirectory(prefix="server-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture
def own_server() -> Iterator[Postgres]:
    """A server that the test may kill."""
    with Postgres() as postgres:
        SECRETS.add(postgres.password)
        yield postgres
