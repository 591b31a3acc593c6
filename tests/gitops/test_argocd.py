"""Argo CD deploys the chart: which changes run the migration, what a failure looks like, and what follows it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.support.database import Database
from tests.support.documents import block
from tests.support.gitops import FAILING, FOLDER, REASON, ArgoCD, operation, state
from tests.support.kubernetes import TABLE, Api, open_gate, sessions_in_revision_002
from tests.support.repository import Repository
from tests.support.revisions import BLOCK, edit
from tests.support.targets import applied, schemas
from tests.support.waiting import until
from tools.cluster import NAME
from tools.gitops import ARGOCD

FINALIZER = "resources-finalizer.argocd.argoproj.io"


def deployed_ref(argocd: ArgoCD) -> str:
    return argocd.documented(block("jsonpath='{.data.ref}'"))


PATHS = {"argocd.argoproj.io/manifest-generate-paths": f"/{FOLDER}"}


def test_every_push_runs_the_job_also_one_beside_the_folder(
    argocd: ArgoCD, api: Api, repository: Repository, database: Database
) -> None:
    argocd.deploy("dev.yaml")
    assert argocd.synced(repository.git("rev-parse", "HEAD"))
    assert (database.at, len(argocd.runs())) == (["001"], 1)
    until(lambda: api.jobs() == [])
    (repository.folder.parent / "README.md").write_text("unrelated\n")
    assert argocd.synced(repository.push())
    assert (database.at, len(argocd.runs())) == (["001"], 2)
    repository.revision("002", "CREATE TABLE pushed ()")
    commit = repository.push()
    assert argocd.synced(commit)
    assert (deployed_ref(argocd), database.at, len(argocd.runs())) == (commit, ["002"], 3)


def test_with_the_path_annotation_an_unrelated_push_runs_nothing_and_one_during_a_run_is_skipped(
    argocd: ArgoCD, audited_repository: Repository, database: Database
) -> None:
    """argo-cd#22795: the push was compared during the run, so the difference counts as drift, which runs no hook."""
    argocd.deploy("dev.yaml")
    argocd.patch(metadata={"annotations": PATHS})
    argocd.poll()
    commit = argocd.push_during_the_run(database)
    assert argocd.synced(commit)
    until(lambda: deployed_ref(argocd) == commit)
    assert (database.at, len(argocd.runs())) == (["002"], 1)
    (audited_repository.folder.parent / "README.md").write_text("unrelated\n")
    assert argocd.synced(audited_repository.push())
    assert (deployed_ref(argocd), len(argocd.runs())) == (commit, 1)
    delete, sync = block("--type=merge").split("\n", 1)
    assert delete.endswith("delete job <name>")
    argocd.documented(sync)
    assert argocd.synced()
    assert database.at == ["003"]


def test_without_a_push_only_a_manual_sync_runs_the_job(argocd: ArgoCD) -> None:
    argocd.deploy("dev.yaml")
    argocd.settled()
    for _ in range(10):
        argocd.poll()
    argocd.delete_config_map()
    argocd.settled()
    assert len(argocd.runs()) == 1
    argocd.sync()
    assert operation(argocd.settled()).startswith("Succeeded")
    assert len(argocd.runs()) == 2


def test_with_a_branch_instead_of_the_commit_it_is_synced_to_a_commit_that_did_not_run(
    argocd: ArgoCD, repository: Repository, database: Database
) -> None:
    argocd.deploy("dev.yaml", source={"helm": {"parameters": None}})
    argocd.settled()
    repository.revision("002", "CREATE TABLE pushed ()")
    assert state(argocd.settled(repository.push())) == ("Synced", "Healthy")
    assert (database.at, len(argocd.runs())) == (["001"], 1)


