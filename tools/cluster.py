"""A kind cluster with what the chart finds in a DIGIT cluster.

    python -m tools.cluster up        create it, unless it is running (make cluster); --gitops: with Argo CD and Flux
    python -m tools.cluster install   install the chart on it, show the Job's log and the table (make install)
    python -m tools.cluster status    show what is running, and how to reach it
    python -m tools.cluster down      stop and delete it (make cluster-down)

Tests call `get_or_create()`. What is in the cluster: tools/fixtures.

The kubeconfig, passwords and values are in STATE, a folder of the cache; ~/.kube/config is never read or written.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import enum
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from tools import fixtures, gitops
from tools.binaries import find_or_build
from tools.network import bypass_proxy, free_port
from tools.offline_cluster import engine, images
from tools.paths import CACHE, ROOT
from tools.steps import UnavailableError, locked, log, remove, run

NAME = "hcm-db-migrations"
STATE = CACHE / "cluster"
# kind v0.33's default.
KINDEST = "kindest/node:v1.37.0@sha256:a1ed56cfb0e7b93589bdf97c8cd566405a265939e3620fc4f5de89adff580ae5"

START_TIMEOUT = "10m"
KUBEADM_WAITS = "kubeletHealthCheck", "kubernetesAPICall", "etcdAPICall", "controlPlaneComponentHealthCheck"


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
    "server": "python:3.10-bookworm",  # Debian 12, as of the local build
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
    address: str  # on which the engine publishes ports


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

    def __post_init__(self) -> None:
        bypass_proxy(self.address)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and for pytest-xdist, which passes no enum to its workers."""
        return dataclasses.asdict(self) | {"kind": self.kind.value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cluster:
        return cls(**{**data, "kind": ClusterKind(data["kind"])})

    @property
    def is_existing(self) -> bool:
        """Whether it is the user's own."""
        return self.kind is ClusterKind.EXISTING

    @property
    def is_local_build(self) -> bool:
        """Whether no public image can be pulled."""
        return self.kind is ClusterKind.LOCAL_BUILD

    @property
    def git_url(self) -> str:
        """Push to `{git_url}/NAME.git`: a new NAME creates a repository. Pods read `{git_in_cluster}/NAME.git`."""
        return f"http://{self.address}:{self.ports['http']}/git"

    @property
    def wheels_url(self) -> str:
        """PUT a wheel to `{wheels_url}/FILE` to add it to the package index."""
        return f"http://{self.address}:{self.ports['http']}/wheels"

    def upload_wheel(self, wheel: Path) -> None:
        """Add a wheel to the package index, or replace it."""
        request = urllib.request.Request(f"{self.wheels_url}/{wheel.name}", wheel.read_bytes(), method="PUT")  # noqa: S310
        urllib.request.urlopen(request, timeout=30).close()  # noqa: S310

    def postgres_url(self, database: str = "postgres") -> str:
        """A superuser's URL for libpq. Pods reach the server as postgres.hcm-fixtures."""
        login = f"postgres:{self.passwords['ADMIN_PASSWORD']}"
        return f"postgresql://{login}@{self.address}:{self.ports['postgres']}/{database}"

    def kubectl(self, *arguments: str | Path, input: str | None = None) -> str:
        """Run kubectl with the standard input `input`, return its standard output. RuntimeError if it fails."""
        return run([find_or_build("kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments], input=input)

    def apply(self, *objects: Mapping[str, object]) -> None:
        self.kubectl("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def wait_for_rollout(self, namespace: str, workload: str) -> None:
        """Wait until a workload, such as deploy/coredns, is ready; RuntimeError after START_TIMEOUT."""
        self.kubectl("rollout", "status", f"--namespace={namespace}", workload, f"--timeout={START_TIMEOUT}")

    def psql(self, sql: str, database: str = "postgres") -> str:
        """Run SQL or psql's own commands as superuser, in the server's pod."""
        client = f'PGPASSWORD="$POSTGRES_PASSWORD" psql -h 127.0.0.1 -U postgres -v ON_ERROR_STOP=1 -d {database} -f -'
        pod = ["exec", "-i", "-n", "hcm-fixtures", "deploy/postgres", "--", "sh", "-c", client]
        return self.kubectl(*pod, input=sql + "\n")

    def server_file(self, name: str) -> str:
        """A file of the git server: `ssh` (private key), `known_hosts`, `ca.crt`."""
        return self.kubectl("exec", "-n", "hcm-fixtures", "deploy/server", "--", "cat", f"/srv/keys/{name}")

    def docker(self, *arguments: str | Path) -> str:
        """Run docker on the cluster's engine, with BuildKit; return its standard output."""
        return run(["docker", *arguments], env=self.engine_environment() | {"DOCKER_BUILDKIT": "1"})

    def build_image(self, tag: str, context: Path, *arguments: str) -> str:
        """Build an image and load it into the cluster; return its name."""
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as configuration:
            configuration.write(self.pip_configuration())
            configuration.flush()
            secret = f"--secret=id=pip.conf,src={configuration.name}"
            # kind cannot load an image with an attestation from Docker's containerd store.
            options = ["--quiet", "--network=host", "--provenance=false", secret]
            self.docker("build", *options, *arguments, f"--tag={tag}", context)
        return self.load_image(tag)

    def pip_configuration(self) -> str:
        """A pip.conf with the cluster's package index, and a token in its URL as of a private one."""
        login = f"http://git:{self.passwords['TOKEN']}@"
        index = self.wheels_url.replace("http://", login).replace("/wheels", "/simple/")
        return f"[global]\nindex-url = {index}\ntrusted-host = {self.address}\n"

    def load_image(self, tag: str) -> str:
        """Load an image of the engine into the cluster; return its name."""
        kind: list[str | Path] = [find_or_build("kind"), "load", "docker-image", "--name", NAME, tag]
        run(kind, env=self.engine_environment())
        return tag

    def engine_environment(self) -> dict[str, str]:
        """The environment in which docker and kind reach the cluster's engine."""
        if self.is_existing:
            raise UnavailableError("an image cannot be loaded into an existing cluster")
        return engine.environment() if self.is_local_build else dict(os.environ)

    def image_values(self) -> ImageValues:
        """The chart's values for its images, if the public ones cannot be pulled."""
        if self.images["python"] == PUBLIC_IMAGES["python"]:
            return {}
        return {"image": _image_value(self.images["python"]), "git": {"image": _image_value(self.images["git_sync"])}}


def _image_value(name: str) -> ImageValue:
    repository, _, tag = name.rpartition(":")
    return {"repository": repository, "tag": tag}


def get_or_create(kubeconfig: str | None = None, owner: int = 0, *, only_docker: bool = False) -> Cluster:
    """Return the running cluster, or create one. `kubeconfig` names an existing one: it gets the fixtures and is kept.

    `owner` is the process that will call `delete(owner)`. Without one, the cluster is kept, even if another process
    owned it. With `only_docker`, no cluster is built locally. Raises UnavailableError, with the fix, if no cluster can
    be created.
    """
    with locked("cluster"):
        if kubeconfig:
            log(f"cluster: the existing one of {kubeconfig}")
            return _use_existing(kubeconfig)
        if cluster := current():
            if only_docker and cluster.is_local_build:
                raise UnavailableError(
                    "the running cluster was built locally, and --cluster-type docker requires one with public images: "
                    "delete it with make cluster-down"
                )
            if cluster.owner and owner and _is_alive(cluster.owner):
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
            return _create(owner, _select_provider(only_docker=only_docker))
        except BaseException:
            log("deleting the partially created cluster")
            _delete()
            raise


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def current() -> Cluster | None:
    """The running cluster, if any."""
    cluster = _saved_state()
    if cluster and (not cluster.is_local_build or engine.running()):
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

    def may_delete() -> bool:
        return not owner or bool((cluster := _saved_state()) and cluster.owner == owner)

    if may_delete():  # if not, there is nothing to wait for: another process may be creating a cluster
        with locked("cluster"):
            if may_delete():
                _delete()


def install(cluster: Cluster) -> None:
    """Install or upgrade the chart as a user does. Print the Job's log and the table."""
    fixtures.push_checkout(cluster)
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
    print(_unescaped(done.stderr), done.stdout, sep="", flush=True)
    if done.returncode:
        raise RuntimeError(f"helm: exit code {done.returncode}")
    print(cluster.psql(r"\d hcm_report_metadata", "unifieddevdb"))


def _unescaped(output: str) -> str:
    """The messages of Helm 4's records, one of which is the Job's whole log; other lines as they are."""
    record = r'^level=\w+ msg="((?:[^"\\]|\\.)*)"$'
    return re.sub(record, lambda found: found[1].replace(r"\n", "\n").replace(r"\"", '"'), output, flags=re.M)


def _create(owner: int, provider: Provider) -> Cluster:
    STATE.mkdir(parents=True, exist_ok=True)
    address, ports = provider.address, _free_ports()
    mappings = [
        {"containerPort": container, "hostPort": host, "listenAddress": address}
        for container, host in ((NODE_PORTS["postgres"], ports["postgres"]), (NODE_PORTS["http"], ports["http"]))
    ]
    config = {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        # kind looks for a free port only on this machine's own addresses.
        "networking": {"apiServerAddress": address, "apiServerPort": free_port()},
        "kubeadmConfigPatches": [
            # The machine may still have cgroup v1, which kubelet refuses by default.
            json.dumps({"kind": "KubeletConfiguration", "failCgroupV1": False}),
            # Read from a cold disk beside the tests, an API server may take more than kubeadm's minute to start.
            json.dumps({"kind": "InitConfiguration", "timeouts": dict.fromkeys(KUBEADM_WAITS, START_TIMEOUT)}),
        ],
        "nodes": [{"role": "control-plane", "extraPortMappings": mappings}],
    }
    kubeconfig = STATE / "kubeconfig"
    image = KINDEST
    if provider.kind is ClusterKind.LOCAL_BUILD:
        log(f"the first time, this takes about 20 minutes, and 16 GB in {CACHE}; what is interrupted is resumed")
        image = images.build_images()
    # --retain: a node that did not start is deleted only after its logs have been read.
    arguments = ["create", "cluster", "--retain", "--name", NAME, "--config", "-", "--wait", START_TIMEOUT]
    command: list[str | Path] = [find_or_build("kind"), *arguments, "--image", image, "--kubeconfig", kubeconfig]
    kubeconfig.touch(mode=0o600)  # kind writes it late, and _delete() checks that it exists
    try:
        run(command, "starting the kind cluster", "40 s", env=provider.environment, input=json.dumps(config))
    except RuntimeError as error:
        raise RuntimeError(f"{error}\n{_control_plane_logs(provider)}") from None
    cluster = Cluster(provider.kind, str(kubeconfig), address, ports, provider.images, _new_passwords(), owner)
    # If CoreDNS starts before kube-proxy, it waits 30 s for an answer that cannot arrive.
    cluster.wait_for_rollout("kube-system", "daemonset/kube-proxy")
    cluster.kubectl("rollout", "restart", "--namespace=kube-system", "deploy/coredns")
    fixtures.install(cluster, forward=False)
    cluster.wait_for_rollout("kube-system", "deploy/coredns")
    (STATE / "values.yaml").write_text(json.dumps({NAME: cluster.image_values()}, indent=2) + "\n")
    _save_state(cluster)
    return cluster


def _control_plane_logs(provider: Provider) -> str:
    """The last lines that kubelet and the containers logged on a node that did not start, or why there are none."""
    logs = "{ journalctl --no-pager --unit=kubelet --lines=10; tail -n 5 /var/log/containers/*.log; } 2>&1 || true"
    try:
        return run(["docker", "exec", f"{NAME}-control-plane", "sh", "-c", logs], env=provider.environment)
    except RuntimeError as error:
        return f"no logs: {error}"


def _free_ports() -> Ports:
    return {"postgres": free_port(), "http": free_port()}


def _select_provider(*, only_docker: bool = False) -> Provider:
    """Select what creates the cluster, and log it with the reason. The private container engine is started."""
    try:
        provider, reason = select_engine(KINDEST, only_docker=only_docker)
    except UnavailableError as error:
        other = "use an existing cluster: pytest --cluster-type existing --kubeconfig FILE"
        raise UnavailableError(
            f"cannot create a cluster: {error}, or {'omit --cluster-type docker' if only_docker else other}"
        ) from None
    if reason:
        log(f"cluster: kind with a container engine and a node image built locally, because {reason}")
    else:
        log("cluster: kind with its official node image, because the container engine on this machine can pull it")
    return provider


def select_engine(image: str, *, only_docker: bool = False) -> tuple[Provider, str]:
    """Return the user's Docker if it is running and can pull `image`, and "". Otherwise start the private container
    engine, and return it and the reason. UnavailableError, with the fix, if that cannot run either, or with
    `only_docker`.
    """
    reason = _docker_unavailable_reason(image)
    if not reason:
        environment = {key: value for key, value in os.environ.items() if key != "KUBECONFIG"}
        return Provider(ClusterKind.DOCKER, environment, PUBLIC_IMAGES, "127.0.0.1"), ""
    try:
        if only_docker:
            raise UnavailableError("no other engine is allowed")
        engine.check()
    except UnavailableError as error:
        raise UnavailableError(f"{reason}, and {error}. Start Docker with access to its registry") from None
    engine.start()
    return Provider(ClusterKind.LOCAL_BUILD, engine.environment(), LOCAL_IMAGES, engine.address()), reason


def _docker_unavailable_reason(image: str) -> str:
    """Why the user's Docker cannot be used; "" if it is running and can pull the image."""
    if not shutil.which("docker"):
        return "docker is not on PATH"
    for command, seconds, reason in (
        (["docker", "version"], 10, "no container engine is running"),
        (["docker", "pull", "--quiet", image], 600, f"the container engine cannot pull {image.partition('@')[0]}"),
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"{reason} within {seconds} s"
        except OSError as error:
            return f"{reason} ({error})"
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            return f"{reason} ({last[0]})" if last else reason
    return ""


def _use_existing(kubeconfig: str) -> Cluster:
    """Install the fixtures in the user's cluster. Its ports are forwarded as long as this process runs."""
    path = str(Path(kubeconfig).resolve())
    cluster = Cluster(ClusterKind.EXISTING, path, "127.0.0.1", _free_ports(), PUBLIC_IMAGES, _new_passwords())
    namespaces = cluster.kubectl("get", "namespaces", "--output=name").split()
    if "namespace/hcm-fixtures" in namespaces:
        secret, db = _secret(cluster, "hcm-fixtures", "fixtures"), _secret(cluster, "health", "db")
        cluster.passwords = {
            "ADMIN_PASSWORD": secret["admin"],
            "USER_PASSWORD": db["password"],
            "TOKEN": secret["token"],
        }
    elif "namespace/health" in namespaces:
        raise UnavailableError(
            f"the cluster of {kubeconfig} has a namespace health that these tests did not create, and they would "
            "overwrite its ConfigMap egov-config and Secret db: use another cluster, or delete that namespace"
        )
    fixtures.install(cluster, forward=True)
    return cluster


def _secret(cluster: Cluster, namespace: str, name: str) -> dict[str, str]:
    data = json.loads(cluster.kubectl("get", "secret", name, "-n", namespace, "--output=json"))["data"]
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


def _new_passwords() -> Passwords:
    admin, user, token = (secrets.token_urlsafe(18) for _ in range(3))
    return {"ADMIN_PASSWORD": admin, "USER_PASSWORD": user, "TOKEN": token}


def _delete() -> None:
    kubeconfig = STATE / "kubeconfig"
    try:
        if kubeconfig.exists():  # so kind is built, and has begun to create the cluster
            command: list[str | Path] = [find_or_build("kind"), "delete", "cluster", "--name", NAME]
            environment = engine.environment() if engine.running() else None
            subprocess.run([*command, "--kubeconfig", kubeconfig], env=environment, capture_output=True)
    finally:
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
    parser.add_argument("--gitops", action="store_true", help="with Argo CD and Flux, which deploy this checkout")
    arguments = parser.parse_args()
    command = arguments.command
    if arguments.gitops and command != "up":
        parser.error("--gitops is an option of `up` only")
    try:
        if command == "down":
            delete()
        elif command == "status":
            if not (running := current()):
                sys.exit("no cluster is running; make cluster creates one")
            _print_summary(running)
        else:
            cluster = get_or_create()
            if arguments.gitops:
                gitops.deploy_checkout(cluster)
            install(cluster) if command == "install" else _print_summary(cluster)
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
