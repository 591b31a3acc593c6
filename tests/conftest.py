"""What every test shares: the options, and the rule that nothing is skipped in continuous integration."""

import os
from collections.abc import Generator

import pytest

from tools.docs import GROUPS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres-url",
        help="an external PostgreSQL to test on, as a superuser (default: an embedded one, for each worker)",
    )
    parser.addoption("--rounds", type=int, default=20, help="how often ten runs at once are killed at random")
    parser.addoption("--seed", help="the random faults of an earlier run again (default: others each time)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "fault(group, *, fault, sees, state, do): a row of docs/failures.md, which this test proves"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("fault"):
            if (
                len(mark.args) != 1
                or mark.args[0] not in GROUPS
                or set(mark.kwargs) != {"fault", "sees", "state", "do"}
            ):
                raise pytest.UsageError(
                    f"{item.nodeid}: mark it as fault(group, fault=, sees=, state=, do=) with one of these groups:"
                    f" {', '.join(GROUPS)}"
                )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true a test that would be skipped fails: a missing tool must not hide what it would have found."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} may not be skipped with CI=true: {report.longrepr}"
    return report
