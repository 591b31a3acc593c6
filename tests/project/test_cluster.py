"""Which cluster the tests get, told in one line with the reason, and who deletes it. None is made for that."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import cluster
from tools.offline_cluster import engine
from tools.paths import ROOT
from tools.steps import UnavailableError

MADE_HERE = "cluster: kind with an engine and a node image made here, because {}\n"
CANNOT_PULL = "the container engine cannot pull kindest/node:v1.37.0"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of the test's own; an engine of our own is neither started nor refused."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("KUBECONFIG", "/somebody/elses")
    monkeypatch.setattr(engine, "check", lambda: None)
    monkeypatch.setattr(engine, "start", lambda: None)
    monkeypatch.setattr(engine, "environment", dict)
    return folder


def docker(folder: Path, script: str) -> None:
    (folder / "docker").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "docker").chmod(0o755)


def test_a_users_docker_is_taken_where_it_can_pull(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    docker(path, "exit 0")
    environment, how, images = cluster._select_provider()
    assert (how, images) == ("docker", cluster.PUBLIC_IMAGES)
    assert "KUBECONFIG" not in environment
    assert capfd.readouterr().err == (
        "cluster: kind with its official node image, because a container engine runs here that can pull it\n"
    )


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "docker is not on PATH"),
        ("exit 1", "no container engine runs"),
        ('[ "$1" = version ]', CANNOT_PULL),
    ],
    ids=["no docker", "no daemon", "no registry"],
)
def test_else_the_cluster_is_made_here(
    path: Path, capfd: pytest.CaptureFixture[str], script: str | None, reason: str
) -> None:
    if script:
        docker(path, script)
    _, how, images = cluster._select_provider()
    assert (how, images) == ("made here", cluster.LOCAL_IMAGES)
    assert capfd.readouterr().err == MADE_HERE.format(reason)


def test_where_none_is_possible_the_message_has_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UnavailableError) as caught:
        cluster._select_provider()
    assert re.fullmatch(
        "no cluster can be made here: docker is not on PATH, and an engine of our own needs root, .*apt-get with"
        " Debian's keyring. Start Docker with access to its registry, or name a cluster of your own: pytest"
        " --cluster-type existing --kubeconfig FILE",
        str(caught.value),
    )


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cluster that answers; what is done to it."""
    done: list[str] = []
    monkeypatch.setattr(cluster, "STATE", tmp_path)
    monkeypatch.setattr(cluster.Cluster, "kubectl", lambda *_, **__: "ok")
    monkeypatch.setattr(cluster, "_delete", lambda: done.append("deleted"))
    return done


def remember(owner: int) -> None:
    cluster._save_state(cluster.Cluster("docker", "", "", {}, {}, {}, owner))


DEAD = 2**22 + 1  # above the kernel's largest pid


@pytest.mark.parametrize(
    ("before", "asked", "after"),
    [(0, 0, 0), (0, os.getpid(), 0), (1, 0, 0), (DEAD, os.getpid(), os.getpid()), (DEAD, 0, 0)],
    ids=["kept", "kept, tests", "tested on, make cluster", "left by a killed run, tests", "left, make cluster"],
)
def test_a_cluster_that_runs_is_taken_and_only_its_owner_deletes_it(
    running: list[str], before: int, asked: int, after: int
) -> None:
    remember(before)
    found = cluster.get_or_create(owner=asked)
    assert (found.owner, json.loads((cluster.STATE / "cluster.json").read_text())["owner"]) == (after, after)
    cluster.delete(os.getpid())
    assert running == ["deleted"] * (after == os.getpid())


def test_a_cluster_that_another_run_will_delete_is_not_shared(running: list[str]) -> None:
    remember(1)
    with pytest.raises(UnavailableError, match=r"process 1 tests on the cluster .* or keep it with make cluster"):
        cluster.get_or_create(owner=os.getpid())
    assert running == []


@pytest.mark.parametrize("option", [["--kubeconfig", "/a/file"], ["--cluster-type", "existing"]], ids=lambda o: o[0])
def test_a_cluster_of_the_users_takes_both_options(option: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/e2e", *option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "a cluster of your own takes both options: --cluster-type existing --kubeconfig FILE" in done.stderr
