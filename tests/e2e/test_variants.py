"""Other ways to run the chart: a custom image, no hook, other commands, an umbrella chart, a plain Alembic project."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support.canary import PASSWORD
from tests.support.cluster import OWN_IMAGE, Shared
from tests.support.database import Database
from tests.support.documents import block
from tests.support.kubernetes import NOTHING_TO_DO, TABLE, Api
from tests.support.programs import run
from tests.support.release import Release
from tests.support.repository import Repository
from tests.support.revisions import edit
from tests.support.waiting import until
from tools.cluster import Cluster
from tools.paths import BIN, CHART


def test_an_image_with_pre_installed_dependencies_needs_only_git_and_the_database(
    release: Release, api: Api, repository: Repository, database: Database, shared: Shared
) -> None:
    """pip would fail: there is no requirements.txt and no index. Not every network plugin enforces policies."""
    if not shared.preinstalled_image:
        pytest.skip("loads an image into the node, which requires a kind cluster of the tests: omit --kubeconfig")
    peers = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "hcm-fixtures"}}}
    names = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "migrations", "namespace": api.namespace},
        "spec": {
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "hcm-db-migrations"}},
            "policyTypes": ["Egress"],
            "egress": [{"to": [peers, names]}],
        },
    }
    release.cluster.apply(policy)
    (repository.folder / "requirements.txt").unlink()
    repository.push()
    example = block('tag: "1"').replace("registry.example.org/hcm-db-migrations", OWN_IMAGE["repository"])
    values = release.example(example.replace('"1"', OWN_IMAGE["tag"]))
    result = release.upgrade({**values, "extraEnv": [{"name": "PIP_INDEX_URL", "value": "http://127.0.0.1:9/"}]})
    assert (result.returncode, database.at, api.jobs()) == (0, ["001"], []), result.text
    result.line("INFO now at 001 (head)")
    assert "pip" not in result.text


def test_without_a_hook_it_is_an_ordinary_job_that_is_recreated_when_a_value_changes(
    release: Release, api: Api, database: Database
) -> None:
    options = ("--wait", "--wait-for-jobs", "--timeout", "120s")
    assert release.upgrade({"hook": ""}, *options).returncode == 0
    (first,) = api.jobs()
    assert first.startswith("hcm-db-migration-")
    assert (api.conditions(first)["Complete"], database.at) == ("CompletionsReached", ["001"])
    assert release.upgrade({"hook": ""}, *options).returncode == 0
    assert api.jobs() == [first]
    changed = release.upgrade({"hook": "", "podLabels": {"changed": "yes"}}, *options)
    assert changed.returncode == 0
    (second,) = api.jobs()
    assert second != first
    assert NOTHING_TO_DO in api.logs(second)[0]


@pytest.mark.fault(
    "Code and settings",
    fault='With `hook: ""`, only a literal of `extraEnv` changed',
    sees="`... field is immutable`, exit 1",
    state="Nothing was changed",
    do="`kubectl delete job <name>`, deploy again",
)
def test_an_ordinary_job_is_deleted_before_a_literal_alone_is_changed(
    release: Release, api: Api, cluster: Cluster
) -> None:
    """No digest is made of a literal, which could be guessed from it."""
    values = {"hook": "", "extraEnv": [*release.values["extraEnv"], {"name": "LC_ALL", "value": "C"}]}
    assert release.upgrade(values).returncode == 0
    values["extraEnv"][-1] = {"name": "LC_ALL", "value": "C.UTF-8"}
    refused = release.upgrade(values)
    assert refused.returncode == 1
    assert "field is immutable" in refused.text
    (job,) = api.jobs()
    cluster.kubectl("delete", "job", job, "-n", api.namespace)
    assert release.upgrade(values).returncode == 0
    assert api.jobs() == [job]


@pytest.mark.fault(
    "Rolling back",
    fault='A revision has to be undone: `args: [downgrade, "001"]`',
    sees="`running downgrade 002 -> 001, ...`; without 'args', the next upgrade applies it again",
    state="The schema of 001; the data in the revision's columns is lost",
    do="Fix the revision, push, deploy again",
)
def test_a_plan_changes_nothing_and_a_downgrade_can_be_upgraded_again(
    release: Release, repository: Repository, database: Database
) -> None:
    assert release.upgrade().returncode == 0
    repository.revision("002", "CREATE TABLE added ()", downgrade="DROP TABLE added")
    repository.push()
    plan = release.documented(block("> plan.sql").splitlines()[1])
    assert (plan.returncode, database.relations) == (0, TABLE), plan.text
    for line in ("CREATE TABLE added ();", "COMMIT;"):
        assert line in plan.lines
    assert "CREATE TABLE hcm_report_metadata" not in plan.text
    assert release.upgrade().returncode == 0
    assert database.relations == ["added", *TABLE]
    downgrade = release.documented(block('["downgrade"'))
    assert (downgrade.returncode, database.at, database.relations) == (0, ["001"], TABLE), downgrade.text
    downgrade.line("HH:MM:SS INFO running downgrade 002 -> 001, add")
    assert (release.upgrade().returncode, database.at) == (0, ["002"])


def test_the_examples_of_args_plan_downgrade_and_stamp(
    release: Release, repository: Repository, database: Database
) -> None:
    repository.revision("002", "CREATE TABLE second ()")
    repository.revision("003", "CREATE TABLE third ()", downgrade="DROP TABLE third")
    repository.push()
    plan, downgrade, stamp = (
        release.example(block("args: [upgrade")),
        release.example(block("args: [downgrade")),
        release.example(block("args: [stamp")),
    )
    planned = release.upgrade(plan)
    assert (planned.returncode, database.relations) == (0, []), planned.text
    assert [line for line in planned.lines if line.startswith("CREATE TABLE")] == [
        "CREATE TABLE second ();",
        "CREATE TABLE third ();",
    ]
    assert (release.upgrade().returncode, database.at) == (0, ["003"])
    assert (release.upgrade(downgrade).returncode, database.at) == (0, ["002"])
    assert "third" not in database.relations
    assert (release.upgrade().returncode, database.at) == (0, ["003"])
    assert (release.upgrade(stamp).returncode, database.at) == (0, ["002"])
    assert "third" in database.relations


def _umbrella(folder: Path, dependencies: str) -> Path:
    """A chart with these dependencies, next to a copy of this one."""
    shutil.copytree(CHART, folder / "hcm-db-migrations")
    chart = folder / "umbrella"
    (chart / "templates").mkdir(parents=True)
    (chart / "templates" / "app.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: app}\n")
    (chart / "Chart.yaml").write_text(f"apiVersion: v2\nname: umbrella\nversion: 1.0.0\n{dependencies}")
    return chart


@pytest.mark.parametrize("enabled", [True, False])
def test_an_umbrella_chart_runs_the_packaged_chart(
    releases: Callable[..., Release], api: Api, database: Database, tmp_path: Path, enabled: bool
) -> None:
    chart = _umbrella(tmp_path, block("condition: hcm-db-migrations.enabled"))
    release = releases(api, name="digit", chart=chart)
    package = release.run("dependency", "update", chart)
    assert package.returncode == 0, package.text
    values = {**release.values, "enabled": enabled}
    release.values = {"global": {"domain": "example.org"}, "egov-user": {"replicas": 1}, "hcm-db-migrations": values}
    upgrade = release.start_upgrade()
    if enabled:
        until(lambda: api.jobs() == ["digit-hcm-db-migration-1"])
    result = upgrade.wait()
    assert (result.returncode, api.core.read_namespaced_config_map("app", api.namespace).data) == (0, None), result.text
    assert (database.relations, api.jobs()) == (TABLE if enabled else [], [])
    result.line("INFO now at 001 (head)", times=enabled)


def test_an_umbrella_chart_runs_two_aliases_of_the_chart(
    releases: Callable[..., Release], api: Api, database: Database, tmp_path: Path
) -> None:
    release = releases(api, chart=_umbrella(tmp_path, block("alias: reports")))
    assert release.run("dependency", "update", release.chart).returncode == 0
    overlays = yaml.safe_load(block("fullnameOverride: reports-migration"))
    tables = {"reports": "reports_version", "plans": "plans_version"}
    values = {
        alias: {
            **release.values,
            **overlay,
            "extraEnv": [
                *release.values["extraEnv"],
                {"name": "ALEMBIC_VERSION_TABLE", "value": tables[alias]},
            ],
            "args": ["upgrade" if alias == "reports" else "stamp", "head"],
        }
        for alias, overlay in overlays.items()
    }
    release.values = values
    result = release.upgrade()
    assert result.returncode == 0, result.text
    assert {name: database.scalar(f"SELECT version_num FROM {name}") for name in tables.values()} == {
        "reports_version": "001",
        "plans_version": "001",
    }
    for name in ("reports-migration", "plans-migration"):
        assert api.core.read_namespaced_config_map(name, api.namespace).data["ref"] == "main"


READS_DATABASE_URL = """
import os
config.set_main_option("sqlalchemy.url", os.environ["DATABASE_URL"].replace("%", "%%"))
"""


def test_a_folder_created_by_alembic_init_runs_with_its_own_env_py(
    release: Release, api: Api, repository: Repository, database: Database
) -> None:
    for path in ("alembic.ini", "migrations"):
        path = repository.folder / path
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run([BIN / "alembic", "init", "migrations"], cwd=repository.folder, check=True)
    anchor = "config = context.config\n"
    edit(repository.folder / "migrations" / "env.py", anchor, anchor + READS_DATABASE_URL)
    repository.revision("001", "CREATE TABLE theirs ()")
    repository.push()
    url = database.url.set(host="postgres.hcm-fixtures", port=5432, drivername="postgresql+psycopg2")
    assert url.password == PASSWORD
    api.secret("migrations", url=url.render_as_string(hide_password=False))
    values = release.example(block("secretKeyRef"))
    result = release.upgrade(values)
    assert (result.returncode, database.relations) == (0, ["theirs"]), result.text
    result.line(f"code: repository {repository.url}, ref main, commit <commit>, path .")
    result.line("INFO  [alembic.runtime.migration] Running upgrade  -> 001, add")
    repository.revision("002", "SELECT 1 / 0")
    repository.push()
    failed = release.upgrade(values)
    assert (failed.returncode, database.at) == (1, ["001"])
    reason = "sqlalchemy.exc.DataError: (psycopg2.errors.DivisionByZero) division by zero"
    failed.line(f"FAILED: alembic upgrade head: {reason} (exit status 1)", times=2)  # of each attempt of the Job
