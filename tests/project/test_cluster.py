"""Which cluster the tests use, logged with the reason, and who deletes it. These tests create none."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.cluster import requires_docker
from tests.support.documents import block
from tests.support.programs import run
from tools import cluster
from tools.binaries import pinned_version
from tools.cluster import Cluster, ClusterKind
from tools.offline_cluster import engine, images
from tools.paths import CHART, ROOT
from tools.steps import UnavailableError

BUILT_LOCALLY = block("node image built locally").replace("docker is not on PATH", "{}")
CANNOT_PULL = "the container engine cannot pull kindest/node:v1.37.0"
UNREACHABLE = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock."
NO_ROUTE = "dial tcp 192.0.2.1:443: connect: no route to host"
NO_DAEMON = f"echo '{UNREACHABLE}' >&2; exit 1"
NO_REGISTRY = f"[ $1 = version ] || {{ echo '{NO_ROUTE}' >&2; exit 1; }}"
# A docker that is missing, that reaches no daemon, and whose daemon reaches no registry; and the reason that is logged.
UNUSABLE = [
    pytest.param(None, "docker is not on PATH", id="no docker"),
    pytest.param(NO_DAEMON, f"no container engine is running ({UNREACHABLE})", id="no daemon"),
    pytest.param(NO_REGISTRY, f"{CANNOT_PULL} ({NO_ROUTE})", id="no registry"),
    pytest.param('[ "$1" = version ]', CANNOT_PULL, id="no registry, no message"),
]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dedicated PATH; the private container engine is neither started nor rejected."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("KUBECONFIG", "/somebody/elses")
    monkeypatch.setattr(engine, "check", lambda: None)
    monkeypatch.setattr(engine, "start", lambda: None)
    monkeypatch.setattr(engine, "environment", dict)
    monkeypatch.setattr(engine, "address", lambda: "10.0.0.1")
    return folder


def docker(folder: Path, script: str) -> None:
    (folder / "docker").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "docker").chmod(0o755)


def test_a_users_docker_is_used_if_it_can_pull(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    docker(path, "exit 0")
    provider = cluster._select_provider()
    assert (provider.kind, provider.images) == (ClusterKind.DOCKER, cluster.PUBLIC_IMAGES)
    assert provider.address == "127.0.0.1"
    assert "KUBECONFIG" not in provider.environment
    assert capfd.readouterr().err == (
        "cluster: kind with its official node image, because the container engine on this machine can pull it\n"
    )


def test_the_public_images_are_the_charts_defaults() -> None:
    values = json.loads((CHART / "files/defaults.json").read_text())
    defaults = [f"{image['repository']}:{image['tag']}" for image in (values["image"], values["git"]["image"])]
    assert defaults == [cluster.PUBLIC_IMAGES[name] for name in ("python", "git_sync")]


@pytest.mark.parametrize(("script", "reason"), UNUSABLE)
def test_falls_back_to_a_local_build(
    path: Path, capfd: pytest.CaptureFixture[str], script: str | None, reason: str
) -> None:
    if script:
        docker(path, script)
    provider = cluster._select_provider()
    assert (provider.kind, provider.images) == (ClusterKind.LOCAL_BUILD, cluster.LOCAL_IMAGES)
    assert provider.address == "10.0.0.1"
    assert capfd.readouterr().err == BUILT_LOCALLY.format(reason)


@pytest.mark.parametrize(("script", "reason"), UNUSABLE)
def test_where_docker_is_required_nothing_is_built_locally(path: Path, script: str | None, reason: str) -> None:
    if script:
        docker(path, script)
    with pytest.raises(UnavailableError) as caught:
        cluster._select_provider(only_docker=True)
    assert str(caught.value) == (
        f"cannot create a cluster: {reason}, and no other engine is allowed. Start Docker with access to its registry,"
        " or omit --cluster-type docker"
    )


def test_if_no_cluster_is_possible_the_message_has_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UnavailableError) as caught:
        cluster._select_provider()
    assert re.fullmatch(
        "cannot create a cluster: docker is not on PATH, and a private container engine requires root, .*apt-get with"
        " Debian's keyring. Start Docker with access to its registry, or use an existing cluster: pytest"
        " --cluster-type existing --kubeconfig FILE",
        str(caught.value),
    )


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A running cluster; the recorded deletions."""
    deletions: list[str] = []
    monkeypatch.setattr(cluster, "STATE", tmp_path)
    monkeypatch.setattr(cluster.Cluster, "kubectl", lambda *_, **__: "ok")
    monkeypatch.setattr(cluster, "_delete", lambda: deletions.append("deleted"))
    monkeypatch.setattr(cluster, "locked", contextlib.nullcontext)  # the lock is held while the tests' cluster starts
    return deletions


