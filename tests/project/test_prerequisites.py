"""A missing prerequisite is reported in one line, with the fix."""

import shutil
from pathlib import Path

import pytest

from tests.support.programs import run
from tools.paths import ROOT


def _make_venv(folder: Path, path: Path, python: str) -> str:
    for name in ("Makefile", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder)
    command = [shutil.which("make") or "make", "--silent", "venv", f"PYTHON={python}"]
    result = run(command, cwd=folder, env={"PATH": str(path), "HOME": str(folder)})
    assert result.returncode != 0
    assert not (folder / ".venv").exists()
    return result.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("git", "python", "line"),
    [
        ("", "python3", "git is missing: install it (Debian: apt-get install git)"),
        (
            "exit 0",
            "exit 127",
            "python3 is missing or older than 3.10: install Python 3.10 or newer, or set one: make PYTHON=python3.12",
        ),
        (
            "exit 0",
            'case "$2" in *venv*) exit 1;; esac',
            "python3 has no venv module: install it (Debian: apt-get install python3-venv)",
        ),
    ],
    ids=["git", "python", "venv"],
)
def test_a_missing_prerequisite_is_reported_with_the_fix(tmp_path: Path, git: str, python: str, line: str) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sh").symlink_to("/bin/sh")
    for name, body in (("git", git), ("python3", python)):
        if body:
            (tools / name).write_text(f"#!/bin/sh\n{body}\n")
            (tools / name).chmod(0o755)
    project = tmp_path / "project"
    project.mkdir()
    assert _make_venv(project, tools, "python3") == line
