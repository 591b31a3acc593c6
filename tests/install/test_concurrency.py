"""More than one run at once, and runs that are cut off: each revision is applied once, and the work gets done."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kubernetes import client

from tests.install.helpers import Api, Release, Repository, node
from tests.migrations.conftest import Database, until
from tools.cluster import Cluster

JOB = "hcm-db-migration-1"


@pytest.fixture
def audited(repository: Repository, database: Database) -> Repository:
    """Revision 002 notes that it ran, and waits while the table `brake` has a row."""
    database.execute("CREATE TABLE brake AS SELECT 1")
    database.execute("CREATE TABLE audit (revision text)")
    database.execute(f"GRANT ALL ON brake, audit TO {database.role}")
    wait = "DO $$ BEGIN WHILE EXISTS (SELECT FROM brake) LOOP PERFORM pg_sleep(0.1); END LOOP; END $$"
    repository.revision("002", "INSERT INTO audit VALUES ('002')", wait)
    repository.push()
    return repository


def in_002(database: Database) -> bool:
    return any("FROM brake" in statement for statement in database.activity())


def let_go(database: Database) -> None:
    database.execute("DELETE FROM brake")


def assert_applied_once(database: Database) -> None:
    assert (database.at, database.execute("SELECT revision FROM audit")) == (["002"], [("002",)])


@pytest.mark.parametrize("where", ["one namespace", "two namespaces"])
def test_of_two_releases_at_once_one_works_and_the_other_waits_for_it(
    releases: Callable[..., Release],
    namespaces: Callable[[], Api],
    api: Api,
    audited: Repository,
    database: Database,
    where: str,
) -> None:
    other = api if where == "one namespace" else namespaces()
    both = [releases(api).upgrading(), releases(other, name="second").upgrading()]
    waiting = f"more: another run is at work (pid N, hcm-db-migrations as {database.role} from "
    jobs = [(api, JOB), (other, "second-hcm-db-migration-1")]
    until(lambda: any(waiting in log for namespace, job in jobs for log in namespace.logs(job)), 60)
    let_go(database)
    results = sorted([command.wait() for command in both], key=lambda result: waiting in result.text)
    assert [result.returncode for result in results] == [0, 0], [result.text for result in results]
    results[0].line("INFO now at 002 (head)")
    results[1].line("INFO at 002 (head): nothing to do")
    assert_applied_once(database)


def _kill(api: Api, pod: client.V1Pod) -> None:
    api.core.delete_namespaced_pod(pod.metadata.name, api.namespace, grace_period_seconds=0)


def _drain(api: Api, pod: client.V1Pod) -> None:
    """As `kubectl drain` does."""
    name = pod.metadata.name
    api.core.create_namespaced_pod_eviction(name, api.namespace, {"metadata": {"name": name}})


@pytest.mark.parametrize("cut_off", [_kill, _drain])
def test_a_pod_that_is_cut_off_in_a_revision_is_followed_by_one_that_finishes_it(
    release: Release, api: Api, audited: Repository, database: Database, cut_off: Callable[[Api, client.V1Pod], None]
) -> None:
    upgrade = release.upgrading()
    until(lambda: in_002(database), 60)
    (pod,) = api.pods(JOB)
    cut_off(api, pod)
    until(lambda: not in_002(database))  # no orphan of the first pod goes on
    let_go(database)
    result = upgrade.wait()
    assert result.returncode == 0, result.text
    result.line("INFO at 001 (the head is 002); to do: 1 (002 test)")
    assert_applied_once(database)


@pytest.mark.disruptive
def test_a_run_survives_a_restart_of_kubelet(
    release: Release, api: Api, cluster: Cluster, audited: Repository, database: Database
) -> None:
    upgrade = release.upgrading()
    until(lambda: in_002(database), 60)
    before = node(cluster, "systemctl", "show", "--property=MainPID", "kubelet")
    node(cluster, "systemctl", "restart", "kubelet")
    until(lambda: node(cluster, "systemctl", "is-active", "kubelet") == "active\n")
    assert node(cluster, "systemctl", "show", "--property=MainPID", "kubelet") != before
    # The new one has looked at its pods when it serves their logs.
    until(lambda: "running upgrade 001 -> 002" in api.logs(JOB)[0])
    let_go(database)
    result = upgrade.wait()
    assert result.returncode == 0, result.text
    assert_applied_once(database)
