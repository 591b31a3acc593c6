"""Locked tables: no other session is blocked for long, and a lock timeout is retried if that is safe."""

import signal
import time

import pytest

from migration_runner.database import Database as RunDatabase
from migration_runner.monitor import Monitor
from migration_runner.retry import RetryBudget
from migration_runner.session import open_session
from migration_runner.settings import Settings
from tests.support.database import Database
from tests.support.project import Project
from tests.support.revisions import AUDIT, BLOCK, FILE, SLEEP, audited
from tests.support.runs import audit, sleeping
from tests.support.waiting import AT_ONCE, until


@pytest.mark.fault(
    "Database",
    fault="A table is locked, and released later",
    sees="`waiting, ...: revision 003 (...) failed: canceling statement due to lock timeout ...`,"
    " then recovers automatically; other sessions wait 3 s at most",
    state="Complete, each revision applied once",
    do="Nothing",
)
def test_a_locked_table_is_retried_until_it_is_released_and_no_session_is_blocked_for_long(
    project_at_002: Project, database: Database
) -> None:
    project_at_002.add("003", audited("003", 'op.execute("ALTER TABLE hcm_report_metadata ADD COLUMN status text")'))
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM hcm_report_metadata")
        running = project_at_002.start("upgrade", "head")
        until(lambda: sleeping(database, "ALTER TABLE"))
        start = time.monotonic()
        # Another session's query queues behind the waiting ALTER TABLE, until that times out.
        assert database.scalar("SELECT count(*) FROM hcm_report_metadata") == 0
        assert time.monotonic() - start < AT_ONCE
    result = running.wait()
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
    waiting = [line for line in result.lines if " waiting, " in line]
    assert waiting[0].endswith(
        f" s more: revision 003 ({FILE.format('003')}) failed: canceling statement due to lock timeout, at"
        f" {FILE.format('003')}, line 8; blocked by pid N, report as postgres; rolled back;"
        " the database is at revision 002"
    )
    assert result.lines[-1] == "HH:MM:SS INFO now at 003 (head)"


@pytest.mark.fault(
    "Database",
    fault="A table stays locked",
    sees="`... canceling statement due to lock timeout ...; blocked by pid N, report as postgres; rolled back;"
    " the database is at revision 002; timed out after N s; retry later`, exit 1",
    state="Finished revisions are kept, this one is rolled back",
    do="Terminate that session, or deploy off-peak; the run releases its locks between attempts",
)
def test_a_table_that_stays_locked_fails_the_run_and_names_the_blocking_session(
    project_at_002: Project, database: Database
) -> None:
    project_at_002.add("003", audited("003", 'op.execute("ALTER TABLE hcm_report_metadata ADD COLUMN status text")'))
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM hcm_report_metadata")
        result = project_at_002.alembic("upgrade", "head", MIGRATION_WAIT_SECONDS="4")
    assert result.returncode == 1
    assert result.failure == (
        f"revision 003 ({FILE.format('003')}) failed: canceling statement due to lock timeout, at {FILE.format('003')},"
        " line 8; blocked by pid N, report as postgres; rolled back; the database is at revision 002;"
        " timed out after 4 s; retry later"
    )
    assert (database.at, audit(database)) == (["002"], [])


def test_the_monitor_survives_a_lost_connection(database: Database) -> None:
    """Found by ten concurrent runs killed at random: it ended with a traceback once in 920 rounds."""
    settings = Settings(database.url.set(drivername="postgresql+psycopg2"), None, "alembic_version", 5)
    run = RunDatabase(settings)
    with open_session(run, RetryBudget(5)) as session:
        with Monitor(run, session.raw.pid, lambda: None) as monitor:
            session.connection.invalidate()
            time.sleep(1.5)
        assert monitor.blockers == set()


def test_a_relative_upgrade_is_retried_and_goes_no_further(project_at_002: Project, database: Database) -> None:
    project_at_002.add("003", audited("003", 'op.execute("LOCK TABLE hcm_report_metadata")'))
    project_at_002.add("004", audited("004"))
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM hcm_report_metadata")
        running = project_at_002.start("upgrade", "+1")
        until(lambda: sleeping(database, "LOCK TABLE"))
    result = running.wait()
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result


def test_a_partly_applied_relative_upgrade_is_retried_from_its_starting_revision(
    project_at_002: Project, database: Database
) -> None:
    """From 003, which the first attempt reached, `+2` would go to 005."""
    project_at_002.add("003", audited("003"))
    project_at_002.add("004", audited("004", 'op.execute("LOCK TABLE hcm_report_metadata")'))
    project_at_002.add("005", audited("005"))
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM hcm_report_metadata")
        running = project_at_002.start("upgrade", "+2")
        running.prints("; blocked by pid ")
    result = running.wait()
    assert (result.returncode, database.at, audit(database)) == (0, ["004"], ["003", "004"]), result


