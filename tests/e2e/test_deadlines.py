"""Runs that take too long: they end before the deadline, and Helm's output shows why."""

from __future__ import annotations

import pytest
from kubernetes import client

from tests.support.database import Database
from tests.support.kubernetes import FIRST_JOB, Api, contacted, open_gate
from tests.support.release import Release
from tests.support.repository import Repository
from tests.support.waiting import until
from tools.cluster import Cluster


@pytest.mark.fault(
    "Process and pod",
    fault="Deadline exceeded (`job.activeDeadlineSeconds`) during a revision",
    sees="`FAILED: interrupted by SIGTERM in revision 002 (...) after N s; rolled back; the database is at"
    " revision 001; run again to resume; if the Job's deadline was exceeded, raise 'job.activeDeadlineSeconds'"
    " and Helm's --timeout together`, exit 143",
    state="Finished revisions are kept, this one is rolled back",
    do="Raise both, deploy again",
)
def test_a_revision_that_exceeds_the_deadline_is_rolled_back_and_helm_shows_which_value_to_raise(
    release: Release,
    api: Api,
    database: Database,
    audited_repository: Repository,
) -> None:
    result = release.upgrade({"job": {"activeDeadlineSeconds": 25, "backoffLimit": 0}})
    assert result.returncode == 1
    result.line(
        "FAILED: interrupted by SIGTERM in revision 002 (20251202_143000_002_add.py) after ",
        "; rolled back; the database is at revision 001; run again to resume; if the Job's deadline was exceeded,"
        " raise 'job.activeDeadlineSeconds' and Helm's --timeout together",
    )
    assert api.conditions(FIRST_JOB)["Failed"] == "BackoffLimitExceeded"
    (log,) = api.logs(FIRST_JOB)
    assert log.splitlines()[-1].startswith("FAILED: interrupted by SIGTERM")
    assert (database.at, database.execute("SELECT revision FROM audit")) == (["001"], [])
    assert database.activity() == []


@pytest.mark.fault(
    "Process and pod",
    fault="Helm's `--timeout` is exceeded before the Job has finished",
    sees="The Job's log so far, and `... Job/.../hcm-db-migration-1 not ready. status: InProgress ...`, exit 1",
    state="The Job continues and completes; the release is `failed`",
    do="Deploy again, with a `--timeout` at least 70 s longer than `job.activeDeadlineSeconds`",
)
def test_a_helm_timeout_does_not_stop_the_job(
    release: Release, api: Api, database: Database, audited_repository: Repository
) -> None:
    result = release.upgrade({}, "--timeout", "15s")
    assert (result.returncode, release.status()) == (1, "failed"), result.text
    result.line("Error: ", f"Job/{api.namespace}/{FIRST_JOB} not ready. status: InProgress")
    open_gate(database)
    until(lambda: "Complete" in api.conditions(FIRST_JOB))
    assert database.at == ["002"]
    again = release.upgrade()
    assert again.returncode == 0, again.text
    again.line("INFO at 002 (head): nothing to do")


@pytest.mark.fault(
    "Network",
    fault="The git server accepts the connection and does not respond",
    sees="`FAILED: no checkout of ... from ...: the clone did not finish within N s: the git server does not respond,"
    " ...`, before the Job's deadline, exit 1",
    state="The database is not contacted",
    do="Fix the git server, deploy again",
)
def test_a_git_server_that_hangs_is_reported_before_the_deadline(
    release: Release, api: Api, cluster: Cluster, database: Database, unresponsive_pod: client.V1Pod
) -> None:
    address = f"http://{unresponsive_pod.status.pod_ip}:8080/schema.git"
    result = release.upgrade({"git": {"repo": address}, "job": {"activeDeadlineSeconds": 45, "backoffLimit": 0}})
    assert (result.returncode, api.seconds_to_failure(FIRST_JOB) < 45) == (1, True)
    result.line(
        f'FAILED: no checkout of "main" from "{address}": the clone did not finish within 27 s: the git server does not'
        " respond, a firewall, NetworkPolicy or proxy drops the packets, or the network is too slow (then raise"
        ' "job.activeDeadlineSeconds") (README.md of the chart, "Git access")'
    )
    assert (api.conditions(FIRST_JOB)["Failed"], contacted(cluster, database)) == ("BackoffLimitExceeded", False)
