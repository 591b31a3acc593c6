"""A plugin: the mark `fault` defines a row of docs/failures.md; its `sees` is checked against what the test prints.

In `sees`, back-quoted text is output: `...` matches any text within a line, `N` a number, `<a name>` what it names.
`exit N` is an exit code. The test must observe every text and code; of a parametrized test, each variant must observe
at least one, and each must be observed by a variant.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Generator

import pytest

from tests.support.suite import OUTPUT
from tools.docs import GROUPS

KEYS = {"fault", "sees", "state", "do"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "fault(group, *, fault, sees, state, do): a row of docs/failures.md that this test verifies"
    )
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Coverage())


def function_id(item_id: str) -> str:
    return item_id.partition("[")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    variants = Counter(function_id(item.nodeid) for item in items)
    for item in items:
        for mark in item.iter_markers("fault"):
            if len(mark.args) != 1 or mark.args[0] not in GROUPS or set(mark.kwargs) != KEYS:
                usage = "mark it as fault(group, fault=, sees=, state=, do=) with one of these groups"
                raise pytest.UsageError(f"{item.nodeid}: {usage}: {', '.join(GROUPS)}")
            item.user_properties.append(("variants", variants[function_id(item.nodeid)]))


def claims(sees: str) -> list[str]:
    """The claims of `sees`: the back-quoted texts, and exit codes as `exit N`."""
    prose = re.sub(r"`[^`]*`", "", sees)
    codes = re.findall(r"\bexit (\d+)(?: \((\d+)\))?", prose)
    return [*re.findall(r"`([^`]*)`", sees), *(f"exit {code}" for pair in codes for code in pair if code)]


def pattern(claim: str) -> re.Pattern[str]:
    """`claim` as a pattern for output."""
    parts = re.split(r"( ?\.\.\.|<[^<>]+>|\bN\b)", claim)
    return re.compile("".join(_part_pattern(part) for part in parts))


def _part_pattern(part: str) -> str:
    if part == "N":
        return r"\d+(?:\.\d+)?"
    return ".*" if part.endswith("...") or part.startswith("<") else re.escape(part)


def is_seen(claim: str, texts: list[str], codes: set[int]) -> bool:
    if code := re.fullmatch(r"exit (\d+)", claim):
        return bool({int(code[1]), 128 - int(code[1])} & codes)  # subprocess has -9 for a shell's 137
    found = pattern(claim)
    return any(found.search(text) for text in texts)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Runs after the teardown of the fixtures, which may still print."""
    yield
    marks = list(item.iter_markers("fault"))
    if OUTPUT not in item.stash or not marks or not item.stash.get(PASSED, False):
        return
    texts, codes = item.stash[OUTPUT]
    for mark in marks:
        claimed = claims(mark.kwargs["sees"])
        seen = [claim for claim in claimed if is_seen(claim, texts, codes)]
        missing = [claim for claim in claimed if claim not in seen]
        parametrized = dict(item.user_properties)["variants"] != 1
        if missing and not (parametrized and seen):
            listed = "\n".join(texts)
            pytest.fail(f"the fault mark claims {missing}, which is not printed; exit codes {codes}:\n{listed}", False)
        item.user_properties.append(("claimed", claimed))
        item.user_properties.append(("seen", seen))


PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call":
        item.stash[PASSED] = report.passed
    return report


class Coverage:
    """Checks that each claim of a parametrized test was observed by a variant, once all variants have passed."""

    def __init__(self) -> None:
        self.claimed: dict[str, set[str]] = defaultdict(set)
        self.seen: dict[str, set[str]] = defaultdict(set)
        self.passed: Counter[str] = Counter()
        self.variants: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = report.user_properties
        if report.when != "teardown" or not report.passed or "claimed" not in dict(properties):
            return
        name = function_id(report.nodeid)
        self.passed[name] += 1
        for key, value in properties:
            if key == "variants":
                self.variants[name] = int(str(value))
            elif key in ("claimed", "seen"):
                getattr(self, key)[name].update(value)

    def unseen(self) -> dict[str, set[str]]:
        complete = [name for name, count in self.passed.items() if count == self.variants[name]]
        return {name: missing for name in complete if (missing := self.claimed[name] - self.seen[name])}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unseen() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, missing in self.unseen().items():
            terminalreporter.write_line(f"FAILED {name}: the fault mark claims what no variant prints: {missing}")
