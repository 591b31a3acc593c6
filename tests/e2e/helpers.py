"""What a test here holds in its hands: the API server, a release of the chart, and a git repository in the cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config
from sqlalchemy import make_url

from tests.migrations.helpers import Database
from tools.cluster import NAME, Cluster, ClusterKind
from tools.offline_cluster import engine
from tools.paths import CHART, ROOT
from tools.postgres import execute
from tools.steps import run

# What differs each time, in a log and in Helm's output.
MOVING = [
    (r"\d\d:\d\d:\d\d INFO", "HH:MM:SS INFO"),
    (r"\b\d+\.\d\d s\b", "N.NN s"),
    (r"\bpid \d+", "pid N"),
    (r"\b[0-9a-f]{40}\b", "<commit>"),
]


@dataclass
class Api:
    """The API server, asked by the kubernetes client about one namespace."""

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
        """What is true of a Job: {type: reason}. By type, because newer versions put SuccessCriteriaMet first."""
        found = self.batch.read_namespaced_job(job, self.namespace).status.conditions or []
        return {condition.type: condition.reason for condition in found if condition.status == "True"}

    def seconds_to_failure(self, job: str) -> float:
        """From a Job's start to the end of its first pod's containers, by the cluster's clock."""
        status = self.pods(job)[0].status
        states = [container.state for container in (*status.init_container_statuses, *status.container_statuses)]
        end = max(state.terminated.finished_at for state in states if state.terminated)
        return (end - self.batch.read_namespaced_job(job, self.namespace).status.start_time).total_seconds()

    def pods(self, job: str = "") -> list[client.V1Pod]:
        """The pods, of one Job or of all, oldest first."""
        selector = f"batch.kubernetes.io/job-name={job}" if job else ""
        found = self.core.list_namespaced_pod(self.namespace, label_selector=selector).items
        return sorted(found, key=lambda pod: pod.metadata.creation_timestamp)

    def log(self, pod: client.V1Pod, container: str = "migrate") -> str:
        """Empty while the container has not started."""
        try:
            return self.core.read_namespaced_pod_log(pod.metadata.name, self.namespace, container=container) or ""
        except client.ApiException as error:
            if error.status in (400, 404, 500):  # 500: kubelet is away
                return ""
            raise

    def logs(self, job: str) -> list[str]:
        """What the Job's pods have said, oldest first."""
        return [steady(self.log(pod)) for pod in self.pods(job)]

    def events(self) -> list[str]:
        return [f"{event.reason}: {event.message}" for event in self.core.list_namespaced_event(self.namespace).items]

    def secret(self, name: str, **data: str) -> None:
        self.core.create_namespaced_secret(self.namespace, {"metadata": {"name": name}, "stringData": data})

    def config_map(self, name: str, **data: str) -> None:
        self.core.create_namespaced_config_map(self.namespace, {"metadata": {"name": name}, "data": data})


def steady(text: str) -> str:
    for pattern, replacement in MOVING:
        text = re.sub(pattern, replacement, text)
    return text


def readable(output: str) -> str:
    """Helm's output, through the command for it that the chart's README names."""
    script = re.search(r"helm upgrade \.\.\. 2>&1 \| sed '(.*)'", (CHART / "README.md").read_text())
    assert script
    return subprocess.run(["sed", script[1]], input=output, capture_output=True, text=True, check=True).stdout


@dataclass
class Result:
    """How a command ended; `text` is both its streams as a person reads them, without what differs each time."""

    returncode: int
    text: str

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def line(self, *words: str, times: int = 1) -> None:
        """Assert that a line has all of these words, and how many have."""
        found = [line for line in self.lines if all(word in line for word in words)]
        assert len(found) == times, f"{len(found)} lines with {words}:\n{self.text}"


@dataclass
class Command:
    """A command that runs."""

    process: subprocess.Popen[str]
    output: str = ""

    def wait(self) -> Result:
        output, _ = self.process.communicate(timeout=240)
        self.output += output
        return Result(self.process.returncode, steady(readable(output)))


