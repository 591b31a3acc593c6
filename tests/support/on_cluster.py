"""A plugin of the folders whose tests need the cluster: it starts before the first test, and their reports name it."""

from dataclasses import asdict
from typing import Any

import pytest

from tests.support.cluster import SHARED, Shared, describe_cluster, start_cluster


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    start_cluster(session)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist: pass the cluster to a worker."""
    node.workerinput["shared"] = asdict(node.config.stash.get(SHARED, Shared()))


def pytest_report_header(config: pytest.Config) -> str:
    return describe_cluster(config)
