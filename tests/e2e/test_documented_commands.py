"""The commands that install the chart, as both READMEs have them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

import pytest
import yaml
from sqlalchemy import make_url

from tests.support.database import Database
from tests.support.documents import block
from tests.support.kubernetes import TABLE, Api
from tests.support.project import PARTS, head
from tests.support.release import Release
from tests.support.repository import Repository
from tests.support.waiting import until
from tools.cluster import NAME, Cluster
from tools.cluster import install as make_install
from tools.fixtures import push_checkout
from tools.paths import ROOT
from tools.postgres import execute


def test_the_commands_of_the_readme_work(
    releases: Callable[..., Release],
    cluster: Cluster,
    with_pip: dict,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Only the repository's address, the images and the package index are replaced by this cluster's."""
    health = Api.of(cluster, "health")
    release = releases(health)
    if release.run("status", NAME).returncode == 0:
        pytest.skip("the namespace health has your release: helm uninstall hcm-db-migrations -n health")
    push_checkout(cluster)
    release.values = {
        **with_pip,
        "git": {**with_pip.get("git", {}), "repo": "git@server.hcm-fixtures:hcm-db-migrations"},
    }
    logs, test = block("helm test").splitlines()
    database = make_url(cluster.postgres_url("unifieddevdb"))
    query = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
    was_empty = not execute(database, query)
    overlay = yaml.safe_load((ROOT / "environments/unified-dev.yaml").read_text())
    assert yaml.safe_load(block("git@github.com")) == overlay
    try:
        install = release.start_documented(block("-f environments/unified-dev.yaml -n health\n"))
        until(lambda: any(map(health.log, health.pods("hcm-db-migration-1"))))
        log = release.documented(logs.replace("<revision>", "1"))
        result = install.wait()
        assert result.returncode == 0, result.text
        log.line("code: ", "ref airflow-analysis", "path utilities/hcm-db-migrations")
        result.line("database unifieddevdb at postgres.hcm-fixtures:5432 as hcm, schema public")
        assert re.search(rf"INFO now at {head()} \(head\)|INFO at {head()} \(head\): nothing to do", result.text)
        assert set(TABLE) <= {name for (name,) in execute(database, query)}
        assert "hcm-db-migration-1" not in health.jobs()
        tested = release.documented(test)
        assert tested.returncode == 0, tested.text
        tested.line("Phase:", "Succeeded")
        capfd.readouterr()
        make_install(cluster)
        output = capfd.readouterr().out
        assert "\ncode: repository " in output
        assert re.search(rf"^[\d:]+ INFO at {head()} \(head\): nothing to do$", output, re.M)
        assert 'Table "public.hcm_report_metadata"' in output
    finally:
        release.run("uninstall", NAME)
        if was_empty:
            execute(database, "DROP TABLE IF EXISTS hcm_report_metadata, alembic_version")


def test_the_command_of_the_charts_readme_installs_from_standard_input(
    release: Release, repository: Repository, database: Database
) -> None:
    folder = repository.folder / "utilities" / "hcm-db-migrations"  # the default of git.path
    folder.mkdir(parents=True)
    for name in (*PARTS, "requirements.txt"):
        shutil.move(repository.folder / name, folder)
    repository.push()
    git = {name: value for name, value in release.values["git"].items() if name == "image"}
    release.values = {**release.values, "git": git}
    command = block("-n health -f - <<EOF")
    result = release.documented(command.replace("https://github.com/<owner>/<repository>", repository.url))
    assert (result.returncode, database.at) == (0, ["001"]), result.text
