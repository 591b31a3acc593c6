"""A plugin: one Kubernetes cluster for the whole run; a namespace and a git repository for each test.

The cluster is the one that `--cluster-type existing --kubeconfig FILE` names (pytest-helm-charts' options; the variable
KUBECONFIG is ignored), else the running cluster of `make cluster`, else one that is created and deleted. With
`--cluster-type docker`, it has public images in the user's Docker, or the tests fail with the reason. With
pytest-xdist, it starts and is deleted while the workers run tests that need none.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import secrets
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pytest
from kubernetes import client

from tests.support.canary import PASSWORD, SECRETS, assert_no_secret
from tests.support.database import Database
from tests.support.documents import chart_command
from tests.support.kubernetes import Api, statuses
from tests.support.release import Release
from tests.support.repository import Repository
from tests.support.targets import WAIT
from tests.support.waiting import until
from tools import gitops
from tools.binaries import find_or_build, helm_3
from tools.cluster import NAME, Cluster, ImageValue, delete, get_or_create
from tools.paths import ROOT
from tools.steps import UnavailableError

OWN_IMAGE: ImageValue = {"repository": "hcm-local/hcm-db-migrations", "tag": "test"}


@dataclass
class Shared:
    """The data that every pytest-xdist worker receives: the cluster as plain data, and paths as text."""

    cluster: dict[str, Any] | None = None
    description: str = ""  # its kind, versions and image
    preinstalled_image: bool = False  # OWN_IMAGE, which has the dependencies pre-installed, is in the cluster
    helm: str = ""  # the path of Helm 4
    unavailable: str = ""  # why this machine has no cluster
    error: str = "the process that starts the cluster was killed"  # unless it ended otherwise


SHARED = pytest.StashKey[Shared]()
FILE = pytest.StashKey[Path]()  # of Shared, as JSON: locked until the cluster runs or has failed to start
NEEDS_GITOPS = pytest.StashKey[bool]()  # whether the tests need Argo CD and Flux


def requires_docker(kubeconfig: str | None, cluster_type: str | None) -> bool:
    """Whether these options allow only a cluster in the user's Docker; UsageError if they contradict each other."""
    if cluster_type not in (None, "existing", "docker"):
        raise pytest.UsageError(f"--cluster-type is {cluster_type!r}: set it to docker or existing, or omit it")
    if bool(kubeconfig) != (cluster_type == "existing"):
        raise pytest.UsageError("to use your own cluster, set both options: --cluster-type existing --kubeconfig FILE")
    return cluster_type == "docker"


def start_cluster(session: pytest.Session) -> None:
    """Find or create the cluster, once; its progress is printed.

    With pytest-xdist it starts in the background, and a test that needs it waits.
    """
    config = session.config
    if hasattr(config, "workerinput"):
        config.stash[FILE] = Path(config.workerinput["shared"])
    elif not config.option.collectonly:
        named = config.getoption("--kubeconfig")
        only_docker = requires_docker(named, config.getoption("--cluster-type"))
        folder = tempfile.TemporaryDirectory(prefix="hcm-cluster-")
        config.add_cleanup(folder.cleanup)
        config.stash[FILE] = Path(folder.name, "shared.json")
        config.add_cleanup(lambda: delete(os.getpid()))
        arguments = named, only_docker, config.stash.get(NEEDS_GITOPS, False), os.getpid()
        with (
            config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled(),
            config.stash[FILE].open("w") as file,
        ):
            config.stash[FILE].with_name("images").touch()
            fcntl.flock(file, fcntl.LOCK_EX)
            if named or config.getoption("dist", "no") == "no":  # this process forwards the ports of a user's cluster
                _start(file, *arguments)
            else:
                # It keeps the file open, and so locked, until it ends.
                background = multiprocessing.get_context("fork").Process(
                    target=_start_in_background, args=(file, *arguments)
                )
                background.start()
                config.add_cleanup(background.join)
                config.add_cleanup(background.terminate)  # before it: the last is called first
                config.pluginmanager.register(EarlyDeletion(config))


def _start_in_background(file: IO[str], *arguments: Any) -> None:
    """Start the cluster in a process that Ctrl-C does not reach: pytest's process terminates it, once."""
    os.setsid()
    with contextlib.suppress(KeyboardInterrupt):
        _start(file, *arguments)


