"""Concurrent and interrupted runs: each revision is applied once, and the migration completes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg2
import pytest
from kubernetes import client

from tests.support.database import Database
from tests.support.kubernetes import (
    FIRST_JOB,
    TABLE,
    Api,
    SwitchedService,
    contacted,
    kill_container,
    node,
    open_gate,
    sessions_in_revision_002,
)
from tests.support.programs import observed
from tests.support.release import Release
from tests.support.repository import Repository
from tests.support.waiting import until
from tools.cluster import Cluster


def assert_applied_once(database: Database) -> None:
    assert (database.at, database.execute("SELECT revision FROM audit")) == (["002"], [("002",)])


@pytest.mark.fault(
    "Concurrency",
    fault="Two releases on one database are upgraded concurrently, in one namespace or in two",
    sees="One migrates, the other logs `waiting, ...: another migration is running (pid ...)`, then `nothing to do`;"
    " exit 0",
    state="Each revision applied once",
    do="Nothing",
)
@pytest.mark.parametrize("location", ["one namespace", "two namespaces"])
def test_of_two_concurrent_releases_one_migrates_and_the_other_waits_for_it(
    releases: Callable[..., Release],
    namespaces: Callable[[], Api],
    api: Api,
    audited_repository: Repository,
    database: Database,
    location: str,
) -> None:
    other = api if location == "one namespace" else namespaces()
    both = [releases(api).start_upgrade(), releases(other, name="second").start_upgrade()]
    waiting = f"more: another migration is running (pid N, hcm-db-migrations as {database.role} from "
    jobs = [(api, FIRST_JOB), (other, "second-hcm-db-migration-1")]
    until(lambda: any(waiting in log for namespace, job in jobs for log in namespace.logs(job)))
    open_gate(database)
    results = sorted([command.wait() for command in both], key=lambda result: waiting in result.text)
    assert [result.returncode for result in results] == [0, 0], [result.text for result in results]
    results[0].line("INFO now at 002 (head)")
    results[1].line("INFO at 002 (head): nothing to do")
    assert_applied_once(database)


@pytest.mark.fault(
    "Concurrency",
    fault="A release is upgraded while its Job is still running",
    sees="The second upgrade: `another operation (install/upgrade/rollback) is in progress`, exit 1",
    state="The first continues",
    do="Wait for the first",
)
def test_a_second_upgrade_of_a_release_is_rejected_while_the_first_one_runs(
    release: Release, audited_repository: Repository, database: Database
) -> None:
    first = release.start_upgrade()
    until(lambda: sessions_in_revision_002(database))
    second = release.upgrade()
    assert second.returncode == 1
    second.line("another operation (install/upgrade/rollback) is in progress")
    open_gate(database)
    result = first.wait()
    assert result.returncode == 0, result.text
    assert_applied_once(database)


def _kill(api: Api, pod: client.V1Pod) -> None:
    api.core.delete_namespaced_pod(pod.metadata.name, api.namespace, grace_period_seconds=0)


def _drain(api: Api, pod: client.V1Pod) -> None:
    """Like `kubectl drain`."""
    name = pod.metadata.name
    api.core.create_namespaced_pod_eviction(name, api.namespace, {"metadata": {"name": name}})


@pytest.mark.fault(
    "Process and pod",
    fault="The pod is killed during a revision, or its node is drained",
    sees="The next pod: `at 001 (the head is 002); to do: 1 (...)`, then recovers automatically; a drained pod logs"
    " `interrupted by SIGTERM in revision 002 (...)`",
    state="Complete, each revision applied once",
    do="Nothing",
)
@pytest.mark.parametrize("interrupt", [_kill, _drain])
def test_a_pod_that_is_killed_or_drained_during_a_revision_is_followed_by_one_that_completes_it(
    release: Release,
    api: Api,
    cluster: Cluster,
    audited_repository: Repository,
    database: Database,
    interrupt: Callable[[Api, client.V1Pod], None],
) -> None:
    upgrade = release.start_upgrade()
    first = until(lambda: sessions_in_revision_002(database))
    (pod,) = api.pods(FIRST_JOB)
    arguments = ["logs", "--follow", pod.metadata.name, "-n", api.namespace, "--container=migrate"]
    with ThreadPoolExecutor() as pool:
        log = pool.submit(cluster.kubectl, *arguments)
        until(lambda: "running upgrade 001 -> 002" in api.log(pod))
        interrupt(api, pod)
        text = observed.add(log.result(60))
    if interrupt is _drain:  # a killed pod may or may not have logged it
        assert "FAILED: interrupted by SIGTERM in revision 002 " in text
    until(lambda: sessions_in_revision_002(database) != first)  # no orphaned session of the first pod continues
    open_gate(database)
    result = upgrade.wait()
    assert result.returncode == 0, result.text
    result.line("INFO at 001 (the head is 002); to do: 1 (002 add)")
    assert_applied_once(database)


@pytest.mark.fault(
    "Concurrency",
    fault="The same pod runs twice concurrently, which Kubernetes does not rule out",
    sees="One migrates, the other logs `waiting, ...: another migration is running (pid ...)`, then `nothing to do`;"
    " exit 0",
    state="Each revision applied once",
    do="Nothing",
)
def test_of_the_same_pod_twice_one_migrates_and_the_other_waits_for_it(
    release: Release, api: Api, audited_repository: Repository, database: Database
) -> None:
    upgrade = release.start_upgrade()
    until(lambda: sessions_in_revision_002(database))
    (pod,) = api.pods(FIRST_JOB)
    pod.metadata = client.V1ObjectMeta(name="twin", annotations=pod.metadata.annotations)
    api.core.create_namespaced_pod(api.namespace, pod)
    until(lambda: "another migration is running" in api.log(pod))
    open_gate(database)
    result = upgrade.wait()
    assert result.returncode == 0, result.text
    until(lambda: api.core.read_namespaced_pod("twin", api.namespace).status.phase == "Succeeded")
    assert api.log(pod).splitlines()[-1].endswith("INFO at 002 (head): nothing to do")
    assert_applied_once(database)


@pytest.mark.fault(
    "Process and pod",
    fault="SIGKILL (out of memory, a lost node) during the clone or while pip installs",
    sees="No message from that pod, exit 137; the next one starts over and completes",
    state="Complete, each revision applied once; the killed pod did not contact the database",
    do="Nothing",
)
@pytest.mark.parametrize("stage", ["clone", "pip"])
def test_a_pod_that_is_killed_before_it_contacts_the_database_is_followed_by_one_that_completes(
    releases: Callable[..., Release],
    api: Api,
    cluster: Cluster,
    repository: Repository,
    database: Database,
    unresponsive_pod: client.V1Pod,
    with_pip: dict,
    stage: str,
) -> None:
    """The server for this stage accepts connections and does not respond, until the first pod is killed."""
    release = releases(api)
    service = SwitchedService(api)
    service.route_to(unresponsive_pod, 8080)
    repository.revision("002", "CREATE TABLE once AS SELECT 1")
    repository.push()
    if stage == "clone":
        values, container, text = {"git": {"repo": f"http://{service.host}/git/{repository.name}.git"}}, "git-sync", "{"
    else:
        index = [
            {"name": "PIP_INDEX_URL", "value": f"http://{service.host}/simple/"},
            {"name": "PIP_TRUSTED_HOST", "value": service.host},
        ]
        values, container, text = {**with_pip, "extraEnv": index}, "migrate", "code: repository"
    upgrade = release.start_upgrade(values)
    until(lambda: any(text in api.log(pod, container) for pod in api.pods(FIRST_JOB)))
    (pod,) = api.pods(FIRST_JOB)
    service.route_to(api.fixture("server"), 80)
    kill_container(cluster, pod, container)
    until(lambda: api.pods(FIRST_JOB)[0].status.phase == "Failed")
    assert not contacted(cluster, database)
    result = upgrade.wait()
    assert (result.returncode, database.at) == (0, ["002"]), result.text
    assert database.execute("SELECT count(*) FROM once") == [(1,)]


@pytest.mark.fault(
    "Process and pod",
    fault="A revision needs more memory than the limit",
    sees="`OOMKilled` in the output of 'kubectl describe pod', exit 137; with cgroup v1 also 'FAILED: alembic was"
    ' killed, most likely out of memory: raise "resources.limits.memory"\'',
    state="Finished revisions are kept, this one is rolled back",
    do="Raise `resources.limits.memory`, deploy again",
)
def test_a_revision_that_needs_more_memory_than_the_limit_is_rolled_back_and_passes_with_more(
    release: Release, api: Api, cluster: Cluster, repository: Repository, database: Database
) -> None:
    path = repository.revision("002", "CREATE TABLE filled ()")
    path.write_text(path.read_text().replace("def downgrade", "    b'x' * (300 << 20)\ndef downgrade"))
    repository.push()
    values = {"resources": {"limits": {"memory": "160Mi"}}, "job": {"backoffLimit": 0}}
    failed = release.upgrade(values)
    assert (failed.returncode, database.at, database.relations) == (1, ["001"], TABLE)
    (pod,) = api.pods(FIRST_JOB)
    terminated = pod.status.container_statuses[0].state.terminated
    assert (terminated.exit_code, terminated.reason) == (137, "OOMKilled")
    if "cgroup2fs" not in node(cluster, "stat", "-fc", "%T", "/sys/fs/cgroup"):
        failed.line('FAILED: alembic was killed, most likely out of memory: raise "resources.limits.memory"')
    values["resources"]["limits"]["memory"] = "512Mi"
    result = release.upgrade(values)
    assert (result.returncode, database.at) == (0, ["002"]), result.text


@pytest.mark.fault(
    "Process and pod",
    fault="kubelet is restarted during a run",
    sees="No visible effect",
    state="Complete, each revision applied once",
    do="Nothing",
)
@pytest.mark.disruptive
def test_a_run_survives_a_restart_of_kubelet(
    release: Release, api: Api, cluster: Cluster, audited_repository: Repository, database: Database
) -> None:
    upgrade = release.start_upgrade()
    until(lambda: sessions_in_revision_002(database))
    before = node(cluster, "systemctl", "show", "--property=MainPID", "kubelet")
    node(cluster, "systemctl", "restart", "kubelet")
    until(lambda: node(cluster, "systemctl", "is-active", "kubelet") == "active\n")
    assert node(cluster, "systemctl", "show", "--property=MainPID", "kubelet") != before
    # The new kubelet has synced its pods once it serves their logs.
    until(lambda: "running upgrade 001 -> 002" in api.logs(FIRST_JOB)[0])

    def released() -> bool:
        try:
            open_gate(database)
        except psycopg2.OperationalError:  # the new kubelet has not yet marked the database's pod as ready
            return False
        return True

    until(released)
    result = upgrade.wait()
    assert result.returncode == 0, result.text
    assert_applied_once(database)
