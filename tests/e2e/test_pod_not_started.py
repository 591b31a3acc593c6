"""A Job whose pod is not created, or does not start: Helm's output ends without a log; the events have the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.database import Database
from tests.support.kubernetes import FIRST_JOB, Api, contacted
from tests.support.release import Release
from tests.support.waiting import until
from tools.cluster import Cluster

WITHOUT_LOG = (
    "`... Job/.../hcm-db-migration-1 not ready. status: Failed, message: Job Failed. failed: N/1`, without a log"
)
# The shortest: the Job's own is 30 s.
DEADLINE = {"job": {"activeDeadlineSeconds": 10, "backoffLimit": 0}}
QUOTA = {
    "kind": "ResourceQuota",
    "spec": {"hard": {"requests.cpu": "4", "requests.memory": "8Gi", "limits.cpu": "8", "limits.memory": "16Gi"}},
}
LIMIT_RANGE = {"kind": "LimitRange", "spec": {"limits": [{"type": "Container", "max": {"memory": "256Mi"}}]}}


def create(cluster: Cluster, api: Api, found: dict[str, Any]) -> None:
    cluster.apply({"apiVersion": "v1", "metadata": {"name": "compute", "namespace": api.namespace}, **found})


def row(fault: str, event: str, do: str) -> pytest.MarkDecorator:
    sees = f"{WITHOUT_LOG}, exit 1; in the output of kubectl get events: `{event}`"
    state = "The database is not contacted"
    return pytest.mark.fault("Process and pod", fault=fault, sees=sees, state=state, do=do)


@pytest.mark.parametrize(
    ("policy", "values"),
    [
        pytest.param(
            QUOTA,
            {},
            id="quota",
            marks=row(
                "A quota requires a CPU limit",
                "FailedCreate ... is forbidden: failed quota: compute: must specify limits.cpu for: git-sync,migrate",
                "Set `limits.cpu` in both `resources` and `git.resources`, deploy again",
            ),
        ),
        pytest.param(
            LIMIT_RANGE,
            {},
            id="limit range",
            marks=row(
                "A LimitRange forbids the limits",
                "FailedCreate ... is forbidden: maximum memory usage per Container is 256Mi, but limit is 512Mi",
                "Set `resources` and `git.resources` within the range, deploy again",
            ),
        ),
        pytest.param(
            None,
            {"serviceAccountName": "migrations"},
            id="service account",
            marks=row(
                "The ServiceAccount of `serviceAccountName` does not exist",
                'FailedCreate ... is forbidden: error looking up service account ...: serviceaccount "migrations" not'
                " found",
                "Create it in the Job's namespace, deploy again",
            ),
        ),
        pytest.param(
            None,
            {"extraPodSpec": {"priorityClassName": "missing"}},
            id="priority class",
            marks=row(
                "The priority class of `extraPodSpec.priorityClassName` does not exist",
                "FailedCreate ... is forbidden: no PriorityClass with name missing was found",
                "Create it, or fix the name, deploy again",
            ),
        ),
        pytest.param(
            None,
            {"podSecurityContext": {"runAsNonRoot": False}},
            id="admission",
            marks=row(
                "An admission policy refuses the pod, for example after `podSecurityContext` was relaxed",
                'FailedCreate ... is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true ...',
                "Follow the message: the chart's defaults conform to the restricted standard",
            ),
        ),
        pytest.param(
            None,
            {"image": {"repository": "127.0.0.1:1/missing", "tag": "1"}},
            id="image",
            marks=row(
                "An image cannot be pulled",
                'Failed ... Failed to pull image "127.0.0.1:1/missing:1": ...',
                "Fix `image`, `git.image` or `imagePullSecrets`, deploy again",
            ),
        ),
        pytest.param(
            None,
            {"nodeSelector": {"disk": "fast"}},
            id="node",
            marks=row(
                "No node fits the pod",
                "FailedScheduling ... 0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector ...",
                "Fix `nodeSelector`, `tolerations`, `affinity` or the requests, deploy again",
            ),
        ),
    ],
)
def test_events_show_why_a_pod_is_not_created_or_does_not_start(
    release: Release,
    api: Api,
    cluster: Cluster,
    database: Database,
    policy: dict[str, Any] | None,
    values: dict[str, Any],
) -> None:
    if policy:
        create(cluster, api, policy)
    result = release.upgrade({**values, **DEADLINE})
    assert (result.returncode, contacted(cluster, database)) == (1, False)
    events, job = (
        release.documented(f"kubectl {command} -n health") for command in ("get events", f"describe job/{FIRST_JOB}")
    )
    assert ("FailedCreate" in events.text) == ("FailedCreate" in job.text) == ("Created pod:" not in job.text)


def test_helm_3_names_the_deadline_of_a_job_without_a_pod(releases: Callable[..., Release], api: Api) -> None:
    result = releases(api, 3).upgrade({"serviceAccountName": "migrations", **DEADLINE})
    assert result.returncode == 1
    result.line(f"job {FIRST_JOB} failed: DeadlineExceeded")


def test_a_quota_admits_the_pod_if_both_containers_have_a_cpu_limit(
    release: Release, api: Api, cluster: Cluster, database: Database
) -> None:
    create(cluster, api, QUOTA)
    until(lambda: api.core.read_namespaced_resource_quota("compute", api.namespace).status.hard)
    limits = {"resources": {"limits": {"cpu": "1"}}}
    result = release.upgrade({**limits, "git": limits})
    assert (result.returncode, database.at) == (0, ["001"]), result.text
