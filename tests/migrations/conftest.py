"""One server a worker, one database and one ordinary role a test, and a copy of the project to add revisions to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url

from tests.conftest import CANARY
from tests.migrations.helpers import Database, Project, fresh_database
from tests.support.revisions import AUDIT
from tools.paths import ROOT
from tools.postgres import Postgres, dsn


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[URL]:
    """The superuser's URL of the server that the tests share."""
    if external := request.config.getoption("--postgres-url"):
        yield make_url(external).set(drivername="postgresql")
        return
    with Postgres() as postgres:
        yield postgres.url


@pytest.fixture
def database(server: URL) -> Iterator[Database]:
    with fresh_database(server) as fresh:
        yield fresh


@pytest.fixture
def own_server() -> Iterator[Postgres]:
    """A server that the test may kill."""
    with Postgres() as postgres:
        yield postgres


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Project]:
    """A project without a database: nothing listens where it looks."""
    folder = tmp_path / "project"
    for name in ("migrations", "migration_runner"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "alembic.ini", folder)
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}
    project = Project(folder, environment)
    yield project
    for running in project.running:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()
    for path in tmp_path.glob("run-*/*"):  # those of runs that were killed, too
        assert CANARY not in path.read_text(errors="replace"), path.read_text(errors="replace")


@pytest.fixture
def project(files: Project, database: Database) -> Project:
    """A project whose DATABASE_URL names the test's database."""
    files.environment["DATABASE_URL"] = dsn(database.url)
    return files


@pytest.fixture
def prepared(project: Project, database: Database) -> Project:
    """A database at 002, where 002 made the audit table."""
    project.add("002", AUDIT, 'op.execute("DROP TABLE audit")')
    assert project.alembic("upgrade", "head").returncode == 0
    return project