def _start(file: IO[str], kubeconfig: str | None, only_docker: bool, needs_gitops: bool, owner: int) -> None:
    """Start the cluster, and write it to the file, or why there is none."""
    try:
        cluster = get_or_create(kubeconfig, owner, only_docker=only_docker)
        if needs_gitops:
            gitops.install(cluster)
        preinstalled_image = not cluster.is_existing  # in a user's cluster, pip runs
        if preinstalled_image:
            tag = f"{OWN_IMAGE['repository']}:{OWN_IMAGE['tag']}"
            cluster.build_image(tag, ROOT, f"--build-arg=PYTHON={cluster.images['python']}")
        helm = str(find_or_build("helm"))
        shared = Shared(cluster.to_dict(), _describe(cluster), preinstalled_image, helm, error="")
    except UnavailableError as error:
        # Who requires Docker does not expect skipped tests.
        shared = Shared(error=str(error)) if only_docker else Shared(unavailable=str(error), error="")
    except Exception:
        shared = Shared(error=f"the cluster does not start:\n{traceback.format_exc()}")
    print(json.dumps(asdict(shared)), file=file, flush=True)


def wait_for_cluster(config: pytest.Config, lock: int = fcntl.LOCK_SH) -> None:
    """Wait until the cluster runs or has failed to start; BlockingIOError if `lock` does not wait."""
    if SHARED not in config.stash and FILE in config.stash:
        with config.stash[FILE].open() as file:
            fcntl.flock(file, lock)
            text = file.read()
        config.stash[SHARED] = Shared(**json.loads(text)) if text else Shared()


class EarlyDeletion:
    """A plugin of pytest-xdist's controller: the last tests need no cluster, and it is deleted while they run."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.remaining: set[str] | None = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        """Before the first test; also for each other worker, and one that replaces a crashed one."""
        if self.remaining is None:
            self.remaining = {nodeid for nodeid in ids if nodeid.startswith(("tests/e2e/", "tests/gitops/"))}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.remaining:
            self.remaining.discard(nodeid)
            if not self.remaining:
                deletion = threading.Thread(target=delete, args=[os.getpid()])
                deletion.start()
                self.config.add_cleanup(deletion.join)


def _describe(cluster: Cluster) -> str:
    kubernetes = client.VersionApi(Api.of(cluster, "").core.api_client).get_code().git_version
    image = cluster.images["git_sync"]
    which = "a stand-in for git-sync" if "standin" in image else "the real git-sync"
    node = ""
    if not cluster.is_existing:
        node = f", node {cluster.docker('inspect', '--format={{.Config.Image}}', f'{NAME}-control-plane').strip()}"
    return f"{cluster.kind}, Kubernetes {kubernetes}{node}, {which} ({image})"


def record_images(config: pytest.Config, pods: Iterable[client.V1Pod]) -> None:
    """Add the images of these pods' containers, as the cluster reports them, to those that the report lists."""
    found = {f"  image {each.image} ({each.image_id})\n" for pod in pods for each in statuses(pod) if each.image_id}
    with config.stash[FILE].with_name("images").open("a") as file:
        file.write("".join(found))


