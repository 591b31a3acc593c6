"""A missing prerequisite is reported in one line, with the fix."""

import os
import shutil
import ssl
import sys
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.git import clone_checkout, git, nested_checkout
from tests.support.programs import Result, run
from tests.support.project import copy_parts
from tests.support.servers import certificate, serving
from tools import checkout, fixtures
from tools.cluster import PUBLIC_IMAGES, Cluster, ClusterKind, Passwords, Ports
from tools.network import SETTINGS
from tools.paths import BIN, ROOT
from tools.steps import UnavailableError

CLUSTER = (ClusterKind.DOCKER, "", "192.0.2.1", Ports(postgres=1, http=2), PUBLIC_IMAGES)
MAKE = shutil.which("make") or "make"
PASSWORDS = Passwords(ADMIN_PASSWORD="", USER_PASSWORD="", TOKEN="")


def _make_venv(folder: Path, path: Path, python: str) -> Result:
    for name in ("Makefile", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder)
    command = [MAKE, "--silent", "venv", f"PYTHON={python}"]
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
        " mirror of PyPI, PIP_INDEX_URL; for its CA, PIP_CERT (docs/machines.md)",
    ]


@pytest.mark.parametrize("target", ["demo", "impact", "docs"])
def test_without_git_each_command_says_so(tmp_path: Path, target: str) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").symlink_to(BIN.parent)
    (tmp_path / "sh").symlink_to("/bin/sh")
    result = run([MAKE, "--old-file=.venv/ready", target], cwd=tmp_path, env={"PATH": str(tmp_path)})
    assert (result.returncode, result.lines[0]) == (2, "git is missing: install it (Debian: apt-get install git)")


def test_a_virtual_environment_that_was_moved_is_set_up_again(tmp_path: Path) -> None:
    """Its programs start with the path of its interpreter. A link to one does not move it."""
    python = tmp_path / "python"
    venv = "mkdir -p .venv/bin; ln -s /bin/true .venv/bin/pip"
    python.write_text(f'#!/bin/sh\ncase "$*" in *"venv .venv") {venv};; esac\n')
    python.chmod(0o755)

    def make(folder: str) -> str:
        result = run([MAKE, "venv", f"PYTHON={python}"], cwd=tmp_path / folder, env={"PATH": os.environ["PATH"]})
        assert result.returncode == 0, result.text
        return result.stdout

    for folder in ("before", "linked"):
        (tmp_path / folder).mkdir()
        copy_parts(tmp_path / folder, "Makefile", "requirements-dev.txt")
    assert "setting up .venv" in make("before")
    (tmp_path / "linked/.venv").symlink_to(tmp_path / "before/.venv")
    assert "setting up" not in make("before") + make("linked")
    (tmp_path / "before").rename(tmp_path / "after it")
    assert "setting up .venv" in make("after it")
    assert "setting up" not in make("after it")


@pytest.fixture
def index(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment with pip's settings, and only those, for an index with a private CA and without packages."""
    ca = certificate(
        tmp_path / "index.crt", "index", "subjectAltName=IP:127.0.0.1", "basicConstraints=critical,CA:FALSE"
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=os.devnull))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(ca, ca.with_suffix(".key"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    others = {name: value for name, value in os.environ.items() if not name.startswith(("SSL_CERT_", "UV_", "PIP_"))}
    with serving(server):
        url = f"https://127.0.0.1:{server.server_port}/"
        yield others | {
            "PATH": "/usr/bin:/bin",
            "PIP_INDEX_URL": url,
            "PIP_CERT": str(ca),
            "XDG_CACHE_HOME": str(tmp_path),
        }


LOCK = ["make", "--old-file=.venv/ready", "lock"]
BUNDLE = [sys.executable, "-c", "from tools import bundle; bundle._wheels('3.11', 'x86_64')"]


@pytest.mark.parametrize("command", [LOCK, BUNDLE], ids=["lock", "bundle"])
def test_uv_uses_the_index_and_the_ca_that_are_set_for_pip(
    tmp_path: Path, index: dict[str, str], command: list[str]
) -> None:
    copy_parts(tmp_path, "Makefile", "requirements.in", "requirements.txt")
    (tmp_path / ".venv").symlink_to(BIN.parent)
    result = run(command, cwd=tmp_path, env={**index, "PYTHONPATH": str(ROOT)})
    assert result.returncode != 0
    assert "alembic was not found in the package registry" in result.text


def test_a_certificate_that_is_not_trusted_is_named_with_the_settings(index: dict[str, str]) -> None:
    del index["PIP_CERT"]
    result = run(BUNDLE, cwd=ROOT, env=index)
    failed = "RuntimeError: no wheels of requirements.txt for Python 3.11 on x86_64: Failed to fetch: "
    line = result.lines[-1]
    assert line.startswith(f"{failed}{index['PIP_INDEX_URL']}")
    assert line.endswith(f" invalid peer certificate: UnknownIssuer ({SETTINGS})")
    page, section = SETTINGS.split(", ", 1)
    assert f"## {section.strip(chr(34))}\n" in (ROOT / page).read_text()


def test_an_unpacked_archive_is_named_by_what_needs_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_parts(tmp_path, "tools", "charts")
    reason = "not a git repository (or any of the parent directories): .git"
    line = f"{tmp_path} has no commit HEAD ({reason}): this needs a clone that you own, not an unpacked archive"
    for command, failed in (("demo", "\nthe demo failed"), ("docs", "FAILED"), ("bundle", "FAILED")):
        result = run([sys.executable, "-m", f"tools.{command}"], cwd=tmp_path, env=os.environ)
        assert (result.returncode, result.stderr) == (1, f"{failed}: {line}\n")
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    with pytest.raises(UnavailableError) as caught:
        fixtures.push_checkout(Cluster(*CLUSTER, PASSWORDS))
    assert str(caught.value) == line
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message=test")
    monkeypatch.setattr(checkout, "ROOT", tmp_path / "charts")
    with pytest.raises(UnavailableError) as caught:
        fixtures.push_checkout(Cluster(*CLUSTER, PASSWORDS))
    assert str(caught.value) == f"{tmp_path}/charts is not in the last commit of {tmp_path}: git add and commit it"


@pytest.mark.parametrize("nested", [False, True], ids=["shallow clone", "folder of a repository"])
def test_a_checkout_is_pushed_to_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    clone, remote = tmp_path / "clone", tmp_path / "remote"
    clone = nested_checkout(clone) if nested else clone_checkout(clone, "--depth=1")
    git(tmp_path, "init", "--quiet", "--bare", str(remote))
    git(remote, "config", "receive.shallowUpdate", "true")  # as tools/fixtures/server.py
    monkeypatch.setattr(checkout, "ROOT", clone)
    monkeypatch.setattr(Cluster, "git_url", str(tmp_path))
    fixtures.push_checkout(Cluster(*CLUSTER, PASSWORDS), "remote")
    is_head = git(remote, "rev-parse", "main") == git(clone, "rev-parse", "HEAD")
    assert is_head == (clone == tmp_path / "clone")
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
