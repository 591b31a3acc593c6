"""Packets are dropped silently, as when a node dies."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.fault_injection import namespace, root_only
from tests.support.messages import KILLED
from tests.support.programs import Program, run
from tests.support.project import Project
from tests.support.revisions import AUDIT, FILE, SLEEP, audited
from tests.support.waiting import until
from tools.paths import BIN
from tools.postgres import Postgres, dsn

SENDS = 'open("started", "w")\ntime.sleep(4)\nop.execute("SELECT 1")'


@dataclass
class Veth:
    """A server and a client, each in a dedicated network namespace, and the veth pair between them."""

    server: Postgres
    project: Project
    enter: list[str]  # enters the client's namespace
    inside: list[str]  # enters the server's

    def set_link(self, state: str) -> None:
        """`down` or `up`."""
        run([*self.inside, "ip", "link", "set", "veth0", state], check=True)

    def start(self, **environment: str) -> Program:
        program, *arguments = [*self.enter, str(BIN / "alembic"), "upgrade", "head"]
        return self.project.start(*arguments, program=Path(f"/usr/bin/{program}"), **environment)

    def execute(self, statement: str) -> list[tuple]:
        """Execute a statement as superuser, over the server's socket, which needs no network."""
        return self.server.execute(statement)

    def held(self) -> list[tuple]:
        """The runs' sessions and locks on the server."""
        return self.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'hcm-db-migrations'"
            " UNION ALL SELECT pid FROM pg_locks WHERE locktype = 'advisory'"
        )


@pytest.fixture
def veth(offline_project: Project, own_server: Postgres) -> Iterator[Veth]:
    own_server.kill()
    with ExitStack() as stack:
        ends = [stack.enter_context(namespace("net", "ip link set lo up")) for _ in range(2)]
        pids = [end[1].split("/")[2] for end in ends]
        pair = ["name", "veth0", "netns", pids[0], "type", "veth", "peer", "name", "veth0", "netns", pids[1]]
        run(["ip", "link", "add", *pair], check=True)
        for number, end in enumerate(ends, 1):
            run([*end, "ip", "address", "add", f"192.0.2.{number}/30", "dev", "veth0"], check=True)
            run([*end, "ip", "link", "set", "veth0", "up"], check=True)
        with (own_server.data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 192.0.2.0/30 scram-sha-256\n")
        own_server.enter = ends[0]
        own_server.settings["listen_addresses"] = "192.0.2.1"
        own_server.start()
        offline_project.environment["DATABASE_URL"] = dsn(own_server.url.set(host="192.0.2.1"))
        # Over the socket: the superuser's connections need no network.
        own_server.url = own_server.url.set(host=None, query={"host": str(own_server.folder)})
        offline_project.add("002", AUDIT)
        yield Veth(own_server, offline_project, ends[1], ends[0])
        own_server.kill()


@pytest.mark.fault(
    "Network",
    fault="The node or the network fails silently (half-open connection) during a revision",
    sees="Within 25 s `waiting, ...: revision 003 (...) failed: could not receive data from server: ...`, then"
    " `could not connect to database ... within N s`, exit 1",
    state="Finished revisions are kept; the server ends the orphaned session and its lock within 20 s",
    do="Fix the network, deploy again",
)
@root_only
@pytest.mark.parametrize("body", [SLEEP, SENDS], ids=["receiving", "sending"])
def test_a_half_open_connection_is_detected_on_both_sides_and_the_next_run_completes(veth: Veth, body: str) -> None:
    path = veth.project.add("003", audited("003", body))
    running = veth.start(MIGRATION_WAIT_SECONDS="3")
    busy = "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'"
    until(lambda: veth.execute(busy) or (veth.project.folder / "started").exists())
    start = time.monotonic()
    veth.set_link("down")
    running.prints(" waiting, ")
    assert time.monotonic() - start < 25
    until(lambda: not veth.held(), 20 - (time.monotonic() - start))
    result = running.wait()
    assert time.monotonic() - start < 40
    assert result.returncode == 1
    assert f"revision 003 ({FILE.format('003')}) failed: could not receive data from server: " in result.stderr
    assert result.failure.startswith("could not connect to database postgres at 192.0.2.1:")
    assert veth.execute("SELECT version_num FROM alembic_version") == [("002",)]
    veth.set_link("up")
    path.write_text(path.read_text().replace("pg_sleep(60)", "1"))
    assert veth.start().wait().returncode == 0
    assert veth.execute("SELECT * FROM alembic_version, audit") == [("003", "003")]


@pytest.mark.fault(
    "Network",
    fault="SIGTERM (drain, deadline) while the network is down",
    sees="Within 2 s `interrupted by SIGTERM; did not stop in time and was killed; ...; run again to resume`, exit 143",
    state="Finished revisions are kept; the server ends the orphaned session and its lock within 20 s",
    do="Fix the network, deploy again",
)
@root_only
def test_sigterm_while_the_network_is_down_ends_the_run_at_once(veth: Veth) -> None:
    path = veth.project.add("003", audited("003", SLEEP))
    running = veth.start()
    until(lambda: veth.execute("SELECT 1 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'"))
    veth.set_link("down")
    start = time.monotonic()
    result = running.stop(signal.SIGTERM)
    assert (result.returncode, result.failure) == (143, KILLED)
    until(lambda: not veth.held(), 20 - (time.monotonic() - start))
    assert veth.execute("SELECT version_num FROM alembic_version") == [("002",)]
    veth.set_link("up")
    path.write_text(path.read_text().replace("pg_sleep(60)", "1"))
    assert veth.start().wait().returncode == 0
