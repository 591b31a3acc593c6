"""A missing prerequisite is reported in one line, with the fix."""

import os
import shutil
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.support.git import clone_checkout, git, nested_checkout
from tests.support.programs import Result, run
from tests.support.project import copy_parts
from tools import checkout, fixtures
from tools.cluster import PUBLIC_IMAGES, Cluster, ClusterKind, Passwords, Ports
from tools.paths import ROOT
from tools.steps import UnavailableError

CLUSTER = (ClusterKind.DOCKER, "", "192.0.2.1", Ports(postgres=1, http=2), PUBLIC_IMAGES)
PASSWORDS = Passwords(ADMIN_PASSWORD="", USER_PASSWORD="", TOKEN="")


def _make_venv(folder: Path, path: Path, python: str) -> Result:
    for name in ("Makefile", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder)
    command = [shutil.which("make") or "make", "--silent", "venv", f"PYTHON={python}"]
    result = run(command, cwd=folder, env={"PATH": str(path), "HOME": str(folder)})
    assert result.returncode != 0
    assert not (folder / ".venv/ready").exists()
    return result


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
    assert _make_venv(project, tools, "python3").stderr.splitlines()[0] == line
    assert not (project / ".venv").exists()


def test_what_pip_cannot_install_is_reported_with_the_settings_for_a_proxy_and_a_mirror(tmp_path: Path) -> None:
    """The next `make` starts again."""
    python = tmp_path / "python"
    pip = "mkdir -p .venv/bin; printf '#!/bin/sh\\necho pip: no route to host >&2; exit 1\\n' > .venv/bin/pip"
    python.write_text(f'#!/bin/sh\ncase "$*" in *"venv .venv") {pip}; chmod +x .venv/bin/pip;; esac\n')
    python.chmod(0o755)
    assert _make_venv(tmp_path, Path("/usr/bin:/bin"), str(python)).stderr.splitlines()[:2] == [
        "pip: no route to host",
        "pip could not install requirements-dev.txt, for the reason above: behind a proxy, set HTTPS_PROXY; for a"
        " mirror of PyPI, PIP_INDEX_URL; for its CA, PIP_CERT",
    ]


def test_an_unpacked_archive_is_named_by_what_needs_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_parts(tmp_path, "tools", "charts")
    demo = run([sys.executable, "-m", "tools.demo"], cwd=tmp_path)
    reason = "not a git repository (or any of the parent directories): .git"
    line = f"{tmp_path} has no commit HEAD ({reason}): this needs a clone that you own, not an unpacked archive"
    assert (demo.returncode, demo.stderr) == (1, f"\nthe demo failed: {line}\n")
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    with pytest.raises(UnavailableError) as caught:
        fixtures.push_checkout(Cluster(*CLUSTER, PASSWORDS))
    assert str(caught.value) == line


@pytest.mark.parametrize("nested", [False, True], ids=["shallow clone", "folder of a repository"])
def test_a_checkout_is_pushed_to_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    clone, remote = tmp_path / "clone", tmp_path / "remote"
    clone = nested_checkout(clone) if nested else clone_checkout(clone, "--depth=1")
    git(tmp_path, "init", "--quiet", "--bare", str(remote))
    git(remote, "config", "receive.shallowUpdate", "true")  # as tools/fixtures/server.py
    monkeypatch.setattr(checkout, "ROOT", clone)
    monkeypatch.setattr(Cluster, "git_url", str(tmp_path))
    fixtures.push_checkout(Cluster(*CLUSTER, PASSWORDS), "remote")
    assert (git(remote, "rev-parse", "main") == git(clone, "rev-parse", "HEAD")) is not nested
    for tree in ("main:", "airflow-analysis:utilities/hcm-db-migrations"):
        assert git(remote, "rev-parse", tree) == git(ROOT, "rev-parse", "HEAD:./")


def test_a_cache_that_is_not_writable_is_named_with_the_variable_for_another(tmp_path: Path) -> None:
    """A file in its place, because root may write to every folder."""
    home = tmp_path / "home"
    home.touch()
    result = run(
        [sys.executable, "-m", "tools.cluster", "up"], cwd=ROOT, env={"PATH": os.environ["PATH"], "HOME": str(home)}
    )
    assert (result.returncode, result.stderr) == (
        1,
        f"error: the cache {home}/.cache/hcm-db-migrations is not writable (Not a directory): set XDG_CACHE_HOME to a"
        " folder that is\n",
    )


def test_a_proxy_is_not_used_for_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "mirror.example.org"}.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.lower(), value)
    for _ in range(2):
        cluster = Cluster(*CLUSTER, PASSWORDS)
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == f"mirror.example.org,{cluster.address}"
    assert urllib.request.proxy_bypass(cluster.address)
    assert not urllib.request.proxy_bypass("pypi.org")
