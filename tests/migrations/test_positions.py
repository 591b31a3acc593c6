"""POSITION_FILE: the database's revision before and after a run, for the report of several targets."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.database import Database
from tests.support.programs import Result
from tests.support.project import Project
from tests.support.revisions import SLEEP, audited
from tests.support.runs import sleeping, terminate
from tests.support.waiting import until
from tools.postgres import Postgres, dsn, execute

FAILS = 'op.execute("SELECT 1 / 0")'


@pytest.fixture
def file(project: Project, tmp_path: Path) -> Path:
    path = tmp_path / "position"
    project.environment["POSITION_FILE"] = str(path)
    return path


def _upgrade(project: Project, *arguments: str, **environment: str | None) -> Result:
    return project.alembic(*(arguments or ("upgrade", "head")), **environment)


def test_a_run_writes_the_revisions_before_and_after(project: Project, file: Path) -> None:
    project.add("002")
    for arguments, expected in [
        (("upgrade", "001"), "base -> 001\n"),
        (("upgrade", "head"), "001 -> 002\n"),
        (("upgrade", "head"), "002 -> 002\n"),
        (("current",), "002 -> 002\n"),
        (("history", "-i"), "002 -> 002\n"),
        (("downgrade", "001"), "002 -> 001\n"),
        (("stamp", "head"), "001 -> 002\n"),
        (("stamp", "--purge", "001"), " -> 001\n"),
        (("downgrade", "base"), "001 -> base\n"),
        (("current",), "base -> base\n"),
    ]:
        file.unlink(missing_ok=True)
        assert project.alembic(*arguments).returncode == 0
        assert file.read_text() == expected, arguments


def test_all_heads_are_written(project: Project, file: Path) -> None:
    project.add("002")
    project.add("003", down="001", name="other")
    assert _upgrade(project, "upgrade", "heads").returncode == 0
    assert file.read_text() == "base -> 002, 003\n"


def test_a_failing_revision_leaves_the_one_before_it(project: Project, database: Database, file: Path) -> None:
    project.add("002")
    project.add("003", FAILS)
    assert _upgrade(project).returncode == 255
    assert (file.read_text(), database.at) == ("base -> 002\n", ["002"])
    assert _upgrade(project).returncode == 255
    assert file.read_text() == "002 -> 002\n"


def test_a_revision_that_is_retried_counts_once(project: Project, database: Database, file: Path) -> None:
    """The second attempt starts at another revision than the run."""
    project.add("002", 'import os\nif not os.path.exists("started"):\n    open("started", "w")\n    ' + SLEEP)
    running = project.start("upgrade", "head")
    until(lambda: sleeping(database))
    terminate(database)
    assert running.wait().returncode == 0
    assert (file.read_text(), database.at) == ("base -> 002\n", ["002"])


def test_a_refused_database_stays_where_it_is(project: Project, database: Database, file: Path) -> None:
    path = project.add("002")
    assert _upgrade(project).returncode == 0
    path.unlink()
    assert _upgrade(project).returncode == 255
    assert file.read_text() == "002 -> 002\n"


def test_a_revision_with_control_characters_is_one_line(project: Project, database: Database, file: Path) -> None:
    assert _upgrade(project).returncode == 0
    database.execute("UPDATE alembic_version SET version_num = E'ü\\n1 -> 2\\x1b[31m'")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert project.start("current", **ascii_only).wait().returncode == 255
    assert file.read_text("utf-8") == "ü\\n1 -> 2\\x1b[31m -> ü\\n1 -> 2\\x1b[31m\n"


def test_what_is_unknown_is_empty(offline_project: Project, tmp_path: Path) -> None:
    """Nothing listens there."""
    file = tmp_path / "position"
    result = offline_project.alembic("upgrade", "head", POSITION_FILE=str(file), MIGRATION_WAIT_SECONDS="0")
    assert result.returncode == 1
    assert file.read_text() == " -> \n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_has_written_what_it_knew(
    project: Project, database: Database, file: Path, number: signal.Signals, code: int
) -> None:
    project.add("002", 'op.execute("CREATE TABLE audit (revision text)")')
    project.add("003", audited("003", SLEEP))
    running = project.start("upgrade", "head")
    until(lambda: sleeping(database))
    assert running.stop(number).returncode == code
    assert file.read_text() == ("base -> \n" if number == signal.SIGKILL else "base -> 002\n")


def test_a_run_that_waits_for_another_one_has_only_read_the_end(
    project: Project, database: Database, file: Path
) -> None:
    project.add("002", SLEEP)
    first = project.start("upgrade", "head", POSITION_FILE=None)
    until(lambda: sleeping(database))
    second = project.start("upgrade", "head")
    second.prints(" waiting, ")
    assert second.stop().returncode == 143
    assert file.read_text() == " -> 001\n"
    first.stop()


def test_after_a_server_that_stays_down_the_revision_is_unknown(
    offline_project: Project, own_server: Postgres, tmp_path: Path
) -> None:
    """It may have committed the last revision."""
    file = tmp_path / "position"
    offline_project.add("002", 'op.execute("SELECT pg_sleep(60)")')
    url = dsn(own_server.url)
    running = offline_project.start(
        "upgrade", "head", DATABASE_URL=url, POSITION_FILE=str(file), MIGRATION_WAIT_SECONDS="2"
    )
    until(lambda: "SELECT pg_sleep(60)" in str(execute(own_server.url, "SELECT query FROM pg_stat_activity")))
    own_server.kill()
    assert running.wait().returncode == 1
    assert file.read_text() == "base -> \n"


@pytest.mark.parametrize("path", ["missing/position", ".", "/dev/full"])
def test_a_file_that_cannot_be_written_fails_no_run(project: Project, database: Database, path: str) -> None:
    result = _upgrade(project, POSITION_FILE=path)
    assert (result.returncode, database.at) == (0, ["001"]), result.text
    assert "position" not in result.text.lower()


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_nothing_is_written(project: Project, tmp_path: Path, value: str | None) -> None:
    before = sorted(project.folder.iterdir())
    assert _upgrade(project, POSITION_FILE=value).returncode == 0
    assert [path for path in sorted(project.folder.iterdir()) if path not in before] == []
