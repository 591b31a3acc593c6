"""A kind cluster with what the chart finds in a DIGIT cluster.

    python -m tools.cluster up        make it, or say that it runs already (make cluster)
    python -m tools.cluster install   install the chart on it, show the Job's log and the table (make install)
    python -m tools.cluster status    say what runs, and how to reach it
    python -m tools.cluster down      stop and delete it (make cluster-down)

Tests call `get_or_create()`. The cluster holds a namespace `health` with ConfigMap egov-config and the Secrets db and
git-creds, and a namespace `hcm-fixtures` with PostgreSQL 15 and a git and package server (tools/fixtures): this
checkout's HEAD is its repository hcm-db-migrations.git, as main and, in the folder utilities/hcm-db-migrations, as
airflow-analysis.

kubeconfig, passwords and values are in STATE, a folder of the cache; ~/.kube/config is never read or written.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import contextlib
import dataclasses
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
from pathlib import Path

import psycopg2

from tools.binaries import find_or_build
from tools.network import free_port
from tools.offline_cluster import engine
from tools.offline_cluster import images as offline_images
from tools.paths import CACHE, ROOT
from tools.steps import UnavailableError, cached, locked, log, remove, run

NAME = "hcm-db-migrations"
STATE = CACHE / "cluster"
FIXTURES = ROOT / "tools/fixtures"
# kind v0.33's own default, which it takes when no other image is named.
KINDEST = "kindest/node:v1.37.0@sha256:a1ed56cfb0e7b93589bdf97c8cd566405a265939e3620fc4f5de89adff580ae5"
NODE_PORTS = {"postgres": 30432, "http": 30080}

PUBLIC_IMAGES = {
    "python": "python:3.10-slim",
    "git_sync": "registry.k8s.io/git-sync/git-sync:v4.7.1",
    "postgres": "postgres:15",
    "server": "python:3.10",
}
LOCAL_IMAGES = {
    "python": offline_images.PYTHON,
    "git_sync": offline_images.GIT_SYNC,
    "postgres": offline_images.SERVER,
    "server": offline_images.SERVER,
}


@dataclasses.dataclass
class Cluster:
    """A cluster that runs, with its fixtures. Addresses are for this process, those called `*_in_cluster` for pods."""

    how: str  # "existing", "docker" or "made here", for a test report's header
    kubeconfig: str
    address: str
    ports: dict[str, int]
    images: dict[str, str]
    passwords: dict[str, str] = dataclasses.field(repr=False)
    owner: int = 0  # the process that deletes it at its end; 0 where it is kept until `make cluster-down`

    index_in_cluster = "http://server.hcm-fixtures/simple/"
    git_in_cluster = "http://server.hcm-fixtures/git"

    @property
    def git_url(self) -> str:
        """Push to `{git_url}/NAME.git`: a new NAME makes a repository. Pods read it at `{git_in_cluster}/NAME.git`."""
        return f"http://{self.address}:{self.ports['http']}/git"

    @property
    def wheels_url(self) -> str:
        """PUT a wheel to `{wheels_url}/FILE`: it is then in the package index."""
        return f"http://{self.address}:{self.ports['http']}/wheels"

    def postgres_url(self, database: str = "postgres") -> str:
        """A superuser's URL for libpq. Pods reach the server as postgres.hcm-fixtures."""
        login = f"postgres:{self.passwords['ADMIN_PASSWORD']}"
        return f"postgresql://{login}@{self.address}:{self.ports['postgres']}/{database}"

    def kubectl(self, *arguments: str | Path, **options) -> str:
        """Run kubectl, return its standard output. RuntimeError with its words when it fails; `input` is its stdin."""
        return run([find_or_build("kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments], **options)

    def apply(self, *objects: dict) -> None:
        self.kubectl("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def psql(self, sql: str, database: str = "postgres") -> str:
        """Run SQL or psql's own commands as superuser, in the server's pod."""
        client = f'PGPASSWORD="$POSTGRES_PASSWORD" psql -h 127.0.0.1 -U postgres -v ON_ERROR_STOP=1 -d {database} -f -'
        place = ["exec", "-i", "-n", "hcm-fixtures", "deploy/postgres", "--", "sh", "-c", client]
        return self.kubectl(*place, input=sql + "\n")

    def server_file(self, name: str) -> str:
        """A file of the git server: `ssh` (private key), `known_hosts`, `ca.crt`."""
        return self.kubectl("exec", "-n", "hcm-fixtures", "deploy/server", "--", "cat", f"/srv/keys/{name}")

    def build_image(self, tag: str, context: Path, *arguments: str) -> str:
        """Build an image and load it into the cluster; return its name. Its pip reads our package index."""
        if self.how == "existing":
            raise UnavailableError("an image cannot be loaded into a cluster that you named")
        env = engine.environment() if self.how == "made here" else dict(os.environ)
        index = self.wheels_url.replace("/wheels", "/simple/")
        pip = [f"--build-arg=PIP_INDEX_URL={index}", f"--build-arg=PIP_TRUSTED_HOST={self.address}"]
        run(["docker", "build", "--quiet", "--network=host", *pip, *arguments, f"--tag={tag}", context], env=env)
        run([find_or_build("kind"), "load", "docker-image", "--name", NAME, tag], env=env)
        return tag

    def image_values(self) -> dict:
        """The chart's values for the images, where the public ones cannot be pulled."""
        split = {
            key: dict(zip(("repository", "tag"), name.rsplit(":", 1), strict=True)) for key, name in self.images.items()
        }
        if self.images["python"] == PUBLIC_IMAGES["python"]:
            return {}
        return {"image": split["python"], "git": {"image": split["git_sync"]}}


def get_or_create(kubeconfig: str | None = None, owner: int = 0) -> Cluster:
    """Return the cluster, made first if none runs. `kubeconfig` names an existing one: it gets the fixtures and stays.

    `owner` is the process that will call `delete(owner)`. Without one, the cluster is kept, also one that is another's.
    Raises UnavailableError, with the cure, when no cluster can be made here.
    """
    with locked("cluster"):
        if kubeconfig:
            log(f"cluster: the one that {kubeconfig} names, because you named it")
            return _use_existing(kubeconfig)
        if cluster := current():
            if cluster.owner and Path(f"/proc/{cluster.owner}").exists() and owner:
                raise UnavailableError(
                    f"process {cluster.owner} tests on the cluster that runs, and deletes it at its end: wait for that,"
                    " or keep it with make cluster"
                )
            log(f"cluster: the one that runs already ({cluster.how}); make cluster-down deletes it")
            if cluster.owner:
                cluster.owner = owner
                _save_state(cluster)
            return cluster
        _delete()  # what an earlier, killed run may have left
        try:
            return _create(owner)
        except BaseException:
            log("deleting the half-made cluster")
            _delete()
            raise


def current() -> Cluster | None:
    """The cluster that runs, if any."""
    cluster = _saved_state()
    if cluster and (cluster.how != "made here" or engine.running()):
        find_or_build("kubectl")  # here, as its errors are not the API server's
        for _ in range(5):  # a busy API server may miss one
            with contextlib.suppress(RuntimeError):
                cluster.kubectl("get", "--raw=/readyz", "--request-timeout=30s")
                return cluster
            time.sleep(1)
    return None


def _saved_state() -> Cluster | None:
    """The last cluster that was made and not deleted; whether it runs is not looked at."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Cluster(**json.loads((STATE / "cluster.json").read_text()))
    return None


def _save_state(cluster: Cluster) -> None:
    state = STATE / "cluster.json"
    state.touch(mode=0o600)
    state.write_text(json.dumps(dataclasses.asdict(cluster)))


def delete(owner: int = 0) -> None:
    """Stop and delete the cluster and the engine, unless it is not this owner's. What was built stays in the cache."""
    with locked("cluster"):
        if not owner or ((cluster := _saved_state()) and cluster.owner == owner):
            _delete()


def install(cluster: Cluster) -> None:
    """Install or upgrade the chart as a user does. Show the Job's log and the table."""
    push_checkout(cluster)
    code = ["migrations", "migration_runner", "alembic.ini", "requirements.txt"]
    if changed := run(["git", "-C", ROOT, "status", "--porcelain", "--", *code]):
        log(f"not committed, and so not in the cluster:\n{changed.rstrip()}")
    values = ["-f", "environments/kind.yaml"]
    if cluster.image_values():
        values += ["-f", STATE / "values.yaml"]
    command = ["upgrade", "--install", NAME, f"charts/{NAME}", *values, "-n", "health"]
    print("$ helm", *command, flush=True)
    helm = [find_or_build("helm"), *command, f"--kubeconfig={cluster.kubeconfig}"]
    done = subprocess.run([str(word) for word in helm], cwd=ROOT, capture_output=True, text=True)
    # Helm 4 prints the Job's log as one escaped record.
    print(done.stderr.replace("\\n", "\n"), done.stdout, sep="", flush=True)
    if done.returncode:
        raise RuntimeError(f"helm: exit status {done.returncode}")
    print(cluster.psql(r"\d hcm_report_metadata", "unifieddevdb"))


def push_checkout(cluster: Cluster, name: str = "hcm-db-migrations.git", revision: str = "HEAD") -> None:
    """Push a commit of this checkout: as main, and under utilities/hcm-db-migrations as airflow-analysis."""
    with tempfile.TemporaryDirectory() as folder:

        def git(*words: str, **options) -> str:
            return run(["git", "-C", folder, *words], **options).strip()

        run(["git", "clone", "--quiet", "--bare", "--shared", ROOT, folder])
        commit = run(["git", "-C", ROOT, "rev-parse", f"{revision}^{{commit}}"]).strip()
        tree = git("rev-parse", f"{commit}^{{tree}}")
        for parent in ("hcm-db-migrations", "utilities"):
            tree = git("mktree", input=f"040000 tree {tree}\t{parent}\n")
        who = ["-c", "user.name=hcm-db-migrations", "-c", "user.email=hcm-db-migrations@localhost"]
        message = f"hcm-db-migrations at {commit}"
        date = git("show", "--no-patch", "--format=%cI", commit)
        dates = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}  # the same tree gives the same commit
        nested = git(*who, "commit-tree", tree, "-m", message, env=os.environ | dates)
        refs = [f"+{commit}:refs/heads/main", f"+{nested}:refs/heads/airflow-analysis"]
        git("push", "--quiet", f"{cluster.git_url}/{name}", *refs)


def _create(owner: int) -> Cluster:
    env, how, images = _select_provider()
    STATE.mkdir(parents=True, exist_ok=True)
    if how == "made here":
        address, ports, image = engine.address(), dict(NODE_PORTS), ["--image", offline_images.build_images()]
        networking = {"apiServerAddress": address, "apiServerPort": 6443}
        # The machine may still have cgroup v1, which kubelet refuses unless told otherwise.
        patches = ["kind: KubeletConfiguration\nfailCgroupV1: false\n"]
    else:
        address, ports, image = "127.0.0.1", {name: free_port() for name in NODE_PORTS}, ["--image", KINDEST]
        networking, patches = {"apiServerAddress": address}, []
    mappings = [
        {"containerPort": NODE_PORTS[name], "hostPort": port, "listenAddress": address} for name, port in ports.items()
    ]
    config = {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "networking": networking,
        "kubeadmConfigPatches": patches,
        "nodes": [{"role": "control-plane", "extraPortMappings": mappings}],
    }
    kubeconfig = STATE / "kubeconfig"
    command = [find_or_build("kind"), "create", "cluster", "--name", NAME, "--config", "-", "--wait", "180s", *image]
    command += ["--kubeconfig", kubeconfig]
    kubeconfig.touch(mode=0o600)  # kind writes it late; _delete() looks for it
    run(command, "starting the kind cluster", "40 s", env=env, input=json.dumps(config))
    cluster = Cluster(how, str(kubeconfig), address, ports, images, _new_passwords(), owner)
    dns = "--namespace=kube-system", "deploy/coredns"
    # Begun before kube-proxy, it waits 30 s for an answer that cannot come.
    cluster.kubectl("rollout", "status", "--namespace=kube-system", "daemonset/kube-proxy", "--timeout=180s")
    cluster.kubectl("rollout", "restart", *dns)
    _install_fixtures(cluster)
    cluster.kubectl("rollout", "status", *dns, "--timeout=180s")
    (STATE / "values.yaml").write_text(json.dumps({NAME: cluster.image_values()}, indent=2) + "\n")
    _save_state(cluster)
    return cluster


def _select_provider() -> tuple[dict[str, str], str, dict[str, str]]:
    """The environment for kind, how the cluster is made, and its images. Each choice is told with its reason."""
    reason = _docker_unavailable_reason()
    if not reason:
        log("cluster: kind with its official node image, because a container engine runs here that can pull it")
        return {key: value for key, value in os.environ.items() if key != "KUBECONFIG"}, "docker", PUBLIC_IMAGES
    try:
        engine.check()
    except UnavailableError as error:
        raise UnavailableError(
            f"no cluster can be made here: {reason}, and {error}. Start Docker with access to its registry, or name a "
            "cluster of your own: pytest --cluster-type existing --kubeconfig FILE"
        ) from None
    log(f"cluster: kind with an engine and a node image made here, because {reason}")
    engine.start()
    return engine.environment(), "made here", LOCAL_IMAGES


def _docker_unavailable_reason() -> str:
    """Empty when the user's Docker runs and can pull the node image; else the reason."""
    if not shutil.which("docker"):
        return "docker is not on PATH"
    for command, seconds, reason in (
        (["docker", "version"], 10, "no container engine runs"),
        (["docker", "pull", "--quiet", KINDEST], 600, f"the container engine cannot pull {KINDEST.partition('@')[0]}"),
    ):
        try:
            if subprocess.run(command, capture_output=True, timeout=seconds).returncode:
                return reason
        except (OSError, subprocess.TimeoutExpired):
            return reason
    return ""


def _use_existing(kubeconfig: str) -> Cluster:
    """Put the fixtures into a cluster that the user named. Its ports are forwarded while this process runs."""
    ports = {name: free_port() for name in NODE_PORTS}
    cluster = Cluster("existing", str(Path(kubeconfig).resolve()), "127.0.0.1", ports, PUBLIC_IMAGES, _new_passwords())
    namespaces = cluster.kubectl("get", "namespaces", "--output=name").split()
    if "namespace/hcm-fixtures" in namespaces:
        for namespace, secret, keys in (
            ("hcm-fixtures", "fixtures", {"admin": "ADMIN_PASSWORD", "token": "TOKEN"}),
            ("health", "db", {"password": "USER_PASSWORD"}),
        ):
            data = json.loads(cluster.kubectl("get", "secret", secret, "-n", namespace, "--output=json"))["data"]
            cluster.passwords |= {name: base64.b64decode(data[key]).decode() for key, name in keys.items()}
    elif "namespace/health" in namespaces:
        raise UnavailableError(
            f"the cluster that {kubeconfig} names has a namespace health that these tests did not make, and they would "
            "overwrite its ConfigMap egov-config and Secret db: name another cluster, or delete that namespace"
        )
    _install_fixtures(cluster)
    return cluster


def _new_passwords() -> dict[str, str]:
    return {name: secrets.token_urlsafe(18) for name in ("ADMIN_PASSWORD", "USER_PASSWORD", "TOKEN")}


def _forward(cluster: Cluster) -> None:
    for service, port in (("postgres", f"{cluster.ports['postgres']}:5432"), ("server", f"{cluster.ports['http']}:80")):
        kubectl = [find_or_build("kubectl"), f"--kubeconfig={cluster.kubeconfig}", "-n", "hcm-fixtures"]
        process = subprocess.Popen([*kubectl, "port-forward", f"service/{service}", port], stdout=subprocess.DEVNULL)
        atexit.register(process.terminate)


def _wait_for_services(cluster: Cluster) -> None:
    """A deployment is rolled out before the node's proxy, or a forwarded port, passes anybody on to it."""
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://{cluster.address}:{cluster.ports['http']}/healthz", timeout=5).close()
            psycopg2.connect(cluster.postgres_url(), connect_timeout=5).close()
            return
        except (OSError, psycopg2.OperationalError) as error:
            if time.monotonic() > end:
                raise RuntimeError(f"the services of hcm-fixtures do not answer: {error}") from error
        time.sleep(0.2)


def _install_fixtures(cluster: Cluster) -> None:
    """PostgreSQL, the git and package server, and what the chart finds in the namespace health."""
    log("installing PostgreSQL, the git server and the package index (usually 20 s)")
    images = {f"{name.upper()}_IMAGE": image for name, image in cluster.images.items()}
    manifests = string.Template((FIXTURES / "manifests.yaml").read_text()).safe_substitute(cluster.passwords | images)
    script = {"server.py": (FIXTURES / "server.py").read_text()}
    metadata = {"name": "server-script", "namespace": "hcm-fixtures"}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": script}
    cluster.kubectl("apply", "-f", "-", input=f"{manifests}\n---\n{json.dumps(config_map)}")
    wheels = _wheels(re.search(r":(\d+\.\d+)", cluster.images["python"])[1])
    for name in ("postgres", "server"):
        cluster.kubectl("rollout", "status", "-n", "hcm-fixtures", f"deploy/{name}", "--timeout=300s")
    if cluster.how == "existing":
        _forward(cluster)
    cluster.psql(  # token_urlsafe has no character that SQL would mind
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


def _wheels(version: str) -> Path:
    """A folder with the wheels of requirements.txt for one version of Python, such as 3.11, checked by their hashes."""
    requirements = ROOT / "requirements.txt"
    machine = platform.machine()
    digest = run(["git", "hash-object", requirements]).strip()[:12]

    def download(partial: Path) -> None:
        partial.mkdir()
        # pip weighs the markers for the Python that it runs on; uv for the one it is asked for.
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
        kind = [find_or_build("kind"), "delete", "cluster", "--name", NAME, "--kubeconfig", STATE / "kubeconfig"]
        subprocess.run(kind, capture_output=True)
    engine.stop()
    remove(STATE)


def _print_summary(cluster: Cluster) -> None:
    print(f"""The cluster is ready ({cluster.how}).
  kubectl       export KUBECONFIG={cluster.kubeconfig}  ({find_or_build("kubectl")})
  database      kubectl -n hcm-fixtures exec -it deploy/postgres -- psql -h 127.0.0.1 -U postgres unifieddevdb
  code          {cluster.git_in_cluster}/hcm-db-migrations.git  (in the cluster)
  wheels        {cluster.index_in_cluster}  (in the cluster)
  next          make install, also after each commit; make cluster-down deletes everything""")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.cluster", description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["up", "install", "status", "down"])
    command = parser.parse_args().command
    try:
        if command == "down":
            delete()
        elif command == "status":
            _print_summary(cluster) if (cluster := current()) else sys.exit("no cluster runs; make cluster makes one")
        else:
            cluster = get_or_create()
            install(cluster) if command == "install" else _print_summary(cluster)
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
