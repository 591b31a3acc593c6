"""Two runs at once, tables that are locked, and signals: nothing is applied twice, nothing is left half done."""

import signal
import sys
import time
from pathlib import Path

import pytest

from migrations import session, settings
from tests.migrations.conftest import Database, Project, Result, until

# Every revision of these tests writes its number here: a revision that ran twice has two rows, one that was
# rolled back has none.
AUDIT = 'op.execute("CREATE TABLE audit (revision text)")'
FILE = "20251202_143000_{}_add.py"
AGAIN = (
    "run again to go on, and where the Job's time was up raise 'job.activeDeadlineSeconds' and Helm's --timeout"
    " together"
)
SLEEP = 'op.execute("SELECT pg_sleep(60)")'
BUILD = 'op.execute("CREATE INDEX CONCURRENTLY slow ON audit (revision)")'


def audited(number: str, body: str = "") -> str:
    return f"op.execute(\"INSERT INTO audit VALUES ('{number}')\")\n{body}"  # noqa: S608


def audit(database: Database) -> list[str]:
    return [revision for (revision,) in database.execute("SELECT revision FROM audit ORDER BY 1")]


@pytest.fixture
def prepared(project: Project, database: Database) -> Project:
    """A database at 002, where 002 made the audit table."""
    project.add("002", AUDIT, 'op.execute("DROP TABLE audit")')
    assert project.alembic("upgrade", "head").returncode == 0
    return project


def sleeping(database: Database, words: str = "pg_sleep") -> bool:
    """Whether a run's statement with these words is at work."""
    return any(row.startswith("active: ") and words in row for row in database.activity())


def idle(database: Database) -> None:
    """Nothing of any run is left on the server within seconds: no session, and so no lock."""
    until(lambda: database.activity() == [], 6)


# ---- two runs at once


@pytest.mark.fault(
    "Concurrency",
    fault="Two or ten runs at once (two releases, two clusters, the same pod twice)",
    sees="One works, the others say `waiting, ...: another run is at work (pid ...)`, then `nothing to do`; all exit 0",
    state="Each revision applied once",
    do="Nothing",
)
@pytest.mark.parametrize("runners", [2, 10])
def test_runs_at_the_same_time_apply_each_revision_once(project: Project, database: Database, runners: int) -> None:
    project.add("002", AUDIT)
    project.add("003", audited("003", 'op.execute("SELECT pg_sleep(0.5)")'))
    project.add("004", audited("004", "with op.get_context().autocommit_block():\n    " + BUILD))
    project.add("005", audited("005"))
    results = [running.wait() for running in [project.popen("upgrade", "head") for _ in range(runners)]]
    assert [result.returncode for result in results] == [0] * runners, results
    assert sorted(result.lines[-1] for result in results) == (
        ["HH:MM:SS INFO at 005 (head): nothing to do"] * (runners - 1) + ["HH:MM:SS INFO now at 005 (head)"]
    )
    assert (audit(database), database.at) == (["003", "004", "005"], ["005"])
    idle(database)


@pytest.mark.fault(
    "Concurrency",
    fault="Another run does not end",
    sees="`another run was still at work after N s (pid ...); let it end, or end it with SELECT "
    "pg_terminate_backend(pid), or raise MIGRATION_WAIT_SECONDS`, exit 1",
    state="The other run's work",
    do="What the line says",
)
def test_a_second_run_says_whom_it_waits_for_and_gives_up(prepared: Project, database: Database) -> None:
    prepared.add("003", audited("003", SLEEP))
    first = prepared.popen("upgrade", "head")
    until(lambda: sleeping(database))
    second = prepared.alembic("upgrade", "head", MIGRATION_WAIT_SECONDS="1")
    holder = f"pid N, hcm-db-migrations as {database.role} from 127.0.0.1"
    assert second.lines[1:] == [
        f"HH:MM:SS INFO waiting, up to 1 s more: another run is at work ({holder})",
        f"FAILED: another run was still at work after 1 s ({holder}); let it end, or end it with SELECT"
        " pg_terminate_backend(pid), or raise MIGRATION_WAIT_SECONDS",
    ]
    assert second.returncode == 1
    first.stop(signal.SIGTERM)
    assert audit(database) == []


