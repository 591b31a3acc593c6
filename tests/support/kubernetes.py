"""The API server, releases of the chart, git repositories and the node of the tests' cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config
from sqlalchemy import make_url

from tests.support import revisions
from tests.support.database import Database
from tests.support.git import git
from tests.support.programs import Program, Result, normalize, observed, run, start
from tests.support.project import copy
from tools.cluster import NAME, Cluster, ClusterKind
from tools.offline_cluster import engine
from tools.paths import CHART, ROOT
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
        status = self.pods(job)[0].status
        states = [container.state for container in (*status.init_container_statuses, *status.container_statuses)]
        end = max(state.terminated.finished_at for state in states if state.terminated)
        return float((end - self.batch.read_namespaced_job(job, self.namespace).status.start_time).total_seconds())

    def pods(self, job: str = "") -> list[client.V1Pod]:
        """The pods, of one Job or of all, oldest first."""
        selector = f"batch.kubernetes.io/job-name={job}" if job else ""
        found = self.core.list_namespaced_pod(self.namespace, label_selector=selector).items
        for pod in found:
            for status in (*(pod.status.init_container_statuses or ()), *(pod.status.container_statuses or ())):
                if status.state.terminated:
                    observed.codes.add(status.state.terminated.exit_code)
                    observed.add(status.state.terminated.reason or "")
        return sorted(found, key=lambda pod: pod.metadata.creation_timestamp)

    def log(self, pod: client.V1Pod, container: str = "migrate") -> str:
        """Empty while the container has not started."""
        try:
            log = self.core.read_namespaced_pod_log(pod.metadata.name, self.namespace, container=container) or ""
        except client.ApiException as error:
            if error.status in (400, 404, 500):  # 500: kubelet is down
                return ""
            raise
        return observed.add(log)

    def logs(self, job: str) -> list[str]:
        """The log of each pod of the Job, oldest first."""
        return [normalize(self.log(pod)) for pod in self.pods(job)]

    def events(self) -> list[str]:
        return [f"{event.reason}: {event.message}" for event in self.core.list_namespaced_event(self.namespace).items]

    def secret(self, name: str, **data: str) -> None:
        self.core.create_namespaced_secret(self.namespace, {"metadata": {"name": name}, "stringData": data})

    def config_map(self, name: str, **data: str) -> None:
        self.core.create_namespaced_config_map(self.namespace, {"metadata": {"name": name}, "data": data})


def readable(output: str) -> str:
    """Helm's output, piped through the sed command of the chart's README."""
    script = re.search(r"helm upgrade \.\.\. 2>&1 \| sed '(.*)'", (CHART / "README.md").read_text())
    assert script
    return run(["sed", script[1]], stdin=output, verbatim=True, check=True).stdout


@dataclass
class HelmProgram:
    """A started Helm process."""

    program: Program

    @property
    def output(self) -> str:
        """Unchanged."""
        return self.program.output

    def wait(self) -> Result:
        """Wait for the program to exit; the result has the readable output."""
        result = self.program.wait(240)
        return Result(result.returncode, normalize(observed.add(readable(self.output))))

    def kill(self) -> None:
        self.program.kill()


@dataclass
class Release:
    """A release of the chart in a namespace, with a Helm isolated from the user's settings."""

    helm: Path
    cluster: Cluster
    namespace: str
    home: Path
    values: dict[str, Any]
    name: str = "hcm-db-migrations"
    chart: Path = CHART
    upgrades: int = 0

    def start(self, *arguments: str | Path) -> HelmProgram:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "KUBECONFIG": self.cluster.kubeconfig}
        command = [self.helm, *arguments, "-n", self.namespace]
        return HelmProgram(start(command, cwd=ROOT, env=environment, one_stream=True))

    def run(self, *arguments: str | Path) -> Result:
        return self.start(*arguments).wait()

    def upgrading(self, values: dict[str, Any] | None = None, *options: str | Path) -> HelmProgram:
        """Start `helm upgrade --install`, with `values` merged over the release's."""
        self.upgrades += 1
        file = self.home / f"{self.namespace}-{self.name}-{self.upgrades}.yaml"
        file.write_text(yaml.safe_dump(merged(self.values, values or {})))
        return self.start("upgrade", "--install", self.name, self.chart, "-f", file, *options)

    def upgrade(self, values: dict[str, Any] | None = None, *options: str | Path) -> Result:
        return self.upgrading(values, *options).wait()

    def status(self) -> str:
        """Such as `deployed`."""
        command = self.start("status", self.name, "--output", "json")
        command.wait()
        return str(json.loads(command.output)["info"]["status"])


