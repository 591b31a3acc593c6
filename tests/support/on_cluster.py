"""A plugin of the folders whose tests need the cluster: it starts before them, and the report names it."""

from collections.abc import Generator
from typing import Any

import pytest

from tests.support.cluster import FILE, describe_cluster, start_cluster, wait_for_cluster


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    start_cluster(session)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist: pass the cluster to a worker."""
    node.workerinput["shared"] = str(node.config.stash[FILE])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test's timeout starts when the cluster runs."""
    if "cluster" in getattr(item, "fixturenames", ()):
        wait_for_cluster(item.config)
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if FILE in config.stash:
        terminalreporter.write_line(describe_cluster(config))
