"""A plugin: a copy of this project to add revisions to, and Alembic's command line in it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory

from tests.support import revisions
from tests.support.alembic_process import AlembicProcess
from tests.support.database import Database
from tests.support.programs import Program, Result, output_folder, start, watch
from tests.support.revisions import AUDIT
from tools.paths import BIN, ROOT
from tools.postgres import dsn

PARTS = ("alembic.ini", "migrations", "migration_runner")


@dataclass
class Project:
    """A copy of alembic.ini, migrations/ and migration_runner/, with a dedicated environment."""

    folder: Path
    environment: dict[str, str]

    @property
    def versions(self) -> Path:
        return self.folder / "migrations" / "versions"

    def files(self) -> list[str]:
        return sorted(path.name for path in self.versions.glob("*.py"))

    def add(
        self, number: str, upgrade: str = "pass", downgrade: str = "pass", *, down: str | None = None, name: str = "add"
    ) -> Path:
        """Write a revision whose functions have these bodies, by default after the previous number."""
        return revisions.write(self.versions, number, upgrade, downgrade, down=down, name=name)

    def _variables(self, changed: dict[str, str | None]) -> dict[str, str]:
        """The environment with these changes; None unsets a variable."""
        return {name: value for name, value in (self.environment | changed).items() if value is not None}

    def start(
        self, *arguments: str, program: Path = BIN / "alembic", cwd: Path | None = None, **environment: str | None
    ) -> Program:
        """Start `alembic`, or another program of the virtual environment."""
        return start([program, *arguments], cwd=cwd or self.folder, env=self._variables(environment))

    def fork(self, *arguments: str, **environment: str | None) -> Program:
        """Start `alembic` as a forked process."""
        folder = output_folder()
        streams = (Path(folder.name, "stdout"), Path(folder.name, "stderr"))
        process = AlembicProcess(self.folder, streams, self._variables(environment), arguments)
        return watch(Program(process, folder, leads_group=False))

    def alembic(self, *arguments: str, **environment: str | None) -> Result:
        """Run `alembic` until it exits."""
        return self.fork(*arguments, **environment).wait()


def copy(folder: Path, *more: str) -> None:
    """Copy the parts of this checkout that a run needs, and `more` of its files and folders.

    Of the revisions, only the first one: what the tests add to it must not depend on what was released since.
    """
    copy_parts(folder, *PARTS, *more)
    keep_first_revision(folder)


def head() -> str:
    """The newest revision of this checkout."""
    return str(ScriptDirectory(str(ROOT / "migrations")).get_current_head())


def keep_first_revision(folder: Path) -> None:
    for path in (folder / "migrations/versions").glob("*.py"):
        if "_001_" not in path.name:
            path.unlink()


def copy_parts(folder: Path, *names: str) -> None:
    """Copy these files and folders of this checkout."""
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)


@pytest.fixture
def offline_project(tmp_path: Path) -> Project:
    """A project without a database: nothing listens at its DATABASE_URL."""
    folder = tmp_path / "project"
    folder.mkdir()
    copy(folder)
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}
    return Project(folder, environment)


@pytest.fixture
def project(offline_project: Project, database: Database) -> Project:
    """A project with the test's database as DATABASE_URL."""
    offline_project.environment["DATABASE_URL"] = dsn(database.url)
    return offline_project


@pytest.fixture
def project_at_002(project: Project) -> Project:
    """A database at 002, where 002 created the audit table."""
    project.add("002", AUDIT, 'op.execute("DROP TABLE audit")')
    assert project.alembic("upgrade", "head").returncode == 0
    return project
