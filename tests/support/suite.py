"""A plugin: options, cleanup of each test's programs, serialization of disruptive tests, and no skips in CI."""

import fcntl
import os
from collections.abc import Generator, Iterator

import pytest

from tests.support.programs import observed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres-url",
        help="URL of an external PostgreSQL, as superuser (default: an embedded one for each worker)",
    )
    parser.addoption("--rounds", type=int, default=20, help="rounds of ten runs with random kills (default: 20)")
    parser.addoption("--seed", help="repeat the random faults of an earlier run (default: random)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "disruptive: disturbs other tests; runs last and alone")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("disruptive") is not None)


@pytest.fixture(autouse=True)
def _kill_remaining_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kill the programs that the test left running, and search all output for secrets."""
    yield
    request.node.stash[OUTPUT] = observed.finish()


OUTPUT = pytest.StashKey[tuple[list[str], set[int]]]()


@pytest.fixture(autouse=True)
def _serialize_disruptive_tests(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """A disruptive test waits until the other workers are between tests, and they wait for it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base
    with (shared / "disruptive.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if request.node.get_closest_marker("disruptive") else fcntl.LOCK_SH)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true, fail a test that would be skipped, so that a missing tool does not hide problems."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} may not be skipped with CI=true: {report.longrepr}"
    return report