@dataclass
class Release:
    """A release of the chart in a namespace, by a Helm that sees nothing of the user's."""

    helm: Path
    cluster: Cluster
    namespace: str
    home: Path
    values: dict[str, Any]
    name: str = "hcm-db-migrations"
    chart: Path = CHART
    commands: list[Command] = field(default_factory=list)

    def start(self, *words: str | Path) -> Command:
        """Start Helm with these words."""
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "KUBECONFIG": self.cluster.kubeconfig}
        process = subprocess.Popen(
            [self.helm, *words, "-n", self.namespace],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.commands.append(Command(process))
        return self.commands[-1]

    def run(self, *words: str | Path) -> Result:
        return self.start(*words).wait()

    def upgrading(self, values: dict[str, Any] | None = None, *options: str | Path) -> Command:
        """Start `helm upgrade --install`, with `values` over the release's own."""
        file = self.home / f"{self.namespace}-{self.name}-{len(self.commands)}.yaml"
        file.write_text(yaml.safe_dump(merged(self.values, values or {})))
        return self.start("upgrade", "--install", self.name, self.chart, "-f", file, *options)

    def upgrade(self, values: dict[str, Any] | None = None, *options: str | Path) -> Result:
        return self.upgrading(values, *options).wait()

    def status(self) -> str:
        """Such as `deployed`."""
        command = self.start("status", self.name, "--output", "json")
        command.wait()
        return json.loads(command.output)["info"]["status"]


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


@dataclass
class Repository:
    """A git repository of a test, on the server in the cluster; it begins with this checkout's migrations, on main."""

    folder: Path
    cluster: Cluster
    name: str

    @classmethod
    def create(cls, folder: Path, cluster: Cluster, name: str) -> Repository:
        made = cls(folder, cluster, name)
        folder.mkdir()
        made.git("init", "--quiet", "--initial-branch=main")
        for file in ("alembic.ini", "requirements.txt"):
            shutil.copy(ROOT / file, folder)
        for name in ("migrations", "migration_runner"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        made.push()
        return made

    @property
    def url(self) -> str:
        """For pods."""
        return f"{self.cluster.git_in_cluster}/{self.name}.git"

    @property
    def remote(self) -> str:
        """For this process, which may push."""
        return f"{self.cluster.git_url}/{self.name}.git"

    def git(self, *words: str) -> str:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder.parent), "GIT_CONFIG_NOSYSTEM": "1"}
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        return run(["git", "-C", self.folder, *who, *words], env=environment).strip()

    def push(self, ref: str = "refs/heads/main") -> str:
        """Commit what is there and push it; return the commit."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message=test")
        self.git("push", "--quiet", "--force", self.remote, f"HEAD:{ref}")
        return self.git("rev-parse", "HEAD")

    def revision(self, number: str, *upgrade: str, downgrade: str = "SELECT 1") -> Path:
        """Write a revision that runs these SQL statements."""
        path = self.folder / "migrations" / "versions" / f"20251202_143000_{number}_test.py"
        lines = [
            '"""test"""',
            "from alembic import op",
            f"revision = {number!r}",
            f"down_revision = {f'{int(number) - 1:03}'!r}",
            "def upgrade():",
            *(f"    op.execute({statement!r})" for statement in upgrade),
            "def downgrade():",
            f"    op.execute({downgrade!r})",
        ]
        path.write_text("\n".join(lines) + "\n")
        return path


def sessions(cluster: Cluster, database: Database) -> int:
    """How many sessions the test's database ever had, the test's own among them."""
    query = "SELECT sessions FROM pg_stat_database WHERE datname = %s"
    return execute(make_url(cluster.postgres_url()), query, database.name)[0][0]


def contacted(cluster: Cluster, database: Database) -> bool:
    """Whether anybody ever had a session in the test's database. Ask before the test has one itself."""
    return sessions(cluster, database) > 0


def in_002(database: Database) -> list[int]:
    """The sessions, by pid, of the run that is in revision 002 of the fixture `audited`."""
    query = "SELECT pid FROM pg_stat_activity WHERE query LIKE %s AND application_name = 'hcm-db-migrations'"
    return [pid for (pid,) in database.execute(query + " AND datname = current_database()", "%FROM brake%")]


def let_go(database: Database) -> None:
    """Let revision 002 of the fixture `audited` go on."""
    database.execute("DELETE FROM brake")


def in_node(cluster: Cluster, *command: str) -> tuple[list[str], dict[str, str]]:
    """The command line, and the environment, that run a command on the machine that kind made."""
    if cluster.kind is ClusterKind.EXISTING:
        pytest.skip("this reaches into the node: it needs a kind cluster of our own, so leave out --kubeconfig")
    environment = engine.environment() if cluster.kind is ClusterKind.LOCAL_BUILD else dict(os.environ)
    return ["docker", "exec", f"{NAME}-control-plane", *command], environment


def node(cluster: Cluster, *command: str) -> str:
    """Run a command on the machine that kind made; return its output."""
    words, environment = in_node(cluster, *command)
    return run(words, env=environment)


def kill_container(cluster: Cluster, pod: client.V1Pod, name: str) -> None:
    """Kill a container's first process, and so the container, at once."""
    label = f"--label=io.kubernetes.pod.uid={pod.metadata.uid}"  # the pod's own status comes late
    found = node(cluster, "crictl", "ps", "--quiet", f"--name=^{name}$", label).strip()
    pid = node(cluster, "crictl", "inspect", "--output=go-template", "--template={{.info.pid}}", found).strip()
    node(cluster, "kill", "-9", pid)


class Gate:
    """A Service of a test's own that leads where the test says: nowhere, at first."""

    def __init__(self, api: Api, port: int = 80) -> None:
        self.api = api
        self.host = f"gate.{api.namespace}"
        service = {"metadata": {"name": "gate"}, "spec": {"ports": [{"port": port}]}}
        api.core.create_namespaced_service(api.namespace, service)
        api.core.create_namespaced_endpoints(api.namespace, {"metadata": {"name": "gate"}})

    def lead_to(self, pod: client.V1Pod, port: int) -> None:
        to = {"addresses": [{"ip": pod.status.pod_ip}], "ports": [{"port": port}]}
        self.api.core.replace_namespaced_endpoints(
            "gate", self.api.namespace, {"metadata": {"name": "gate"}, "subsets": [to]}
        )
