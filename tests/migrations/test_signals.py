"""Signals: a run stops within seconds, reports its position, and leaves no revision partly applied."""

import signal
import sys
from pathlib import Path

import pytest

from tests.support.database import Database
from tests.support.messages import AGAIN, KILLED
from tests.support.programs import Result
from tests.support.project import Project
from tests.support.revisions import BLOCK, BUILD, FILE, SLEEP, audited, edit
from tests.support.runs import audit, building, idle, sleeping
from tests.support.waiting import until

STOPS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
stops = pytest.mark.parametrize(("number", "code"), STOPS, ids=["SIGTERM", "SIGINT"])

IGNORES_EXCEPTIONS = """while True:
    try:
        open("started", "w")
        time.sleep(60)
    except BaseException:
        pass
"""


def interrupted(result: Result, number: signal.Signals, code: int, position: str) -> None:
    assert result.returncode == code, result
    assert result.failure == f"interrupted by {number.name}{position}; {AGAIN}"


def during(result: Result, revision: str, rest: str) -> str:
    elapsed = result.failure.split(" after ")[1].split(" ")[0]
    return f" in revision {revision} ({FILE.format(revision)}) after {elapsed} s; {rest}"


@pytest.mark.fault(
    "Process and pod",
    fault="SIGTERM (drain, deadline, deleted Job) or SIGINT during a revision",
    sees="Within 2 s `interrupted by <signal> in revision 004 (...) after N s; rolled back; the database is at"
    " revision 003; run again to resume; ...`, exit 143 (130)",
    state="Finished revisions are kept, this one is rolled back",
    do="Deploy again; if the deadline was exceeded, raise `job.activeDeadlineSeconds` and Helm's `--timeout`",
)
@stops
@pytest.mark.parametrize(
    ("body", "statement"),
    [
        (SLEEP, "pg_sleep"),
        ('op.execute("CREATE TABLE started ()")\ntime.sleep(60)', "CREATE TABLE started"),
        (
            'try:\n    op.execute("SELECT pg_sleep(60)")\nexcept Exception:\n    pass\ntime.sleep(60)',
            "pg_sleep",
        ),
    ],
    ids=["in a statement", "in Python", "in a statement whose errors are caught"],
)
def test_a_signal_in_a_revision_rolls_it_back(
    project_at_002: Project, database: Database, number: signal.Signals, code: int, body: str, statement: str
) -> None:
    project_at_002.add("003", audited("003"))
    project_at_002.add("004", audited("004", body))
    running = project_at_002.start("upgrade", "head")
    until(lambda: any(statement in row for row in database.activity()))
    result = running.stop(number)
    interrupted(result, number, code, during(result, "004", "rolled back; the database is at revision 003"))
    idle(database)
    assert (database.at, audit(database)) == (["003"], ["003"])


@pytest.mark.fault(
    "Process and pod",
    fault="SIGTERM or SIGINT while the run waits for the database",
    sees="`interrupted by <signal>; nothing was changed; ...`, exit 143 (130)",
    state="Nothing was changed",
    do="Deploy again",
)
@stops
def test_a_signal_while_waiting_for_the_database(offline_project: Project, number: signal.Signals, code: int) -> None:
    running = offline_project.start("upgrade", "head")
    running.prints(" waiting, ")
    interrupted(running.stop(number), number, code, "; nothing was changed")


@pytest.mark.fault(
    "Process and pod",
    fault="SIGTERM or SIGINT while the run waits for another run",
    sees="`interrupted by <signal>; the database is at revision 002; ...`, exit 143 (130)",
    state="Only the other run's changes",
    do="Nothing",
)
@stops
def test_a_signal_while_waiting_for_another_run(
    project_at_002: Project, database: Database, number: signal.Signals, code: int
) -> None:
    project_at_002.add("003", audited("003", SLEEP))
    first = project_at_002.start("upgrade", "head")
    until(lambda: sleeping(database))
    second = project_at_002.start("upgrade", "head")
    second.prints(" waiting, ")
    interrupted(second.stop(number), number, code, "; the database is at revision 002")
    first.stop(signal.SIGTERM)


@pytest.mark.fault(
    "Process and pod",
    fault="SIGTERM or SIGINT while the run waits for a locked table",
    sees="`interrupted by <signal> in revision 003 (...) after N s; rolled back;"
    " the database is at revision 002; ...`, exit 143 (130)",
    state="Finished revisions are kept, this one is rolled back",
    do="Deploy again",
)
@stops
def test_a_signal_while_waiting_for_a_table(
    project_at_002: Project, database: Database, number: signal.Signals, code: int
) -> None:
    project_at_002.add("003", audited("003", 'op.execute("LOCK TABLE hcm_report_metadata")'))
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM hcm_report_metadata")
        running = project_at_002.start("upgrade", "head")
        until(lambda: sleeping(database, "LOCK TABLE"))
        result = running.stop(number)
    interrupted(result, number, code, during(result, "003", "rolled back; the database is at revision 002"))


@pytest.mark.fault(
    "Partial work",
    fault="SIGTERM or SIGINT while an index is built concurrently",
    sees="`interrupted by <signal> in ...; left INVALID: public.slow; drop with: DROP INDEX"
    " CONCURRENTLY public.slow; ...`, exit 143 (130)",
    state="An INVALID index; finished revisions are kept",
    do="Run the statement in the message, deploy again",
)
@stops
def test_a_signal_while_an_index_is_built_concurrently_names_the_invalid_index(
    project_at_002: Project, database: Database, number: signal.Signals, code: int
) -> None:
    project_at_002.add("003", BLOCK + BUILD)
    with database.session() as writer:
        writer.execute("INSERT INTO audit VALUES ('writer')")  # CREATE INDEX CONCURRENTLY waits for it to end
        running = project_at_002.start("upgrade", "head")
        until(lambda: building(database))
        result = running.stop(number)
    invalid = (
        "left INVALID: public.slow; drop with: DROP INDEX CONCURRENTLY public.slow; the database is at revision 002"
    )
    interrupted(result, number, code, during(result, "003", invalid))
    database.execute("DROP INDEX CONCURRENTLY public.slow")
    assert project_at_002.alembic("upgrade", "head").returncode == 0


