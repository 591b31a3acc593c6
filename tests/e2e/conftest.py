"""Starts the cluster before the first test; its PostgreSQL is the server of these tests."""

from dataclasses import asdict
from typing import Any

import pytest
from sqlalchemy import URL, make_url

from tests.support.cluster import SHARED, Shared, describe_cluster, start_cluster
from tools.cluster import Cluster


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    start_cluster(session)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist: pass the cluster to a worker."""
    node.workerinput["shared"] = asdict(node.config.stash.get(SHARED, Shared()))


def pytest_report_header(config: pytest.Config) -> str:
    return describe_cluster(config)


@pytest.fixture(scope="session")
def server(cluster: Cluster) -> URL:
    """The superuser's URL of the server in the cluster."""
    return make_url(cluster.postgres_url())
