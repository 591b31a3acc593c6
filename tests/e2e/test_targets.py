"""Several targets: databases and schemas, each migrated by a pod of an Indexed Job."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import takewhile

import pytest
from kubernetes import client
from sqlalchemy import URL

from tests.support.canary import PASSWORD
from tests.support.database import Database, fresh_database
from tests.support.documents import block
from tests.support.kubernetes import FIRST_JOB, Api, kill_container, node
from tests.support.programs import start
from tests.support.release import Release
from tests.support.repository import Repository
from tests.support.revisions import edit
from tests.support.targets import WAITING, applied, close_gates, schemas
from tests.support.waiting import until
from tools.cluster import Cluster

ALL_AT_ONCE = {"canary": 0, "parallelism": 2}


def report(log: str) -> dict[str, str]:
    """The results of the only report in the log: {target: result}, in its order."""
    _, table = re.split(r"target +before +after +seconds +result\n", log)
    lines = takewhile(lambda line: line[0].islower(), table.splitlines())
    return {line.split()[0]: re.split(r" {2,}", line, maxsplit=4)[-1] for line in lines}


def reported(release: Release, command: str) -> list[str]:
    """The report that a command of the README shows, with this release's Job."""
    kubectl, _, sed = command.strip().partition(" | sed ")
    logs = release.documented(kubectl.replace("<revision>", str(release.upgrades)))
    return start(["sed", *shlex.split(sed)], stdin=logs.text).wait().lines


@pytest.mark.fault(
    "Partial work",
    fault="Of several targets, a canary fails",
    sees="`kano ... FAILED: ...`, `lagos ... not started`, and `FAILED: 1 of 3 targets (2 not started); fix them and"
    " upgrade all again, or these: --set-string 'hcm-db-migrations.rollout.only={kano}' (...)`",
    state="No other target is contacted",
    do="Follow the message, deploy again",
)
def test_a_canary_that_fails_stops_the_rest(release: Release, api: Api, database: Database) -> None:
    names = "ng_kano", "ng_lagos", "ng_oyo"
    schemas(database, *names[1:])
    values = release.example(block("schema: ng_kano"))
    values["targets"].append({"name": "oyo", "schema": "ng_oyo"})
    failed = release.upgrade(values)
    assert failed.returncode != 0
    assert applied(database, *names) == {name: [] for name in names}
    canary = f"{FIRST_JOB}-canary"
    assert api.jobs() == [canary]
    log = "\n".join(reported(release, block("-canary)")))
    assert list(report(log)) == ["lagos", "oyo", "kano"]
    schemas(database, names[0])
    upgrade = release.upgrade(values)
    assert upgrade.returncode == 0, upgrade.text
    assert applied(database, *names) == {name: ["001"] for name in names}
    upgrade.line("target lagos (2 of 3)")
    assert report(upgrade.text) == dict.fromkeys(("kano", "lagos", "oyo"), "migrated")
    upgrade.line("DONE: 3 targets: 3 migrated")
    assert api.jobs() == [canary]  # the failed one
    roles = client.RbacAuthorizationV1Api(api.core.api_client).list_namespaced_role(api.namespace).items
    assert roles == []


def test_only_some_targets_and_helm_test_of_all(release: Release, database: Database) -> None:
    values = {"targets": schemas(database, "kano", "lagos"), "rollout": {"only": ["lagos"]}}
    assert release.upgrade(values).returncode == 0
    failed = release.run("test", release.name)
    assert failed.returncode != 0
    results = report(failed.text)
    assert list(results) == ["lagos", "kano"]
    assert results["lagos"] == "unchanged"
    assert results["kano"].startswith('FAILED: alembic current did not report "(head)": the database is not at')
    assert release.upgrade({**values, "rollout": {"only": ["kano"]}}).returncode == 0
    test = release.run("test", release.name)
    assert (test.returncode, report(test.text)) == (0, {"kano": "unchanged", "lagos": "unchanged"})
    assert applied(database, "kano", "lagos") == {"kano": ["001"], "lagos": ["001"]}


