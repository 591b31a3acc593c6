"""What a run logs: one line per fact, in a fixed order, on standard error, and never a password."""

import pytest

from tests.support.database import Database
from tests.support.project import Project


@pytest.fixture
def since(database: Database) -> str:
    return f"HH:MM:SS INFO since YYYY-MM-DD HH:MM:SS UTC: {{}} by {database.role}"


@pytest.fixture
def first_line(database: Database) -> str:
    version = database.scalar("SELECT current_setting('server_version')")
    url = database.url
    return (
        f"HH:MM:SS INFO database {database.name} at {url.host}:{url.port or 5432} as {database.role}, schema public,"
        f" PostgreSQL {version}"
    )


def test_an_upgrade_logs_the_database_the_steps_and_their_durations(
    project: Project, first_line: str, since: str
) -> None:
    project.add("002", name="add_status_column")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.splitlines() == [
        first_line,
        "HH:MM:SS INFO at base (the head is 002); to do: 2 (001 create_hcm_report_metadata, 002 add_status_column)",
        "HH:MM:SS INFO running upgrade  -> 001, create_hcm_report_metadata",
        "HH:MM:SS INFO done in N.NN s",
        "HH:MM:SS INFO running upgrade 001 -> 002, add_status_column",
        "HH:MM:SS INFO done in N.NN s",
        since.format("upgrade 002"),
        "HH:MM:SS INFO now at 002 (head)",
    ]


def test_a_second_upgrade_logs_that_there_is_nothing_to_do(project: Project, first_line: str, since: str) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    result = project.alembic("upgrade", "head")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.lines == [first_line, since.format("upgrade 001"), "HH:MM:SS INFO at 001 (head): nothing to do"]


def test_many_revisions_are_counted_and_the_first_ten_named(project: Project) -> None:
    for number in range(2, 13):
        project.add(f"{number:03}")
    names = ", ".join(["001 create_hcm_report_metadata", *(f"{number:03} add" for number in range(2, 11)), "..."])
    result = project.alembic("upgrade", "head")
    assert result.lines[1] == f"HH:MM:SS INFO at base (the head is 012); to do: 12 ({names})"
    assert result.lines[-1] == "HH:MM:SS INFO now at 012 (head)"


def test_a_downgrade_logs_the_same(project: Project, first_line: str, since: str) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    result = project.alembic("downgrade", "-1")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.lines == [
        first_line,
        "HH:MM:SS INFO at 001 (head); to do: 1 (001 create_hcm_report_metadata)",
        "HH:MM:SS INFO running downgrade 001 -> , create_hcm_report_metadata",
        "HH:MM:SS INFO done in N.NN s",
        since.format("downgrade 001"),
        "HH:MM:SS INFO now at base (the head is 001)",
    ]


def test_a_failure_ends_with_the_reason_and_the_fix(project: Project, first_line: str) -> None:
    path = project.add("002", 'op.execute("SELECT 1 / 0")')
    result = project.alembic("upgrade", "head")
    reason = (
        f"revision 002 ({path.name}) failed: division by zero, at {path.name}, line 7; rolled back; the database is at"
        " revision 001; fix it, then retry"
    )
    assert (result.returncode, result.stdout) == (255, f"FAILED: {reason}\n")
    assert result.stderr.splitlines() == [
        first_line,
        "HH:MM:SS INFO at base (the head is 002); to do: 2 (001 create_hcm_report_metadata, 002 add)",
        "HH:MM:SS INFO running upgrade  -> 001, create_hcm_report_metadata",
        "HH:MM:SS INFO done in N.NN s",
        "HH:MM:SS INFO running upgrade 001 -> 002, add",
    ]


def test_current_logs_the_database_and_prints_only_the_revision(project: Project, first_line: str, since: str) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    result = project.alembic("current")
    assert (result.returncode, result.stdout, result.stderr) == (
        0,
        "001 (head)\n",
        f"{first_line}\n{since.format('upgrade 001')}\n",
    )


def test_log_messages_of_a_revision_are_shown(project: Project) -> None:
    project.add("002", 'import logging\nlogging.getLogger("migrations.versions").info("12 rows changed")')
    assert "HH:MM:SS INFO 12 rows changed" in project.alembic("upgrade", "head").lines


def test_the_values_of_a_failed_statement_are_not_printed(project: Project) -> None:
    statement = "sa.text(\"SELECT 1 / 0 WHERE :name = 'x'\")"
    project.add("002", f'import sqlalchemy as sa\nop.get_bind().execute({statement}, {{"name": "x-ray"}})')
    result = project.alembic("upgrade", "head")
    assert result.failure.startswith("revision 002 ")
    assert "x-ray" not in result.stdout + result.stderr
