"""A plugin: namespaces that Argo CD or Flux deploys a test's repository to, with the examples of gitops/."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from http import HTTPStatus
from typing import Any, TypeVar

import pytest
from kubernetes import client

from tests.support.canary import assert_no_secret
from tests.support.cluster import record_images
from tests.support.database import Database
from tests.support.kubernetes import JOB, Api, open_gate, sessions_in_revision_002
from tests.support.programs import run
from tests.support.repository import Repository
from tests.support.waiting import until
from tools import gitops
from tools.binaries import find_or_build
from tools.cluster import NAME, Cluster
from tools.gitops import ARGOCD, CODE, CONTROLLERS
from tools.values import merged

# Of the examples.
FOLDER = "utilities/hcm-db-migrations"
BRANCH = "airflow-analysis"
# A revision that fails, and what its run prints.
FAILING, REASON = "SELECT 1/0", "division by zero"
REFRESH = "argocd.argoproj.io/refresh"
OBJECTS = {
    "Application": ("argoproj.io", "v1alpha1", "applications"),
    "HelmRelease": ("helm.toolkit.fluxcd.io", "v2", "helmreleases"),
    "HelmChart": ("source.toolkit.fluxcd.io", "v1", "helmcharts"),
    "GitRepository": ("source.toolkit.fluxcd.io", "v1", "gitrepositories"),
    "OCIRepository": ("source.toolkit.fluxcd.io", "v1", "ocirepositories"),
}


T = TypeVar("T")
E = TypeVar("E", bound="Environment")


@dataclass
class Environment:
    """A namespace that a tool deploys the test's repository to."""

    folder = ""  # in gitops/
    kind = ""  # of the object that deploys the chart
    source_kind = ""  # of the one that it is deployed from

    cluster: Cluster
    api: Api
    repository: Repository
    values: dict[str, Any]

    @property
    def address(self) -> tuple[str, str]:
        """Namespace and name of that object."""
        return self.api.namespace, NAME

    @property
    def _custom(self) -> client.CustomObjectsApi:
        return client.CustomObjectsApi(self.api.core.api_client)

    def _path(self, kind: str, name: str = "") -> tuple[str, str, str, str, str]:
        """Group, version, namespace, plural and name of an object, as CustomObjectsApi takes them."""
        group, version, plural = OBJECTS[kind or self.kind]
        namespace, default = self.address
        return group, version, namespace, plural, name or default

    def get(self, kind: str = "", name: str = "") -> dict[str, Any]:
        """An object; by default the one that deploys the chart."""
        found: dict[str, Any] = self._custom.get_namespaced_custom_object(*self._path(kind, name))
        return found

    def patch(self, kind: str = "", **patch: Any) -> None:
        """Merge a patch, such as `spec={"suspend": True}`, into an object; None removes a field."""
        self._custom.patch_namespaced_custom_object(*self._path(kind), patch)

    def assert_no_secret(self) -> None:
        with contextlib.suppress(client.ApiException):  # deleted by the test
            assert_no_secret(str(self.get()))

    def delete(self) -> None:
        """Delete what `deploy` applied, unless it is missing, and wait until it is gone."""
        for kind in dict.fromkeys((self.kind, self.source_kind)):
            group, _, namespace, plural, name = self._path(kind)
            options = f"--namespace={namespace}", "--ignore-not-found", "--timeout=60s"
            self.cluster.kubectl("delete", f"{plural}.{group}", name, *options)

    def runs(self) -> list[str]:
        """The names of the Jobs that created a pod, oldest first; also of those that were deleted since."""
        selector = "reason=SuccessfulCreate,involvedObject.kind=Job"
        events = self.api.core.list_namespaced_event(self.api.namespace, field_selector=selector).items
        events.sort(key=lambda event: event.metadata.creation_timestamp)
        return list({event.involved_object.uid: event.involved_object.name for event in events}.values())

    def access(self) -> list[str]:
        """The ServiceAccount of the targets' pods, its Role and its RoleBinding."""
        selector = f"--selector=app.kubernetes.io/name={NAME}"
        kinds = "serviceaccounts,roles,rolebindings"
        found = self.cluster.kubectl("get", kinds, selector, f"--namespace={self.api.namespace}", "--output=name")
        return [line.partition("/")[0].partition(".")[0] for line in found.splitlines()]

    def documented(self, block: str, job: str = "") -> str:
        """Run a block of docs/gitops.md for this environment and one of its Jobs; return its output."""
        namespace = self.api.namespace
        block = block.replace("-n health", f"-n {namespace}").replace("<name>", job)
        block = block.replace(f"application {NAME}", f"application {namespace}")
        path = f"{find_or_build('kubectl').parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": os.environ["HOME"], "KUBECONFIG": self.cluster.kubeconfig}
        return run(["sh", "-ec", block], env=environment, verbatim=True, check=True).stdout

    def delete_config_map(self) -> None:
        """Delete the release's ConfigMap, and wait until the tool has restored it."""
        before = self.api.release_config_map()
        assert before
        self.api.core.delete_namespaced_config_map(JOB, self.api.namespace)

        def restored() -> bool:
            self.poll()
            found = self.api.release_config_map()
            return found is not None and found.metadata.uid != before.metadata.uid

        until(restored)

    def deploy(
        self,
        file: str,
        addresses: Mapping[str, str] | None = None,
        change: Callable[[dict[str, Any]], None] = lambda spec: None,
        **spec: Any,
    ) -> None:
        """Apply an example for this namespace.

        `spec` is merged over its last object's, where None removes a field, and `change` may change it.
        """
        addresses = {CODE: self.repository.url} if addresses is None else addresses
        objects = gitops.example(f"{self.folder}/{file}", self.api.namespace, addresses, {NAME: self.values})
        objects[-1]["spec"] = merged(objects[-1]["spec"], spec)
        change(objects[-1]["spec"])
        self.cluster.apply(*objects)
        self.source_kind = objects[0]["kind"]

    def push_during_the_run(self, database: Database) -> str:
        """Push revision 003 while `audited_repository`'s 002 runs, which then ends; return the commit."""
        until(lambda: sessions_in_revision_002(database))
        self.repository.revision("003", "CREATE TABLE pushed ()")
        commit = self.repository.push()
        self.fetch()
        open_gate(database)
        return commit

    def fetch(self) -> None:
        """Have the tool see the last push; during a run, it deploys nothing yet."""
        raise NotImplementedError

    def poll(self) -> None:
        """Request what the tool does at each interval; return when it has happened."""
        raise NotImplementedError

    def synced(self, commit: str = "") -> bool:
        """Wait until the tool has deployed `commit`, or failed to; return whether it reports success."""
        raise NotImplementedError


