"""The API server and the node of the tests' cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from kubernetes import client, config
from sqlalchemy import make_url

from tests.support.database import Database
from tests.support.programs import normalize, observed, run
from tests.support.waiting import until
from tools.cluster import NAME, Cluster
from tools.postgres import execute

JOB = "hcm-db-migration"  # without the revision of the release
FIRST_JOB = f"{JOB}-1"
TABLE = [
    "hcm_report_metadata",
    "hcm_report_metadata_id_seq",
    "hcm_report_metadata_pkey",
    "idx_hcm_report_campaign",
    "idx_hcm_report_campaign_report_freq",
    "idx_hcm_report_frequency",
    "idx_hcm_report_name",
    "idx_hcm_report_trigger_date",
]
NOTHING_TO_DO = "HH:MM:SS INFO at 001 (head): nothing to do"


def statuses(pod: client.V1Pod) -> list[client.V1ContainerStatus]:
    """Of each container that kubelet knows, init containers first."""
    return [*(pod.status.init_container_statuses or ()), *(pod.status.container_statuses or ())]


@dataclass
class Api:
    """The API server, queried with the kubernetes client about one namespace."""

    namespace: str
    core: client.CoreV1Api
    batch: client.BatchV1Api

    @classmethod
    def of(cls, cluster: Cluster, namespace: str) -> Api:
        connection = config.new_client_from_config(config_file=cluster.kubeconfig)
        return cls(namespace, client.CoreV1Api(connection), client.BatchV1Api(connection))

    def jobs(self) -> list[str]:
        return sorted(job.metadata.name for job in self.batch.list_namespaced_job(self.namespace).items)

    def conditions(self, job: str) -> dict[str, str]:
        """True conditions of a Job: {type: reason}; by type, because newer versions put SuccessCriteriaMet first."""
        found = self.batch.read_namespaced_job(job, self.namespace).status.conditions or []
        return {condition.type: condition.reason for condition in found if condition.status == "True"}

    def seconds_to_failure(self, job: str) -> float:
        """From a Job's start to the end of its first pod's containers, by the cluster's clock."""
        states = [container.state for container in statuses(self.pods(job)[0])]
        end = max(state.terminated.finished_at for state in states if state.terminated)
        return float((end - self.batch.read_namespaced_job(job, self.namespace).status.start_time).total_seconds())

    def pods(self, job: str = "") -> list[client.V1Pod]:
        """The pods, of one Job or of all, oldest first."""
        selector = f"batch.kubernetes.io/job-name={job}" if job else ""
        found = self.core.list_namespaced_pod(self.namespace, label_selector=selector).items
        for pod in found:
            for status in statuses(pod):
                if status.state.terminated:
                    observed.add(status.state.terminated.reason or "", status.state.terminated.exit_code)
        return sorted(found, key=lambda pod: pod.metadata.creation_timestamp)

    def log(self, pod: client.V1Pod, container: str = "migrate") -> str:
        """Empty while the container has not started."""
        try:
            log = self.core.read_namespaced_pod_log(pod.metadata.name, self.namespace, container=container) or ""
        except client.ApiException as error:
            if error.status in (400, 404, 500):  # 500: kubelet is down
                return ""
            raise
        found = [status for status in statuses(pod) if status.name == container]
        ended = [status.state.terminated for status in found if status.state.terminated]
        return observed.add(log, ended[0].exit_code if ended else None)

    def logs(self, job: str) -> list[str]:
        """The log of each pod of the Job, oldest first."""
        return [normalize(self.log(pod)) for pod in self.pods(job)]

    def events(self) -> list[str]:
        return [f"{event.reason}: {event.message}" for event in self.core.list_namespaced_event(self.namespace).items]

    def secret(self, name: str, **data: str) -> None:
        self.core.create_namespaced_secret(self.namespace, {"metadata": {"name": name}, "stringData": data})

    def serve(self, name: str, image: str, script: str, port: int = 8080) -> client.V1Pod:
        """Run a Python script in a pod, which is ready when it listens on `port`."""
        container = {
            "name": name,
            "image": image,
            "command": ["python3", "-u", "-c", script],
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1},
        }
        spec = {
            "containers": [container],
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65533, "seccompProfile": {"type": "RuntimeDefault"}},
            "terminationGracePeriodSeconds": 0,
        }
        self.core.create_namespaced_pod(self.namespace, {"metadata": {"name": name}, "spec": spec})

        def ready() -> client.V1Pod | None:
            pod = self.core.read_namespaced_pod(name, self.namespace)
            conditions = {condition.type: condition.status for condition in pod.status.conditions or []}
            return pod if conditions.get("Ready") == "True" else None

        return until(ready)

    def fixture(self, app: str) -> client.V1Pod:
        """The pod of `postgres` or of `server`, in hcm-fixtures."""
        (pod,) = self.core.list_namespaced_pod("hcm-fixtures", label_selector=f"app={app}").items
        return pod

    def delete(self, *, everything: bool) -> None:
        """Delete the namespace, or only what runs in it: for each kind of object, the deletion is a request or two."""
        if everything:
            self.core.delete_namespace(self.namespace)
        else:
            self.batch.delete_collection_namespaced_job(self.namespace, propagation_policy="Background")
            self.core.delete_collection_namespaced_pod(self.namespace, grace_period_seconds=0)

    def release_config_map(self) -> client.V1ConfigMap | None:
        """The ConfigMap that the chart installs; None if it does not exist."""
        name = f"metadata.name={JOB}"
        found = self.core.list_namespaced_config_map(self.namespace, field_selector=name).items
        return found[0] if found else None

    def config_map(self, name: str, **data: str) -> None:
        self.core.create_namespaced_config_map(self.namespace, {"metadata": {"name": name}, "data": data})


