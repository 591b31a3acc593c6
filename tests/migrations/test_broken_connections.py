"""Sessions and servers that break in a revision: tried again, and each revision is applied once."""

import os
import signal
import time

import pytest

from tests.support.database import Database
from tests.support.project import Project
from tests.support.revisions import AUDIT, FILE, SLEEP, audit, audited, sleeping, terminate
from tests.support.waiting import until
from tools.postgres import Postgres, dsn


@pytest.mark.fault(
    "Database",
    fault="`pg_terminate_backend` in a revision",
    sees="`waiting, ...: revision 003 (...) failed: server closed the connection unexpectedly ...; rolled back;"
    " the database is at revision 002`, then it goes on by itself",
    state="All done, each revision once",
    do="Nothing",
)
@pytest.mark.parametrize(
    "execute", ["op.execute", "op.get_bind().connection.cursor().execute"], ids=["op", "the driver's cursor"]
)
def test_a_backend_that_is_terminated_in_a_revision_is_tried_again(
    project: Project, database: Database, execute: str
) -> None:
    project.add("002", AUDIT)
    project.add("003", audited("003", f'{execute}("SELECT pg_sleep(2)")'))
    running = project.start("upgrade", "head")
    until(lambda: sleeping(database))
    terminate(database)
    result = running.wait()
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
    assert "Traceback" not in result.stderr
    waited = next(line for line in result.lines if " waiting, " in line)
    assert f"revision 003 ({FILE.format('003')}) failed: server closed the connection unexpectedly" in waited
    assert waited.endswith("; rolled back; the database is at revision 002")


@pytest.mark.fault(
    "Database",
    fault="The server's process for the session is killed (-9) in a revision",
    sees="`waiting, ...: revision 003 (...) failed: server closed the connection unexpectedly ...`, then it goes on by"
    " itself",
    state="All done, each revision once",
    do="Nothing: the server recovers by itself",
)
def test_a_backend_that_is_killed_in_a_revision_is_tried_again(offline_project: Project, own_server: Postgres) -> None:
    offline_project.add("002", AUDIT)
    offline_project.add("003", audited("003", 'op.execute("SELECT pg_sleep(2)")'))
    running = offline_project.start("upgrade", "head", DATABASE_URL=dsn(own_server.url))
    query = "SELECT pid FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(2)'"
    os.kill(until(lambda: own_server.execute(query))[0][0], signal.SIGKILL)
    result = running.wait()
    assert result.returncode == 0, result
    assert f"revision 003 ({FILE.format('003')}) failed: server closed the connection unexpectedly" in result.stderr
    assert own_server.execute("SELECT * FROM alembic_version, audit") == [("003", "003")]


@pytest.mark.fault(
    "Database",
    fault="The server is killed (-9) in a revision, and restarted",
    sees="`waiting, ...`, then it goes on by itself",
    state="All done, each revision once",
    do="Nothing",
)
def test_a_server_that_is_killed_in_a_revision_and_restarted_is_migrated(
    offline_project: Project, own_server: Postgres
) -> None:
    offline_project.add("002", AUDIT)
    offline_project.add("003", audited("003", 'op.execute("SELECT pg_sleep(2)")'))
    running = offline_project.start("upgrade", "head", DATABASE_URL=dsn(own_server.url))
    until(lambda: own_server.execute("SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(2)'"))
    own_server.kill()
    time.sleep(1)
    own_server.start()
    result = running.wait()
    assert "Traceback" not in result.stderr, result.stderr
    assert (result.returncode, own_server.execute("SELECT * FROM alembic_version, audit")) == (0, [("003", "003")])
    assert result.lines[-1] == "HH:MM:SS INFO now at 003 (head)"


@pytest.mark.fault(
    "Database",
    fault="The server is killed (-9) in a revision, and stays away",
    sees="`could not connect to database ... within N s: ...`, exit 1",
    state="Finished revisions stay, this one is rolled back",
    do="Start the server, deploy again",
)
def test_a_server_that_is_killed_in_a_revision_and_stays_away_is_an_error(
    offline_project: Project, own_server: Postgres
) -> None:
    offline_project.add("002", SLEEP)
    running = offline_project.start("upgrade", "head", DATABASE_URL=dsn(own_server.url), MIGRATION_WAIT_SECONDS="2")
    until(lambda: own_server.execute("SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'"))
    own_server.kill()
    result = running.wait()
    assert result.returncode == 1
    where = f"database postgres at 127.0.0.1:{own_server.port}"
    assert result.failure.startswith(f"could not connect to {where} within 2 s: ")
    own_server.start()
    assert own_server.execute("SELECT * FROM alembic_version") == [("001",)]
