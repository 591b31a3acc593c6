"""Flux deploys the chart: which changes run the migration, what a failure looks like, and what follows it."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.support.database import Database
from tests.support.documents import block
from tests.support.gitops import FAILING, REASON, Flux
from tests.support.kubernetes import TABLE, Api, open_gate, sessions_in_revision_002
from tests.support.repository import Repository
from tests.support.revisions import edit
from tests.support.targets import WAITING, applied, close_gates, schemas
from tests.support.waiting import until


def reason(api: Api, job: str) -> str:
    """The last line of a Job's log."""
    return api.logs(job)[0].splitlines()[-1]


def test_a_push_is_deployed_once_within_a_minute_also_one_beside_the_folder(
    flux: Flux, api: Api, repository: Repository, database: Database
) -> None:
    """sparseCheckout does not change that: the revision of the GitRepository does."""
    flux.deploy("dev.yaml")
    assert flux.settled()["Ready"].startswith("True InstallSucceeded")
    assert (database.at, flux.runs(), api.jobs()) == (["001"], ["hcm-db-migration-1"], [])
    repository.revision("002", "CREATE TABLE pushed ()")
    commit = repository.push()
    until(lambda: database.at == ["002"], 90)  # a minute, on a busy machine
    assert flux.settled(commit)["Ready"].startswith("True UpgradeSucceeded")
    assert flux.runs() == ["hcm-db-migration-1", "hcm-db-migration-2"]
    for _ in range(10):
        flux.poll()
    assert len(flux.runs()) == 2
    (repository.folder.parent / "README.md").write_text("unrelated\n")
    assert flux.settled(flux.push())["Ready"].startswith("True UpgradeSucceeded")
    assert (len(flux.runs()), database.at) == (3, ["002"])


def test_without_the_strategy_revision_only_a_new_chart_version_or_value_runs_the_job(
    flux: Flux, repository: Repository, database: Database
) -> None:
    flux.deploy("dev.yaml", chart={"spec": {"reconcileStrategy": None}})
    flux.settled()
    repository.revision("002", "CREATE TABLE pushed ()")
    commit = flux.push()
    assert flux.settled()["Ready"].startswith("True InstallSucceeded")
    assert (database.at, len(flux.runs())) == (["001"], 1)
    flux.patch(spec={"values": {"hcm-db-migrations": {"git": {"branch": commit}}}})
    assert flux.settled()["Ready"].startswith("True UpgradeSucceeded")
    assert (database.at, len(flux.runs())) == (["002"], 2)
    edit(repository.folder / "charts/hcm-db-migrations/Chart.yaml", "\nversion: ", "\nversion: 9")
    flux.push()
    until(lambda: len(flux.runs()) == 3)


def test_a_failed_run_is_not_repeated_and_the_next_push_recovers(
    flux: Flux, api: Api, repository: Repository, database: Database
) -> None:
    flux.deploy("dev.yaml")
    flux.settled()
    file = repository.revision("002", FAILING)
    conditions = flux.settled(flux.push())
    failed = f"[Job/{api.namespace}/hcm-db-migration-2 status: 'Failed']"
    assert conditions["Ready"].startswith("False UpgradeFailed: Helm upgrade failed for release")
    assert failed in conditions["Ready"]
    assert conditions["Stalled"].startswith("True RetriesExceeded: Failed to upgrade after 1 attempt(s)")
    assert any(failed in event for event in api.events() if event.startswith("UpgradeFailed: "))
    shown = flux.documented(block('{.status.conditions[?(@.type=="Ready")].message}'), "hcm-db-migration-2")
    assert failed in shown
    assert REASON in shown.splitlines()[-1]
    flux.reconcile("HelmRelease")
    assert (flux.runs()[1:], database.at) == (["hcm-db-migration-2"], ["001"])
    file.unlink()
    repository.revision("002", "CREATE TABLE fixed ()")
    assert flux.settled(flux.push())["Ready"].startswith("True UpgradeSucceeded")
    assert (api.jobs(), database.at) == (["hcm-db-migration-2"], ["002"])


def test_a_run_is_repeated_on_request(flux: Flux, api: Api, database: Database) -> None:
    api.core.patch_namespaced_config_map("egov-config", api.namespace, {"data": {"db-name": f"{database.name}_late"}})
    flux.deploy("dev.yaml")
    assert "Job/" in flux.settled()["Ready"]
    database.execute(f"CREATE DATABASE {database.name}_late OWNER {database.role}")
    try:
        flux.documented(block("forceAt=$now"))
        until(lambda: len(flux.runs()) == 2)
        assert flux.settled()["Ready"].startswith("True ")
    finally:
        flux.delete()
        database.execute(f"DROP DATABASE {database.name}_late WITH (FORCE)")