def test_a_signal_while_an_index_is_rebuilt_concurrently_names_the_new_one(
    project_at_002: Project, database: Database
) -> None:
    database.execute("CREATE INDEX slow ON audit (revision)")
    project_at_002.add("003", BLOCK + 'op.execute("REINDEX INDEX CONCURRENTLY slow")')
    with database.session() as writer:
        writer.execute("INSERT INTO audit VALUES ('writer')")
        running = project_at_002.start("upgrade", "head")
        until(lambda: building(database))
        result = running.stop(signal.SIGTERM)
    invalid = "left INVALID: public.slow_ccnew; drop with: DROP INDEX CONCURRENTLY public.slow_ccnew"
    assert (result.returncode, invalid in result.failure) == (143, True), result.failure
    database.execute("DROP INDEX CONCURRENTLY public.slow_ccnew")
    assert project_at_002.alembic("upgrade", "head").returncode == 0


@pytest.mark.fault(
    "Process and pod",
    fault="Forty signals at once",
    sees="One message, as for one signal",
    state="Finished revisions are kept, this one is rolled back",
    do="Deploy again",
)
def test_repeated_signals_are_handled_once(project_at_002: Project, database: Database) -> None:
    project_at_002.add("003", audited("003", SLEEP))
    running = project_at_002.start("upgrade", "head")
    until(lambda: sleeping(database))
    for _ in range(20):
        running.process.send_signal(signal.SIGTERM)
        running.process.send_signal(signal.SIGINT)
    result = running.wait()
    assert result.returncode in (143, 130)
    assert result.failure.endswith(AGAIN)
    assert result.lines[-1].startswith("FAILED: interrupted by ")
    assert (database.at, audit(database)) == (["002"], [])


@pytest.mark.fault(
    "Process and pod",
    fault="SIGTERM during a revision that ignores all exceptions",
    sees="Within 2 s `interrupted by SIGTERM; did not stop in time and was killed; the database was at revision 002"
    " before: check with 'alembic current'; run again to resume`, exit 143",
    state="Finished revisions are kept, this one is rolled back",
    do="Deploy again",
)
def test_a_revision_that_ignores_the_interruption_is_killed(project_at_002: Project, database: Database) -> None:
    project_at_002.add("003", audited("003", IGNORES_EXCEPTIONS))
    running = project_at_002.start("upgrade", "head")
    until((project_at_002.folder / "started").exists)
    result = running.stop(signal.SIGTERM)
    assert (result.returncode, result.failure) == (143, KILLED)
    idle(database)
    assert (database.at, audit(database)) == (["002"], [])


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("", "check for changes made outside its transaction"),
        (audited("003"), "committed outside the transaction and not rolled back: INSERT INTO audit"),
    ],
    ids=["nothing before", "a statement before"],
)
def test_a_revision_that_ignores_the_interruption_outside_its_transaction_is_reported(
    project_at_002: Project, before: str, message: str
) -> None:
    project_at_002.add("003", before + BLOCK + IGNORES_EXCEPTIONS.replace("\n", "\n    "))
    running = project_at_002.start("upgrade", "head")
    until((project_at_002.folder / "started").exists)
    result = running.stop(signal.SIGTERM)
    assert (result.returncode, result.failure) == (
        143,
        f"{KILLED.removesuffix('; run again to resume')}; {message}; run again to resume",
    )


@pytest.mark.fault(
    "Process and pod",
    fault="SIGKILL (out of memory, a lost node) during a revision",
    sees="No message from the run, exit 137",
    state="Finished revisions are kept, this one is rolled back; the session ends and releases its lock within seconds",
    do="Deploy again",
)
def test_a_killed_run_leaves_no_lock_and_the_next_one_finishes(project_at_002: Project, database: Database) -> None:
    path = project_at_002.add("003", audited("003", SLEEP))
    running = project_at_002.start("upgrade", "head")
    until(lambda: sleeping(database))
    running.stop(signal.SIGKILL)
    idle(database)  # its statement would have taken a minute
    edit(path, "pg_sleep(60)", "1")
    result = project_at_002.alembic("upgrade", "head")
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result


def test_a_program_that_calls_alembic_keeps_its_own_signal_handlers(project: Project, database: Database) -> None:
    program = project.folder / "program.py"
    program.write_text("""
import signal, sys, threading
from alembic import command
from alembic.config import Config

def handler(number, frame): sys.exit("mine")

signal.signal(signal.SIGTERM, handler)
before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
config = Config("alembic.ini")
command.upgrade(config, "head")
thread = threading.Thread(target=command.downgrade, args=(config, "base"))
thread.start()
thread.join()
command.current(config)
assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
assert signal.set_wakeup_fd(-1) == -1
assert threading.active_count() == 1, threading.enumerate()
signal.raise_signal(signal.SIGTERM)
""")
    result = project.start(str(program), program=Path(sys.executable)).wait()
    assert (result.returncode, result.lines[-1], result.stdout) == (1, "mine", "")
    assert (database.at, database.relations) == ([], [])
