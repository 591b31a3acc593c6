"""docs/failures.md says what the marked tests prove, and nothing else."""

import sys
from pathlib import Path

import pytest

from tests.support.programs import Result, run
from tools.paths import ROOT

MARK = '@pytest.mark.fault("Network", fault="a fire", sees={sees!r}, state="ashes", do="water")\n'
PRINTS = "    run(['sh', '-c', 'echo {text}; exit {code}'])\n"


def test_what_is_generated_is_what_is_committed() -> None:
    run([sys.executable, "-m", "tools.docs", "--check"], cwd=ROOT, check=True)


def pytest_on(path: Path, text: str, *options: str) -> Result:
    path = path / "test_x.py"
    path.write_text(f"import pytest\nfrom tests.support.programs import run\n\n{text}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", f"--rootdir={ROOT}", *options]
    return run([*command, "-c", ROOT / "pyproject.toml", path], cwd=ROOT)


def test_a_row_that_lacks_a_cell_is_refused(tmp_path: Path) -> None:
    refused = pytest_on(tmp_path, '@pytest.mark.fault("Network", fault="a fire")\ndef test_it(): pass\n', "--co")
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    message = "test_it: mark it as fault(group, fault=, sees=, state=, do=) with one of these groups: Database, "
    assert message in refused.text


@pytest.mark.parametrize(
    ("sees", "missing"),
    [
        ("`FAILED: no ...; after N s`, exit 7", ""),
        ("`<a file> is missing`", ""),
        ("`FAILED: no fire`", "FAILED: no fire"),
        ("`FAILED: no ...`, exit 8", "exit 8"),
        ("`FAILED: no ...`, exit 7 (8)", "exit 8"),
    ],
)
def test_what_a_row_says_is_seen_must_be_printed_by_its_test(tmp_path: Path, sees: str, missing: str) -> None:
    printed = PRINTS.format(text='"FAILED: no water; after 3.2 s; x.py is missing"', code=7)
    result = pytest_on(tmp_path, f"{MARK.format(sees=sees)}def test_it():\n{printed}")
    assert result.returncode == (pytest.ExitCode.TESTS_FAILED if missing else pytest.ExitCode.OK), result.text
    assert not missing or f"the mark fault says that this is seen: ['{missing}']" in result.text


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(("sees", "passes"), [("`one` or `two`", True), ("`one`, `two` or `three`", False)])
def test_of_a_test_with_parameters_each_text_is_printed_by_one(
    tmp_path: Path, sees: str, passes: bool, workers: str
) -> None:
    body = "def test_it(word):\n    run(['echo', word])\n"
    parameters = "@pytest.mark.parametrize('word', ['one', 'two'])\n"
    result = pytest_on(tmp_path, MARK.format(sees=sees) + parameters + body, "-n", workers)
    assert result.returncode == (pytest.ExitCode.OK if passes else pytest.ExitCode.TESTS_FAILED), result.text
    assert passes or "test_it: the mark fault says what no parameter sees: {'three'}" in result.text
