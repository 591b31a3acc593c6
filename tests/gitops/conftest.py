"""As in tests/e2e, the cluster's PostgreSQL is the server; Argo CD and Flux are installed for these tests."""

from pathlib import Path

import pytest
from sqlalchemy import URL, make_url

from tests.support.cluster import NEEDS_GITOPS
from tests.support.gitops import BRANCH, FOLDER
from tests.support.kubernetes import Api
from tests.support.repository import Repository
from tools.cluster import Cluster


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NEEDS_GITOPS] = True
    config.pluginmanager.import_plugin("tests.support.on_cluster")
    config.pluginmanager.import_plugin("tests.support.gitops")


@pytest.fixture(scope="session")
def server(cluster: Cluster) -> URL:
    """The superuser's URL of the server in the cluster."""
    return make_url(cluster.postgres_url())


@pytest.fixture
def repository(cluster: Cluster, api: Api, tmp_path: Path) -> Repository:
    """A repository with upstream's layout, which contains the chart as well."""
    more = "charts", "environments"
    return Repository.create(tmp_path / "repository", cluster, api.namespace, FOLDER, BRANCH, more)
