"""The commands of the project's first README, verbatim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from sqlalchemy import make_url

from tests.support.kubernetes import TABLE, Api
from tests.support.release import Release
from tests.support.waiting import until
from tools.cluster import NAME, Cluster
from tools.cluster import install as make_install
from tools.fixtures import push_checkout
from tools.postgres import execute


def test_the_commands_of_the_first_readme_work(
    releases: Callable[..., Release],
    cluster: Cluster,
    with_pip: dict,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Only the repository's address, the images and the package index are replaced by this cluster's."""
    health = Api.of(cluster, "health")
    release = releases(health)
    if release.run("status", NAME).returncode == 0:
        pytest.skip("the namespace health has your release: helm uninstall hcm-db-migrations -n health")
    push_checkout(cluster)
    machine = tmp_path / "machine.yaml"
    machine.write_text(yaml.safe_dump({NAME: with_pip}))
    database = make_url(cluster.postgres_url("unifieddevdb"))
    query = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
    was_empty = not execute(database, query)
    try:
        install = release.start(
            *("upgrade", "--install", NAME, "charts/hcm-db-migrations", "-f", "environments/unified-dev.yaml"),
            *("--set", "hcm-db-migrations.git.repo=git@server.hcm-fixtures:hcm-db-migrations", "-f", machine),
        )
        until(lambda: any(map(health.log, health.pods("hcm-db-migration-1"))))
        log = cluster.kubectl("logs", "job/hcm-db-migration-1", "-n", "health", "--follow")
        result = install.wait()
        assert result.returncode == 0, result.text
        assert "ref airflow-analysis" in log.splitlines()[0]
        assert "path utilities/hcm-db-migrations" in log.splitlines()[0]
        assert "database unifieddevdb at postgres.hcm-fixtures:5432 as hcm, schema public" in log.splitlines()[1]
        assert log.splitlines()[-1].endswith(("INFO now at 001 (head)", "INFO at 001 (head): nothing to do"))
        assert set(TABLE) <= {name for (name,) in execute(database, query)}
        assert "hcm-db-migration-1" not in health.jobs()
        capfd.readouterr()
        make_install(cluster)
        output = capfd.readouterr().out
        assert "INFO at 001 (head): nothing to do" in output
        assert 'Table "public.hcm_report_metadata"' in output
    finally:
        release.run("uninstall", NAME)
        if was_empty:
            execute(database, "DROP TABLE IF EXISTS hcm_report_metadata, alembic_version")
