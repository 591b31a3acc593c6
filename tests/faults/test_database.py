"""A server that is full, busy, a standby, or behind a pooler: the run reports it, and the next one completes."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg2
import pytest

from tests.support.database import Database, parts
from tests.support.fault_injection import namespace, pgbouncer, root_only
from tests.support.programs import run
from tests.support.project import Project
from tests.support.revisions import AUDIT, FILE, audited
from tests.support.runs import audit, sleeping, terminate
from tests.support.waiting import until
from tools.postgres import Postgres, dsn

FILL = "op.execute(\"CREATE TABLE filled AS SELECT repeat('x', 1000) FROM generate_series(1, {})\")"


@pytest.fixture
def small_disk() -> Iterator[tuple[Path, list[str]]]:
    """A folder with 16 MB of disk space, in a mount namespace, and the command that enters the namespace."""
    with (
        tempfile.TemporaryDirectory(prefix="hcm-disk-") as name,
        namespace("mount", f"mount -t tmpfs -o size=16m,mode=700,uid=nobody tmpfs {name}") as enter,
    ):
        yield Path(name), enter


def enlarge(disk: tuple[Path, list[str]]) -> None:
    folder, enter = disk
    run([*enter, "mount", "-o", "remount,size=512m", folder], check=True)


@pytest.mark.fault(
    "Database",
    fault="The server's disk is full",
    sees="`revision 002 (...) failed: could not extend file ...: No space left on device ... (the server's disk is"
    " full: free disk space), at ...; rolled back; the database is at revision 001; timed out after N s`, exit 1",
    state="Finished revisions are kept, this one is rolled back",
    do="Free disk space, deploy again",
)
@root_only
def test_a_full_disk_is_reported_and_with_more_space_the_next_run_completes(
    offline_project: Project, own_server: Postgres, small_disk: tuple[Path, list[str]]
) -> None:
    own_server.kill()
    own_server.enter = small_disk[1]
    own_server.start()
    own_server.execute(f"CREATE TABLESPACE small LOCATION '{small_disk[0]}'")
    own_server.execute("CREATE DATABASE reports TABLESPACE small")
    offline_project.add("002", FILL.format(20_000))
    url = own_server.url.set(database="reports")
    offline_project.environment["DATABASE_URL"] = dsn(url)
    result = offline_project.alembic("upgrade", "head", MIGRATION_WAIT_SECONDS="2")
    assert result.returncode == 1
    assert result.failure.startswith(f"revision 002 ({FILE.format('002')}) failed: could not extend file ")
    assert "No space left on device" in result.failure
    assert "(the server's disk is full: free disk space)" in result.failure
    assert result.failure.endswith("; rolled back; the database is at revision 001; timed out after 2 s; retry later")
    enlarge(small_disk)
    assert offline_project.alembic("upgrade", "head").returncode == 0
    assert own_server.execute("SELECT version_num FROM alembic_version", database="reports") == [("002",)]
    assert own_server.execute("SELECT count(*) FROM filled", database="reports") == [(20_000,)]


@pytest.mark.fault(
    "Database",
    fault="The disk of the server's write-ahead log is full, so the server crashes",
    sees="`waiting, ...: revision 002 (...) failed: server closed the connection unexpectedly`, then `FAILED` with that"
    " reason or `could not connect to database ...`, exit 1",
    state="Finished revisions are kept, this one is rolled back by the server's recovery",
    do="Free disk space, start the server, deploy again",
)
@root_only
def test_a_server_that_crashes_on_a_full_disk_is_waited_for_and_the_next_run_completes(
    offline_project: Project, own_server: Postgres
) -> None:
    own_server.kill()
    wal = own_server.data / "pg_wal"
    script = (
        f"cp -a {wal} {wal}.copy; mount -t tmpfs -o size=40m,mode=700,uid=nobody tmpfs {wal}; mv {wal}.copy/* {wal}"
    )
    with namespace("mount", script) as enter:
        own_server.enter = enter
        own_server.start()
        offline_project.add("002", FILL.format(100_000))
        offline_project.environment["DATABASE_URL"] = dsn(own_server.url)
        result = offline_project.alembic("upgrade", "head", MIGRATION_WAIT_SECONDS="3")
        assert result.returncode == 1
        assert "No space left on device" in (own_server.folder / "log").read_text()
        assert "failed: server closed the connection unexpectedly" in result.stderr
        assert result.failure
        enlarge((wal, enter))
        own_server.kill()
        own_server.start()
        assert offline_project.alembic("upgrade", "head").returncode == 0
        assert own_server.execute("SELECT version_num, count(*) FROM alembic_version, filled GROUP BY 1") == [
            ("002", 100_000)
        ]


@pytest.mark.fault(
    "Database",
    fault="`max_connections` is reached",
    sees="`waiting, up to N s more: ... remaining connection slots are reserved ...`, or 'too many clients already'",
    state="Nothing was changed",
    do="Nothing: recovers as soon as one slot is free; if none becomes free, find out who holds the connections",
)
def test_a_server_without_a_free_connection_is_waited_for_until_one_is_free(offline_project: Project) -> None:
    with Postgres(max_connections="6", superuser_reserved_connections="2") as server:
        server.execute("CREATE ROLE migrations LOGIN PASSWORD 'x'")
        server.execute("CREATE DATABASE reports OWNER migrations")
        url = server.url.set(database="reports", username="migrations", password="x")  # noqa: S106
        offline_project.environment["DATABASE_URL"] = dsn(url)
        with ExitStack() as stack:
            others = [psycopg2.connect(dsn(url)) for _ in range(4)]
            for other in others:
                stack.callback(other.close)
            running = offline_project.start("upgrade", "head")
            running.prints("connection slots are reserved")
            others[0].close()
            result = running.wait()
        assert result.returncode == 0, result
        assert server.execute("SELECT version_num FROM alembic_version", database="reports") == [("001",)]


@pytest.mark.fault(
    "Database",
    fault="The host is a read-only standby",
    sees="`cannot execute ... in a read-only transaction (on a standby, set DB_HOST to the primary;"
    " ...)`, exit 255; otherwise `nothing to do`, exit 0",
    state="Nothing was changed",
    do="Set the host to the primary's address",
)
def test_a_standby_is_reported_and_a_run_with_nothing_to_do_passes_there(
    offline_project: Project, own_server: Postgres
) -> None:
    offline_project.environment["DATABASE_URL"] = dsn(own_server.url)
    assert offline_project.alembic("upgrade", "head").returncode == 0
    own_server.execute("CHECKPOINT")
    own_server.kill()
    (own_server.data / "standby.signal").touch()
    own_server.start()
    assert own_server.execute("SELECT pg_is_in_recovery()") == [(True,)]
    result = offline_project.alembic("upgrade", "head")
    assert (result.returncode, result.lines[-1]) == (0, "HH:MM:SS INFO at 001 (head): nothing to do")
    path = offline_project.add("002", AUDIT)
    result = offline_project.alembic("upgrade", "head", **parts(own_server.url))
    assert (result.returncode, result.failure) == (
        255,
        f"revision 002 ({path.name}) failed: cannot execute CREATE TABLE in a read-only transaction"
        " (on a standby, set DB_HOST to the primary; otherwise, reset default_transaction_read_only),"
        f" at {path.name}, line 7; rolled back; the database is at revision 001; fix it, then retry",
    )


@pytest.mark.fault(
    "Database",
    fault="PgBouncer in transaction mode between the run and the server",
    sees="`the connection goes through a pooler in transaction mode (PgBouncer's pool_mode=transaction), where"
    " session-level locks do not work; set DB_HOST and DB_PORT to the server itself, or to a pool in session mode`,"
    " exit 255",
    state="Nothing was changed; no setting of the run remains in the pool",
    do="Set host and port to the server, or to a pool in session mode",
)
def test_pgbouncer_in_transaction_mode_is_rejected_and_keeps_no_setting(project: Project, database: Database) -> None:
    with pgbouncer(database, "transaction") as url:
        result = project.alembic("upgrade", "head", **parts(url))
        assert (result.returncode, result.failure) == (
            255,
            "the connection goes through a pooler in transaction mode (PgBouncer's pool_mode=transaction), where"
            " session-level locks do not work; set DB_HOST and DB_PORT to the server itself, or to a pool in session"
            " mode",
        )
        assert database.relations == []
        settings = set()
        for _ in range(4):
            with psycopg2.connect(dsn(url)) as connection, connection.cursor() as cursor:
                cursor.execute("SELECT current_setting('lock_timeout'), current_setting('statement_timeout')")
                settings.add(cursor.fetchone())
            connection.close()
        assert settings == {("0", "0")}


@pytest.mark.fault(
    "Database",
    fault="PgBouncer in session mode between two runs and the server",
    sees="As without it: one migrates, the other waits",
    state="Each revision applied once",
    do="Nothing",
)
def test_pgbouncer_in_session_mode_works_like_the_server(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    project.add("003", audited("003", 'op.execute("SELECT pg_sleep(1)")'))
    with pgbouncer(database, "session") as url:
        runs = [project.start("upgrade", "head", DATABASE_URL=dsn(url)) for _ in range(2)]
        results = [running.wait() for running in runs]
        assert [result.returncode for result in results] == [0, 0], results
        # PgBouncer keeps the server's session; its reset query (DISCARD ALL) releases the lock.
        held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database"
        until(lambda: database.scalar(f"{held} WHERE datname = current_database())") == 0)
    assert (database.at, audit(database)) == (["003"], ["003"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"password": "wrong"}, "authentication failed; check the user and the password"),
        ({"username": "other"}, "authentication failed; check the user and the password"),
        ({"database": "other"}, "no such database: other; add it to the pooler, or change the database"),
    ],
    ids=["wrong password", "unknown user", "unknown database"],
)
def test_a_connection_that_pgbouncer_rejects_fails_at_once(
    project: Project, database: Database, change: dict[str, str], message: str
) -> None:
    with pgbouncer(database, "session") as url:
        result = project.alembic("upgrade", "head", DATABASE_URL=dsn(url.set(**change)))
    assert result.returncode == 255
    assert result.failure.endswith(f"{message} in DATABASE_URL")
    assert "waiting" not in result.stderr


@pytest.mark.fault(
    "Database",
    fault="`pg_terminate_backend` during a revision that has run longer than `MIGRATION_WAIT_SECONDS`",
    sees="`waiting, up to N s more: revision 003 (...) failed: server closed the connection"
    " unexpectedly ...`, then recovers automatically",
    state="Complete, each revision applied once",
    do="Nothing",
)
def test_the_duration_of_a_revision_does_not_count_as_waiting(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    project.add("003", audited("003", 'op.execute("SELECT pg_sleep(8)")'))
    running = project.start("upgrade", "head", MIGRATION_WAIT_SECONDS="2")
    until(lambda: sleeping(database))
    time.sleep(2.5)
    terminate(database)
    result = running.wait()
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
    assert "waiting, up to 2 s more: revision 003 " in result.stderr