def test_a_failed_canary_starts_no_other_target(flux: Flux, api: Api, database: Database) -> None:
    names = "kano", "lagos", "oyo"
    flux.values["targets"] = schemas(database, *names)
    database.execute("DROP SCHEMA kano")
    flux.deploy("dev.yaml")
    conditions = flux.settled()
    canary = "hcm-db-migration-1-canary"
    failed = f"[Job/{api.namespace}/{canary} status: 'Failed']"
    assert conditions["Ready"].startswith("False InstallFailed: Helm install failed for release")
    assert failed in conditions["Ready"]
    assert any(failed in event for event in api.events() if event.startswith("InstallFailed: "))
    assert (flux.runs(), flux.access(), applied(database, *names)) == ([canary], [], {name: [] for name in names})
    report = flux.documented(block("--tail=-1 --ignore-errors | sed -n"), canary)
    assert re.search("^kano .* FAILED: DB_SCHEMA is 'kano', a schema that does not exist", report, re.MULTILINE)
    assert re.search("^oyo +not started$", report, re.MULTILINE)
    assert report.splitlines()[-1].startswith("FAILED: 1 of 3 targets")


def test_after_a_timeout_no_other_target_is_started_and_the_next_run_migrates_all(
    flux: Flux, api: Api, repository: Repository, database: Database
) -> None:
    """Helm deletes the ServiceAccount, and with the next one, the first Job would start its targets as well."""
    names = "kano", "lagos", "oyo"
    flux.values |= {"targets": schemas(database, *names), "rollout": {"canary": 0, "parallelism": 1}}
    close_gates(database, "kano")
    repository.revision("002", WAITING)
    repository.push()
    flux.deploy("dev.yaml", timeout="15s")
    conditions = flux.settled()
    assert re.search(r"timeout waiting for: \[Job/|would exceed context deadline", conditions["Ready"])
    assert sessions_in_revision_002(database)
    database.execute("DELETE FROM kano.gate")
    until(lambda: any(event.startswith("FailedCreate: ") for event in api.events()))
    assert applied(database, *names) == {"kano": ["001", "002"], "lagos": [], "oyo": []}
    flux.patch(spec={"timeout": "5m"})
    until(lambda: len(flux.runs()) == 2)
    assert flux.settled()["Ready"].startswith("True UpgradeSucceeded")
    assert applied(database, *names) == {name: ["001", "002"] for name in names}
    assert not any(line.startswith("code: ") for log in api.logs("hcm-db-migration-1")[1:] for line in log.splitlines())


def test_a_remediated_failure_is_only_in_the_condition_released(
    flux: Flux, api: Api, repository: Repository, database: Database
) -> None:
    """A rollback runs no hook, and does not undo a schema change."""
    flux.deploy("dev.yaml", upgrade={"remediation": {"retries": 1}})
    flux.settled()
    repository.revision("002", "CREATE TABLE kept ()")
    repository.revision("003", FAILING)
    conditions = flux.settled(flux.push())
    assert conditions["Ready"].startswith("False RollbackSucceeded: Helm rollback to previous release")
    assert "Job/" not in conditions["Ready"]
    assert f"[Job/{api.namespace}/hcm-db-migration-4 status: 'Failed']" in conditions["Released"]
    assert flux.runs()[1:] == ["hcm-db-migration-2", "hcm-db-migration-4"]
    assert (database.at, REASON in reason(api, "hcm-db-migration-2")) == (["002"], True)


def test_drift_of_the_config_map_is_corrected_without_a_run(flux: Flux) -> None:
    flux.deploy("dev.yaml", driftDetection={"mode": "enabled"})
    flux.settled()
    flux.delete_config_map()
    assert "DriftCorrected" in str(flux.api.events())
    assert len(flux.runs()) == 1