def test_projects_with_other_version_tables_do_not_wait_for_each_other(prepared: Project, database: Database) -> None:
    prepared.add("003", audited("003", SLEEP))
    first = prepared.popen("upgrade", "head")
    until(lambda: sleeping(database))
    second = prepared.alembic("stamp", "head", ALEMBIC_VERSION_TABLE="other", MIGRATION_WAIT_SECONDS="0")
    assert second.returncode == 0, second
    first.stop(signal.SIGTERM)


def test_reading_commands_do_not_wait_for_a_run(prepared: Project, database: Database) -> None:
    prepared.add("003", audited("003", SLEEP))
    first = prepared.popen("upgrade", "head")
    until(lambda: sleeping(database))
    assert prepared.alembic("current", MIGRATION_WAIT_SECONDS="0").stdout == "002\n"
    first.stop(signal.SIGTERM)


# ---- tables that are locked


@pytest.mark.fault(
    "Database",
    fault="A table is locked, and freed later",
    sees="`waiting, ...: revision 003 (...) failed: canceling statement due to lock timeout ...`, then it goes on;"
    " bystanders wait 3 s at most",
    state="All done, each revision once",
    do="Nothing",
)
def test_a_locked_table_is_tried_again_until_it_is_free_and_nobody_waits_long(
    prepared: Project, database: Database
) -> None:
    prepared.add("003", audited("003", 'op.execute("ALTER TABLE hcm_report_metadata ADD COLUMN status text")'))
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM hcm_report_metadata")
        running = prepared.popen("upgrade", "head")
        until(lambda: sleeping(database, "ALTER TABLE"))
        start = time.monotonic()
        # A bystander's query queues behind the ALTER TABLE that waits, until that gives way.
        assert database.scalar("SELECT count(*) FROM hcm_report_metadata") == 0
        assert time.monotonic() - start < 4.5
    result = running.wait()
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
    waited = [line for line in result.lines if " waiting, " in line]
    assert waited[0].endswith(
        f" s more: revision 003 ({FILE.format('003')}) failed: canceling statement due to lock timeout, at"
        f" {FILE.format('003')}, line 8; blocked by pid N, report as postgres; rolled back at 002"
    )
    assert result.lines[-1] == "HH:MM:SS INFO now at 003 (head)"


@pytest.mark.fault(
    "Database",
    fault="A table stays locked",
    sees="`... canceling statement due to lock timeout ...; blocked by pid N, report as postgres; rolled back at "
    "002; gave up after N s, run again later`, exit 1",
    state="Finished revisions stay, this one is rolled back",
    do="End that session, or deploy at a quieter time",
)
def test_a_table_that_stays_locked_fails_the_run_and_names_who_holds_it(prepared: Project, database: Database) -> None:
    prepared.add("003", audited("003", 'op.execute("ALTER TABLE hcm_report_metadata ADD COLUMN status text")'))
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM hcm_report_metadata")
        result = prepared.alembic("upgrade", "head", MIGRATION_WAIT_SECONDS="4")
    assert result.returncode == 1
    assert result.failure == (
        f"revision 003 ({FILE.format('003')}) failed: canceling statement due to lock timeout, at {FILE.format('003')},"
        " line 8; blocked by pid N, report as postgres; rolled back at 002; gave up after 4 s, run again"
        " later"
    )
    assert (database.at, audit(database)) == (["002"], [])


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_watch_for_who_blocks_outlives_the_connection(database: Database) -> None:
    """Ten runs at once, killed at random, found that it ended with a traceback, once in 920 rounds."""
    where = settings.Settings(database.url.set(drivername="postgresql+psycopg2"), None, "alembic_version", 5)
    names: set[str] = set()
    with session.connect(where, session.Patience(5)) as connection:
        with session.watch_blockers(where, connection, names):
            connection.invalidate()
            time.sleep(1.5)
        assert names == set()


