"""A kind cluster with what the chart finds in a DIGIT cluster.

    python -m tools.cluster up        create it, unless it is running (make cluster)
    python -m tools.cluster install   install the chart on it, show the Job's log and the table (make install)
    python -m tools.cluster status    show what is running, and how to reach it
    python -m tools.cluster down      stop and delete it (make cluster-down)

Tests call `get_or_create()`. The cluster holds a namespace `health` with ConfigMap egov-config and the Secrets db and
git-creds, and a namespace `hcm-fixtures` with PostgreSQL 15 and a git and package server (tools/fixtures): this
checkout's HEAD is its repository hcm-db-migrations.git, as branch main and, in the folder
utilities/hcm-db-migrations, as branch airflow-analysis.

The kubeconfig, passwords and values are in STATE, a folder of the cache; ~/.kube/config is never read or written.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import contextlib
import dataclasses
import enum
import json
import os
import platform
import re
import secrets
import shutil
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import psycopg2

from tools.binaries import find_or_build
from tools.network import free_port
from tools.offline_cluster import engine, images
from tools.paths import CACHE, ROOT
from tools.steps import UnavailableError, cached, locked, log, remove, run, wait_until

NAME = "hcm-db-migrations"
STATE = CACHE / "cluster"
FIXTURES = ROOT / "tools/fixtures"
# kind v0.33's default.
KINDEST = "kindest/node:v1.37.0@sha256:a1ed56cfb0e7b93589bdf97c8cd566405a265939e3620fc4f5de89adff580ae5"


class ClusterKind(str, enum.Enum):
    """Where the cluster comes from; printed in the header of a test report."""

    EXISTING = "existing"  # named by its kubeconfig; gets the fixtures, and is kept
    DOCKER = "docker"  # kind in the user's container engine, with public images
    LOCAL_BUILD = "built locally"  # kind in a private container engine, without pulling an image

    def __str__(self) -> str:
        return self.value


class Ports(TypedDict):
    """The ports of the fixtures on the cluster's address."""

    postgres: int
    http: int


class Images(TypedDict):
    """The images of the chart and of the fixtures, with their tags."""

    python: str
    git_sync: str
    postgres: str
    server: str


class Passwords(TypedDict):
    """The generated passwords, by their names in fixtures/manifests.yaml."""

    ADMIN_PASSWORD: str
    USER_PASSWORD: str
    TOKEN: str


class ImageValue(TypedDict):
    repository: str
    tag: str


class GitValues(TypedDict):
    image: ImageValue


class ImageValues(TypedDict, total=False):
    """The chart's values for its images; empty for the chart's defaults."""

    image: ImageValue
    git: GitValues


NODE_PORTS: Ports = {"postgres": 30432, "http": 30080}

PUBLIC_IMAGES: Images = {
    "python": "python:3.10-slim",
    "git_sync": "registry.k8s.io/git-sync/git-sync:v4.7.1",
    "postgres": "postgres:15",
    "server": "python:3.10",
}
LOCAL_IMAGES: Images = {
    "python": images.PYTHON,
    "git_sync": images.GIT_SYNC,
    "postgres": images.SERVER,
    "server": images.SERVER,
}


@dataclasses.dataclass(frozen=True)
class Provider:
    """What creates a cluster."""

    kind: ClusterKind
    environment: dict[str, str]  # of the command `kind`
    images: Images


