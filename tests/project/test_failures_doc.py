"""docs/failures.md says what the marked tests prove, and nothing else."""

import subprocess
import sys
from pathlib import Path

from tools.paths import ROOT


def test_what_is_generated_is_what_is_committed() -> None:
    check = [sys.executable, "-m", "tools.docs", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_row_that_lacks_a_cell_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test_x.py"
    path.write_text('import pytest\n\n@pytest.mark.fault("Network", fault="a fire")\ndef test_it(): pass\n')
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "tests.conftest", f"--rootdir={ROOT}"]
    done = subprocess.run([*command, "-c", ROOT / "pyproject.toml", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4, done.stdout
    assert "test_it: mark it as fault(group, fault=, sees=, state=, do=) with one of these groups: Database, " in (
        done.stdout + done.stderr
    )