def test_a_relative_upgrade_is_tried_again_and_goes_no_further(prepared: Project, database: Database) -> None:
    prepared.add("003", audited("003", 'op.execute("LOCK TABLE hcm_report_metadata")'))
    prepared.add("004", audited("004"))
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM hcm_report_metadata")
        running = prepared.popen("upgrade", "+1")
        until(lambda: sleeping(database, "LOCK TABLE"))
    result = running.wait()
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result


def test_a_relative_downgrade_that_was_interrupted_is_not_run_again_as_it_is(
    project: Project, database: Database
) -> None:
    """From 002, where it stopped, `-2` would go to base."""
    project.add("002", AUDIT, SLEEP)
    project.add("003")
    assert project.alembic("upgrade", "head").returncode == 0
    running = project.popen("downgrade", "-2")
    until(lambda: sleeping(database))
    result, _ = running.stop(signal.SIGTERM)
    assert (result.returncode, database.at) == (143, ["002"])
    assert "; rolled back at 002; '-2' would count from there, so name the revision to go to, and" in result.failure


@pytest.mark.fault(
    "Database",
    fault="A deadlock with another session",
    sees="`waiting, ...: ... failed: deadlock detected ...`, then it goes on by itself",
    state="All done, each revision once",
    do="Nothing",
)
def test_a_deadlock_is_tried_again(prepared: Project, database: Database) -> None:
    database.execute("CREATE TABLE a (); CREATE TABLE b (); GRANT ALL ON a, b TO PUBLIC")
    database.execute("ALTER TABLE a OWNER TO " + database.role + "; ALTER TABLE b OWNER TO " + database.role)
    body = 'op.execute("SET LOCAL lock_timeout = 0")\nop.execute("LOCK a")\nop.execute("SELECT pg_sleep(1)")\n'
    prepared.add("003", audited("003", body + 'op.execute("LOCK b")'))
    with database.session() as other:
        other.execute("SET deadlock_timeout = '60s'; LOCK b")  # so that the run is the one that is cancelled
        running = prepared.popen("upgrade", "head")
        until(lambda: sleeping(database))
        other.execute("LOCK a")
    result = running.wait()
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
    assert "failed: deadlock detected (Process " in next(line for line in result.lines if " waiting, " in line)


# ---- signals

STOPS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
stops = pytest.mark.parametrize(("number", "code"), STOPS, ids=["SIGTERM", "SIGINT"])


def interrupted(result: Result, seconds: float, number: signal.Signals, code: int, where: str) -> None:
    assert result.returncode == code, result
    assert result.failure == f"interrupted by {number.name}{where}; {AGAIN}"
    assert seconds < 3


@pytest.mark.fault(
    "Process and pod",
    fault="SIGTERM (drain, deadline, deleted Job) or SIGINT in a revision",
    sees="Within 2 s `interrupted by SIGTERM in revision 004 (...) after N s; rolled back at 003; run again to go "
    "on, ...`, exit 143 (SIGINT: 130)",
    state="Finished revisions stay, this one is rolled back",
    do="Deploy again; where the time was up, raise `job.activeDeadlineSeconds` and Helm's `--timeout`",
)
@stops
@pytest.mark.parametrize(
    ("body", "begun"),
    [
        (SLEEP, "pg_sleep"),
        ('op.execute("CREATE TABLE begun ()")\ntime.sleep(60)', "CREATE TABLE begun"),
        (
            'try:\n    op.execute("SELECT pg_sleep(60)")\nexcept Exception:\n    pass\ntime.sleep(60)',
            "pg_sleep",
        ),
    ],
    ids=["in a statement", "in Python", "in a statement whose errors are caught"],
)
def test_a_signal_in_a_revision_rolls_it_back(
    prepared: Project, database: Database, number: signal.Signals, code: int, body: str, begun: str
) -> None:
    prepared.add("003", audited("003"))
    prepared.add("004", audited("004", body))
    running = prepared.popen("upgrade", "head")
    until(lambda: any(begun in row for row in database.activity()))
    result, seconds = running.stop(number)
    elapsed = result.failure.split(" after ")[1].split(" ")[0]
    where = f" in revision 004 ({FILE.format('004')}) after {elapsed} s; rolled back at 003"
    interrupted(result, seconds, number, code, where)
    idle(database)
    assert (database.at, audit(database)) == (["003"], ["003"])


