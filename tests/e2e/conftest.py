"""The cluster's PostgreSQL is the server of these tests."""

import pytest
from sqlalchemy import URL, make_url

from tools.cluster import Cluster


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("tests.support.on_cluster")


@pytest.fixture(scope="session")
def server(cluster: Cluster) -> URL:
    """The superuser's URL of the server in the cluster."""
    return make_url(cluster.postgres_url())
