"""The schema over a release's lifecycle: install, upgrade, failure, helm test, rollback, uninstall."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.database import Database
from tests.support.documents import block
from tests.support.kubernetes import (
    FIRST_JOB,
    JOB,
    NOTHING_TO_DO,
    TABLE,
    Api,
    contacted,
    open_gate,
    sessions_in_revision_002,
)
from tests.support.release import Release
from tests.support.repository import Repository
from tests.support.waiting import until
from tools.cluster import Cluster


def test_install_migrates_an_empty_database_shows_the_log_and_leaves_no_job(
    release: Release, api: Api, cluster: Cluster, repository: Repository, database: Database, with_pip: dict
) -> None:
    commit = repository.git("rev-parse", "HEAD")
    command = release.start_upgrade(with_pip)
    result = command.wait()
    assert result.returncode == 0, result.text
    assert f"commit {commit}" in command.output
    assert contacted(cluster, database)  # other tests rely on this function
    server = database.scalar("SHOW server_version") + (", TLSv1.3" if database.scalar("SHOW ssl") == "on" else "")
    log = [
        f"code: repository {repository.url}, ref main, commit <commit>, path .",
        f"HH:MM:SS INFO database {database.name} at postgres.hcm-fixtures:5432 as {database.role}, schema public,"
        f" PostgreSQL {server}",
        "HH:MM:SS INFO at base (the head is 001); to do: 1 (001 create_hcm_report_metadata)",
        "HH:MM:SS INFO running upgrade  -> 001, create_hcm_report_metadata",
        "HH:MM:SS INFO done in N.NN s",
        f"HH:MM:SS INFO since YYYY-MM-DD HH:MM:SS UTC: upgrade 001 by {database.role}, commit <commit>",
        "HH:MM:SS INFO now at 001 (head)",
    ]
    assert "\n".join(log) in result.text, result.text
    ((host, *origin),) = database.history("host, repository, ref, commit")
    assert (host.startswith(f"{JOB}-1-"), origin) == (True, [repository.url, "main", commit])
    assert (database.relations, database.at) == (TABLE, ["001"])
    assert (api.jobs(), api.pods()) == ([], [])


@pytest.mark.parametrize("version", [3, 4])
def test_an_upgrade_does_nothing_until_a_revision_is_pushed(
    releases: Callable[..., Release], api: Api, repository: Repository, database: Database, version: int
) -> None:
    release = releases(api, version)
    early = release.run("test", release.name)
    assert (early.returncode, early.lines) == (1, ["Error: release: not found"])
    assert release.upgrade().returncode == 0
    before = database.dump()
    again = release.upgrade()
    assert again.returncode == 0
    assert database.dump() == before
    repository.revision("002", "ALTER TABLE hcm_report_metadata ADD COLUMN status VARCHAR(50)")
    repository.push()
    upgrade = release.upgrade()
    assert (upgrade.returncode, database.at) == (0, ["002"])
    columns = "SELECT attname FROM pg_attribute WHERE attrelid = 'hcm_report_metadata'::regclass AND attname = 'status'"
    assert database.execute(columns) == [("status",)]
    assert (api.jobs(), release.status()) == ([], "deployed")
    if version == 4:  # Helm 3.17 does not print a hook's log
        again.line(NOTHING_TO_DO)
        upgrade.line("HH:MM:SS INFO running upgrade 001 -> 002, add")


def test_uninstall_leaves_only_the_schema_and_a_reinstall_finds_it(
    release: Release, api: Api, database: Database
) -> None:
    assert release.upgrade().returncode == 0
    uninstall = release.run("uninstall", release.name)
    assert uninstall.returncode == 0, uninstall.text
    configs = [found.metadata.name for found in api.core.list_namespaced_config_map(api.namespace).items]
    assert (sorted(configs), api.jobs(), api.pods()) == (["egov-config", "kube-root-ca.crt"], [], [])
    assert (database.relations, database.at) == (TABLE, ["001"])
    reinstall = release.upgrade()
    assert (reinstall.returncode, release.status()) == (0, "deployed")
    reinstall.line(NOTHING_TO_DO)


@pytest.mark.fault(
    "Rolling back",
    fault="`helm rollback` to older code",
    sees="No message; the next upgrade with that code: `the database is at 002, which this code (head 001) does not"
    " know; deploy the code that knows it ...`, exit 255",
    state="The schema is unchanged",
    do="Deploy the newer code, or downgrade with it by `args`",
)
def test_a_rollback_leaves_the_schema_and_the_next_upgrade_to_that_code_reports_it(
    release: Release, api: Api, repository: Repository, database: Database
) -> None:
    old = {"git": {"branch": repository.push("refs/heads/v1")}}
    repository.revision("002", "CREATE TABLE added ()")
    new = {"git": {"branch": repository.push("refs/heads/v2")}}
    assert release.upgrade(old).returncode == 0
    assert release.upgrade(new).returncode == 0
    rollback = release.run("rollback", release.name, "1")
    assert rollback.returncode == 0, rollback.text
    assert (database.at, api.jobs()) == (["002"], [])
    upgrade = release.upgrade(old)
    assert upgrade.returncode == 1
    upgrade.line(
        "FAILED: the database is at 002, which this code (head 001) does not know; deploy the code that knows it or, if"
        " the version table is another project's, set ALEMBIC_VERSION_TABLE or DB_SCHEMA; see"
        " docs/troubleshooting.md"
    )
    assert (database.at, api.conditions(f"{JOB}-4")["Failed"]) == (["002"], "PodFailurePolicy")


def test_a_failed_run_shows_its_reason_keeps_job_pod_and_log_and_the_next_upgrade_completes(
    release: Release, api: Api, repository: Repository, database: Database
) -> None:
    repository.revision("002", "CREATE TABLE kept ()")
    broken = repository.revision("003", "CREATE TABLE lost ()", "ALTER TABLE missing ADD COLUMN status text")
    repository.push()
    failed = release.upgrade()
    assert failed.returncode == 1
    reason = (
        f'FAILED: revision 003 ({broken.name}) failed: relation "missing" does not exist, at {broken.name}, line 8;'
        " rolled back; the database is at revision 002; fix it, then retry"
    )
    failed.line(reason)
    failed.line("HH:MM:SS INFO running upgrade 001 -> 002, add")
    assert api.jobs() == [f"{JOB}-1"]
    assert api.conditions(f"{JOB}-1")["Failed"] == "PodFailurePolicy"
    log = release.documented(
        block("kubectl logs job/hcm-db-migration-<revision> -n health\n").replace("<revision>", "1")
    )
    assert reason in log.lines[-2:]  # Alembic logs it as well
    assert (database.at, [*TABLE, "kept"]) == (["002"], database.relations)
    assert release.status() == "failed"

    repository.revision("003", "CREATE TABLE third ()")
    repository.push()
    fixed = release.upgrade()
    assert (fixed.returncode, database.at, release.status()) == (0, ["003"], "deployed")
    fixed.line("HH:MM:SS INFO at 002 (the head is 003); to do: 1 (003 add)")
    assert api.jobs() == [f"{JOB}-1"]  # until its ttlSecondsAfterFinished


def test_helm_test_passes_after_an_install_and_fails_if_the_schema_is_behind(
    release: Release, api: Api, repository: Repository, database: Database
) -> None:
    assert release.upgrade().returncode == 0
    passed = release.run("test", release.name)
    assert passed.returncode == 0, passed.text
    passed.line("Phase:", "Succeeded")
    passed.line("INFO since YYYY-MM-DD HH:MM:SS UTC: upgrade 001 by ")
    repository.revision("002", "CREATE TABLE added ()")
    repository.push()
    failed = release.run("test", release.name)
    assert failed.returncode == 1
    failed.line(
        'FAILED: alembic current did not report "(head)": the database is not at the current head of "main"; run helm'
        ' upgrade (README.md of the chart, "helm test")'
    )
    assert database.at == ["001"]


@pytest.mark.parametrize(("version", "rollback"), [(3, "--atomic"), (4, "--rollback-on-failure")])
def test_wait_succeeds_and_a_failed_upgrade_is_rolled_back_to_the_previous_release(
    releases: Callable[..., Release],
    api: Api,
    repository: Repository,
    database: Database,
    version: int,
    rollback: str,
) -> None:
    release = releases(api, version)
    options = ["--wait", "--timeout", "120s", rollback]
    assert release.upgrade(None, *options).returncode == 0
    repository.revision("002", "SELECT 1 / 0")
    broken = repository.push()
    failed = release.upgrade({"git": {"branch": broken}}, *options)
    assert (failed.returncode, release.status(), database.at) == (1, "deployed", ["001"])
    assert api.release_config_map().data["ref"] == "main"
    (log,) = api.logs(f"{JOB}-2")
    assert "FAILED: revision 002 (20251202_143000_002_add.py) failed: division by zero" in log
    if version == 4:
        failed.line("FAILED: revision 002", "division by zero")


def _kill_helm(release: Release, database: Database) -> None:
    """Kill Helm while the Job runs revision 002, then wait until the Job has applied it, as in the README."""
    upgrade = release.start_upgrade()
    until(lambda: sessions_in_revision_002(database))
    upgrade.kill()
    open_gate(database)
    until(lambda: database.at == ["002"])


@pytest.mark.fault(
    "Process and pod",
    fault="The Job is deleted while it runs",
    sees="Helm 3 and Flux take it for a success, exit 0; Helm 4 waits for it until its timeout, exit 1. `helm test`:"
    " `FAILED: alembic current ... did not report ...`, exit 1",
    state="The interrupted revision is rolled back",
    do="Upgrade again; do not delete a running Job",
)
@pytest.mark.parametrize(("version", "status"), [(3, 0), (4, 1)])
def test_helm_test_fails_after_the_job_was_deleted_during_its_run(
    releases: Callable[..., Release],
    api: Api,
    cluster: Cluster,
    audited_repository: Repository,
    database: Database,
    version: int,
    status: int,
) -> None:
    release = releases(api, version)
    upgrade = release.start_upgrade(None, "--timeout", "20s")
    until(lambda: sessions_in_revision_002(database))
    cluster.kubectl("delete", "job", FIRST_JOB, "-n", api.namespace)
    result = upgrade.wait()
    until(lambda: not sessions_in_revision_002(database))  # the pod is deleted after its Job
    assert (result.returncode, database.at) == (status, ["001"]), result.text
    assert release.run("test", release.name).returncode == 1
    open_gate(database)
    assert (release.upgrade().returncode, database.at) == (0, ["002"])
    assert database.execute("SELECT revision FROM audit") == [("002",)]


@pytest.mark.fault(
    "Rolling back",
    fault="Helm is killed during an upgrade: the release is stuck in pending-upgrade",
    sees="The next upgrade: `another operation (install/upgrade/rollback) is in progress`",
    state="The Job completes; Job and log are kept",
    do="Wait for the Job, then `helm rollback` to the last deployed revision, and deploy again",
)
def test_a_release_stuck_in_pending_upgrade_is_recovered_by_a_rollback(
    release: Release, api: Api, audited_repository: Repository, database: Database
) -> None:
    first = audited_repository.git("rev-parse", "HEAD~1")
    assert release.upgrade({"git": {"branch": first}}).returncode == 0
    assert database.at == ["001"]
    _kill_helm(release, database)
    assert release.status() == "pending-upgrade"
    refused = release.upgrade()
    assert refused.returncode == 1
    refused.line("another operation (install/upgrade/rollback) is in progress")
    until(lambda: "Complete" in api.conditions(f"{JOB}-2"))
    jobs, history, rollback = block("helm rollback").splitlines()
    release.documented(jobs).line(f"{JOB}-2", "Complete")
    release.documented(history).line("1 ", "deployed")
    assert release.documented(rollback.replace("<last deployed revision>", "1")).returncode == 0
    assert (release.status(), database.at) == ("deployed", ["002"])
    result = release.upgrade()
    assert (result.returncode, release.status()) == (0, "deployed"), result.text
    result.line("INFO at 002 (head): nothing to do")


@pytest.mark.fault(
    "Rolling back",
    fault="Helm is killed during the first install: the release is stuck in pending-install",
    sees="The next upgrade: `another operation (install/upgrade/rollback) is in progress`",
    state="The Job completes; Job and log are kept",
    do="Wait for the Job, then `helm uninstall`, which leaves the schema, and deploy again",
)
def test_a_release_stuck_in_pending_install_is_recovered_by_an_uninstall(
    release: Release, api: Api, audited_repository: Repository, database: Database
) -> None:
    _kill_helm(release, database)
    assert release.status() == "pending-install"
    refused = release.upgrade()
    assert refused.returncode == 1
    refused.line("another operation (install/upgrade/rollback) is in progress")
    assert release.run("uninstall", release.name).returncode == 0
    result = release.upgrade()
    assert (result.returncode, release.status()) == (0, "deployed"), result.text
    result.line("INFO at 002 (head): nothing to do")