def test_a_failed_run_is_not_repeated_and_the_next_push_recovers(
    argocd: ArgoCD, api: Api, repository: Repository, database: Database
) -> None:
    argocd.deploy("dev.yaml")
    argocd.settled()
    file = repository.revision("002", FAILING)
    commit = repository.push()
    application = argocd.settled(commit)
    job = argocd.runs()[-1]
    assert re.fullmatch(r"hcm-db-migration-[0-9a-f]{8}", job)
    assert operation(application).startswith("Failed: one or more synchronization tasks completed unsuccessfully")
    shown = argocd.documented(block("syncResult.resources[*].message"), job)
    assert f"Container migrate for pod {api.namespace}/{job}-" in shown
    assert "failed with exit code 255" in shown
    assert state(application) == ("OutOfSync", "Healthy")
    last_line = shown.splitlines()[-1]
    (pod,) = api.pods(job)
    # What its tree of resources shows beside the pod.
    assert (REASON in last_line, pod.status.container_statuses[0].state.terminated.message) == (True, last_line)
    argocd.settled(commit)
    assert (len(argocd.runs()), database.at) == (2, ["001"])
    file.unlink()
    repository.revision("002", "CREATE TABLE fixed ()")
    assert operation(argocd.settled(repository.push())).startswith("Succeeded")
    until(lambda: api.jobs() == [job])
    assert database.at == ["002"]


def test_a_retry_of_the_sync_keeps_the_first_reason_and_a_deleted_job_runs_again(
    argocd: ArgoCD, api: Api, repository: Repository, database: Database
) -> None:
    """A second run fails for another reason: the first left an invalid index."""
    repository.revision("002", "CREATE TABLE duplicates AS SELECT 1 AS id FROM generate_series(1, 2)")
    file = repository.revision("003", "CREATE UNIQUE INDEX CONCURRENTLY two_id ON duplicates (id)")
    edit(file, "op.execute('CREATE", f"{BLOCK}    op.execute('CREATE")
    repository.push()
    argocd.deploy("dev.yaml")
    application = argocd.settled()
    assert application["status"]["operationState"]["retryCount"] == 1
    argocd.sync()
    assert operation(argocd.settled()).startswith("Failed")
    (job,) = argocd.runs()
    assert "could not create unique index" in api.logs(job)[0]
    argocd.documented(block("delete job <name>"), job)
    assert operation(argocd.settled()).startswith("Failed")
    assert argocd.runs() == [job, job]
    assert 'relation "two_id" already exists' in api.logs(job)[0]


def test_targets_stop_after_a_failure_and_the_next_push_migrates_the_rest(
    argocd: ArgoCD, api: Api, repository: Repository, database: Database
) -> None:
    """The next sync updates what the failed one left: the Role names the Jobs, which have other names then."""
    names = "kano", "lagos", "oyo"
    wave = {"argocd.argoproj.io/sync-wave": "-5"}  # takes precedence over the hooks' weights
    argocd.values |= {"targets": schemas(database, *names), "job": {"annotations": wave}}
    argocd.values["rollout"] = {"parallelism": 1}
    database.execute("DROP SCHEMA lagos")
    argocd.deploy("dev.yaml")
    application = argocd.settled()
    canary, job = argocd.runs()
    assert (canary, applied(database, *names)) == (f"{job}-canary", {"kano": ["001"], "lagos": [], "oyo": []})
    assert operation(application).startswith("Failed: one or more synchronization tasks completed unsuccessfully")
    assert f"Container migrate for pod {api.namespace}/{job}-1-" in str(application["status"]["operationState"])
    report = argocd.documented(block("--tail=-1 --ignore-errors | sed -n"), job)
    assert re.search("^lagos .* FAILED: DB_SCHEMA is 'lagos', a schema that does not exist", report, re.MULTILINE)
    assert re.search("^oyo +not started$", report, re.MULTILINE)
    # What its tree of resources shows beside the pods.
    messages = [pod.status.container_statuses[0].state.terminated.message for pod in api.pods(job)]
    assert ("DB_SCHEMA is 'lagos'" in messages[0], messages[1:]) == (True, report.splitlines()[-1:])
    assert report.splitlines()[-1].startswith("FAILED: 1 of 3 targets")
    assert argocd.access() == ["serviceaccount", "role", "rolebinding"]
    schemas(database, "lagos")
    assert argocd.synced(repository.push())
    assert applied(database, *names) == {name: ["001"] for name in names}
    until(lambda: (argocd.access(), api.jobs()) == ([], [job, canary]))


