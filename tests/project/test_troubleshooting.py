"""docs/troubleshooting.md says what the marked tests prove, and nothing else."""

import re
import sys
from pathlib import Path

import pytest

from tests.support import fault_marks
from tests.support.programs import Result, run
from tools.paths import ROOT

MARK = '@pytest.mark.fault("Network", fault="a fire", sees={!r}, state="ashes", do="water")\n'
# Another program exits with 0, and one is killed after the test.
PRINTS = """def {name}():
    run(["sh", "-c", "echo 'FAILED: no water; after 3.2 s; x.py is missing'; exit 7"])
    run(["echo", "another"])
    start(["sleep", "60"])
"""
PARAMETRIZED = """@pytest.mark.parametrize("text", ["one", "two"])
def {name}(text):
    run(["echo", text])
"""


def pytest_on(folder: Path, tests: dict[str, tuple[str, str]], *options: str) -> Result:
    """Run pytest on a file with these tests: {name: (`sees`, test)}."""
    path = folder / "test_x.py"
    marked = [MARK.format(sees) + test.format(name=name) for name, (sees, test) in tests.items()]
    path.write_text("\n\n".join(["import pytest\nfrom tests.support.programs import run, start", *marked]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", f"--rootdir={ROOT}", *options]
    command.append(f"--basetemp={folder / 'nested'}")  # else it deletes at its end what many earlier runs left behind
    return run([*command, "-c", ROOT / "pyproject.toml", path], cwd=ROOT)


def test_the_generated_files_are_up_to_date() -> None:
    run([sys.executable, "-m", "tools.docs", "--check"], cwd=ROOT, check=True)


def test_a_row_without_all_cells_is_refused(tmp_path: Path) -> None:
    row = '@pytest.mark.fault("Network", fault="a fire")\ndef {name}(): pass\n'
    refused = pytest_on(tmp_path, {"test_row": ("nothing", row)}, "--collect-only")
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    message = "test_row: mark it as fault(group, fault=, sees=, state=, do=) with one of these groups: Database, "
    assert message in refused.text


@pytest.mark.parametrize("sees", ["`a`, exit 143/130", "exit code 1", "exits 1", "`...`", "`N`"])
def test_a_claim_that_would_not_be_checked_is_malformed(sees: str) -> None:
    assert fault_marks.malformed(sees)


@pytest.mark.parametrize("sees", ["`a ...`, exit 143 (130)", "No visible effect", "`a <b>`, exit 1; then `c`, exit 0."])
def test_a_claim_that_is_checked_is_not_malformed(sees: str) -> None:
    assert fault_marks.malformed(sees) == ""


def test_a_test_must_print_what_its_row_claims(tmp_path: Path) -> None:
    printed = ["`FAILED: no ...; after N s`, exit 7", "`<a file> is missing`"]
    missing = {
        "`FAILED: no fire`": "FAILED: no fire",
        "`FAILED: no ...`, exit 0": "exit 0",
        "`FAILED: no ...`, exit 137": "exit 137",
        "`FAILED: no ...`, exit 7 (8)": "exit 8",
    }
    tests = {f"test_{number}": (sees, PRINTS) for number, sees in enumerate([*printed, *missing])}
    result = pytest_on(tmp_path, tests)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    assert re.findall(r"^ERROR .*::(\w+)", result.text, re.M) == ["test_2", "test_3", "test_4", "test_5"]
    claims = re.findall(r"^the fault mark claims \['(.*)'\], which is not printed:", result.text, re.M)
    assert claims == list(missing.values())


def test_each_claim_of_a_parametrized_test_must_be_printed_by_a_variant(tmp_path: Path) -> None:
    """On workers, as in `make test`."""
    tests = {"test_all": ("`one` or `two`", PARAMETRIZED), "test_some": ("`one`, `two` or `three`", PARAMETRIZED)}
    result = pytest_on(tmp_path, tests, "-n", "2")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    assert [line.partition("::")[2] for line in result.lines if line.startswith("FAILED ")] == [
        "test_some: the fault mark claims what no variant prints: {'three'}"
    ]
    assert "4 passed" in result.text
