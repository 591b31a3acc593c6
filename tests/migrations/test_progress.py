"""Long-running revisions log progress: the statement, its phase, the sessions it waits for or blocks."""

import re
import signal
import threading
import time

import pytest

from tests.support.database import Database
from tests.support.programs import Result
from tests.support.project import Project
from tests.support.revisions import BLOCK, BUILD, FILE, SLEEP, audited
from tests.support.runs import building, sleeping
from tests.support.waiting import until

NAME = f"revision 003 \\({FILE.format('003')}\\)".replace(".", "\\.")


def progress(result: Result) -> list[str]:
    return [line for line in result.lines if "still running" in line]


@pytest.mark.fault(
    "Database",
    fault="A statement runs for a long time",
    sees="After 10 s, and every 10 s in the first minute:"
    " `revision 003 (...) still running after N s: SELECT pg_sleep`",
    state="-",
    do="Nothing",
)
def test_a_long_statement_is_named_without_its_values(project_at_002: Project, database: Database) -> None:
    project_at_002.add("003", audited("003", 'op.execute("SELECT pg_sleep(23)")'))
    result = project_at_002.alembic("upgrade", "head")
    lines = progress(result)
    assert result.returncode == 0
    assert len(lines) == 2
    for line in lines:
        assert re.fullmatch(rf"HH:MM:SS INFO {NAME} still running after \d+ s: SELECT pg_sleep", line), line


@pytest.mark.fault(
    "Database",
    fault="A concurrent index build waits for other sessions, or runs for a long time",
    sees="`revision 003 (...) still running after N s: CREATE INDEX CONCURRENTLY slow ON audit; waiting for writers"
    " before build; waiting for pid N, report as postgres`",
    state="-",
    do="Terminate that session, or wait",
)
def test_a_concurrent_build_logs_its_phase_and_the_session_it_waits_for(
    project_at_002: Project, database: Database
) -> None:
    project_at_002.add("003", BLOCK + BUILD)
    with database.session() as writer:
        writer.execute("INSERT INTO audit VALUES ('writer')")
        running = project_at_002.start("upgrade", "head")
        until(lambda: building(database))
        running.prints("still running")
        writer.connection.commit()
        result = running.wait()
    assert result.returncode == 0
    line = progress(result)[0]
    assert re.fullmatch(
        rf"HH:MM:SS INFO {NAME} still running after \d+ s: CREATE INDEX CONCURRENTLY slow ON audit; waiting for writers"
        r" before build(, \d+ %)?; waiting for pid N, report as postgres( from \S+)?",
        line,
    ), line


@pytest.mark.fault(
    "Concurrency",
    fault="A revision opens a second connection, which waits for the first one",
    sees="`revision 003 (...) still running after N s: no statement is running; pid N, hcm-db-migrations as ..., a"
    " connection opened by the revision waits for this run`, and the same in the last line",
    state="Finished revisions are kept, this one is rolled back except what its second connection committed",
    do="Use only `op.get_bind()`",
)
def test_a_second_connection_that_waits_for_the_first_is_named(project_at_002: Project, database: Database) -> None:
    body = """
op.execute("ALTER TABLE audit ADD COLUMN x int")
with op.get_bind().engine.begin() as other:
    other.exec_driver_sql("UPDATE audit SET revision = 'x'")
"""
    project_at_002.add("003", body)
    running = project_at_002.start("upgrade", "head")
    running.prints("still running")
    result = running.stop(signal.SIGTERM)
    own = f"pid N, hcm-db-migrations as {database.role} from 127.0.0.1, a connection opened by the revision"
    line = progress(result)[0]
    assert line.endswith(f": no statement is running; {own} waits for this run")
    assert result.returncode == 143
    assert (
        f"; waiting for this run: {own}; check for changes committed on the revision's second connection; the database"
        " is at revision 002; "
    ) in result.failure


def test_a_session_that_waits_for_the_run_is_named(project_at_002: Project, database: Database) -> None:
    project_at_002.add("003", audited("003", f'op.execute("LOCK TABLE hcm_report_metadata")\n{SLEEP}'))
    running = project_at_002.start("upgrade", "head")
    until(lambda: sleeping(database))
    with database.session() as reader:
        pid = reader.connection.info.backend_pid
        read = "SELECT count(*) FROM hcm_report_metadata"
        thread = threading.Thread(target=reader.execute, args=(read,))
        thread.start()
        until(lambda: database.scalar(f"SELECT count(*) FROM pg_locks WHERE pid = {pid} AND NOT granted") > 0)
        running.prints("still running")
        result = running.stop(signal.SIGTERM)
        thread.join()
    line = progress(result)[0]
    assert "; pid N, report as postgres" in line
    assert line.endswith(" waits for this run")


def test_a_short_revision_logs_no_progress(project_at_002: Project) -> None:
    project_at_002.add("003", audited("003", "time.sleep(3)"))
    start = time.monotonic()
    result = project_at_002.alembic("upgrade", "head")
    assert time.monotonic() - start < 9
    assert "still running" not in result.stderr