def test_a_job_that_is_deleted_during_its_run_completes_and_the_sync_is_terminated(
    argocd: ArgoCD, api: Api, audited_repository: Repository, database: Database
) -> None:
    """Argo CD's finalizer keeps the Job, and its sync waits forever (argo-cd#25323)."""
    argocd.deploy("dev.yaml")
    argocd.poll()
    until(lambda: sessions_in_revision_002(database))
    until(lambda: "waiting for completion of hook" in operation(argocd.get()))
    argocd.cluster.kubectl("delete", "job", argocd.runs()[0], f"--namespace={api.namespace}", "--wait=false")
    open_gate(database)
    until(lambda: [pod.status.phase for pod in api.pods()] == ["Succeeded"])
    argocd.poll()
    assert "waiting for completion of hook" in operation(argocd.get())
    argocd.patch(status={"operationState": {"phase": "Terminating"}})
    assert operation(argocd.settled()) == "Failed: Operation terminated"
    argocd.sync()
    assert operation(argocd.settled()).startswith("Succeeded")
    assert database.execute("SELECT revision FROM audit") == [("002",)]


def test_a_second_application_of_the_release_can_be_refused(
    argocd: ArgoCD,
    environments: Callable[[type[ArgoCD], Api], ArgoCD],
    namespaces: Callable[[], Api],
    repository: Repository,
) -> None:
    argocd.deploy("dev.yaml")
    argocd.settled()
    (repository.folder.parent / "README.md").write_text("the second deploys another commit\n")
    repository.push()
    second = environments(ArgoCD, namespaces())
    second.values["namespace"] = argocd.api.namespace
    second.deploy("dev.yaml", syncPolicy={"syncOptions": ["FailOnSharedResource=true"]})
    found = second.settled()
    assert "ConfigMap/hcm-db-migration is part of applications" in str(found["status"]["conditions"])
    assert operation(found).startswith("Failed: Shared resource found")
    assert len(argocd.runs()) == 1


def test_deletion_with_the_finalizer_keeps_the_schema(
    argocd: ArgoCD, api: Api, repository: Repository, database: Database
) -> None:
    argocd.deploy("dev.yaml")
    argocd.patch(metadata={"finalizers": [FINALIZER]})
    argocd.settled()
    repository.revision("002", FAILING)
    argocd.settled(repository.push())
    assert len(api.jobs()) == 1
    argocd.delete()
    assert (api.jobs(), api.release_config_map()) == ([], None)
    assert (database.at, database.relations) == (["001"], TABLE)


@pytest.mark.disruptive
def test_tracking_by_label_causes_no_run(argocd: ArgoCD) -> None:
    argocd.deploy("dev.yaml")
    argocd.settled()
    config = "patch", "configmap", "argocd-cm", f"--namespace={ARGOCD}", "--type=merge", "--patch"
    argocd.cluster.kubectl(*config, '{"data": {"application.resourceTrackingMethod": "label"}}')
    try:

        def labelled() -> bool:
            argocd.poll()
            found = argocd.api.release_config_map()
            return found.metadata.labels["app.kubernetes.io/instance"] == argocd.api.namespace

        until(labelled)
        for _ in range(3):
            assert state(argocd.settled()) == ("Synced", "Healthy")
    finally:
        argocd.cluster.kubectl(*config, '{"data": {"application.resourceTrackingMethod": null}}')
    assert len(argocd.runs()) == 1


