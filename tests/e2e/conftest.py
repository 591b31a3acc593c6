"""One Kubernetes cluster for the whole run; a namespace, a database and a git repository for each test.

The cluster is the one that `--cluster-type existing --kubeconfig FILE` names (pytest-helm-charts' options; the variable
KUBECONFIG is not looked at), else the one that `make cluster` left, else one that is made before the first test and
deleted after the last.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from sqlalchemy import make_url

from tests.conftest import SECRETS
from tests.e2e.helpers import Api, Release, Repository
from tests.migrations.helpers import PASSWORD, Database, fresh_database, until
from tools.binaries import find_or_build
from tools.cluster import Cluster, delete, get_or_create
from tools.paths import ROOT
from tools.steps import UnavailableError

SHARED = pytest.StashKey[dict[str, Any]]()
OWN_IMAGE = {"repository": "hcm-local/hcm-db-migrations", "tag": "test"}


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Find or make the cluster, once, before the workers start; what takes minutes is shown."""
    config = session.config
    if hasattr(config, "workerinput"):
        config.stash[SHARED] = config.workerinput["shared"]
    elif not config.option.collectonly:
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            config.stash[SHARED] = _start(config)


def _start(config: pytest.Config) -> dict[str, Any]:
    """What every worker needs to know, as JSON."""
    named = config.getoption("--kubeconfig")
    if bool(named) != (config.getoption("--cluster-type") == "existing"):
        raise pytest.UsageError("a cluster of your own takes both options: --cluster-type existing --kubeconfig FILE")
    try:
        cluster = get_or_create(named, owner=os.getpid())
        if cluster.owner:
            config.add_cleanup(lambda: delete(cluster.owner))
        python = f"--build-arg=PYTHON={cluster.images['python']}"
        own_image = None
        with contextlib.suppress(UnavailableError):  # in a cluster of the user's, pip runs
            cluster.build_image(":".join(OWN_IMAGE.values()), ROOT, python)
            own_image = OWN_IMAGE
    except UnavailableError as error:
        return {"unavailable": str(error)}
    helms = [Path(sys.executable).with_name("helm"), find_or_build("helm")]
    return {"cluster": cluster.to_dict(), "own image": own_image, "helms": list(map(str, helms))}


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist: hand the cluster to a worker."""
    node.workerinput["shared"] = node.config.stash.get(SHARED, None)


def pytest_report_header(config: pytest.Config) -> list[str]:
    shared = config.stash.get(SHARED, None) or {}
    if "cluster" not in shared:
        return [f"cluster: none, {reason}" for reason in shared.values()]
    cluster = Cluster.from_dict(shared["cluster"])
    kubernetes = client.VersionApi(Api.of(cluster, "").core.api_client).get_code().git_version
    image = cluster.images["git_sync"]
    which = "a stand-in for git-sync" if "standin" in image else "the real git-sync"
    return [f"cluster: {cluster.kind}, Kubernetes {kubernetes}, {which} ({image})"]


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> dict[str, Any]:
    found = request.config.stash.get(SHARED, None)
    if found is None:
        pytest.fail("the cluster is made before the first test: name this folder, pytest tests/e2e")
    if "unavailable" in found:
        pytest.skip(found["unavailable"])
    return found


@pytest.fixture(scope="session")
def cluster(shared: dict[str, Any]) -> Cluster:
    found = Cluster.from_dict(shared["cluster"])
    SECRETS.add(found.passwords["TOKEN"])
    return found


@pytest.fixture
def database(cluster: Cluster) -> Iterator[Database]:
    """A database of the test's own, with a role that owns it; its password has every hard character."""
    with fresh_database(make_url(cluster.postgres_url())) as fresh:
        yield fresh