PORTS = cluster.Ports(postgres=1, http=2)
PASSWORDS = cluster.Passwords(ADMIN_PASSWORD="", USER_PASSWORD="", TOKEN="")


def save_state(owner: int) -> None:
    cluster._save_state(Cluster(ClusterKind.DOCKER, "", "", PORTS, cluster.PUBLIC_IMAGES, PASSWORDS, owner))


def test_a_cluster_is_restored_from_plain_data() -> None:
    before = Cluster(ClusterKind.LOCAL_BUILD, "/a/file", "10.0.0.1", PORTS, cluster.LOCAL_IMAGES, PASSWORDS, 1)
    data = json.loads(json.dumps(before.to_dict()))
    assert (type(before.to_dict()["kind"]), str(before.kind)) == (str, "built locally")
    assert Cluster.from_dict(data) == before


DEAD = 2**22 + 1  # above the kernel's largest pid


@pytest.mark.parametrize(
    ("before", "requested", "after"),
    [(0, 0, 0), (0, os.getpid(), 0), (1, 0, 0), (DEAD, os.getpid(), os.getpid()), (DEAD, 0, 0)],
    ids=["kept", "kept, tests", "in use, make cluster", "left by a killed run, tests", "left, make cluster"],
)
def test_a_running_cluster_is_used_and_only_its_owner_deletes_it(
    running: list[str], before: int, requested: int, after: int
) -> None:
    save_state(before)
    found = cluster.get_or_create(owner=requested)
    assert (found.owner, json.loads((cluster.STATE / "cluster.json").read_text())["owner"]) == (after, after)
    cluster.delete(os.getpid())
    assert running == ["deleted"] * (after == os.getpid())


def test_a_cluster_that_another_run_will_delete_is_not_shared(running: list[str]) -> None:
    save_state(1)
    with pytest.raises(
        UnavailableError, match=r"process 1 is testing on the running cluster .* or keep the cluster with make cluster"
    ):
        cluster.get_or_create(owner=os.getpid())
    assert running == []


