"""Concurrent runs: one migrates, the others wait, and no revision is applied twice."""

import signal

import pytest

from tests.support.database import Database
from tests.support.messages import FIX
from tests.support.project import Project
from tests.support.revisions import AUDIT, BLOCK, BUILD, FILE, SLEEP, audited
from tests.support.runs import audit, idle, sleeping
from tests.support.waiting import until


@pytest.mark.fault(
    "Concurrency",
    fault="Two or ten concurrent runs (two releases, two clusters, the same pod twice)",
    sees="One migrates, the others log `waiting, ...: another migration is running (pid ...)`,"
    " then `nothing to do`; all exit 0",
    state="Each revision applied once",
    do="Nothing",
)
@pytest.mark.parametrize("runners", [2, 10])
def test_concurrent_runs_apply_each_revision_once(project: Project, database: Database, runners: int) -> None:
    project.add("002", AUDIT)
    project.add("003", audited("003", 'op.execute("SELECT pg_sleep(0.5)")'))
    project.add("004", audited("004", BLOCK + BUILD))
    project.add("005", audited("005"))
    results = [running.wait() for running in [project.start("upgrade", "head") for _ in range(runners)]]
    assert [result.returncode for result in results] == [0] * runners, results
    assert sorted(result.lines[-1] for result in results) == (
        ["HH:MM:SS INFO at 005 (head): nothing to do"] * (runners - 1) + ["HH:MM:SS INFO now at 005 (head)"]
    )
    assert (audit(database), database.at) == (["003", "004", "005"], ["005"])
    idle(database)


@pytest.mark.fault(
    "Concurrency",
    fault="Another run does not finish",
    sees="`another migration was still running after N s (pid ...); wait for it to finish, or terminate it with"
    " SELECT pg_terminate_backend(pid), or raise MIGRATION_WAIT_SECONDS`, exit 1",
    state="Only the other run's changes",
    do="Follow the message",
)
def test_a_second_run_names_the_run_it_waits_for_and_times_out(project_at_002: Project, database: Database) -> None:
    project_at_002.add("003", audited("003", SLEEP))
    first = project_at_002.start("upgrade", "head")
    until(lambda: sleeping(database))
    second = project_at_002.alembic("upgrade", "head", MIGRATION_WAIT_SECONDS="1")
    holder = f"pid N, hcm-db-migrations as {database.role} from 127.0.0.1"
    assert second.lines[1:] == [
        f"HH:MM:SS INFO waiting, up to 1 s more: another migration is running ({holder})",
        f"FAILED: another migration was still running after 1 s ({holder}); wait for it to finish, or terminate it"
        " with SELECT pg_terminate_backend(pid), or raise MIGRATION_WAIT_SECONDS",
    ]
    assert second.returncode == 1
    first.stop(signal.SIGTERM)
    assert audit(database) == []


def test_projects_with_different_version_tables_do_not_wait_for_each_other(
    project_at_002: Project, database: Database
) -> None:
    project_at_002.add("003", audited("003", SLEEP))
    first = project_at_002.start("upgrade", "head")
    until(lambda: sleeping(database))
    second = project_at_002.alembic("stamp", "head", ALEMBIC_VERSION_TABLE="other", MIGRATION_WAIT_SECONDS="0")
    assert second.returncode == 0, second
    first.stop(signal.SIGTERM)


def test_read_only_commands_do_not_wait_for_a_run(project_at_002: Project, database: Database) -> None:
    project_at_002.add("003", audited("003", SLEEP))
    first = project_at_002.start("upgrade", "head")
    until(lambda: sleeping(database))
    assert project_at_002.alembic("current", MIGRATION_WAIT_SECONDS="0").stdout == "002\n"
    first.stop(signal.SIGTERM)


def test_a_revision_that_releases_the_lock_fails_if_another_run_acquires_it(
    project_at_002: Project, database: Database
) -> None:
    key = "SELECT classid::bigint << 32 | objid::bigint FROM pg_locks WHERE locktype = 'advisory'"
    body = f"""
query = op.get_bind().exec_driver_sql
key = query("{key}").scalar()
op.execute("SELECT pg_advisory_unlock_all()")
with open("key", "x") as file: file.write(f"{{key}}\\n")
while not query("{key}").all(): time.sleep(0.05)"""
    project_at_002.add("003", audited("003", body))
    project_at_002.add("004", audited("004"))
    running = project_at_002.start("upgrade", "head")
    file = project_at_002.folder / "key"
    until(lambda: file.exists() and file.read_text().endswith("\n"))
    with database.session() as other:
        other.execute(f"SELECT pg_try_advisory_lock({file.read_text()})")
        assert other.fetchone() == (True,)
        result = running.wait()
    assert (result.returncode, result.failure) == (
        255,
        f"revision 003 ({FILE.format('003')}) released the migration lock, which another run has acquired; do not"
        f" release session-level advisory locks; rolled back; the database is at revision 002; {FIX}",
    )
    assert (database.at, audit(database)) == (["002"], [])