class Flux(Environment):
    """A HelmRelease and its source."""

    folder, kind, source_kind = "flux", "HelmRelease", "GitRepository"

    def conditions(self) -> dict[str, str]:
        """Such as {"Ready": "True UpgradeSucceeded: Helm upgrade succeeded for ..."}."""
        return _conditions(self.get())

    def poll(self) -> None:
        self.fetch()
        self.reconcile("HelmRelease")

    def fetch(self) -> None:
        self.reconcile(self.source_kind)
        if self.source_kind == "GitRepository":  # the chart is packaged afterwards
            fetched = self.get("GitRepository")["status"]["artifact"]["revision"]
            eventually(lambda: self._packaged() == fetched)

    def _packaged(self) -> str:
        """The revision of the repository that the chart was packaged from."""
        try:
            chart = self.get("HelmChart", f"{self.api.namespace}-{NAME}")
        except client.ApiException:
            return ""
        return str(chart.get("status", {}).get("observedSourceArtifactRevision", ""))

    def reconcile(self, kind: str) -> None:
        """Request what happens at each interval, as `flux reconcile` does; return when it has happened."""
        token = secrets.token_hex(8)
        self.patch(kind, metadata={"annotations": {"reconcile.fluxcd.io/requestedAt": token}})

        def handled() -> bool:
            found = self.get(kind)
            status = found.get("status", {})
            current: bool = status.get("observedGeneration") == found["metadata"]["generation"]
            return current and status.get("lastHandledReconcileAt") == token

        eventually(handled)

    def settled(self, commit: str = "") -> dict[str, str]:
        """Wait until the HelmRelease, with the chart of `commit`, is ready or has failed; return its conditions."""

        def settled() -> dict[str, str] | None:
            found = self.get()
            status, conditions = found.get("status", {}), _conditions(found)
            current = status.get("observedGeneration") == found["metadata"]["generation"]
            deployed = commit[:12] in status.get("lastAttemptedRevision", "")
            ended = conditions.get("Ready", "Unknown").split()[0] != "Unknown" and "Reconciling" not in conditions
            return conditions if current and deployed and ended else None

        return eventually(settled)

    def synced(self, commit: str = "") -> bool:
        self.poll()
        return self.settled(commit)["Ready"].startswith("True ")

    def push(self) -> str:
        """Push to the environment's branch, have Flux handle it, return the commit."""
        commit = self.repository.push()
        self.poll()
        return commit