@pytest.mark.fault(
    "Partial work",
    fault="Of several targets, more than `rollout.maxFailures` fail",
    sees="`missing ... FAILED: no value for DB_HOST (...), ...`, `last ... not started`, and"
    " `FAILED: 1 of 3 targets (1 migrated, 1 not started); ...`",
    state="Those that run finish; no other is contacted",
    do="Follow the message, deploy again",
)
def test_after_too_many_failures_those_that_run_finish(
    release: Release,
    api: Api,
    repository: Repository,
    database: Database,
) -> None:
    seen = "import os; found = ' '.join(sorted(os.listdir('/etc/target'))), os.path.exists('/etc/api')"
    create = "op.execute('CREATE TABLE seen AS SELECT $$%s, API: %s$$' % found)"
    revision = repository.revision("002", WAITING)
    edit(revision, "def upgrade():", f"def upgrade():\n    {seen}\n    {create}")
    repository.push()
    slow, last = schemas(database, "slow", "last")
    api.secret("of-slow", username=database.role, password=PASSWORD)
    slow["secret"] = {"name": "of-slow"}
    close_gates(database, "slow")
    missing = {"name": "missing", "configMap": {"name": "missing"}, "schema": "public"}
    rollout = {**ALL_AT_ONCE, "maxFailures": 0}
    upgrade = release.start_upgrade({"targets": [slow, missing, last], "rollout": rollout, "job": {"backoffLimit": 0}})
    until(lambda: api.pods(FIRST_JOB))
    until(lambda: api.batch.read_namespaced_job(FIRST_JOB, api.namespace).status.failed_indexes == "1")
    until(lambda: any(pod.metadata.name.startswith(f"{FIRST_JOB}-2-") for pod in api.pods(FIRST_JOB)))
    until(lambda: any(line.startswith("active: DO") for line in database.activity()))
    assert upgrade.program.running
    database.execute("DELETE FROM slow.gate")
    result = upgrade.wait()
    assert result.returncode != 0
    assert applied(database, "slow", "last", "public") == {"slow": ["001", "002"], "last": [], "public": []}
    assert list(report(result.text)) == ["slow", "last", "missing"]
    assert api.conditions(FIRST_JOB)["Failed"] == "PodFailurePolicy"
    assert database.scalar("SELECT * FROM slow.seen") == "DB_PASSWORD DB_USER, API: False"


@pytest.mark.fault(
    "Process and pod",
    fault="Of several targets, one takes longer than `job.activeDeadlineSeconds`, and is retried",
    sees="`other targets are still running: the report continues in another pod`; `slow ... migrated`",
    state="Complete, each revision applied once",
    do="Nothing",
)
def test_the_report_waits_for_a_retry(
    release: Release,
    api: Api,
    repository: Repository,
    database: Database,
) -> None:
    repository.revision("002", WAITING)
    repository.push()
    targets = schemas(database, "slow")
    close_gates(database, "slow")
    job = {"activeDeadlineSeconds": 30, "backoffLimit": 1}
    upgrade = release.start_upgrade({"targets": targets, "rollout": ALL_AT_ONCE, "job": job})
    until(lambda: any(log.startswith("other targets") for log in api.logs(FIRST_JOB)))
    until(lambda: any("interrupted by SIGTERM" in log for log in api.logs(FIRST_JOB)))
    database.execute("DELETE FROM slow.gate")
    result = upgrade.wait()
    assert result.returncode == 0, result.text
    assert report(result.text) == {"slow": "migrated"}
    assert applied(database, "slow") == {"slow": ["001", "002"]}


@pytest.mark.fault(
    "Code and settings",
    fault="The ServiceAccount of several targets' pods may not read the Job's state",
    sees="`FAILED: the ServiceAccount has no access to the state of the Job and its pods (HTTP Error 403: Forbidden):"
    " ...`, exit 255",
    state="The database is not contacted",
    do="Follow the message, deploy again",
)
def test_a_serviceaccount_without_rights_is_reported(release: Release, api: Api, database: Database) -> None:
    targets = schemas(database, "kano")
    created, *rights = block("kubectl create serviceaccount migrations").strip().splitlines()
    assert release.documented(created).returncode == 0
    values = {"targets": targets, "serviceAccountName": "migrations", "job": {"activeDeadlineSeconds": 40}}
    assert release.upgrade(values).returncode != 0
    assert applied(database, "kano") == {"kano": []}
    for command in rights:
        assert release.documented(command.replace("=health:", f"={api.namespace}:")).returncode == 0
    upgrade = release.upgrade(values)
    assert upgrade.returncode == 0, upgrade.text
    assert applied(database, "kano") == {"kano": ["001"]}


@pytest.fixture
def databases(server: URL) -> Iterator[list[Database]]:
    """Databases on the test's server, each with its own role."""
    with ExitStack() as stack:
        yield [stack.enter_context(fresh_database(server)) for _ in range(6)]


def test_the_examples_and_the_report_of_the_readme(
    release: Release,
    api: Api,
    database: Database,
    databases: list[Database],
) -> None:
    schemas(database, "ng_kano", "ng_lagos")
    examples = [release.example(values) for values in (block("schema: ng_kano"), block("hostKey: kenya-host"))]
    values = {"targets": [target for example in examples for target in example["targets"]]}
    values["rollout"] = {"parallelism": 1, "only": ["lagos"]}
    assert release.upgrade(values).returncode == 0
    assert applied(database, "ng_kano", "ng_lagos") == {"ng_kano": [], "ng_lagos": ["001"]}
    kenya, malawi, *_ = databases
    host = "postgres.hcm-fixtures"
    api.config_map("tenants", **{"kenya-host": host, "kenya-name": kenya.name})
    api.config_map("db-malawi", **{"db-host": host, "db-name": malawi.name})
    api.secret("db-malawi", username=malawi.role, password=PASSWORD)
    values["rollout"] = {"parallelism": 1}
    assert release.upgrade(values).returncode != 0
    log, expected = reported(release, block("-canary)")), block("before  after").strip().splitlines()
    for line, shown in zip(log, expected, strict=True):
        pattern = re.escape(shown).replace(r"\.\.\.", ".*")
        assert re.fullmatch(re.sub(r"\\ \d\\ ", r"\\ \\d\\ ", pattern), line), line  # another number of seconds
    api.secret("tenants", **{"kenya-username": kenya.role, "kenya-password": PASSWORD})
    result = release.upgrade({**values, "rollout": {"only": ["kenya", "malawi"]}})
    assert result.returncode == 0, result.text
    assert [tenant.history("revision") for tenant in (kenya, malawi)] == [[("001",)]] * 2


