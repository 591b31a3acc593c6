"""Runs that are stopped at any moment: no revision is applied partially, and the next run completes."""

import signal

import pytest

from tests.support.database import Database
from tests.support.messages import AGAIN
from tests.support.project import Project
from tests.support.revisions import AUDIT, BLOCK, BUILD, SLEEP, audited
from tests.support.runs import audit, building, idle, sleeping, terminate
from tests.support.waiting import until

EXIT_CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
signals = pytest.mark.parametrize(("number", "code"), EXIT_CODES, ids=["SIGTERM", "SIGINT", "SIGKILL"])

# A revision that sends a signal to its process when the run logs this message, if a variable is set.
SIGNAL_AT = """
import logging, os
def filter(record):
    if "SIGNAL" in os.environ and record.getMessage().startswith({message!r}):
        os.kill(os.getpid(), {number})
    return True
logging.getLogger("migration_runner").addFilter(filter)
"""


@pytest.mark.fault(
    "Process and pod",
    fault="SIGTERM, SIGINT or SIGKILL between two revisions, or after the last one before the exit",
    sees="`FAILED: interrupted by <signal>; the database is at revision <number>; run again to resume; ...`, exit 143"
    " (130); SIGKILL: no message, exit 137",
    state="Finished revisions are kept, each applied once; no lock",
    do="Deploy again",
)
@signals
@pytest.mark.parametrize(
    ("message", "at"),
    [("done in", "003"), ("running upgrade 003 -> 004", "003"), ("now at", "004")],
    ids=["after a revision", "before the next", "after the last"],
)
def test_a_run_that_ends_between_two_revisions_has_applied_whole_ones(
    project: Project, database: Database, number: signal.Signals, code: int, message: str, at: str
) -> None:
    project.add("002", AUDIT)
    project.add("003", audited("003", SIGNAL_AT.format(message=message, number=int(number))))
    project.add("004", audited("004"))
    result = project.alembic("upgrade", "head", SIGNAL="yes")
    assert result.returncode == code, result
    if number != signal.SIGKILL:
        assert result.failure == f"interrupted by {number.name}; the database is at revision {at}; {AGAIN}"
    idle(database)
    assert (database.at, audit(database)) == ([at], ["003", "004"][: int(at) - 2])
    assert project.alembic("upgrade", "head").returncode == 0
    assert (database.at, audit(database)) == (["004"], ["003", "004"])


@pytest.mark.fault(
    "Process and pod",
    fault="SIGKILL (out of memory, a lost node) while a run waits for another one",
    sees="No message from the run, exit 137; the other run is not affected",
    state="Only the other run's changes; no session or lock of the killed one",
    do="Nothing",
)
def test_a_run_that_is_killed_while_it_waits_does_not_affect_the_other(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    project.add("003", audited("003", 'op.execute("SELECT pg_sleep(4)")'))
    first = project.start("upgrade", "head")
    until(lambda: sleeping(database))
    second = project.start("upgrade", "head")
    second.prints(" waiting, ")
    result = second.stop(signal.SIGKILL)
    assert result.returncode == -9
    assert first.wait().returncode == 0
    assert (database.at, audit(database)) == (["003"], ["003"])
    idle(database)


@pytest.mark.fault(
    "Partial work",
    fault="SIGKILL while an index is built concurrently",
    sees="The next run: `... already exists ...; left INVALID: public.slow;"
    " drop with: DROP INDEX CONCURRENTLY public.slow; the database is at revision 002`, exit 255",
    state="An INVALID index; finished revisions are kept",
    do="Run the statement in the message, deploy again",
)
def test_an_index_whose_build_was_killed_is_reported_by_the_next_run(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    project.add("003", BLOCK + BUILD)
    assert project.alembic("upgrade", "002").returncode == 0
    with database.session() as writer:
        writer.execute("INSERT INTO audit VALUES ('writer')")  # CREATE INDEX CONCURRENTLY waits for it to end
        running = project.start("upgrade", "head")
        until(lambda: building(database))
        running.stop(signal.SIGKILL)
        idle(database)
    result = project.alembic("upgrade", "head")
    drop = "DROP INDEX CONCURRENTLY public.slow"
    assert (result.returncode, database.at) == (255, ["002"])
    assert f"; left INVALID: public.slow; drop with: {drop}; the database is at revision 002; " in result.failure
    database.execute(drop)
    assert project.alembic("upgrade", "head").returncode == 0
    assert database.scalar("SELECT indisvalid FROM pg_index WHERE indexrelid = 'slow'::regclass") is True


@pytest.mark.fault(
    "Partial work",
    fault="SIGKILL after an index was built concurrently and before its revision was stamped",
    sees="The next run: `revision 003 (...) failed: relation ... already exists (created manually, or by a run that"
    " was killed before the revision was stamped: see docs/troubleshooting.md)`, exit 255",
    state="A valid index; finished revisions are kept",
    do="`DROP INDEX CONCURRENTLY` it, deploy again",
)
def test_an_index_that_was_built_but_not_stamped_is_reported_with_the_fix(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    kill = "import os\nos.kill(os.getpid(), signal.SIGKILL)"
    path = project.add("003", f"{BLOCK}{BUILD}\n{kill}")
    assert project.alembic("upgrade", "head").returncode == -9
    idle(database)
    path.write_text(path.read_text().replace("os.kill", "print"))
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["002"])
    assert result.failure == (
        f'revision 003 ({path.name}) failed: relation "slow" already exists (created manually, or by a run that was'
        f" killed before the revision was stamped: see docs/troubleshooting.md), at {path.name}, line 8;"
        " rolled back; the database is at revision 002; fix it, then retry"
    )
    database.execute("DROP INDEX CONCURRENTLY slow")
    assert project.alembic("upgrade", "head").returncode == 0
    assert database.at == ["003"]


@pytest.mark.fault(
    "Partial work",
    fault="The connection breaks in an `autocommit_block`",
    sees="`... failed: server closed the connection unexpectedly ...; committed outside the transaction and not rolled"
    " back: ...; check what was committed by: ...; drop with: DROP INDEX CONCURRENTLY public.slow; the database is at"
    " revision 002; ...`, exit 255",
    state="What the message lists; finished revisions are kept",
    do="Undo or complete what is listed, deploy again",
)
def test_a_broken_connection_in_an_autocommit_block_lists_what_was_committed(
    project: Project, database: Database
) -> None:
    project.add("002", AUDIT)
    path = project.add("003", f"{BLOCK}{BUILD}\n    {SLEEP}")
    running = project.start("upgrade", "head")
    until(lambda: sleeping(database))
    terminate(database)
    result = running.wait()
    assert (result.returncode, database.at) == (255, ["002"])
    assert result.failure == (
        f"revision 003 ({path.name}) failed: server closed the connection unexpectedly This probably means the server"
        f" terminated abnormally before or while processing the request, at {path.name}, line 9;"
        " committed outside the transaction and not rolled back: CREATE INDEX CONCURRENTLY slow ON audit;"
        " check what was committed by: SELECT pg_sleep; drop with: DROP INDEX CONCURRENTLY public.slow;"
        " the database is at revision 002; fix it, then retry"
    )
    assert " waiting, " not in result.stderr
    path.write_text(path.read_text().replace("pg_sleep(60)", "1"))
    database.execute("DROP INDEX CONCURRENTLY slow")
    assert project.alembic("upgrade", "head").returncode == 0