def test_an_interrupted_relative_downgrade_names_its_target_revision(project: Project, database: Database) -> None:
    """From 002, where it stopped, `-2` would go to base."""
    project.add("002", AUDIT, SLEEP)
    project.add("003")
    assert project.alembic("upgrade", "head").returncode == 0
    running = project.start("downgrade", "-2")
    until(lambda: sleeping(database))
    result = running.stop(signal.SIGTERM)
    assert (result.returncode, database.at) == (143, ["002"])
    assert "; rolled back; the database is at revision 002; run 'alembic downgrade 001' to resume; " in result.failure


@pytest.mark.fault(
    "Database",
    fault="A deadlock with another session",
    sees="`waiting, ...: ... failed: deadlock detected ...`, then recovers automatically",
    state="Complete, each revision applied once",
    do="Nothing",
)
def test_a_deadlock_is_retried(project_at_002: Project, database: Database) -> None:
    database.execute("CREATE TABLE a (); CREATE TABLE b (); GRANT ALL ON a, b TO PUBLIC")
    database.execute("ALTER TABLE a OWNER TO " + database.role + "; ALTER TABLE b OWNER TO " + database.role)
    body = 'op.execute("SET LOCAL lock_timeout = 0")\nop.execute("LOCK a")\nop.execute("SELECT pg_sleep(1)")\n'
    project_at_002.add("003", audited("003", body + 'op.execute("LOCK b")'))
    with database.session() as other:
        other.execute("SET deadlock_timeout = '60s'; LOCK b")  # so that the server cancels the run
        running = project_at_002.start("upgrade", "head")
        until(lambda: sleeping(database))
        other.execute("LOCK a")
    result = running.wait()
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
    assert "failed: deadlock detected (Process " in next(line for line in result.lines if " waiting, " in line)


@pytest.mark.parametrize(
    "statement", ["{} /* CONCURRENTLY */", "-- CREATE INDEX CONCURRENTLY\n{}", "{} DEFAULT 'CONCURRENTLY'"]
)
def test_concurrently_in_a_comment_or_a_string_keeps_the_lock_timeout(
    project_at_002: Project, database: Database, statement: str
) -> None:
    add = statement.format("ALTER TABLE hcm_report_metadata ADD COLUMN status text")
    project_at_002.add("003", f"{BLOCK}op.execute({add!r})")
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM hcm_report_metadata")
        start = time.monotonic()
        result = project_at_002.alembic("upgrade", "head")
        assert time.monotonic() - start < AT_ONCE
    assert (result.returncode, database.at) == (255, ["002"])
    assert "failed: canceling statement due to lock timeout" in result.failure


@pytest.mark.fault(
    "Database",
    fault="The version table is locked",
    sees="`waiting, ...: canceling statement due to lock timeout; ...; the database's revision is unknown: check with"
    " 'alembic current'`, then recovers automatically, or `timed out after N s; retry later`, exit 1",
    state="Nothing was changed",
    do="Terminate that session, deploy again",
)
def test_a_locked_version_table_is_waited_for_in_bounded_time(project_at_002: Project, database: Database) -> None:
    with database.session() as other:
        other.execute("LOCK TABLE alembic_version")
        start = time.monotonic()
        result = project_at_002.alembic("upgrade", "head", MIGRATION_WAIT_SECONDS="2")
        assert time.monotonic() - start < 30
    assert result.returncode == 1
    assert result.failure == (
        "canceling statement due to lock timeout; blocked by pid N, report as postgres; the database's revision is"
        " unknown: check with 'alembic current'; timed out after 2 s; retry later"
    )


def test_a_partition_is_detached_concurrently_without_a_lock_timeout(
    project_at_002: Project, database: Database
) -> None:
    body = """
op.execute("CREATE TABLE a (x int) PARTITION BY LIST (x)")
op.execute("CREATE TABLE a1 PARTITION OF a FOR VALUES IN (1)")
"""
    project_at_002.add("003", body)
    detach = 'op.execute("ALTER TABLE a DETACH PARTITION a1 CONCURRENTLY")'
    project_at_002.add("004", BLOCK + detach)
    assert project_at_002.alembic("upgrade", "003").returncode == 0
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM a")
        running = project_at_002.start("upgrade", "head")
        until(lambda: sleeping(database, "DETACH"))
        time.sleep(4)  # lock_timeout is 3 s
        reader.connection.commit()
        result = running.wait()
    assert (result.returncode, database.at) == (0, ["004"]), result
    assert database.execute("SELECT 1 FROM pg_inherits WHERE inhdetachpending") == []


def test_a_run_whose_role_is_set_to_another_is_monitored_and_cancelled(
    project_at_002: Project, database: Database
) -> None:
    group = f"group_{database.role}"
    database.execute(f"CREATE ROLE {group} ROLE {database.role}; GRANT ALL ON SCHEMA public TO {group}")
    database.execute(f"GRANT ALL ON alembic_version TO {group}; ALTER ROLE {database.role} SET role = {group}")
    try:
        project_at_002.add("003", SLEEP)
        running = project_at_002.start("upgrade", "head")
        running.prints(" s: SELECT pg_sleep")
        result = running.stop(signal.SIGTERM)
        assert "; rolled back; the database is at revision 002; " in result.failure
    finally:
        database.execute(f"DROP OWNED BY {group}; DROP ROLE {group}")
