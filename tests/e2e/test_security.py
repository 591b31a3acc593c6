"""The pod is admitted under the restricted Pod Security Standard, and no secret is exposed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from tests.support.canary import CANARY, PASSWORD, assert_no_secret
from tests.support.database import Database
from tests.support.documents import block
from tests.support.kubernetes import (
    FIRST_JOB,
    Api,
    admission_policy,
    in_node,
    node,
    open_gate,
    sessions_in_revision_002,
)
from tests.support.programs import run, start
from tests.support.release import Release
from tests.support.repository import Repository
from tests.support.targets import applied, schemas
from tests.support.waiting import until
from tools.binaries import find_or_build
from tools.cluster import Cluster


def test_the_restricted_pod_security_standard_admits_the_pods_without_a_warning(
    release: Release, api: Api, database: Database
) -> None:
    pod = {"metadata": {"name": "lax"}, "spec": {"containers": [{"name": "lax", "image": "none"}]}}
    with pytest.raises(client.ApiException, match="violates PodSecurity"):  # the namespace enforces it
        api.core.create_namespaced_pod(api.namespace, pod)
    results = [release.upgrade(), release.run("test", release.name)]
    assert [result.returncode for result in results] == [0, 0]
    assert database.at == ["001"]
    for result in results:
        assert "warn" not in result.text.lower()
        assert "PodSecurity" not in result.text


def _assigning(user: int) -> dict[str, Any]:
    """The admission policy that assigns ids to pods, unless they have some, as OpenShift does."""
    pods = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    ids = f"Object.spec.securityContext{{runAsUser: {user}, fsGroup: {user}}}"
    return {
        "matchConstraints": {"resourceRules": [pods]},
        "matchConditions": [
            {"name": key.lower(), "expression": f"!has(object.spec.securityContext.{key})"}
            for key in ("runAsUser", "runAsGroup", "fsGroup")
        ],
        "mutations": [
            {
                "patchType": "ApplyConfiguration",
                "applyConfiguration": {"expression": f"Object{{spec: Object.spec{{securityContext: {ids}}}}}"},
            }
        ],
        "reinvocationPolicy": "Never",
    }


def test_openshift_assigns_the_ids(release: Release, api: Api, cluster: Cluster, database: Database) -> None:
    if "mutatingadmissionpolicies" not in cluster.kubectl("api-resources", "--api-group=admissionregistration.k8s.io"):
        pytest.skip("assigns the ids with a MutatingAdmissionPolicy, which requires Kubernetes 1.36: omit --kubeconfig")
    values = release.example(block("runAsUser: null"))
    user = 1000680000
    with admission_policy(cluster, api.namespace, "MutatingAdmissionPolicy", _assigning(user)):
        context = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        containers = [{"name": "probe", "image": "none", "securityContext": security}]
        probe = {"metadata": {"name": "probe"}, "spec": {"securityContext": context, "containers": containers}}

        def assigned() -> int | None:
            created = api.core.create_namespaced_pod(api.namespace, probe, dry_run="All")
            return created.spec.security_context.run_as_user

        until(assigned)  # the API server reads the policy late
        upgrade = release.start_upgrade(values)
        pod = until(lambda: next(iter(api.pods(FIRST_JOB)), None))
        result = upgrade.wait()
    assert (pod.spec.security_context.run_as_user, pod.spec.security_context.run_as_group) == (user, None)
    assert (result.returncode, database.at) == (0, ["001"]), result.text


@pytest.mark.parametrize("names", [(), ("kano",)], ids=["one database", "targets"])
def test_the_documented_rights_are_enough_to_deploy(
    release: Release, api: Api, cluster: Cluster, database: Database, names: tuple[str, ...]
) -> None:
    release.values["targets"] = schemas(database, *names)
    api.core.create_namespaced_service_account(api.namespace, {"metadata": {"name": "deployer"}})
    role = block("kind: Role").replace("namespace: health", f"namespace: {api.namespace}")
    if names:
        role += block("resources: [roles, rolebindings]")
    cluster.kubectl("apply", "-f", "-", input=role)
    grant = ("--role=hcm-db-migrations-deployer", f"--serviceaccount={api.namespace}:deployer", "-n", api.namespace)
    cluster.kubectl("create", "rolebinding", "deployer", *grant)
    config = yaml.safe_load(Path(cluster.kubeconfig).read_text())
    token = cluster.kubectl("create", "token", "deployer", "-n", api.namespace).strip()
    config["users"] = [{"name": user["name"], "user": {"token": token}} for user in config["users"]]
    kubeconfig = release.home / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(config))
    release.cluster = replace(cluster, kubeconfig=str(kubeconfig))
    for result in (release.upgrade(), *([] if names else [release.upgrade()]), release.run("test", release.name)):
        assert result.returncode == 0, result.text
    assert applied(database, *names) == {name: ["001"] for name in names} if names else database.at == ["001"]
    assert release.run("get", "all", release.name).returncode == 0
    assert release.run("uninstall", release.name).returncode == 0
    denied = run([find_or_build("kubectl"), f"--kubeconfig={kubeconfig}", "get", "nodes"])
    assert (denied.returncode, "forbidden" in denied.stderr) == (1, True)


@contextmanager
def watched(cluster: Cluster) -> Iterator[set[str]]:
    """Collect the command lines of all processes on the node, about 20 times a second."""
    stop = f"/tmp/{secrets.token_hex(8)}"  # noqa: S108, on the node
    collect = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '; echo"
    script = f"until [ -e {stop} ]; do sleep 0.05; {collect}; done; rm {stop}"
    arguments, environment = in_node(cluster, "sh", "-c", script)
    collector = start(arguments, env=environment)
    seen: set[str] = set()
    try:
        yield seen
    finally:
        node(cluster, "touch", stop)
        collector.wait(20)
        seen.update(collector.output.splitlines())


def test_password_and_token_are_in_no_log_event_description_manifest_or_process_list(
    release: Release,
    api: Api,
    cluster: Cluster,
    database: Database,
    audited_repository: Repository,
    over_https: dict[str, Any],
) -> None:
    with watched(cluster) as processes:
        upgrade = release.start_upgrade(over_https, "--debug")
        until(lambda: sessions_in_revision_002(database))
        (pod,) = api.pods(FIRST_JOB)
        described = [cluster.kubectl("describe", kind, "-n", api.namespace) for kind in ("pods", "jobs", "events")]
        logs = [api.log(pod, container) for container in ("git-sync", "migrate")]
        events = cluster.kubectl("get", "events", "-n", api.namespace, "-o", "yaml")
        pods = cluster.kubectl("get", "pods,jobs", "-n", api.namespace, "-o", "yaml")
        open_gate(database)
        result = upgrade.wait()
    assert result.returncode == 0, result.text
    stored = [release.run("get", what, release.name).text for what in ("manifest", "hooks", "values", "notes")]
    # Each text is not empty, and is about this run.
    lines = "\n".join(processes)
    for text, part in [
        (described[0], "git-https"),
        (described[1], FIRST_JOB),
        (logs[0], audited_repository.name),
        (logs[1], database.name),
        (events, FIRST_JOB),
        (pods, FIRST_JOB),
        (stored[1], "DB_PASSWORD"),
        (lines, "alembic upgrade head"),
        (lines, "--password-file=/etc/git-sync/password"),
    ]:
        assert part in text
    for text in [*described, *logs, events, pods, *stored, lines, upgrade.output]:
        assert_no_secret(text)
    assert CANARY in PASSWORD
