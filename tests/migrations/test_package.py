"""The runner as a package: in another Alembic project, in a program, and next to packages of the same name."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.database import Database
from tests.support.documents import block
from tests.support.messages import FIX
from tests.support.programs import Program, Result, run
from tests.support.project import Project
from tests.support.revisions import FILE, SLEEP, edit
from tests.support.runs import sleeping
from tests.support.waiting import until
from tools.paths import BIN, CHART, ROOT
from tools.postgres import dsn


def run_in(folder: Path, *command: str | Path, **environment: str) -> Result:
    return run(command, cwd=folder, env={"PATH": "/usr/bin:/bin", "HOME": str(folder)} | environment)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built from a copy of this checkout's sources with the command of the chart's README."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(
        ROOT / "migration_runner", folder / "migration_runner", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", folder)
    (command,) = re.findall(r"`\.venv/bin/(pip wheel [^`]*)`", (CHART / "README.md").read_text())
    run([BIN / "pip", *command.split()[1:]], cwd=folder, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.parametrize(
    "versions",
    [["alembic==1.13.1", "sqlalchemy==2.0.25"], ["alembic", "sqlalchemy"]],
    ids=["oldest pinned upstream", "newest"],
)
def test_another_alembic_project_uses_it_with_a_requirement_and_two_lines(
    wheel: Path, versions: list[str], tmp_path: Path, database: Database
) -> None:
    """As in health-campaign-services, which has its own env.py and version table."""
    python = tmp_path / "venv" / "bin" / "python"
    run([BIN / "uv", "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    install = [BIN / "uv", "pip", "install", "--quiet", "--only-binary", ":all:", "--python", python, wheel, *versions]
    run(install, check=True)
    folder = tmp_path / "utilities" / "hcm-db-migrations"
    folder.mkdir(parents=True)
    alembic = python.with_name("alembic")
    assert run_in(folder, alembic, "init", "migrations").returncode == 0
    (folder / "migrations/env.py").write_text(
        'import os\n\nos.environ.setdefault("ALEMBIC_VERSION_TABLE", "hcm_versions")\n'
        + block("migration_runner.run()")
    )
    environment = {"DATABASE_URL": dsn(database.url), "MIGRATION_WAIT_SECONDS": "5"}
    created = run_in(folder, alembic, "revision", "-m", "create_report")
    assert created.returncode == 0, created
    (path,) = (folder / "migrations/versions").glob("*.py")
    edit(path, "pass", 'op.execute("CREATE TABLE report ()")')
    upgraded = run_in(folder, alembic, "upgrade", "head", **environment)
    assert upgraded.returncode == 0, upgraded
    assert "now at " in upgraded.stderr
    assert "(head)" in upgraded.stderr
    assert "(head)" in run_in(folder, alembic, "current", **environment).stdout
    assert database.scalar("SELECT count(*) FROM hcm_versions") == 1
    assert "report" in database.relations
    (folder / "migrations/versions/2_fails.py").write_text(
        f"from alembic import op\nrevision = 'f'\ndown_revision = {path.name.split('_')[0]!r}\n"
        "def upgrade():\n    op.execute('CREATE TABLE a ()')\n    op.get_bind().commit()\ndef downgrade(): pass\n"
    )
    failed = run_in(folder, alembic, "upgrade", "head", **environment)
    lines = [line for line in (failed.stdout + failed.stderr).splitlines() if "FAILED: " in line]
    assert (failed.returncode, len(lines)) == (255, 1), failed
    assert "committed or rolled back its own transaction" in lines[0]
    plan = run_in(folder, alembic, "upgrade", "head", "--sql", **environment)
    assert (plan.returncode, plan.stdout) == (255, ""), plan


@pytest.mark.parametrize("package", ["migrations", "settings", "session", "runner", "revisions"])
def test_an_installed_package_of_the_same_name_is_not_imported(
    project: Project, database: Database, tmp_path: Path, package: str
) -> None:
    """A service's image may contain its own package `migrations`."""
    (tmp_path / "site" / package).mkdir(parents=True)
    (tmp_path / "site" / package / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    running = project.start("upgrade", "head", PYTHONPATH=str(tmp_path / "site"))
    result = running.wait()
    assert (result.returncode, database.at) == (0, ["001"]), result


PROGRAM = """
import sys
from alembic import command
from alembic.config import Config

config = Config("alembic.ini")
{}
"""


def program(project: Project, body: str, **environment: str | None) -> Program:
    path = project.folder / "program.py"
    path.write_text(PROGRAM.format(body))
    return project.start(str(path), program=Path(sys.executable), **environment)


def test_a_program_that_reads_the_current_revision_does_not_wait_for_a_run(
    project_at_002: Project, database: Database
) -> None:
    project_at_002.add("003", SLEEP)
    first = project_at_002.start("upgrade", "head")
    until(lambda: sleeping(database))
    result = program(project_at_002, "command.current(config)\ncommand.history(config, indicate_current=True)").wait()
    assert (result.returncode, "002 (current)" in result.stdout) == (0, True), result
    first.kill()


def test_a_program_gets_the_same_errors_as_the_command_line(project: Project, database: Database) -> None:
    path = project.add("002", 'op.execute("SELECT 1 / 0")')
    body = """
from alembic.util import CommandError
command.upgrade(config, "001")
try:
    command.upgrade(config, "head")
except CommandError as error:
    print(error)
command.stamp(config, "head")
command.downgrade(config, "base")
"""
    result = program(project, body).wait()
    assert (result.returncode, result.stdout, database.at) == (
        0,
        f"revision 002 ({FILE.format('002')}) failed: division by zero, at {path.name}, line 7; rolled back; the"
        f" database is at revision 001; {FIX}\n",
        [],
    ), result


def test_the_package_requires_only_what_the_job_installs() -> None:
    installed = {
        line.split("<")[0].strip() for line in (ROOT / "requirements.in").read_text().splitlines() if line[0] != "#"
    }
    required = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0]
    assert {name.strip(' "').split(">")[0] for name in required.split(",")} == installed
    assert (ROOT / "migration_runner" / "py.typed").exists()
