"""A cable that is pulled out: packets are lost without a word, as when a node dies."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.conftest import namespace, root_only
from tests.migrations.helpers import ALEMBIC, Project, Running, until
from tests.support.revisions import AUDIT, FILE, KILLED, SLEEP, audited
from tools.postgres import Postgres, dsn

SENDS = 'open("begun", "w")\ntime.sleep(4)\nop.execute("SELECT 1")'


@dataclass
class Cable:
    """A server and a client, each in a network of its own, and the cable between them."""

    server: Postgres
    project: Project
    enter: list[str]  # the client's network
    inside: list[str]  # the server's

    def plug(self, state: str) -> None:
        """`down` or `up`."""
        subprocess.run([*self.inside, "ip", "link", "set", "cable0", state], check=True)

    def popen(self, **environment: str) -> Running:
        program, *arguments = [*self.enter, str(ALEMBIC), "upgrade", "head"]
        return self.project.popen(*arguments, program=Path(f"/usr/bin/{program}"), **environment)

    def execute(self, statement: str) -> list[tuple]:
        """As superuser by the server's socket, which needs no network."""
        return self.server.execute(statement)

    def held(self) -> list[tuple]:
        """The runs' sessions and locks on the server."""
        return self.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'hcm-db-migrations'"
            " UNION ALL SELECT pid FROM pg_locks WHERE locktype = 'advisory'"
        )


@pytest.fixture
def cable(files: Project, own_server: Postgres) -> Iterator[Cable]:
    own_server.kill()
    with ExitStack() as stack:
        ends = [stack.enter_context(namespace("net", "ip link set lo up")) for _ in range(2)]
        pids = [end[1].split("/")[2] for end in ends]
        pair = ["name", "cable0", "netns", pids[0], "type", "veth", "peer", "name", "cable0", "netns", pids[1]]
        subprocess.run(["ip", "link", "add", *pair], check=True)
        for number, end in enumerate(ends, 1):
            subprocess.run([*end, "ip", "address", "add", f"192.0.2.{number}/30", "dev", "cable0"], check=True)
            subprocess.run([*end, "ip", "link", "set", "cable0", "up"], check=True)
        with (own_server.folder / "data" / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 192.0.2.0/30 scram-sha-256\n")
        own_server.enter = ends[0]
        own_server.settings["listen_addresses"] = "192.0.2.1"
        own_server.start()
        files.environment["DATABASE_URL"] = dsn(own_server.url.set(host="192.0.2.1"))
        # By the socket: the superuser's connections need no network.
        own_server.url = own_server.url.set(host=None, query={"host": str(own_server.folder)})
        files.add("002", AUDIT)
        yield Cable(own_server, files, ends[1], ends[0])
        own_server.kill()


@pytest.mark.fault(
    "Network",
    fault="The node or the network dies without a word (half-open connection) in a revision",
    sees="Within 25 s `waiting, ...: revision 003 (...) failed: could not receive data from server: ...`, then"
    " `could not connect to database ... within N s`, exit 1",
    state="Finished revisions stay; the server ends the orphaned session and its lock within 20 s",
    do="Mend the network, deploy again",
)
@root_only
@pytest.mark.parametrize("body", [SLEEP, SENDS], ids=["receiving", "sending"])
def test_a_half_open_connection_is_noticed_on_both_sides_and_the_next_run_finishes(cable: Cable, body: str) -> None:
    path = cable.project.add("003", audited("003", body))
    running = cable.popen(MIGRATION_WAIT_SECONDS="3")
    busy = "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'"
    until(lambda: cable.execute(busy) or (cable.project.folder / "begun").exists())
    start = time.monotonic()
    cable.plug("down")
    running.says(" waiting, ")
    assert time.monotonic() - start < 25
    until(lambda: not cable.held(), 20 - (time.monotonic() - start))
    result = running.wait()
    assert time.monotonic() - start < 40
    assert result.returncode == 1
    assert f"revision 003 ({FILE.format('003')}) failed: could not receive data from server: " in result.stderr
    assert result.failure.startswith("could not connect to database postgres at 192.0.2.1:")
    assert cable.execute("SELECT version_num FROM alembic_version") == [("002",)]
    cable.plug("up")
    path.write_text(path.read_text().replace("pg_sleep(60)", "1"))
    assert cable.popen().wait().returncode == 0
    assert cable.execute("SELECT * FROM alembic_version, audit") == [("003", "003")]


@pytest.mark.fault(
    "Network",
    fault="SIGTERM (drain, deadline) while the network is dead",
    sees="Within 2 s `interrupted by SIGTERM; did not stop in time and was killed; ...; run again to resume`, exit 143",
    state="Finished revisions stay; the server ends the orphaned session and its lock within 20 s",
    do="Mend the network, deploy again",
)
@root_only
def test_sigterm_on_a_dead_network_ends_the_run_at_once(cable: Cable) -> None:
    path = cable.project.add("003", audited("003", SLEEP))
    running = cable.popen()
    until(lambda: cable.execute("SELECT 1 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'"))
    cable.plug("down")
    result, seconds = running.stop(signal.SIGTERM)
    assert (result.returncode, result.failure) == (143, KILLED)
    assert seconds < 3
    until(lambda: not cable.held(), 20 - seconds)
    assert cable.execute("SELECT version_num FROM alembic_version") == [("002",)]
    cable.plug("up")
    path.write_text(path.read_text().replace("pg_sleep(60)", "1"))
    assert cable.popen().wait().returncode == 0
