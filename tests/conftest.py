"""What every test shares: the options, the search for secrets, and the rule that nothing is skipped in CI."""

import fcntl
import os
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tools.docs import GROUPS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres-url",
        help="an external PostgreSQL to test on, as a superuser (default: an embedded one, for each worker)",
    )
    parser.addoption("--rounds", type=int, default=20, help="how often ten runs at once are killed at random")
    parser.addoption("--seed", help="the random faults of an earlier run again (default: others each time)")


# In every role's password: nothing that a run prints may contain it, and no process list. tests/e2e adds its token.
CANARY = "c4n4ry"
SECRETS = {CANARY}


@pytest.fixture(scope="session")
def secrets_in_process_lists() -> Iterator[set[str]]:
    """The command lines that had a secret, of all processes of this machine, those in pods among them."""
    found: set[str] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.25):
            secrets = [secret.encode() for secret in list(SECRETS)]
            for process in Path("/proc").iterdir():
                with suppress(OSError):  # it has ended, or is no process
                    line = (process / "cmdline").read_bytes()
                    if any(secret in line for secret in secrets):
                        found.add(line.replace(b"\0", b" ").decode(errors="replace"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield found
    stop.set()
    thread.join()


@pytest.fixture(autouse=True)
def _no_secret_in_a_process_list(secrets_in_process_lists: set[str]) -> Iterator[None]:
    yield
    found = set(secrets_in_process_lists)
    secrets_in_process_lists.clear()
    assert found == set()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "fault(group, *, fault, sees, state, do): a row of docs/failures.md, which this test proves"
    )
    config.addinivalue_line("markers", "disruptive: disturbs the other tests; runs last, and alone")


@pytest.fixture(autouse=True)
def _turn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A disruptive test waits until the other workers are between two tests, and they for its end."""
    base = tmp_path_factory.getbasetemp()
    with (base.parent if hasattr(request.config, "workerinput") else base).joinpath("turn").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if request.node.get_closest_marker("disruptive") else fcntl.LOCK_SH)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("disruptive") is not None)
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
