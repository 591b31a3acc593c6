"""A network that is slow, cut, or drops everything: each run ends within its time limit, and the next one completes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.database import Database
from tests.support.fault_injection import Proxy
from tests.support.messages import KILLED
from tests.support.programs import Program
from tests.support.project import Project
from tests.support.revisions import AUDIT, FILE, SLEEP, audited
from tests.support.runs import audit, idle, sleeping
from tests.support.waiting import until
from tools.postgres import dsn

UNKNOWN = "commit status unknown: check with 'alembic current'"


@pytest.fixture
def proxied(project: Project, database: Database, proxy: Proxy) -> Project:
    """A project whose runs connect through the proxy, and that creates the audit table in 002."""
    project.add("002", AUDIT)
    project.environment["DATABASE_URL"] = dsn(database.url.set(port=proxy.port))
    return project


@pytest.mark.fault(
    "Network",
    fault="Each packet takes 200 ms",
    sees="As usual, within a minute",
    state="Complete",
    do="Nothing",
)
def test_a_slow_network_only_slows_the_run_down(proxied: Project, database: Database, proxy: Proxy) -> None:
    proxied.add("003", audited("003"))
    proxy.toxic("latency", latency=200)
    start = time.monotonic()
    result = proxied.alembic("upgrade", "head")
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
    assert 5 < time.monotonic() - start < 60


@pytest.mark.fault(
    "Network",
    fault="The connection is cut during a revision, and the network recovers",
    sees="`waiting, up to N s more: revision 003 (...) failed: server closed the connection"
    " unexpectedly ...`, then recovers automatically",
    state="Complete, each revision applied once",
    do="Nothing",
)
def test_a_connection_that_is_cut_is_reestablished(proxied: Project, database: Database, proxy: Proxy) -> None:
    proxied.add("003", audited("003", 'op.execute("SELECT pg_sleep(2)")'))
    running = proxied.start("upgrade", "head")
    until(lambda: sleeping(database))
    proxy.cut()
    running.prints(" waiting, ")
    proxy.restore()
    result = running.wait()
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
    assert f"revision 003 ({FILE.format('003')}) failed: server closed the connection" in result.stderr


@pytest.fixture
def release_commit(database: Database) -> Iterator[Callable[[], None]]:
    """Blocks the commit of every write to the audit table until it is called."""
    with database.session() as other:
        other.execute("SELECT pg_advisory_lock(1)")
        yield lambda: other.execute("SELECT pg_advisory_unlock(1)")


@pytest.fixture
def committing(proxied: Project, database: Database, release_commit: Callable[[], None]) -> Program:
    """A run whose revision 003 the server is committing."""
    proxied.add("003", audited("003"))
    assert proxied.alembic("upgrade", "002").returncode == 0
    database.execute(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END';"
        "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON audit DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
        " EXECUTE FUNCTION wait()"
    )
    running = proxied.start("upgrade", "head")
    until(lambda: any(row == "active: COMMIT" for row in database.activity()))
    return running


def test_a_signal_during_a_commit_reports_its_status_as_unknown_and_not_as_rolled_back(
    committing: Program, database: Database, proxy: Proxy
) -> None:
    proxy.toxic("timeout", timeout=0)
    result = committing.stop(signal.SIGTERM)
    assert (result.returncode, result.failure) == (
        143,
        f"interrupted by SIGTERM; did not stop in time and was killed; {UNKNOWN}; run again to resume",
    )
    proxy.cut()
    idle(database)


@pytest.mark.fault(
    "Network",
    fault="The connection is cut while the server commits a revision",
    sees="`waiting, ...: revision 003 (...) failed: ...; commit status unknown: check with 'alembic current'`, then"
    " `nothing to do`, or the revision again; after SIGTERM, the same status",
    state="Complete, each revision applied once",
    do="Nothing; `alembic current` shows the revision",
)
def test_a_commit_whose_reply_is_lost_is_not_repeated(
    committing: Program, database: Database, proxy: Proxy, release_commit: Callable[[], None]
) -> None:
    running = committing
    proxy.cut()
    release_commit()
    running.prints(f"; {UNKNOWN}")
    until(lambda: database.at == ["003"])
    proxy.restore()
    result = running.wait()
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
    assert result.lines[-1] == "HH:MM:SS INFO at 003 (head): nothing to do"


@pytest.mark.fault(
    "Network",
    fault="The connection is cut during a revision, and the network stays down",
    sees="`could not connect to database ... within N s: ...`, exit 1, N s (`MIGRATION_WAIT_SECONDS`) after the cut",
    state="Finished revisions are kept; the orphaned session and its lock are gone within seconds",
    do="Fix the network, deploy again",
)
def test_a_network_that_stays_down_ends_the_run_and_the_next_one_completes(
    proxied: Project, database: Database, proxy: Proxy
) -> None:
    path = proxied.add("003", audited("003", SLEEP))
    running = proxied.start("upgrade", "head", MIGRATION_WAIT_SECONDS="3")
    until(lambda: sleeping(database))
    start = time.monotonic()
    proxy.cut()
    result = running.wait()
    assert time.monotonic() - start < 15
    assert result.returncode == 1
    assert result.failure.startswith(f"could not connect to database {database.name} at ")
    idle(database)
    assert (database.at, audit(database)) == (["002"], [])
    proxy.restore()
    path.write_text(path.read_text().replace("pg_sleep(60)", "1"))
    assert proxied.alembic("upgrade", "head").returncode == 0
    assert (database.at, audit(database)) == (["003"], ["003"])


@pytest.mark.fault(
    "Network",
    fault="A load balancer accepts the connection and does not respond",
    sees="`could not connect to database ... within N s: ... timeout expired`, exit 1",
    state="Nothing was changed",
    do="Fix the server behind the load balancer, deploy again",
)
def test_a_connection_without_a_response_is_an_error(proxied: Project, database: Database, proxy: Proxy) -> None:
    proxy.toxic("timeout", timeout=0)
    start = time.monotonic()
    result = proxied.alembic("upgrade", "head", MIGRATION_WAIT_SECONDS="2")
    assert time.monotonic() - start < 20
    assert result.returncode == 1
    assert result.failure.startswith(f"could not connect to database {database.name} at ")
    assert "timeout expired" in result.failure
    assert database.relations == []
    proxy.reset()
    assert proxied.alembic("upgrade", "head").returncode == 0


@pytest.mark.fault(
    "Network",
    fault="A load balancer keeps the connection open during a revision, and stops forwarding",
    sees="No message until the Job's deadline ('job.activeDeadlineSeconds'): it looks like a long statement. Then,"
    " within 2 s: `interrupted by SIGTERM; did not stop in time and was killed; ...`, exit 143",
    state="Finished revisions are kept; the orphaned session ends when the load balancer closes the connection",
    do="Fix the load balancer, deploy again",
)
def test_a_run_whose_connection_is_stalled_ends_on_sigterm(proxied: Project, database: Database, proxy: Proxy) -> None:
    path = proxied.add("003", audited("003", SLEEP))
    running = proxied.start("upgrade", "head")
    until(lambda: sleeping(database))
    proxy.toxic("timeout", timeout=0)
    result = running.stop(signal.SIGTERM)
    assert (result.returncode, result.failure) == (143, KILLED)
    proxy.cut()
    idle(database)
    proxy.reset()
    path.write_text(path.read_text().replace("pg_sleep(60)", "1"))
    assert proxied.alembic("upgrade", "head").returncode == 0
    assert (database.at, audit(database)) == (["003"], ["003"])
