"""Each example of gitops/ deploys with each tool; only addresses, the namespace and the images are this cluster's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support.database import Database
from tests.support.gitops import ArgoCD, Environment, Flux
from tests.support.kubernetes import Api, open_gate, sessions_in_revision_002
from tests.support.programs import run, start
from tests.support.repository import Repository
from tests.support.waiting import until
from tools import gitops
from tools.binaries import find_or_build
from tools.cluster import NAME, Cluster
from tools.gitops import ARGOCD, CODE, FLUX, REGISTRY
from tools.network import free_port, is_listening
from tools.paths import CHART

TAG = "hcm-reports-1.0.0"  # of the examples


@pytest.fixture(params=["argocd", "flux"])
def environment(request: pytest.FixtureRequest) -> Environment:
    created: Environment = request.getfixturevalue(request.param)
    return created


def tag(repository: Repository, name: str) -> str:
    """Push a tag with all changes; return the commit."""
    return repository.push(f"refs/tags/{name}")


def test_dev_follows_the_branch_and_a_downgrade_is_a_commit(
    environment: Environment, repository: Repository, database: Database
) -> None:
    revision = repository.revision("002", "CREATE TABLE pushed ()", downgrade="DROP TABLE pushed")
    repository.push()
    environment.deploy("dev.yaml")
    assert environment.synced()
    assert database.at == ["002"]
    overlay = repository.folder / "environments/unified-dev.yaml"
    text = overlay.read_text()
    overlay.write_text(text + '  args: [downgrade, "001"]\n')
    assert environment.synced(repository.push())
    assert (database.at, "pushed" in database.relations) == (["001"], False)
    overlay.write_text(text)
    revision.unlink()
    assert environment.synced(repository.push())
    assert (database.at, len(environment.runs())) == (["001"], 3)


def test_a_push_during_a_run_is_applied_after_it(
    environment: Environment, audited_repository: Repository, database: Database
) -> None:
    environment.deploy("dev.yaml")
    assert environment.synced(environment.push_during_the_run(database))
    assert (database.at, len(environment.runs())) == (["003"], 2)


def test_production_stays_at_a_tag_until_a_commit_promotes_the_next_one(
    environment: Environment, repository: Repository, database: Database
) -> None:
    overlays = repository.folder / "environments"
    shutil.copy(overlays / "unified-dev.yaml", overlays / "unified-prod.yaml")
    tag(repository, TAG)
    environment.deploy("production.yaml")
    assert environment.synced()
    repository.revision("002", "CREATE TABLE promoted ()")
    repository.push()
    commit = tag(repository, "hcm-reports-1.1.0")
    assert environment.synced()
    assert (database.at, len(environment.runs())) == (["001"], 1)
    environment.deploy("production.yaml", {CODE: repository.url, TAG: "hcm-reports-1.1.0"})
    assert environment.synced(commit)
    assert database.at == ["002"]
    # Flux may see the new values before the new chart.
    assert len(environment.runs()) in ([2, 3] if isinstance(environment, Flux) else [2])


def test_the_overlay_of_one_repository_names_the_commit_of_the_other(
    environment: Environment, cluster: Cluster, repository: Repository, database: Database, tmp_path: Path
) -> None:
    devops = Repository.create(tmp_path / "devops", cluster, f"{repository.name}-devops", branch="unified-env")
    helm = devops.folder / "deploy-as-code/helm"
    shutil.copytree(CHART, helm / "charts/utilities" / NAME)
    (helm / "environments").mkdir()

    def push(ref: str) -> str:
        values = {**environment.values, "git": {**environment.values["git"], "branch": ref}}
        (helm / "environments/unified-dev.yaml").write_text(yaml.safe_dump({NAME: values}))
        return devops.push()

    commit = push(repository.git("rev-parse", "HEAD"))
    environment.deploy("two-repositories.yaml", {"https://github.com/egovernments/DIGIT-DevOps": devops.url})
    assert environment.synced(commit)
    repository.revision("002", "CREATE TABLE pushed ()")
    assert environment.synced(push(repository.push()))
    assert (database.at, len(environment.runs())) == (["002"], 2)


def forward_registry(cluster: Cluster) -> int:
    """A port of this machine that reaches the registry, until the test ends."""
    port = free_port()
    arguments = ["--namespace=hcm-fixtures", "port-forward", "service/registry", f"{port}:5000"]
    start([find_or_build("kubectl"), f"--kubeconfig={cluster.kubeconfig}", *arguments], is_evidence=False)
    until(lambda: is_listening(port))
    return port


def test_the_chart_comes_from_an_oci_registry(
    environment: Environment,
    cluster: Cluster,
    repository: Repository,
    database: Database,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """The registry of the tests has no certificate."""
    helm, folder = find_or_build("helm"), environment.api.namespace
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    tag(repository, TAG)
    run([helm, "package", CHART, f"--destination={tmp_path}"], check=True)
    target = f"oci://127.0.0.1:{forward_registry(cluster)}/{folder}"
    run([helm, "push", "--plain-http", tmp_path / f"{NAME}-{version}.tgz", target], check=True)
    addresses = {CODE: repository.url, "registry.example.org/charts": f"{REGISTRY}/{folder}"}
    if isinstance(environment, ArgoCD):
        labels = {"argocd.argoproj.io/secret-type": "repository"}
        metadata = {"name": folder, "namespace": ARGOCD, "labels": labels}
        settings = {"type": "oci", "url": f"oci://{REGISTRY}/{folder}/{NAME}", "insecureOCIForceHttp": "true"}
        request.addfinalizer(lambda: cluster.kubectl("delete", "secret", folder, f"--namespace={ARGOCD}"))
        cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": settings})
    environment.deploy("oci.yaml", addresses)
    if isinstance(environment, Flux):
        environment.patch("OCIRepository", spec={"insecure": True})
    assert environment.synced()
    repository.revision("002", "CREATE TABLE pushed ()")
    tag(repository, "hcm-reports-1.1.0")
    environment.deploy("oci.yaml", {**addresses, TAG: "hcm-reports-1.1.0"})
    assert environment.synced()
    assert (database.at, len(environment.runs())) == (["002"], 2)


def test_two_applications_and_a_helm_release_on_one_database_migrate_one_after_the_other(
    environments: Callable[[type[Environment], Api], Environment],
    namespaces: Callable[[], Api],
    audited_repository: Repository,
    database: Database,
) -> None:
    three = [environments(tool, namespaces()) for tool in (ArgoCD, ArgoCD, Flux)]
    for each in three:
        each.deploy("dev.yaml")

    def waiting() -> list[str]:
        logs = [log for each in three for job in each.api.jobs() for log in each.api.logs(job)]
        return [log for log in logs if "another migration is running" in log]

    until(lambda: len(waiting()) == 2)
    open_gate(database)
    assert all(each.synced() for each in three)
    assert (database.at, database.execute("SELECT revision FROM audit")) == (["002"], [("002",)])
    assert [len(each.runs()) for each in three] == [1, 1, 1]


@pytest.mark.disruptive
def test_runs_survive_a_restart_of_the_controllers(
    environments: Callable[[type[Environment], Api], Environment],
    namespaces: Callable[[], Api],
    cluster: Cluster,
    audited_repository: Repository,
    database: Database,
) -> None:
    """Argo CD's new controller waits for the running Job; Flux's starts a second one, which waits for the first."""
    argocd, flux = both = [environments(tool, namespaces()) for tool in (ArgoCD, Flux)]
    for each in both:
        each.deploy("dev.yaml")
    until(lambda: sessions_in_revision_002(database) and all(each.runs() for each in both))
    cluster.kubectl("delete", "pod", f"--namespace={ARGOCD}", "argocd-application-controller-0")
    cluster.kubectl("delete", "pod", f"--namespace={FLUX}", "--selector=app=helm-controller")
    until(lambda: len(flux.runs()) == 2, 120)
    open_gate(database)
    gitops.wait_until_ready(cluster)
    for each in both:
        assert each.synced()
    assert (database.at, database.execute("SELECT revision FROM audit")) == (["002"], [("002",)])
    assert (len(argocd.runs()), len(flux.runs())) == (1, 2)


@pytest.mark.disruptive  # it migrates the database of the namespace health
def test_make_cluster_deploys_this_checkout(controllers: None, cluster: Cluster, repository: Repository) -> None:
    gitops.deploy_checkout(cluster)
    tools = {"health-argocd": ArgoCD, "health-flux": Flux}
    both = [tool(cluster, Api.of(cluster, namespace), repository, {}) for namespace, tool in tools.items()]
    try:
        assert all(each.synced() for each in both)
    finally:
        for each in both:
            each.delete()