@pytest.mark.fault(
    "Process and pod",
    fault="SIGTERM or SIGINT while the run waits for the database",
    sees="`interrupted by SIGTERM; no session was begun; ...`, exit 143 (130)",
    state="Nothing was changed",
    do="Deploy again",
)
@stops
def test_a_signal_while_waiting_for_the_database(files: Project, number: signal.Signals, code: int) -> None:
    running = files.popen("upgrade", "head")
    running.says(" waiting, ")
    interrupted(*running.stop(number), number, code, "; no session was begun")


@pytest.mark.fault(
    "Process and pod",
    fault="SIGTERM or SIGINT while the run waits for another run",
    sees="`interrupted by SIGTERM; the database is at 002; ...`, exit 143 (130)",
    state="The other run's work",
    do="Nothing",
)
@stops
def test_a_signal_while_waiting_for_another_run(
    prepared: Project, database: Database, number: signal.Signals, code: int
) -> None:
    prepared.add("003", audited("003", SLEEP))
    first = prepared.popen("upgrade", "head")
    until(lambda: sleeping(database))
    second = prepared.popen("upgrade", "head")
    second.says(" waiting, ")
    interrupted(*second.stop(number), number, code, "; the database is at 002")
    first.stop(signal.SIGTERM)


@pytest.mark.fault(
    "Process and pod",
    fault="SIGTERM or SIGINT while the run waits for a locked table",
    sees="`interrupted by SIGTERM in revision 003 (...) after N s; rolled back at 002; ...`, exit 143 (130)",
    state="Finished revisions stay, this one is rolled back",
    do="Deploy again",
)
@stops
def test_a_signal_while_waiting_for_a_table(
    prepared: Project, database: Database, number: signal.Signals, code: int
) -> None:
    prepared.add("003", audited("003", 'op.execute("LOCK TABLE hcm_report_metadata")'))
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM hcm_report_metadata")
        running = prepared.popen("upgrade", "head")
        until(lambda: sleeping(database, "LOCK TABLE"))
        result, seconds = running.stop(number)
    elapsed = result.failure.split(" after ")[1].split(" ")[0]
    where = f" in revision 003 ({FILE.format('003')}) after {elapsed} s; rolled back at 002"
    interrupted(result, seconds, number, code, where)


@pytest.mark.fault(
    "Partial work",
    fault="SIGTERM or SIGINT while an index is built concurrently",
    sees="`interrupted by SIGTERM in ...; INVALID, and of no use: public.slow; remove with: DROP INDEX "
    "CONCURRENTLY public.slow; ...`, exit 143 (130)",
    state="An INVALID index; finished revisions",
    do="Run the statement that the line shows, deploy again",
)
@stops
def test_a_signal_while_an_index_is_built_concurrently_names_what_is_left(
    prepared: Project, database: Database, number: signal.Signals, code: int
) -> None:
    prepared.add("003", "with op.get_context().autocommit_block():\n    " + BUILD)
    with database.session() as writer:
        writer.execute("INSERT INTO audit VALUES ('writer')")  # CREATE INDEX CONCURRENTLY waits for it to end
        running = prepared.popen("upgrade", "head")
        until(lambda: database.scalar("SELECT count(*) FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting%'"))
        result, seconds = running.stop(number)
    elapsed = result.failure.split(" after ")[1].split(" ")[0]
    where = (
        f" in revision 003 ({FILE.format('003')}) after {elapsed} s; INVALID, and of no use: public.slow; remove with:"
        " DROP INDEX CONCURRENTLY public.slow; rolled back at 002"
    )
    interrupted(result, seconds, number, code, where)
    database.execute("DROP INDEX CONCURRENTLY public.slow")
    assert prepared.alembic("upgrade", "head").returncode == 0