@pytest.fixture
def namespaces(cluster: Cluster, database: Database) -> Iterator[Callable[[], Api]]:
    """Makes namespaces that enforce the restricted Pod Security Standard and have what DIGIT's have."""
    made: list[Api] = []

    def make() -> Api:
        api = Api.of(cluster, f"test-{secrets.token_hex(4)}")
        labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
        api.core.create_namespace({"metadata": {"name": api.namespace, "labels": labels}})
        made.append(api)
        api.config_map("egov-config", **{"db-host": "postgres.hcm-fixtures", "db-name": database.name})
        api.secret("db", username=database.role, password=PASSWORD)
        until(lambda: api.core.list_namespaced_service_account(api.namespace).items)  # no pod is made before
        return api

    yield make
    for api in made:
        try:
            for text in [
                *(api.log(pod, name) for pod in api.pods() for name in ("git-sync", "migrate")),
                *api.events(),
                *map(str, api.pods()),
                str(api.batch.list_namespaced_job(api.namespace)),
            ]:
                assert_no_secret(text)
        finally:
            api.core.delete_namespace(api.namespace)


def assert_no_secret(text: str) -> None:
    for secret in SECRETS:
        assert secret not in text, text


@pytest.fixture
def api(namespaces: Callable[[], Api]) -> Api:
    """The test's namespace."""
    return namespaces()


@pytest.fixture
def repository(cluster: Cluster, api: Api, tmp_path: Path) -> Repository:
    return Repository.create(tmp_path / "repository", cluster, api.namespace)


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


@pytest.fixture
def with_pip(cluster: Cluster) -> dict[str, Any]:
    """Values for a run that installs the requirements."""
    index = [
        {"name": "PIP_INDEX_URL", "value": cluster.index_in_cluster},
        {"name": "PIP_TRUSTED_HOST", "value": "server.hcm-fixtures"},
    ]
    return {"requirements": "requirements.txt", "extraEnv": index, **cluster.image_values()}


@pytest.fixture
def quick(shared: dict[str, Any], with_pip: dict[str, Any]) -> dict[str, Any]:
    """Values for a run in an image that brings the requirements; with pip where no such image can be had."""
    image = shared["own image"]
    return {**with_pip, "image": image, "requirements": "", "extraEnv": []} if image else with_pip


@pytest.fixture
def releases(
    shared: dict[str, Any], cluster: Cluster, repository: Repository, quick: dict[str, Any], tmp_path: Path
) -> Iterator[Callable[..., Release]]:
    """Makes releases of the chart, not installed yet, of the test's repository; by Helm 4, unless told otherwise."""
    made: list[Release] = []

    def make(api: Api, version: int = 4, **options: Any) -> Release:
        git = {**quick.get("git", {}), "repo": repository.url, "branch": "main", "path": "."}
        helm = Path(shared["helms"][version - 3])
        values = {**quick, "namespace": api.namespace, "git": git}
        made.append(Release(helm, cluster, api.namespace, tmp_path, values, **options))
        return made[-1]

    yield make
    for release in made:
        release.run("get", "all", release.name)  # what is stored of it: values, manifests, hooks, notes
        for command in release.commands:
            if command.process.poll() is None:
                command.process.kill()
                command.process.communicate()
            assert_no_secret(command.output)


@pytest.fixture
def release(releases: Callable[..., Release], api: Api) -> Release:
    """The release hcm-db-migrations in the test's namespace."""
    return releases(api)


@pytest.fixture
def silent(api: Api, release: Release) -> client.V1Pod:
    """A pod that takes connections on port 8080 and never answers."""
    script = "import socket, time; server = socket.create_server(('', 8080)); time.sleep(3600)"
    image = release.values.get("image", {"repository": "python", "tag": "3.10-slim"})
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {
        "name": "silent",
        "image": f"{image['repository']}:{image['tag']}",
        "command": ["python3", "-c", script],
        "securityContext": security,
        "readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1},
    }
    spec = {
        "containers": [container],
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65533, "seccompProfile": {"type": "RuntimeDefault"}},
        "terminationGracePeriodSeconds": 0,
    }
    api.core.create_namespaced_pod(api.namespace, {"metadata": {"name": "silent"}, "spec": spec})

    def ready() -> client.V1Pod | None:
        pod = api.core.read_namespaced_pod("silent", api.namespace)
        conditions = {condition.type: condition.status for condition in pod.status.conditions or []}
        return pod if conditions.get("Ready") == "True" else None

    return until(ready)