def merged(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in overlay.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


@dataclass
class Repository:
    """A test's git repository, on the server in the cluster; it starts with this checkout's migrations, on main."""

    folder: Path
    cluster: Cluster
    name: str

    @classmethod
    def create(cls, folder: Path, cluster: Cluster, name: str) -> Repository:
        created = cls(folder, cluster, name)
        folder.mkdir()
        created.git("init", "--quiet", "--initial-branch=main")
        copy(folder)
        shutil.copy(ROOT / "requirements.txt", folder)
        created.push()
        return created

    @property
    def url(self) -> str:
        """For pods."""
        return f"{self.cluster.git_in_cluster}/{self.name}.git"

    @property
    def remote(self) -> str:
        """For this process, which has push access."""
        return f"{self.cluster.git_url}/{self.name}.git"

    def git(self, *arguments: str) -> str:
        return git(self.folder, *arguments)

    def push(self, ref: str = "refs/heads/main") -> str:
        """Commit all changes and push them; return the commit."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message=test")
        self.git("push", "--quiet", "--force", self.remote, f"HEAD:{ref}")
        return self.git("rev-parse", "HEAD")

    def revision(self, number: str, *upgrade: str, downgrade: str = "SELECT 1") -> Path:
        """Write a revision that runs these SQL statements."""
        versions = self.folder / "migrations" / "versions"
        body = "\n".join(f"op.execute({statement!r})" for statement in upgrade)
        return revisions.write(versions, number, body, f"op.execute({downgrade!r})", down=None, name="add")


def sessions(cluster: Cluster, database: Database) -> int:
    """The number of sessions that the test's database ever had, including those of the test."""
    query = "SELECT sessions FROM pg_stat_database WHERE datname = %s"
    return int(execute(make_url(cluster.postgres_url()), query, database.name)[0][0])


def contacted(cluster: Cluster, database: Database) -> bool:
    """Whether the test's database ever had a session. Call it before the test opens one."""
    return sessions(cluster, database) > 0


def in_002(database: Database) -> list[int]:
    """The pids of the sessions that are in revision 002 of the fixture `audited`."""
    query = "SELECT pid FROM pg_stat_activity WHERE query LIKE %s AND application_name = 'hcm-db-migrations'"
    return [pid for (pid,) in database.execute(query + " AND datname = current_database()", "%FROM gate%")]


def release_gate(database: Database) -> None:
    """Let revision 002 of the fixture `audited` continue."""
    database.execute("DELETE FROM gate")


def in_node(cluster: Cluster, *command: str) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment that run a command on kind's node."""
    if cluster.kind is ClusterKind.EXISTING:
        pytest.skip("runs commands on the node, which requires a kind cluster of the tests: omit --kubeconfig")
    environment = engine.environment() if cluster.kind is ClusterKind.LOCAL_BUILD else dict(os.environ)
    return ["docker", "exec", f"{NAME}-control-plane", *command], environment


def node(cluster: Cluster, *command: str) -> str:
    """Run a command on kind's node; return its output."""
    arguments, environment = in_node(cluster, *command)
    return run(arguments, env=environment, verbatim=True, check=True).stdout


def kill_container(cluster: Cluster, pod: client.V1Pod, name: str) -> None:
    """Kill a container at once, by its first process."""
    label = f"--label=io.kubernetes.pod.uid={pod.metadata.uid}"  # the pod's status is updated late
    found = node(cluster, "crictl", "ps", "--quiet", f"--name=^{name}$", label).strip()
    pid = node(cluster, "crictl", "inspect", "--output=go-template", "--template={{.info.pid}}", found).strip()
    node(cluster, "kill", "-9", pid)


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