@dataclasses.dataclass
class Cluster:
    """A running cluster with its fixtures. Addresses are for this process, those called `*_in_cluster` for pods."""

    kind: ClusterKind
    kubeconfig: str
    address: str
    ports: Ports
    images: Images
    passwords: Passwords = dataclasses.field(repr=False)
    owner: int = 0  # the process that deletes it when it ends; 0 if it is kept until `make cluster-down`

    index_in_cluster = "http://server.hcm-fixtures/simple/"
    git_in_cluster = "http://server.hcm-fixtures/git"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and for pytest-xdist, which passes no enum to its workers."""
        return dataclasses.asdict(self) | {"kind": self.kind.value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cluster:
        return cls(**{**data, "kind": ClusterKind(data["kind"])})

    @property
    def git_url(self) -> str:
        """Push to `{git_url}/NAME.git`: a new NAME creates a repository. Pods read `{git_in_cluster}/NAME.git`."""
        return f"http://{self.address}:{self.ports['http']}/git"

    @property
    def wheels_url(self) -> str:
        """PUT a wheel to `{wheels_url}/FILE` to add it to the package index."""
        return f"http://{self.address}:{self.ports['http']}/wheels"

    def postgres_url(self, database: str = "postgres") -> str:
        """A superuser's URL for libpq. Pods reach the server as postgres.hcm-fixtures."""
        login = f"postgres:{self.passwords['ADMIN_PASSWORD']}"
        return f"postgresql://{login}@{self.address}:{self.ports['postgres']}/{database}"

    def kubectl(self, *arguments: str | Path, input: str | None = None) -> str:
        """Run kubectl with the standard input `input`, return its standard output. RuntimeError if it fails."""
        return run([find_or_build("kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments], input=input)

    def apply(self, *objects: Mapping[str, object]) -> None:
        self.kubectl("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def psql(self, sql: str, database: str = "postgres") -> str:
        """Run SQL or psql's own commands as superuser, in the server's pod."""
        client = f'PGPASSWORD="$POSTGRES_PASSWORD" psql -h 127.0.0.1 -U postgres -v ON_ERROR_STOP=1 -d {database} -f -'
        pod = ["exec", "-i", "-n", "hcm-fixtures", "deploy/postgres", "--", "sh", "-c", client]
        return self.kubectl(*pod, input=sql + "\n")

    def server_file(self, name: str) -> str:
        """A file of the git server: `ssh` (private key), `known_hosts`, `ca.crt`."""
        return self.kubectl("exec", "-n", "hcm-fixtures", "deploy/server", "--", "cat", f"/srv/keys/{name}")

    def build_image(self, tag: str, context: Path, *arguments: str) -> str:
        """Build an image and load it into the cluster; return its name. pip uses the cluster's package index."""
        if self.kind is ClusterKind.EXISTING:
            raise UnavailableError("an image cannot be loaded into an existing cluster")
        env = engine.environment() if self.kind is ClusterKind.LOCAL_BUILD else dict(os.environ)
        index = self.wheels_url.replace("/wheels", "/simple/")
        pip = [f"--build-arg=PIP_INDEX_URL={index}", f"--build-arg=PIP_TRUSTED_HOST={self.address}"]
        run(["docker", "build", "--quiet", "--network=host", *pip, *arguments, f"--tag={tag}", context], env=env)
        run([find_or_build("kind"), "load", "docker-image", "--name", NAME, tag], env=env)
        return tag

    def image_values(self) -> ImageValues:
        """The chart's values for its images, if the public ones cannot be pulled."""
        if self.images["python"] == PUBLIC_IMAGES["python"]:
            return {}
        return {"image": _image_value(self.images["python"]), "git": {"image": _image_value(self.images["git_sync"])}}


def _image_value(name: str) -> ImageValue:
    repository, _, tag = name.rpartition(":")
    return {"repository": repository, "tag": tag}


def get_or_create(kubeconfig: str | None = None, owner: int = 0) -> Cluster:
    """Return the running cluster, or create one. `kubeconfig` names an existing one: it gets the fixtures and is kept.

    `owner` is the process that will call `delete(owner)`. Without one, the cluster is kept, even if another process
    owned it. Raises UnavailableError, with the fix, if no cluster can be created.
    """
    with locked("cluster"):
        if kubeconfig:
            log(f"cluster: the existing one of {kubeconfig}")
            return _use_existing(kubeconfig)
        if cluster := current():
            if cluster.owner and Path(f"/proc/{cluster.owner}").exists() and owner:
                raise UnavailableError(
                    f"process {cluster.owner} is testing on the running cluster and deletes it when it ends: wait for "
                    "that, or keep the cluster with make cluster"
                )
            log(f"cluster: already running ({cluster.kind}); make cluster-down deletes it")
            if cluster.owner:
                cluster.owner = owner
                _save_state(cluster)
            return cluster
        _delete()  # remains of an earlier, killed run
        try:
            return _create(owner)
        except BaseException:
            log("deleting the partially created cluster")
            _delete()
            raise


def current() -> Cluster | None:
    """The running cluster, if any."""
    cluster = _saved_state()
    if cluster and (cluster.kind is not ClusterKind.LOCAL_BUILD or engine.running()):
        find_or_build("kubectl")  # outside the loop, because its errors are not the API server's
        for _ in range(5):  # a busy API server may miss a request
            with contextlib.suppress(RuntimeError):
                cluster.kubectl("get", "--raw=/readyz", "--request-timeout=30s")
                return cluster
            time.sleep(1)
    return None


def _saved_state() -> Cluster | None:
    """The last cluster that was created and not deleted; it may not be running."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return Cluster.from_dict(json.loads((STATE / "cluster.json").read_text()))
    return None


def _save_state(cluster: Cluster) -> None:
    state = STATE / "cluster.json"
    state.touch(mode=0o600)
    state.write_text(json.dumps(cluster.to_dict()))


def delete(owner: int = 0) -> None:
    """Stop and delete the cluster and the engine, unless another owner has it. What was built stays in the cache."""
    with locked("cluster"):
        if not owner or ((cluster := _saved_state()) and cluster.owner == owner):
            _delete()


def install(cluster: Cluster) -> None:
    """Install or upgrade the chart as a user does. Print the Job's log and the table."""
    push_checkout(cluster)
    code = ["migrations", "migration_runner", "alembic.ini", "requirements.txt"]
    if changed := run(["git", "-C", ROOT, "status", "--porcelain", "--", *code]):
        log(f"not committed, so not in the cluster:\n{changed.rstrip()}")
    values: list[str | Path] = ["-f", "environments/kind.yaml"]
    if cluster.image_values():
        values += ["-f", STATE / "values.yaml"]
    command = ["upgrade", "--install", NAME, f"charts/{NAME}", *values, "-n", "health"]
    print("$ helm", *command, flush=True)
    helm = [find_or_build("helm"), *command, f"--kubeconfig={cluster.kubeconfig}"]
    done = subprocess.run(helm, cwd=ROOT, capture_output=True, text=True)
    # Helm 4 prints the Job's log as one escaped record.
    print(done.stderr.replace("\\n", "\n"), done.stdout, sep="", flush=True)
    if done.returncode:
        raise RuntimeError(f"helm: exit code {done.returncode}")
    print(cluster.psql(r"\d hcm_report_metadata", "unifieddevdb"))


def push_checkout(cluster: Cluster, name: str = "hcm-db-migrations.git", revision: str = "HEAD") -> None:
    """Push a commit of this checkout: as main, and under utilities/hcm-db-migrations as airflow-analysis."""
    with tempfile.TemporaryDirectory() as folder:

        def git(*arguments: str, input: str | None = None, env: Mapping[str, str] | None = None) -> str:
            return run(["git", "-C", folder, *arguments], input=input, env=env).strip()

        run(["git", "clone", "--quiet", "--bare", "--shared", ROOT, folder])
        commit = run(["git", "-C", ROOT, "rev-parse", f"{revision}^{{commit}}"]).strip()
        tree = git("rev-parse", f"{commit}^{{tree}}")
        for parent in ("hcm-db-migrations", "utilities"):
            tree = git("mktree", input=f"040000 tree {tree}\t{parent}\n")
        author = ["-c", "user.name=hcm-db-migrations", "-c", "user.email=hcm-db-migrations@localhost"]
        message = f"hcm-db-migrations at {commit}"
        date = git("show", "--no-patch", "--format=%cI", commit)
        dates = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}  # the same tree always gets the same commit
        nested = git(*author, "commit-tree", tree, "-m", message, env=os.environ | dates)
        refs = [f"+{commit}:refs/heads/main", f"+{nested}:refs/heads/airflow-analysis"]
        git("push", "--quiet", f"{cluster.git_url}/{name}", *refs)


def _create(owner: int) -> Cluster:
    provider = _select_provider()
    STATE.mkdir(parents=True, exist_ok=True)
    networking: dict[str, str | int]
    if provider.kind is ClusterKind.LOCAL_BUILD:
        address, ports, image = engine.address(), NODE_PORTS, images.build_images()
        networking = {"apiServerAddress": address, "apiServerPort": 6443}
        # The machine may still have cgroup v1, which kubelet refuses by default.
        patches = ["kind: KubeletConfiguration\nfailCgroupV1: false\n"]
    else:
        address, ports, image = "127.0.0.1", _free_ports(), KINDEST
        networking, patches = {"apiServerAddress": address}, []
    mappings = [
        {"containerPort": container, "hostPort": host, "listenAddress": address}
        for container, host in ((NODE_PORTS["postgres"], ports["postgres"]), (NODE_PORTS["http"], ports["http"]))
    ]
    config = {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "networking": networking,
        "kubeadmConfigPatches": patches,
        "nodes": [{"role": "control-plane", "extraPortMappings": mappings}],
    }
    kubeconfig = STATE / "kubeconfig"
    arguments = ["create", "cluster", "--name", NAME, "--config", "-", "--wait", "180s", "--image", image]
    command: list[str | Path] = [find_or_build("kind"), *arguments, "--kubeconfig", kubeconfig]
    kubeconfig.touch(mode=0o600)  # kind writes it late, and _delete() checks that it exists
    run(command, "starting the kind cluster", "40 s", env=provider.environment, input=json.dumps(config))
    cluster = Cluster(provider.kind, str(kubeconfig), address, ports, provider.images, _new_passwords(), owner)
    dns = "--namespace=kube-system", "deploy/coredns"
    # If CoreDNS starts before kube-proxy, it waits 30 s for an answer that cannot arrive.
    cluster.kubectl("rollout", "status", "--namespace=kube-system", "daemonset/kube-proxy", "--timeout=180s")
    cluster.kubectl("rollout", "restart", *dns)
    _install_fixtures(cluster)
    cluster.kubectl("rollout", "status", *dns, "--timeout=180s")
    (STATE / "values.yaml").write_text(json.dumps({NAME: cluster.image_values()}, indent=2) + "\n")
    _save_state(cluster)
    return cluster


def _free_ports() -> Ports:
    return {"postgres": free_port(), "http": free_port()}


def _select_provider() -> Provider:
    """Select what creates the cluster, and log it with the reason. The private container engine is started."""
    reason = _docker_unavailable_reason()
    if not reason:
        log("cluster: kind with its official node image, because the container engine on this machine can pull it")
        environment = {key: value for key, value in os.environ.items() if key != "KUBECONFIG"}
        return Provider(ClusterKind.DOCKER, environment, PUBLIC_IMAGES)
    try:
        engine.check()
    except UnavailableError as error:
        raise UnavailableError(
            f"cannot create a cluster: {reason}, and {error}. Start Docker with access to its registry, or use an "
            "existing cluster: pytest --cluster-type existing --kubeconfig FILE"
        ) from None
    log(f"cluster: kind with a container engine and a node image built locally, because {reason}")
    engine.start()
    return Provider(ClusterKind.LOCAL_BUILD, engine.environment(), LOCAL_IMAGES)


def _docker_unavailable_reason() -> str | None:
    """Why the user's Docker cannot create the cluster; None if it is running and can pull the node image."""
    if not shutil.which("docker"):
        return "docker is not on PATH"
    for command, seconds, reason in (
        (["docker", "version"], 10, "no container engine is running"),
        (["docker", "pull", "--quiet", KINDEST], 600, f"the container engine cannot pull {KINDEST.partition('@')[0]}"),
    ):
        try:
            if subprocess.run(command, capture_output=True, timeout=seconds).returncode:
                return reason
        except (OSError, subprocess.TimeoutExpired):
            return reason
    return None


def _use_existing(kubeconfig: str) -> Cluster:
    """Install the fixtures in the user's cluster. Its ports are forwarded as long as this process runs."""
    path = str(Path(kubeconfig).resolve())
    cluster = Cluster(ClusterKind.EXISTING, path, "127.0.0.1", _free_ports(), PUBLIC_IMAGES, _new_passwords())
    namespaces = cluster.kubectl("get", "namespaces", "--output=name").split()
    if "namespace/hcm-fixtures" in namespaces:
        fixtures, db = _secret(cluster, "hcm-fixtures", "fixtures"), _secret(cluster, "health", "db")
        cluster.passwords = {
            "ADMIN_PASSWORD": fixtures["admin"],
            "USER_PASSWORD": db["password"],
            "TOKEN": fixtures["token"],
        }
    elif "namespace/health" in namespaces:
        raise UnavailableError(
            f"the cluster of {kubeconfig} has a namespace health that these tests did not create, and they would "
            "overwrite its ConfigMap egov-config and Secret db: use another cluster, or delete that namespace"
        )
    _install_fixtures(cluster)
    return cluster


def _secret(cluster: Cluster, namespace: str, name: str) -> dict[str, str]:
    data = json.loads(cluster.kubectl("get", "secret", name, "-n", namespace, "--output=json"))["data"]
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


def _new_passwords() -> Passwords:
    admin, user, token = (secrets.token_urlsafe(18) for _ in range(3))
    return {"ADMIN_PASSWORD": admin, "USER_PASSWORD": user, "TOKEN": token}


def _forward(cluster: Cluster) -> None:
    for service, port in (("postgres", f"{cluster.ports['postgres']}:5432"), ("server", f"{cluster.ports['http']}:80")):
        arguments = ["-n", "hcm-fixtures", "port-forward", f"service/{service}", port]
        command: list[str | Path] = [find_or_build("kubectl"), f"--kubeconfig={cluster.kubeconfig}", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        atexit.register(process.terminate)


def _wait_for_services(cluster: Cluster) -> None:
    """A deployment is rolled out before the node's proxy, or a forwarded port, routes connections to it."""

    def answer() -> bool:
        urllib.request.urlopen(f"http://{cluster.address}:{cluster.ports['http']}/healthz", timeout=5).close()
        psycopg2.connect(cluster.postgres_url(), connect_timeout=5).close()
        return True

    wait_until(answer, 60, "the services of hcm-fixtures", ignore=(OSError, psycopg2.OperationalError))


def _install_fixtures(cluster: Cluster) -> None:
    """Install PostgreSQL, the git and package server, and what the chart finds in the namespace health."""
    log("installing PostgreSQL, the git server and the package index (usually 20 s)")
    variables = {**cluster.passwords, **{f"{name.upper()}_IMAGE": image for name, image in cluster.images.items()}}
    manifests = string.Template((FIXTURES / "manifests.yaml").read_text()).safe_substitute(variables)
    script = {"server.py": (FIXTURES / "server.py").read_text()}
    metadata = {"name": "server-script", "namespace": "hcm-fixtures"}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": script}
    cluster.kubectl("apply", "-f", "-", input=f"{manifests}\n---\n{json.dumps(config_map)}")
    wheels = _wheels(_python_version(cluster.images["python"]))
    for name in ("postgres", "server"):
        cluster.kubectl("rollout", "status", "-n", "hcm-fixtures", f"deploy/{name}", "--timeout=300s")
    if cluster.kind is ClusterKind.EXISTING:
        _forward(cluster)
    cluster.psql(  # no character of token_urlsafe needs quoting in SQL
        f"""SELECT 'CREATE ROLE hcm LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'hcm') \\gexec
        ALTER ROLE postgres PASSWORD '{cluster.passwords["ADMIN_PASSWORD"]}';
        ALTER ROLE hcm PASSWORD '{cluster.passwords["USER_PASSWORD"]}';
        SELECT 'CREATE DATABASE unifieddevdb OWNER hcm'
        WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'unifieddevdb') \\gexec"""  # noqa: S608
    )
    _wait_for_services(cluster)
    keys = {name: cluster.server_file(name) for name in ("ssh", "known_hosts")}
    metadata = {"name": "git-creds", "namespace": "health"}
    cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": keys})
    for wheel in wheels.iterdir():
        request = urllib.request.Request(f"{cluster.wheels_url}/{wheel.name}", wheel.read_bytes(), method="PUT")  # noqa: S310
        urllib.request.urlopen(request, timeout=30).close()  # noqa: S310
    push_checkout(cluster)


def _python_version(image: str) -> str:
    found = re.search(r":(\d+\.\d+)", image)
    if not found:
        raise RuntimeError(f"the tag of the image {image} does not start with a version of Python, such as 3.11")
    return found[1]


def _wheels(version: str) -> Path:
    """A folder with the wheels of requirements.txt for one version of Python, such as 3.11; hashes are checked."""
    requirements = ROOT / "requirements.txt"
    machine = platform.machine()
    digest = run(["git", "hash-object", requirements]).strip()[:12]

    def download(partial: Path) -> None:
        partial.mkdir()
        # pip evaluates markers for the Python that it runs on, uv for the requested one.
        uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-deps", "--generate-hashes", "--no-header"]
        uv += ["--no-annotate", "--no-emit-index-url", "--python-version", version]
        flat = run([*uv, "--python-platform", f"{machine}-manylinux_2_28", requirements])
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(flat)
            file.flush()
            platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in (17, 24, 27, 28)]
            platforms += [f"--platform=manylinux2014_{machine}", "--platform=any"]
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            pip += ["--require-hashes", "--only-binary=:all:", "--python-version", version, *platforms]
            run([*pip, "--dest", partial, "--requirement", file.name], "downloading the wheels", "5 s")

    return cached(CACHE / f"wheels-{version}-{digest}", download)


def _delete() -> None:
    if engine.running():
        with contextlib.suppress(RuntimeError):
            run([find_or_build("kind"), "delete", "cluster", "--name", NAME], env=engine.environment())
    elif (STATE / "kubeconfig").exists() and shutil.which("docker"):
        command: list[str | Path] = [find_or_build("kind"), "delete", "cluster", "--name", NAME]
        subprocess.run([*command, "--kubeconfig", STATE / "kubeconfig"], capture_output=True)
    engine.stop()
    remove(STATE)


def _print_summary(cluster: Cluster) -> None:
    print(f"""The cluster is ready ({cluster.kind}).
  kubectl       export KUBECONFIG={cluster.kubeconfig}  ({find_or_build("kubectl")})
  database      kubectl -n hcm-fixtures exec -it deploy/postgres -- psql -h 127.0.0.1 -U postgres unifieddevdb
  code          {cluster.git_in_cluster}/hcm-db-migrations.git  (in the cluster)
  wheels        {cluster.index_in_cluster}  (in the cluster)
  next          make install, again after each commit; make cluster-down deletes everything""")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.cluster", description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["up", "install", "status", "down"])
    command = parser.parse_args().command
    try:
        if command == "down":
            delete()
        elif command == "status":
            if not (running := current()):
                sys.exit("no cluster is running; make cluster creates one")
            _print_summary(running)
        else:
            cluster = get_or_create()
            install(cluster) if command == "install" else _print_summary(cluster)
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