@pytest.mark.fault(
    "Concurrency",
    fault="Of 30 targets, one is locked and one has a wrong password, while a pod is deleted, another's container is"
    " killed, and kubelet is restarted",
    sees="`FAILED: 2 of 30 targets (28 migrated); fix them and upgrade all again, or these: --set-string"
    " 'hcm-db-migrations.rollout.only={s05,s06}' (...)`",
    state="Every other target is migrated once",
    do="Follow the message, deploy again",
)
@pytest.mark.disruptive
def test_faults_at_some_targets_do_not_disturb_the_others(
    release: Release,
    api: Api,
    cluster: Cluster,
    repository: Repository,
    database: Database,
    databases: list[Database],
) -> None:
    repository.revision("002", WAITING)
    repository.push()
    names = [f"s{number:02}" for number in range(24)]
    targets = schemas(database, *names)
    api.secret("wrong", username=database.role, password="wrong")  # noqa: S106
    targets[6]["secret"] = {"name": "wrong"}
    tenants: dict[str, str] = {}
    passwords: dict[str, str] = {}
    for number, tenant in enumerate(databases):
        key = f"d{number}"
        tenants |= {f"{key}-host": "postgres.hcm-fixtures", f"{key}-name": tenant.name}
        passwords |= {f"{key}-username": tenant.role, f"{key}-password": PASSWORD}
        configured = {"name": "tenants", "hostKey": f"{key}-host", "nameKey": f"{key}-name"}
        secret = {"name": "tenants", "usernameKey": f"{key}-username", "passwordKey": f"{key}-password"}
        targets.append({"name": key, "configMap": configured, "secret": secret})
    api.config_map("tenants", **tenants)
    api.secret("tenants", **passwords)
    rollout = {"parallelism": 5, "maxFailures": None}
    wait = [*release.values["extraEnv"], {"name": "MIGRATION_WAIT_SECONDS", "value": "8"}]
    values = {"targets": targets, "rollout": rollout, "extraEnv": wait}

    def waiting(name: str) -> client.V1Pod | None:
        """The pod of a target that waits at its gate."""
        pods = api.pods(FIRST_JOB)
        return next((pod for pod in pods if f"target {name} " in (log := api.log(pod)) and "-> 002" in log), None)

    close_gates(database, "s02", "s10", "s12")
    done = ["001", "002"]
    with database.session() as session:
        key = int.from_bytes(hashlib.sha256(b"s05.alembic_version").digest()[:8], "big", signed=True)
        session.execute("SELECT pg_advisory_lock(%s)", (key,))
        upgrade = release.start_upgrade(values, "--timeout", "20m")
        deleted = until(lambda: waiting("s02")).metadata.name
        api.core.delete_namespaced_pod(deleted, api.namespace)
        until(lambda: deleted not in [pod.metadata.name for pod in api.pods(FIRST_JOB)])
        database.execute("DELETE FROM s02.gate")
        kill_container(cluster, until(lambda: waiting("s10")), "migrate")
        database.execute("DELETE FROM s10.gate")
        until(lambda: waiting("s12"))
        until(lambda: applied(database, "s10") == {"s10": done})  # it has no further retry for what comes now
        node(cluster, "systemctl", "restart", "kubelet")
        until(lambda: node(cluster, "systemctl", "is-active", "kubelet") == "active\n")
        session.execute("DELETE FROM s12.gate")
        session.connection.commit()
        result = upgrade.wait()
    assert result.returncode != 0
    assert list(report(result.text))[-2:] == ["s05", "s06"], result.text
    assert applied(database, *names) == dict.fromkeys(names, done) | {"s05": [], "s06": []}
    assert [tenant.history("revision") for tenant in databases] == [[("001",), ("002",)]] * len(databases)
    api.core.patch_namespaced_secret("wrong", api.namespace, {"stringData": {"password": PASSWORD}})
    finished = release.upgrade({**values, "rollout": {**rollout, "only": ["s05", "s06"]}})
    assert finished.returncode == 0, finished.text
    assert report(finished.text) == {"s05": "migrated", "s06": "migrated"}
    assert applied(database, *names) == dict.fromkeys(names, done)
