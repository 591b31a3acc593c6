"""Other ways to run the chart: a custom image, no hook, other commands, an umbrella chart, a plain Alembic project."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support.canary import PASSWORD
from tests.support.cluster import Shared
from tests.support.database import Database
from tests.support.kubernetes import NOTHING_TO_DO, TABLE, Api
from tests.support.programs import run
from tests.support.release import Release
from tests.support.repository import Repository
from tests.support.waiting import until
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
    result = release.upgrade({"extraEnv": [{"name": "PIP_INDEX_URL", "value": "http://127.0.0.1:9/"}]})
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
    "Rolling back",
    fault='A revision has to be undone: `args: [downgrade, "001"]`',
    sees="`running downgrade 002 -> 001, ...`; without 'args', the next upgrade applies it again",
    state="The schema of 001; the data in the revision's columns is lost",
    do="Fix the revision, push, deploy again",
)
def test_a_plan_changes_nothing_and_a_downgrade_can_be_upgraded_again(
    release: Release, repository: Repository, database: Database
) -> None:
    repository.revision("002", "CREATE TABLE added ()", downgrade="DROP TABLE added")
    repository.push()
    plan = release.upgrade({"args": ["upgrade", "head", "--sql"]})
    assert (plan.returncode, database.relations) == (0, []), plan.text
    for line in ("CREATE TABLE hcm_report_metadata (", "CREATE TABLE added ();", "COMMIT;"):
        assert line in plan.lines
    assert release.upgrade().returncode == 0
    assert database.relations == ["added", *TABLE]
    downgrade = release.upgrade({"args": ["downgrade", "001"]})
    assert (downgrade.returncode, database.at, database.relations) == (0, ["001"], TABLE), downgrade.text
    downgrade.line("HH:MM:SS INFO running downgrade 002 -> 001, add")
    assert (release.upgrade().returncode, database.at) == (0, ["002"])


@pytest.mark.parametrize("enabled", [True, False])
def test_an_umbrella_chart_runs_the_packaged_chart(
    releases: Callable[..., Release], api: Api, database: Database, tmp_path: Path, enabled: bool
) -> None:
    chart = tmp_path / "umbrella"
    (chart / "templates").mkdir(parents=True)
    (chart / "templates" / "app.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: app}\n")
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    dependency = {"name": "hcm-db-migrations", "version": version, "condition": "hcm-db-migrations.enabled"}
    metadata = {"apiVersion": "v2", "name": "umbrella", "version": "1.0.0", "dependencies": [dependency]}
    (chart / "Chart.yaml").write_text(yaml.safe_dump(metadata))
    release = releases(api, name="digit", chart=chart)
    package = release.start("package", CHART, "--destination", chart / "charts").wait()
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
    env = repository.folder / "migrations" / "env.py"
    anchor = "config = context.config\n"
    assert anchor in env.read_text()
    env.write_text(env.read_text().replace(anchor, anchor + READS_DATABASE_URL))
    repository.revision("001", "CREATE TABLE theirs ()")
    first = repository.folder / "migrations/versions/20251202_143000_001_add.py"
    first.write_text(first.read_text().replace("down_revision = '000'", "down_revision = None"))
    repository.push()
    url = database.url.set(host="postgres.hcm-fixtures", port=5432, drivername="postgresql+psycopg2")
    assert url.password == PASSWORD
    api.secret("migrations", url=url.render_as_string(hide_password=False))
    reference = {"secretKeyRef": {"name": "migrations", "key": "url"}}
    values = {"extraEnv": [*release.values["extraEnv"], {"name": "DATABASE_URL", "valueFrom": reference}]}
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