def test_nothing_runs_while_suspended_and_helm_test_follows_each_upgrade(
    flux: Flux, repository: Repository, database: Database
) -> None:
    flux.deploy("dev.yaml", test={"enable": True})
    assert flux.settled()["Ready"].startswith("True TestSucceeded: Helm test succeeded")
    flux.patch(spec={"suspend": True})
    repository.revision("002", "CREATE TABLE pushed ()")
    commit = flux.push()
    assert (database.at, len(flux.runs())) == (["001"], 1)
    flux.patch(spec={"suspend": False})
    assert flux.settled(commit)["Ready"].startswith("True TestSucceeded: Helm test succeeded")
    assert (database.at, len(flux.runs())) == (["002"], 2)


def test_a_timeout_below_the_run_stalls_the_release_and_the_migration_completes(
    flux: Flux, api: Api, audited_repository: Repository, database: Database
) -> None:
    flux.deploy("dev.yaml", timeout="15s")
    conditions = flux.settled()
    assert conditions["Ready"].startswith("False InstallFailed")
    assert re.search(r"timeout waiting for: \[Job/|would exceed context deadline", conditions["Ready"])
    assert conditions["Stalled"].startswith("True RetriesExceeded")
    assert sessions_in_revision_002(database)
    open_gate(database)
    until(lambda: "Complete" in api.conditions("hcm-db-migration-1"))
    assert database.at == ["002"]
    flux.patch(spec={"timeout": "5m"})
    until(lambda: len(flux.runs()) == 2)
    assert flux.settled()["Ready"].startswith("True ")
    assert database.execute("SELECT revision FROM audit") == [("002",)]


def test_a_second_release_of_the_name_is_refused_unless_it_may_take_over(
    flux: Flux, environments: Callable[[type[Flux], Api], Flux], namespaces: Callable[[], Api]
) -> None:
    flux.deploy("dev.yaml")
    flux.settled()
    before = flux.api.release_config_map()
    second = environments(Flux, namespaces())
    second.values["namespace"] = flux.api.namespace
    second.deploy("dev.yaml")
    refused = f'ConfigMap "hcm-db-migration" in namespace "{flux.api.namespace}" exists and cannot be imported'
    until(lambda: refused in second.conditions().get("Ready", ""))
    after = flux.api.release_config_map()
    assert (after.metadata.resource_version, len(flux.runs())) == (before.metadata.resource_version, 1)
    second.patch(spec={"install": {"disableTakeOwnership": False}})
    assert second.settled()["Ready"].startswith("True ")
    taken = flux.api.release_config_map()
    assert taken.metadata.annotations["meta.helm.sh/release-namespace"] == second.api.namespace


def test_deletion_keeps_the_schema_and_the_failed_job(
    flux: Flux, api: Api, repository: Repository, database: Database
) -> None:
    repository.revision("002", FAILING)
    repository.push()
    flux.deploy("dev.yaml")
    assert flux.settled()["Ready"].startswith("False InstallFailed")
    flux.delete()
    assert (database.at, database.relations, api.jobs()) == (["001"], TABLE, ["hcm-db-migration-1"])
    assert REASON in reason(api, "hcm-db-migration-1")


def test_without_a_release_name_the_names_contain_the_target_namespace(flux: Flux, api: Api) -> None:
    flux.deploy("dev.yaml", releaseName=None, targetNamespace=api.namespace)
    flux.settled()
    assert flux.runs() == [f"{api.namespace}-hcm-db-migrations-hcm-db-migration-1"]


def test_without_a_hook_a_rollback_deletes_the_log_and_runs_the_previous_job_again(
    flux: Flux, api: Api, repository: Repository, database: Database
) -> None:
    flux.values["hook"] = ""
    flux.deploy("dev.yaml", upgrade={"remediation": {"retries": 1}})
    flux.settled()
    (first,) = api.jobs()
    repository.revision("002", "CREATE TABLE kept ()")
    repository.revision("003", FAILING)
    flux.push()
    until(lambda: flux.conditions()["Ready"].startswith("False RollbackFailed"), 120)
    assert first in flux.runs()[2:]
    until(lambda: api.jobs() == [first])
    assert database.at == ["002"]


def test_without_a_hook_drift_detection_runs_a_deleted_job_again(flux: Flux, api: Api) -> None:
    """As at the end of job.ttlSecondsAfterFinished."""
    flux.values["hook"] = ""
    flux.deploy("dev.yaml", driftDetection={"mode": "enabled"})
    flux.settled()
    flux.cluster.kubectl("delete", "jobs", "--all", f"--namespace={api.namespace}")
    flux.reconcile("HelmRelease")
    until(lambda: len(flux.runs()) == 2)
