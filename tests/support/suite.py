"""A plugin: options, cleanup of each test's programs, serialization of disruptive tests, and no skips in CI."""

import fcntl
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.support.programs import Output, observed
from tools.network import bypass_proxy
from tools.steps import interrupt_on_signals


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres-url",
        help="URL of an external PostgreSQL, as superuser (default: an embedded one for each worker)",
    )
    parser.addoption("--rounds", type=int, default=10, help="rounds of ten runs with random kills (default: 10)")
    parser.addoption("--seed", help="repeat the random faults of an earlier run (default: random)")


def pytest_configure(config: pytest.Config) -> None:
    interrupt_on_signals()
    bypass_proxy("127.0.0.1", "localhost")
    config.addinivalue_line("markers", "disruptive: disturbs other tests on the cluster, or others without; runs alone")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the cluster wait most, so they run when it has started, which takes as long as those of tests/project;
    disruptive ones run beside tests that they do not disturb.
    """
    order = [("machine", True), ("cluster", False), ("cluster", True), ("machine", False)]
    project = Path(__file__).parents[1] / "project"
    items.sort(key=lambda item: (project not in item.path.parents, order.index((_needs(item), _is_disruptive(item)))))


def _is_disruptive(item: pytest.Item) -> bool:
    return item.get_closest_marker("disruptive") is not None


def _needs(item: pytest.Item) -> str:
    return "cluster" if "cluster" in getattr(item, "fixturenames", ()) else "machine"


OUTPUT = pytest.StashKey[list[Output]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Kill the programs that the test left running before its fixtures end what they use, and search all output for
    secrets after that.
    """
    observed.kill_programs()
    try:
        yield
    finally:
        item.stash[OUTPUT] = observed.finish()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """After an interrupt, no test has had its teardown."""
    observed.finish()


@pytest.fixture(autouse=True)
def _serialize_disruptive_tests(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """A disruptive test waits until no worker runs a test that needs what it disturbs, and they wait for it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base
    with (shared / f"{_needs(request.node)}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if _is_disruptive(request.node) else fcntl.LOCK_SH)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true, fail a test that would be skipped, so that a missing tool does not hide problems."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} may not be skipped with CI=true: {report.longrepr}"
    return report