def describe_cluster(config: pytest.Config) -> str:
    """The lines of the report that name the cluster, and the images that ran."""
    try:
        wait_for_cluster(config, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "cluster: not started yet"
    shared = config.stash[SHARED]
    if not shared.cluster:
        return f"cluster: none, {(shared.unavailable or shared.error).strip().splitlines()[-1]}"
    ran = sorted(set(config.stash[FILE].with_name("images").read_text().splitlines()))
    return "\n".join([f"cluster: {shared.description}", *ran])


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Shared:
    found = request.config.stash.get(SHARED, None)
    if found is None:
        pytest.fail("only a named folder's tests get a cluster: pytest tests/e2e")
    if found.error:
        pytest.fail(found.error)
    if not found.cluster:
        pytest.skip(found.unavailable)
    return found


@pytest.fixture(scope="session")
def cluster(shared: Shared, pytestconfig: pytest.Config) -> Cluster:
    found = Cluster.from_dict(shared.cluster or {})
    SECRETS.update(map(str, found.passwords.values()))
    record_images(pytestconfig, Api.of(found, "").core.list_pod_for_all_namespaces().items)
    return found


@pytest.fixture
def namespaces(cluster: Cluster, database: Database, pytestconfig: pytest.Config) -> Iterator[Callable[[], Api]]:
    """Creates namespaces that enforce the restricted Pod Security Standard, with DIGIT's ConfigMap and a Secret."""
    created: list[Api] = []

    def create() -> Api:
        api = Api.of(cluster, f"test-{secrets.token_hex(4)}")
        labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
        api.core.create_namespace({"metadata": {"name": api.namespace, "labels": labels}})
        created.append(api)
        api.config_map("egov-config", **{"db-host": "postgres.hcm-fixtures", "db-name": database.name})
        api.secret("db", username=database.role, password=PASSWORD)
        until(lambda: api.core.list_namespaced_service_account(api.namespace).items)  # no pod is admitted before
        return api

    yield create
    with contextlib.ExitStack() as stack:
        for api in created:
            stack.callback(api.delete, everything=not cluster.owner)
            stack.callback(_assert_no_secret_in, api, pytestconfig)


def _assert_no_secret_in(api: Api, config: pytest.Config) -> None:
    pods = api.pods()
    record_images(config, pods)
    for text in [
        *(api.log(pod, name) for pod in pods for name in ("git-sync", "migrate")),
        *api.events(),
        *map(str, pods),
        str(api.batch.list_namespaced_job(api.namespace)),
    ]:
        assert_no_secret(text)


@pytest.fixture
def api(namespaces: Callable[[], Api]) -> Api:
    """The test's namespace."""
    return namespaces()


@pytest.fixture
def repository(cluster: Cluster, api: Api, tmp_path: Path) -> Repository:
    return Repository.create(tmp_path / "repository", cluster, api.namespace)


@pytest.fixture
def audited_repository(repository: Repository, database: Database) -> Repository:
    """Revision 002 records that it ran, and waits while the table `gate` has a row."""
    database.execute("CREATE TABLE gate AS SELECT 1")
    database.execute("CREATE TABLE audit (revision text)")
    database.execute(f"GRANT ALL ON gate, audit TO {database.role}")
    repository.revision("002", "INSERT INTO audit VALUES ('002')", f"DO $$ BEGIN {WAIT} END $$")
    repository.push()
    return repository


@pytest.fixture
def with_pip(cluster: Cluster) -> dict[str, Any]:
    """Values for a run that installs the requirements."""
    index = [
        {"name": "PIP_INDEX_URL", "value": cluster.index_in_cluster},
        {"name": "PIP_TRUSTED_HOST", "value": "server.hcm-fixtures"},
    ]
    return {"requirements": "requirements.txt", "extraEnv": index, **cluster.image_values()}


@pytest.fixture
def preinstalled_image_values(shared: Shared, with_pip: dict[str, Any]) -> dict[str, Any]:
    """Values for a run in an image with the dependencies pre-installed; with pip if there is no such image."""
    if not shared.preinstalled_image:
        return with_pip
    return {**with_pip, "image": OWN_IMAGE, "requirements": "", "extraEnv": []}


@pytest.fixture
def releases(
    shared: Shared, cluster: Cluster, repository: Repository, preinstalled_image_values: dict[str, Any], tmp_path: Path
) -> Iterator[Callable[..., Release]]:
    """Creates releases of the chart for the test's repository, not installed yet; with Helm 4 by default."""
    created: list[Release] = []

    def create(api: Api, version: int = 4, **options: Any) -> Release:
        git = {**preinstalled_image_values.get("git", {}), "repo": repository.url, "branch": "main", "path": "."}
        try:
            helm = helm_3() if version == 3 else Path(shared.helm)
        except UnavailableError as error:
            pytest.skip(str(error))
        values = {**preinstalled_image_values, "namespace": api.namespace, "git": git}
        created.append(Release(helm, cluster, api.namespace, tmp_path, values, **options))
        return created[-1]

    yield create
    for release in created:
        # Everything that Helm stored: values, manifests, hooks, notes.
        release.start("get", "all", release.name, is_evidence=False).program.wait(240)


@pytest.fixture
def release(releases: Callable[..., Release], api: Api) -> Release:
    """The release hcm-db-migrations in the test's namespace."""
    return releases(api)


@pytest.fixture
def over_https(release: Release, cluster: Cluster, repository: Repository) -> dict[str, Any]:
    """Values for HTTPS with a token, under a private CA."""
    (release.home / "token.txt").write_text(cluster.passwords["TOKEN"])
    (release.home / "ca.crt").write_text(cluster.server_file("ca.crt"))
    for command in (chart_command("git-https").replace("username=ci", "username=git"), chart_command("git-ca")):
        created = release.documented(command, release.home)
        assert created.returncode == 0, created.text
    address = f"https://server.hcm-fixtures/git/{repository.name}.git"
    return {"git": {"repo": address, "httpsSecretName": "git-https", "ca": {"configMapName": "git-ca"}}}


@pytest.fixture
def unresponsive_pod(api: Api, cluster: Cluster) -> client.V1Pod:
    """A pod that accepts connections on port 8080 and never responds."""
    script = "import socket, time; server = socket.create_server(('', 8080)); time.sleep(3600)"
    return api.serve("unresponsive", cluster.images["python"], script)