def test_in_an_umbrella_chart_the_application_starts_after_the_migration_and_not_if_it_failed(
    argocd: ArgoCD, api: Api, audited_repository: Repository, database: Database
) -> None:
    """The hook is in the phase PreSync, which precedes every wave of the phase Sync."""
    umbrella = audited_repository.folder / "charts/umbrella"
    (umbrella / "templates").mkdir(parents=True)
    dependency = {"name": NAME, "version": "*", "repository": f"file://../{NAME}"}
    chart = {"apiVersion": "v2", "name": "umbrella", "version": "1.0.0", "dependencies": [dependency]}
    (umbrella / "Chart.yaml").write_text(yaml.safe_dump(chart))
    application = umbrella / "templates/application.yaml"
    wave = {"argocd.argoproj.io/sync-wave": "-1"}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "application", "annotations": wave}}
    application.write_text(yaml.safe_dump({**service, "spec": {"ports": [{"port": 80}]}}))
    audited_repository.push()
    source = {"path": f"{FOLDER}/charts/umbrella"}
    argocd.deploy("dev.yaml", source=source)
    argocd.poll()
    until(lambda: sessions_in_revision_002(database))

    def ports() -> list[int]:
        services = api.core.list_namespaced_service(api.namespace).items
        return [service.spec.ports[0].port for service in services]

    assert ports() == []
    open_gate(database)
    assert operation(argocd.settled()).startswith("Succeeded")
    assert (ports(), database.at) == ([80], ["002"])
    application.write_text(yaml.safe_dump({**service, "spec": {"ports": [{"port": 81}]}}))
    audited_repository.revision("003", FAILING)
    assert operation(argocd.settled(audited_repository.push())).startswith("Failed")
    assert (ports(), database.at) == ([80], ["002"])


def test_two_sources_and_server_side_apply(argocd: ArgoCD, repository: Repository, database: Database) -> None:
    def with_two_sources(spec: dict[str, Any]) -> None:
        source = spec.pop("source")
        source["helm"]["valueFiles"] = [f"$values/{FOLDER}/environments/unified-dev.yaml"]
        values = {"repoURL": source["repoURL"], "targetRevision": source["targetRevision"], "ref": "values"}
        spec["sources"] = [source, values]
        spec["syncPolicy"]["syncOptions"] = ["ServerSideApply=true"]

    argocd.deploy("dev.yaml", change=with_two_sources)
    assert argocd.synced()
    repository.revision("002", "CREATE TABLE pushed ()")
    commit = repository.push()
    assert argocd.synced()
    assert (deployed_ref(argocd), database.at, len(argocd.runs())) == (commit, ["002"], 2)


def test_the_value_namespace_takes_precedence_over_the_destination(
    argocd: ArgoCD, namespaces: Callable[[], Api], database: Database
) -> None:
    other = namespaces()
    argocd.values["namespace"] = other.namespace
    argocd.deploy("dev.yaml")
    assert state(argocd.settled()) == ("Synced", "Healthy")
    assert other.release_config_map()
    assert (argocd.runs(), database.at) == ([], ["001"])


def test_without_a_hook_a_sync_does_not_wait_and_the_next_push_does_not_stop_the_run(
    argocd: ArgoCD, api: Api, audited_repository: Repository, database: Database
) -> None:
    argocd.values["hook"] = ""
    argocd.deploy("dev.yaml")
    assert operation(argocd.settled()).startswith("Succeeded")
    until(lambda: sessions_in_revision_002(database))
    audited_repository.revision("003", FAILING)
    application = argocd.settled(audited_repository.push())
    assert operation(application).startswith("Succeeded")
    assert len(sessions_in_revision_002(database)) == 1
    open_gate(database)
    until(lambda: len(argocd.runs()) == 2)
    first, second = argocd.runs()
    until(lambda: "Complete" in api.conditions(first) and "Failed" in api.conditions(second))
    assert REASON in api.logs(second)[0]
    assert database.execute("SELECT revision FROM audit") == [("002",)]
    assert state(argocd.settled()) == ("Synced", "Degraded")


def test_without_a_hook_a_deleted_job_runs_again(argocd: ArgoCD, api: Api) -> None:
    """As at the end of job.ttlSecondsAfterFinished."""
    argocd.values["hook"] = ""
    argocd.deploy("dev.yaml")
    argocd.settled()
    (job,) = api.jobs()
    until(lambda: "Complete" in api.conditions(job))
    argocd.cluster.kubectl("delete", "jobs", "--all", f"--namespace={api.namespace}")

    def ran_twice() -> bool:
        argocd.poll()
        return len(argocd.runs()) == 2

    until(ran_twice)