def test_a_cluster_that_was_built_locally_is_not_used_where_docker_is_required(running: list[str]) -> None:
    cluster._save_state(Cluster(ClusterKind.LOCAL_BUILD, "", "", PORTS, cluster.LOCAL_IMAGES, PASSWORDS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "running", lambda: True)
        with pytest.raises(UnavailableError, match=r"built locally, .* delete it with make cluster-down$"):
            cluster.get_or_create(only_docker=True)
    save_state(0)
    assert cluster.get_or_create(only_docker=True).kind is ClusterKind.DOCKER
    assert running == []


BOTH = "to use your own cluster, set both options: --cluster-type existing --kubeconfig FILE"


@pytest.mark.parametrize(
    ("kubeconfig", "cluster_type", "message"),
    [
        ("/a/file", None, BOTH),
        (None, "existing", BOTH),
        ("/a/file", "docker", BOTH),
        (None, "Docker", "--cluster-type is 'Docker': set it to docker or existing, or omit it"),
    ],
    ids=["no type", "no file", "contradiction", "unknown type"],
)
def test_options_that_name_no_cluster_are_refused(
    kubeconfig: str | None, cluster_type: str | None, message: str
) -> None:
    with pytest.raises(pytest.UsageError, match=re.escape(message)):
        requires_docker(kubeconfig, cluster_type)


def test_pytest_refuses_them_before_a_test() -> None:
    result = run([sys.executable, "-m", "pytest", "-q", "tests/e2e", "--cluster-type", "existing"], cwd=ROOT)
    assert (result.returncode, BOTH in result.stderr) == (pytest.ExitCode.USAGE_ERROR, True)


def nested(folder: Path) -> list[str]:
    """pytest, which at its end would otherwise delete what many earlier runs left behind."""
    return [sys.executable, "-m", "pytest", f"--basetemp={folder / 'nested'}"]


def test_where_docker_is_required_and_cannot_pull_each_test_fails_with_the_reason(tmp_path: Path) -> None:
    """Also without CI=true, with which a skipped test fails."""
    docker(tmp_path, NO_REGISTRY)
    environment = os.environ | {"CI": "", "PATH": f"{tmp_path}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path)}
    command = [*nested(tmp_path), "tests/e2e/test_deadlines.py", "--cluster-type", "docker"]
    result = run(command, cwd=ROOT, env=environment)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    assert "3 errors" in result.stdout
    result.line(
        "cluster: none, cannot create a cluster: ", f"{CANNOT_PULL} ({NO_ROUTE}), and no other engine is allowed"
    )


@pytest.mark.parametrize(
    ("workers", "start", "reason"),
    [
        ("0", "raise RuntimeError('no disk')", "RuntimeError: no disk"),
        ("2", "raise RuntimeError('no disk')", "RuntimeError: no disk"),
        ("2", "raise UnavailableError('no root')", "no root"),
        ("2", "os._exit(9)", "the process that starts the cluster was killed"),
    ],
    ids=["alone", "on workers", "unavailable", "killed"],
)
def test_each_test_on_a_cluster_that_does_not_start_fails_with_the_reason(
    tmp_path: Path, workers: str, start: str, reason: str
) -> None:
    (tmp_path / "no_cluster.py").write_text(
        "import os\nfrom tests.support import cluster\nfrom tools.steps import UnavailableError\n"
        f"def get_or_create(*_, **__):\n    {start}\ncluster.get_or_create = get_or_create\n"
    )
    environment = os.environ | {"CI": "true", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [*nested(tmp_path), "-n", workers, "-p", "no_cluster", "tests/e2e/test_deadlines.py"]
    result = run(command, cwd=ROOT, env=environment)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    assert "3 errors" in result.stdout
    result.line("cluster: none, ", reason)
    sections = re.split(r"^_+ ERROR at setup of ", result.stdout, flags=re.M)[1:]
    assert [reason in section for section in sections] == [True] * 3


def test_the_page_of_the_offline_cluster_names_its_kubernetes_and_files_that_exist() -> None:
    folder = ROOT / "tools" / "offline_cluster"
    page = (folder / "README.md").read_text()
    assert f"`kubernetes/go.mod` (now {pinned_version('kubelet')})" in page
    table = page.split("## Versions")[0] + page.split("## Versions")[1].split("##")[0]
    names = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|toml|mod)|[\w-]+/[\w-]*)`", table)
    assert len(names) > 10
    assert [name for name in names if not (folder / name).exists() and not (ROOT / name).exists()] == []


def test_the_images_are_the_same_after_a_test_has_imported_one_of_their_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python compiles of it is next to it, and is no source."""
    digests: list[str] = []
    monkeypatch.setattr(images, "HERE", shutil.copytree(images.HERE, tmp_path / "offline_cluster"))
    monkeypatch.setattr(images, "_build_system", lambda *_: None)
    monkeypatch.setattr(images, "_is_current", lambda _, digest: digests.append(digest) or True)
    for folder in ("images", "node"):
        images.build_images()
        (images.HERE / folder / "__pycache__").mkdir(exist_ok=True)
        (images.HERE / folder / "__pycache__/git-synccpython-311.pyc").touch()
    images.build_images()
    assert digests == digests[:2] * 3
