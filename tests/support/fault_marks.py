"""A plugin: the mark `fault` defines a row of docs/troubleshooting.md; the test must print what its `sees` claims.

In `sees`, back-quoted text is output: `...` matches any text within a line, `N` a number, `<a name>` what it names.
`exit N` is the exit code of a program or container that printed one of the texts. The test must observe every text and
code; of a parametrized test, each variant must observe at least one, and each must be observed by a variant.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Generator

import pytest

from tests.support.programs import Output
from tests.support.suite import OUTPUT
from tools.docs import GROUPS

KEYS = {"fault", "sees", "state", "do"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "fault(group, *, fault, sees, state, do): a row of docs/troubleshooting.md that this test verifies"
    )
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Coverage())


def function_id(item_id: str) -> str:
    return item_id.partition("[")[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    variants = Counter(function_id(item.nodeid) for item in items)
    complete = not any("[" in argument for argument in config.args)
    for item in items:
        for mark in item.iter_markers("fault"):
            if len(mark.args) != 1 or mark.args[0] not in GROUPS or set(mark.kwargs) != KEYS:
                usage = "mark it as fault(group, fault=, sees=, state=, do=) with one of these groups"
                raise pytest.UsageError(f"{item.nodeid}: {usage}: {', '.join(GROUPS)}")
            if not_a_claim := malformed(mark.kwargs["sees"]):
                raise pytest.UsageError(f"{item.nodeid}: write exit codes as 'exit N' or 'exit N (M)': {not_a_claim}")
            item.user_properties.append(("variants", variants[function_id(item.nodeid)] if complete else 0))


EXIT = re.compile(r"\bexit (\d+)(?: \((\d+)\))?(?![\d/])")


def prose(sees: str) -> str:
    return re.sub(r"`[^`]*`", "", sees)


def malformed(sees: str) -> str:
    """What looks like a claim of an exit code and is none, or a text that any output has; or ''."""
    found = re.search(r"\bexit.{0,12}", EXIT.sub("", prose(sees)))
    empty = [text for text in texts_of(sees) if not re.search(r"\w", re.sub(r"<[^<>]+>|\bN\b", "", text))]
    return found[0] if found else "".join(empty)


def texts_of(sees: str) -> list[str]:
    return re.findall(r"`([^`]*)`", sees)


def codes_of(sees: str) -> list[int]:
    return [int(code) for pair in EXIT.findall(prose(sees)) for code in pair if code]


def pattern(text: str) -> re.Pattern[str]:
    """A text of `sees` as a pattern for output."""
    text = re.sub(r"^\.\.\. ?| ?\.\.\.$", "", text)
    return re.compile("".join(_part_pattern(part) for part in re.split(r"( ?\.\.\.|<[^<>]+>|\bN\b)", text)))


def _part_pattern(part: str) -> str:
    if part == "N":
        return r"\d+(?:\.\d+)?"
    return ".*" if part.endswith("...") or part.startswith("<") else re.escape(part)


def claims_of(sees: str) -> list[str]:
    """The texts, and the exit codes as `exit N`."""
    return [*texts_of(sees), *(f"exit {code}" for code in codes_of(sees))]


def seen_in(sees: str, outputs: list[Output]) -> list[str]:
    """The claims of `sees` that hold for the outputs."""
    patterns = {text: pattern(text) for text in texts_of(sees)}
    printed = {text: [output for output in outputs if found.search(output.text)] for text, found in patterns.items()}
    codes = {output.code for found in (printed.values() if printed else [outputs]) for output in found}
    if any(output.code == -9 for output in outputs):  # of a shell 137; a killed program prints nothing more
        codes.add(137)
    seen = {text for text, found in printed.items() if found} | {f"exit {code}" for code in codes}
    return [claim for claim in claims_of(sees) if claim in seen]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Runs after the teardown of the fixtures, which may still print."""
    yield
    if not item.stash.get(PASSED, False):
        return
    for mark in item.iter_markers("fault"):
        outputs, claimed = item.stash[OUTPUT], claims_of(mark.kwargs["sees"])
        seen = seen_in(mark.kwargs["sees"], outputs)
        missing = [claim for claim in claimed if claim not in seen]
        if missing and not (hasattr(item, "callspec") and seen):
            listed = "\n".join(f"exit code {output.code}:\n{output.text}" for output in outputs if output.text)
            pytest.fail(f"the fault mark claims {missing}, which is not printed:\n{listed}", False)
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
