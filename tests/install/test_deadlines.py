"""Runs that take too long: they end in time, and Helm's output says why."""

from __future__ import annotations

import pytest

from tests.install.helpers import Api, Release, Repository, contacted
from tests.install.test_concurrency import JOB, audited  # noqa: F401
from tests.migrations.conftest import Database
from tools.cluster import Cluster


def test_a_revision_that_meets_the_deadline_is_rolled_back_and_helm_says_which_value_to_raise(
    release: Release,
    api: Api,
    database: Database,
    audited: Repository,  # noqa: F811
) -> None:
    result = release.upgrade({"job": {"activeDeadlineSeconds": 15, "backoffLimit": 0}})
    assert result.returncode == 1
    result.line(
        "FAILED: interrupted by SIGTERM in revision 002 (20251202_143000_002_test.py) after ",
        "; rolled back at 001; run again to go on, and where the Job's time was up raise 'job.activeDeadlineSeconds'"
        " and Helm's --timeout together",
    )
    assert api.conditions(JOB)["Failed"] == "BackoffLimitExceeded"
    (log,) = api.logs(JOB)
    assert log.splitlines()[-1].startswith("FAILED: interrupted by SIGTERM")
    assert (database.at, database.execute("SELECT revision FROM audit")) == (["001"], [])
    assert database.activity() == []


@pytest.fixture
def silent(api: Api, release: Release) -> str:
    """Address of a server that takes connections and never answers."""
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
    api.core.create_namespaced_pod(
        api.namespace, {"metadata": {"name": "silent", "labels": {"app": "silent"}}, "spec": spec}
    )
    service = {"selector": {"app": "silent"}, "ports": [{"port": 80, "targetPort": 8080}]}
    api.core.create_namespaced_service(api.namespace, {"metadata": {"name": "silent"}, "spec": service})
    return f"http://silent.{api.namespace}/schema.git"


def test_a_git_server_that_hangs_is_named_before_the_deadline(
    release: Release, api: Api, cluster: Cluster, database: Database, silent: str
) -> None:
    job = {"activeDeadlineSeconds": 25, "backoffLimit": 0}
    result = release.upgrade({"git": {"repo": silent}, "job": job})
    assert (result.returncode, result.seconds < 30) == (1, True), result.seconds
    result.line(f'FAILED: no checkout of "main" from "{silent}": ', "context deadline exceeded")
    assert (api.conditions(JOB)["Failed"], contacted(cluster, database)) == ("BackoffLimitExceeded", False)