def test_a_signal_while_an_index_is_rebuilt_concurrently_names_the_new_one(
    prepared: Project, database: Database
) -> None:
    database.execute("CREATE INDEX slow ON audit (revision)")
    prepared.add("003", 'with op.get_context().autocommit_block():\n    op.execute("REINDEX INDEX CONCURRENTLY slow")')
    with database.session() as writer:
        writer.execute("INSERT INTO audit VALUES ('writer')")
        running = prepared.popen("upgrade", "head")
        until(lambda: database.scalar("SELECT count(*) FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting%'"))
        result, _ = running.stop(signal.SIGTERM)
    left = "INVALID, and of no use: public.slow_ccnew; remove with: DROP INDEX CONCURRENTLY public.slow_ccnew"
    assert (result.returncode, left in result.failure) == (143, True), result.failure
    database.execute("DROP INDEX CONCURRENTLY public.slow_ccnew")
    assert prepared.alembic("upgrade", "head").returncode == 0


@pytest.mark.fault(
    "Process and pod",
    fault="Forty signals at once",
    sees="One line, as for one signal",
    state="Finished revisions stay, this one is rolled back",
    do="Deploy again",
)
def test_many_signals_are_as_good_as_one(prepared: Project, database: Database) -> None:
    prepared.add("003", audited("003", SLEEP))
    running = prepared.popen("upgrade", "head")
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
    fault="SIGTERM in a revision that ignores all exceptions",
    sees="Within 2 s `interrupted by SIGTERM; it did not end by itself, so the database rolls back at 002; run "
    "again to go on`, exit 143",
    state="Finished revisions stay, this one is rolled back",
    do="Deploy again",
)
def test_a_revision_that_ignores_the_interruption_does_not_keep_the_run(prepared: Project, database: Database) -> None:
    body = "while True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass"
    prepared.add("003", audited("003", body))
    running = prepared.popen("upgrade", "head")
    until(lambda: any("INSERT INTO audit" in row for row in database.activity()))
    result, seconds = running.stop(signal.SIGTERM)
    assert (result.returncode, result.failure) == (
        143,
        "interrupted by SIGTERM; it did not end by itself, so the database rolls back at 002; run again to go on",
    )
    assert seconds < 3
    idle(database)
    assert (database.at, audit(database)) == (["002"], [])


@pytest.mark.fault(
    "Process and pod",
    fault="SIGKILL (out of memory, a lost node) in a revision",
    sees="Nothing, exit 137",
    state="Finished revisions stay, this one is rolled back; session and lock are gone within seconds",
    do="Deploy again",
)
def test_a_killed_run_leaves_no_lock_and_the_next_one_finishes(prepared: Project, database: Database) -> None:
    path = prepared.add("003", audited("003", SLEEP))
    running = prepared.popen("upgrade", "head")
    until(lambda: sleeping(database))
    running.process.kill()
    running.process.wait()
    idle(database)  # its statement would have taken a minute
    path.write_text(path.read_text().replace("pg_sleep(60)", "1"))
    result = prepared.alembic("upgrade", "head")
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
    result = project.popen(str(program), program=Path(sys.executable)).wait()
    assert (result.returncode, result.lines[-1], result.stdout) == (1, "mine", "")
    assert (database.at, database.relations) == ([], [])
