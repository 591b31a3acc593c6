"""`make demo` does what the README says, and leaves nothing behind, even if it is interrupted."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import revisions
from tests.support.documents import block
from tests.support.git import clone_checkout, git, nested_checkout
from tests.support.programs import Program, start
from tests.support.project import keep_first_revision
from tools.network import SETTINGS
from tools.paths import BIN, ROOT


@pytest.fixture
def folder() -> Iterator[Path]:
    """A path that is short enough for a Unix socket and, like /tmp, readable for PostgreSQL's user."""
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def _demo(folder: Path, command: list[str], cwd: Path, **environment: str) -> Program:
    return start(command, cwd=cwd, env={**environment, "TMPDIR": str(folder)}, one_stream=True)


@pytest.mark.parametrize("nested", [False, True], ids=["shallow clone", "folder of a repository"])
def test_the_demo_upgrades_and_downgrades(folder: Path, tmp_path: Path, nested: bool) -> None:
    """In a folder with a name that shells and locales may not expect, with another revision, and without HOME."""
    clone = tmp_path / "für die demo"
    clone = nested_checkout(clone) if nested else clone_checkout(clone, "--depth=1")
    (clone / ".venv").symlink_to(BIN.parent)
    for name in ("Makefile", "requirements-dev.txt"):
        shutil.copy2(ROOT / name, clone)  # with its mtime, or .venv would be out of date
    for name in ("charts", "tools"):
        shutil.copytree(ROOT / name, clone / name, dirs_exist_ok=True)
    keep_first_revision(clone)
    revisions.write(clone / "migrations/versions", "002", "pass", "pass", down="001", name="add_status_column")
    git(clone, "add", "--all", "migrations")
    git(clone, "commit", "--quiet", "--message=another revision")
    result = _demo(folder, block("make demo").split(), clone, PATH=os.environ["PATH"]).wait()
    assert result.returncode == 0, result.text
    states = re.findall(r"INFO (?:at|now at) (.*)", result.text)
    assert states == [
        "base (the head is 002); to do: 2 (001 create_hcm_report_metadata, 002 add_status_column)",
        "002 (head)",
        "002 (head): nothing to do",
        "002 (the head is 003); to do: 1 (003 add_demo_column)",
        "003 (head)",
        "003 (head); to do: 1 (003 add_demo_column)",
        "002 (the head is 003)",
    ]
    assert re.findall(r'"(idx_\w+)" btree', result.text) == [
        "idx_hcm_report_campaign",
        "idx_hcm_report_campaign_report_freq",
        "idx_hcm_report_frequency",
        "idx_hcm_report_name",
        "idx_hcm_report_trigger_date",
    ]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "styled"),
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, False)],
    ids=["terminal", "dumb", "NO_COLOR"],
)
def test_the_demo_is_styled_on_a_terminal_that_can(variables: dict[str, str], styled: bool) -> None:
    terminal, program = os.openpty()
    command = [sys.executable, "-c", "from tools import demo; demo.tell('A sentence.'); demo.show_command('ls')"]
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    subprocess.run(command, cwd=ROOT, env=environment | variables, stdout=program, check=True)
    os.close(program)
    lines = os.read(terminal, 1000).decode().splitlines()
    assert lines == (
        ["", "\033[1m▶ A sentence.\033[0m", "\033[32m$ ls\033[0m"] if styled else ["", "▶ A sentence.", "$ ls"]
    )


def test_without_the_index_the_last_line_names_the_settings_of_this_machine(folder: Path) -> None:
    pip = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_NO_INDEX": "", "PIP_FIND_LINKS": "", "PIP_RETRIES": "1"}
    result = _demo(folder, [sys.executable, "-m", "tools.demo"], ROOT, **os.environ | pip).wait()
    assert (result.returncode, list(folder.iterdir())) == (1, [])
    result.line("FAILED: pip could not install requirements.txt", 'set "extraEnv"')
    assert result.lines[-1].startswith("the demo failed: ")
    assert result.lines[-1].endswith(f"; for pip's settings on this machine, see {SETTINGS}")


def test_an_interrupted_demo_leaves_nothing_behind(folder: Path) -> None:
    demo = _demo(
        folder, [sys.executable, "-m", "tools.demo"], ROOT, **os.environ
    )  # Ctrl-C is for all of make's processes
    demo.prints("$ migrate.sh")
    assert list(folder.iterdir()) != []
    result = demo.stop(signal.SIGINT)
    assert result.text.endswith("interrupted; everything that was started is stopped\n")
    assert list(folder.iterdir()) == []