class ArgoCD(Environment):
    """An Application; it has the name of the namespace that it deploys to."""

    folder, kind, source_kind = "argocd", "Application", "Application"

    @property
    def address(self) -> tuple[str, str]:
        return ARGOCD, self.api.namespace

    def fetch(self) -> None:
        self.poll()

    def poll(self) -> None:
        def refreshed() -> bool:
            return REFRESH not in self.get()["metadata"].get("annotations", {})

        for _ in range(10):  # the controller misses one that arrives during a comparison
            self.patch(metadata={"annotations": {REFRESH: "normal"}})
            with contextlib.suppress(TimeoutError):
                until(refreshed, 6)
                return
            self.patch(metadata={"annotations": {REFRESH: None}})
        pytest.fail("Argo CD handled none of ten requests to refresh the Application")

    def settled(self, commit: str = "") -> dict[str, Any]:
        """Wait until a comparison with `commit`, and each sync that it started, have ended; return the Application."""

        def ended() -> dict[str, Any] | None:
            found = self.get()
            status = found.get("status", {})
            running = "operation" in found or status.get("operationState", {}).get("phase") == "Running"
            compared = commit in status.get("sync", {}).get("revision", "")
            return found if compared and not running else None

        self.poll()
        finished = ""
        while True:  # the status of the last comparison may be older than the end of the sync
            found = eventually(ended)
            at = found["status"].get("operationState", {}).get("finishedAt", "")
            if at == finished:
                return found
            finished = at
            self.poll()

    def synced(self, commit: str = "") -> bool:
        found = self.settled(commit)
        return (*state(found), operation(found).partition(":")[0]) == ("Synced", "Healthy", "Succeeded")

    def sync(self) -> None:
        """Start a sync, as `argocd app sync` does; a request that arrives while Argo CD repairs drift is lost."""
        user = secrets.token_hex(8)

        def started() -> bool:
            found = self.get()
            last = found["status"].get("operationState", {}).get("operation", {})
            if last.get("initiatedBy", {}).get("username") == user:
                return True
            if "operation" not in found:
                # Else it would be merged with a repair, before or just now, of some resources and without hooks.
                version = {"resourceVersion": found["metadata"]["resourceVersion"]}
                sync = {"initiatedBy": {"username": user}, "sync": {}}
                try:
                    self.patch(metadata=version, operation=sync, status={"operationState": None})
                except client.ApiException as error:
                    if error.status != HTTPStatus.CONFLICT:
                        raise
            return False

        eventually(started)

    def delete(self) -> None:
        super().delete()
        # If it was deleted during a sync, a finalizer would keep the Job and its namespace.
        for job in self.api.batch.list_namespaced_job(self.api.namespace).items:
            if job.metadata.finalizers:
                without = {"metadata": {"finalizers": None}}
                self.api.batch.patch_namespaced_job(job.metadata.name, self.api.namespace, without)


