"""The Job installs requirements.txt: hash-locked, wheels only, the same for every Python from 3.10 to 3.13."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.git import git
from tests.support.programs import run
from tools.paths import BIN, ROOT


def _names(file: str) -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+)==", (ROOT / file).read_text(), re.MULTILINE))


def test_the_locks_are_compiled_from_the_inputs(tmp_path: Path) -> None:
    inputs = git(ROOT, "ls-files", "*requirements*.in").splitlines()
    files = [*inputs, *(f"{name.removesuffix('in')}txt" for name in inputs)]
    for file in (*files, "Makefile"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, tmp_path / file)  # with its mtime, or .venv would be out of date
    (tmp_path / ".venv").symlink_to(BIN.parent)
    run(["make", "lock"], cwd=tmp_path, check=True, seconds=500)
    changed = [file for file in files if (tmp_path / file).read_text() != (ROOT / file).read_text()]
    assert not changed, "run `make lock` and commit"


def test_the_job_installs_only_what_it_needs() -> None:
    direct = re.findall(r"^([a-z0-9-]+)", (ROOT / "requirements.in").read_text(), re.MULTILINE)
    assert direct == ["alembic", "psycopg2-binary", "python-dotenv", "sqlalchemy"]
    transitive = {"greenlet", "mako", "markupsafe", "tomli", "typing-extensions"}
    assert _names("requirements.txt") == {*direct, *transitive}


def test_pip_installs_the_lock_from_wheels_with_every_hash_checked(tmp_path: Path) -> None:
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [BIN / "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    wheels = ["--require-hashes", "--only-binary", ":all:", "-r", ROOT / "requirements.txt"]
    run([*pip, *wheels], check=True, seconds=500)
    imports = "import alembic, dotenv, mako, psycopg2, sqlalchemy; print(sqlalchemy.__version__)"
    version = run([python, "-c", imports], check=True).stdout.strip()
    assert f"sqlalchemy=={version} " in (ROOT / "requirements.txt").read_text()


@pytest.mark.parametrize("platform", ["x86_64-manylinux_2_28", "aarch64-manylinux_2_28"])
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_python_and_processor_has_wheels(python: str, platform: str, tmp_path: Path) -> None:
    target = ["--target", tmp_path, "--python-version", python, "--python-platform", platform]
    uv = [BIN / "uv", "pip", "install", "--quiet", "--dry-run", "--require-hashes", "--only-binary", ":all:"]
    run([*uv, *target, "-r", ROOT / "requirements.txt"], check=True, seconds=500)
