"""Sessions and servers that fail during a revision: the run retries, and each revision is applied once."""

import os
import signal
import time

import pytest

from tests.support.database import Database
from tests.support.project import Project
from tests.support.revisions import AUDIT, FILE, SLEEP, audited
from tests.support.runs import audit, sleeping, terminate
from tests.support.waiting import until
from tools.postgres import Postgres, dsn


@pytest.mark.fault(
    "Database",
    fault="`pg_terminate_backend` during a revision",
    sees="`waiting, ...: revision 003 (...) failed: server closed the connection unexpectedly ...; rolled back;"
    " the database is at revision 002`, then recovers automatically",
    state="Complete, each revision applied once",
    do="Nothing",
)
@pytest.mark.parametrize(
    "execute", ["op.execute", "op.get_bind().connection.cursor().execute"], ids=["op", "driver cursor"]
)
def test_a_revision_whose_backend_is_terminated_is_retried(project: Project, database: Database, execute: str) -> None:
    project.add("002", AUDIT)
    project.add("003", audited("003", f'{execute}("SELECT pg_sleep(2)")'))
    running = project.start("upgrade", "head")
    until(lambda: sleeping(database))
    terminate(database)
    result = running.wait()
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
    assert "Traceback" not in result.stderr
    waiting = next(line for line in result.lines if " waiting, " in line)
    assert f"revision 003 ({FILE.format('003')}) failed: server closed the connection unexpectedly" in waiting
    assert waiting.endswith("; rolled back; the database is at revision 002")


@pytest.mark.fault(
    "Database",
    fault="The session's backend process is killed (SIGKILL) during a revision",
    sees="`waiting, ...: revision 003 (...) failed: server closed the connection unexpectedly ...`,"
    " then recovers automatically",
    state="Complete, each revision applied once",
    do="Nothing: the server recovers automatically",
)
def test_a_revision_whose_backend_is_killed_is_retried(offline_project: Project, own_server: Postgres) -> None:
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
    fault="The server is killed (SIGKILL) during a revision, and restarted",
    sees="`waiting, ...`, then recovers automatically",
    state="Complete, each revision applied once",
    do="Nothing",
)
def test_a_server_that_is_killed_during_a_revision_and_restarted_is_migrated(
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
    fault="The server is killed (SIGKILL) during a revision, and stays down",
    sees="`could not connect to database ... within N s: ...`, exit 1",
    state="Finished revisions are kept, this one is rolled back",
    do="Start the server, deploy again",
)
def test_a_server_that_is_killed_during_a_revision_and_stays_down_is_an_error(
    offline_project: Project, own_server: Postgres
) -> None:
    offline_project.add("002", SLEEP)
    running = offline_project.start("upgrade", "head", DATABASE_URL=dsn(own_server.url), MIGRATION_WAIT_SECONDS="2")
    until(lambda: own_server.execute("SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'"))
    own_server.kill()
    result = running.wait()
    assert result.returncode == 1
    target = f"database postgres at 127.0.0.1:{own_server.port}"
    assert result.failure.startswith(f"could not connect to {target} within 2 s: ")
    own_server.start()
    assert own_server.execute("SELECT * FROM alembic_version") == [("001",)]


BREAKS_BEFORE_THE_ROLLBACK = """
import logging, os, psycopg2
def filter(record):
    if "to do: 1" in record.getMessage():
        with psycopg2.connect(os.environ["DATABASE_URL"], application_name="revision") as other:
            other.cursor().execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name = 'hcm-db-migrations'"
            )
        raise ValueError("mine")
    return True
logging.getLogger("migration_runner").addFilter(filter)
"""


def test_a_connection_that_breaks_after_an_error_does_not_hide_it(project: Project) -> None:
    path = project.add("002")
    assert project.alembic("upgrade", "001").returncode == 0
    path.write_text(f"{path.read_text()}{BREAKS_BEFORE_THE_ROLLBACK}")
    result = project.alembic("upgrade", "head")
    assert result.returncode == 255 and result.failure.startswith("ValueError: "), result