def _conditions(release: Mapping[str, Any]) -> dict[str, str]:
    found = release.get("status", {}).get("conditions", [])
    return {each["type"]: f"{each['status']} {each['reason']}: {each['message']}" for each in found}


def eventually(condition: Callable[[], T | None]) -> T:
    """As `until`, but it polls rarely: the API server has the same CPUs as the runs."""

    def result() -> T | None:
        time.sleep(0.4)
        return condition()

    return until(result, 120)


def operation(application: Mapping[str, Any]) -> str:
    """Such as `Failed: one or more synchronization tasks completed unsuccessfully ...`."""
    state = application["status"]["operationState"]
    return f"{state['phase']}: {state.get('message', '')}"


def state(application: Mapping[str, Any]) -> tuple[str, str]:
    """Such as ("Synced", "Healthy")."""
    return application["status"]["sync"]["status"], application["status"]["health"]["status"]


@pytest.fixture(scope="session")
def controllers(cluster: Cluster, pytestconfig: pytest.Config) -> None:
    """Both tools are ready."""
    gitops.wait_until_ready(cluster)
    for namespace in (*CONTROLLERS, "hcm-fixtures"):
        record_images(pytestconfig, Api.of(cluster, namespace).pods())


@pytest.fixture
def environments(
    controllers: None, cluster: Cluster, repository: Repository, preinstalled_image_values: dict[str, Any]
) -> Iterator[Callable[[type[E], Api], E]]:
    """Creates environments for the test's repository. At its end, no controller has crashed or printed a secret."""
    tools = [Api.of(cluster, namespace) for namespace in CONTROLLERS]
    start, restarts = datetime.now(timezone.utc), _restarts([pod for api in tools for pod in api.pods()])
    with contextlib.ExitStack() as stack:
        stack.callback(_assert_no_crash_and_no_secret, tools, start, restarts)

        def create(tool: type[E], api: Api) -> E:
            git = {**preinstalled_image_values.get("git", {}), "repo": repository.url}
            values = {**preinstalled_image_values, "namespace": api.namespace, "git": git}
            environment = tool(cluster, api, repository, values)
            stack.callback(environment.delete)
            stack.callback(environment.assert_no_secret)
            return environment

        yield create


def _restarts(pods: list[client.V1Pod]) -> dict[str, int]:
    """The number of restarts of each pod."""
    return {pod.metadata.name: sum(each.restart_count for each in pod.status.container_statuses or ()) for pod in pods}


def _assert_no_crash_and_no_secret(tools: list[Api], start: datetime, before: dict[str, int]) -> None:
    pods = [pod for api in tools for pod in api.pods()]
    crashed = {name: count for name, count in _restarts(pods).items() if count > before.get(name, 0)}
    assert not crashed, crashed
    seconds = math.ceil((datetime.now(timezone.utc) - start).total_seconds())
    for pod in pods:
        name, namespace = pod.metadata.name, pod.metadata.namespace
        assert_no_secret(tools[0].core.read_namespaced_pod_log(name, namespace, since_seconds=seconds) or "")
    for event in (event for api in tools for event in api.events()):
        assert_no_secret(event)


@pytest.fixture
def flux(environments: Callable[[type[Flux], Api], Flux], api: Api) -> Flux:
    return environments(Flux, api)


@pytest.fixture
def argocd(environments: Callable[[type[ArgoCD], Api], ArgoCD], api: Api) -> ArgoCD:
    return environments(ArgoCD, api)
