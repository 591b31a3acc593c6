"""A release of the last released chart is upgraded to this one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.database import Database
from tests.support.kubernetes import JOB, Api
from tests.support.release import Release
from tests.support.released import chart_version, released_chart
from tests.support.repository import Repository
from tools.cluster import NAME
from tools.paths import CHART


@pytest.mark.parametrize("version", [3, 4])
def test_the_last_released_chart_is_upgraded_with_its_values_reused_and_with_a_file(
    releases: Callable[..., Release],
    api: Api,
    repository: Repository,
    database: Database,
    tmp_path: Path,
    version: int,
) -> None:
    """With --reuse-values, the older chart's defaults replace this one's."""
    released = released_chart(tmp_path)
    release = releases(api, version, chart=released)

    def deployed(number: int, chart: Path) -> str:
        """What Helm stored of the release's revision, without its number; the run was at the newest revision."""
        assert (database.at, release.status(), api.jobs()) == ([f"{number:03}"], "deployed", [])
        assert api.release_config_map().metadata.labels["helm.sh/chart"] == f"{NAME}-{chart_version(chart)}"
        return release.run("get", "hooks", NAME).text.replace(f"{JOB}-{number}", JOB)

    install = release.upgrade()
    assert install.returncode == 0, install.text
    deployed(1, released)
    repository.revision("002", "ALTER TABLE hcm_report_metadata ADD COLUMN status VARCHAR(50)")
    repository.push()
    reused = release.run("upgrade", NAME, CHART, "--reuse-values")
    assert reused.returncode == 0, reused.text
    hooks = deployed(2, CHART)
    repository.revision("003", "CREATE TABLE added ()")
    repository.push()
    release.chart = CHART
    upgrade = release.upgrade()
    assert upgrade.returncode == 0, upgrade.text
    assert deployed(3, CHART) == hooks != ""