def sessions(cluster: Cluster, database: Database) -> int:
    """The number of sessions that the test's database ever had, including those of the test."""
    query = "SELECT sessions FROM pg_stat_database WHERE datname = %s"
    return int(execute(make_url(cluster.postgres_url()), query, database.name)[0][0])


def contacted(cluster: Cluster, database: Database) -> bool:
    """Whether the test's database ever had a session. Call it before the test opens one."""
    return sessions(cluster, database) > 0


def sessions_in_revision_002(database: Database) -> list[int]:
    """The pids of the sessions that are in revision 002 of the fixture `audited_repository`."""
    query = "SELECT pid FROM pg_stat_activity WHERE query LIKE %s AND application_name = 'hcm-db-migrations'"
    return [pid for (pid,) in database.execute(query + " AND datname = current_database()", "%FROM gate%")]


def open_gate(database: Database) -> None:
    """Let revision 002 of the fixture `audited_repository` continue."""
    database.execute("DELETE FROM gate")


def in_node(cluster: Cluster, *command: str) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment that run a command on kind's node."""
    if cluster.is_existing:
        pytest.skip("runs commands on the node, which requires a kind cluster of the tests: omit --kubeconfig")
    return ["docker", "exec", f"{NAME}-control-plane", *command], cluster.engine_environment()


def node(cluster: Cluster, *command: str) -> str:
    """Run a command on kind's node; return its output."""
    arguments, environment = in_node(cluster, *command)
    return run(arguments, env=environment, verbatim=True, check=True).stdout


# (protocol, address, port) of a pod's peer.
Peer = tuple[str, str, int]


def connections(cluster: Cluster, address: str, direction: str) -> set[Peer]:
    """What a pod connected to (`--orig-src`), or who connected to it (`--orig-dst`), as a policy sees it: behind a
    Service, the pod. The node's table has a connection for two minutes after its end.
    """
    table = node(cluster, "sh", "-c", f"conntrack --dump {direction}={address} 2>/dev/null")
    entry = r"^(\w+) .*?src=.*?src=(\S+) dst=\S+ sport=(\d+)"  # the second tuple is the reply's
    return {(protocol, peer, int(port)) for protocol, peer, port in re.findall(entry, table, re.M)}


def kill_container(cluster: Cluster, pod: client.V1Pod, name: str) -> None:
    """Kill a container at once, by its first process."""
    label = f"--label=io.kubernetes.pod.uid={pod.metadata.uid}"  # the pod's status is updated late
    found = node(cluster, "crictl", "ps", "--quiet", f"--name=^{name}$", label).strip()
    pid = node(cluster, "crictl", "inspect", "--output=go-template", "--template={{.info.pid}}", found).strip()
    node(cluster, "kill", "-9", pid)


@contextmanager
def admission_policy(
    cluster: Cluster, namespace: str, kind: str, spec: dict[str, Any], **binding: Any
) -> Iterator[None]:
    """A `ValidatingAdmissionPolicy` or `MutatingAdmissionPolicy` for a namespace. The API server enforces it late."""
    api, name = {"apiVersion": "admissionregistration.k8s.io/v1"}, {"metadata": {"name": namespace}}
    selector = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    specs = {kind: spec, f"{kind}Binding": {"policyName": namespace, "matchResources": selector, **binding}}
    try:
        cluster.apply(*({**api, **name, "kind": of, "spec": found} for of, found in specs.items()))
        yield
    finally:
        for of in specs:
            cluster.kubectl("delete", "--ignore-not-found", of, namespace)


class SwitchedService:
    """A Service whose endpoint the test sets; initially it has none."""

    def __init__(self, api: Api, port: int = 80) -> None:
        self.api = api
        self.host = f"switched.{api.namespace}"
        service = {"metadata": {"name": "switched"}, "spec": {"ports": [{"port": port}]}}
        api.core.create_namespaced_service(api.namespace, service)
        api.core.create_namespaced_endpoints(api.namespace, {"metadata": {"name": "switched"}})

    def route_to(self, pod: client.V1Pod, port: int) -> None:
        subset = {"addresses": [{"ip": pod.status.pod_ip}], "ports": [{"port": port}]}
        self.api.core.replace_namespaced_endpoints(
            "switched", self.api.namespace, {"metadata": {"name": "switched"}, "subsets": [subset]}
        )
