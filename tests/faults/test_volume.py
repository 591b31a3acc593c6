"""A pod's volume that is full: the containers' own scripts, with real git and pip, on a disk with little room."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.chart.conftest import Helm, environment, git_sync, helm4, migrate
from tests.chart.test_scripts import CODE, CREDENTIALS, README, Volume, make_wheel
from tests.faults.conftest import namespace, root_only
from tools.paths import ROOT

__all__ = ["helm4"]


def run_in_little_room(container: dict[str, Any], laid: Path, room: Path, **references: str) -> tuple[int, str]:
    """Run the container's command in `room`, 1 MB of memory with a copy of what is in `laid`: exit status and log."""
    room.mkdir(exist_ok=True)
    script = f"mount -t tmpfs -o size=1m,mode=777 tmpfs {room}; cp -a {laid}/. {room}"
    text = json.dumps(container).replace("/workspace", str(room)).replace("/etc/git-sync/", f"{room}/")
    container = json.loads(text.replace('"/git-sync"', f'"{ROOT}/tools/offline_cluster/images/git-sync"'))
    values = {name: value for name, value in environment(container).items() if isinstance(value, str)}
    path = f"{laid}/bin:/usr/bin:/bin"
    with namespace("mount", script) as enter:
        inside = [*enter, "sh", "-c", f'cd {room} && exec "$@"', "sh"]
        words = [*inside, "sh", *container["command"][1:], *container["args"]]
        variables = values | {"PATH": path, **references}
        done = subprocess.run(words, env=variables, stdout=-1, stderr=subprocess.STDOUT, text=True)
        left = subprocess.run([*enter, "cat", f"{room}/git-error"], capture_output=True).stdout
        (laid / "git-error").write_bytes(left)
    return done.returncode, done.stdout


@pytest.mark.fault(
    "Process and pod",
    fault="The pod's volume is full in the clone",
    sees="`FAILED: no checkout of ... from ...: ... No space left on device ...`, exit 1",
    state="The database is not contacted",
    do="Make room on the node, or a smaller repository; deploy again",
)
@root_only
def test_a_volume_that_is_full_in_the_clone_is_told(helm4: Helm, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "large").write_bytes(random.randbytes(3_000_000))  # noqa: S311
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "--quiet", "--initial-branch=main"], ["add", "."], ["commit", "--quiet", "--message=test"]):
        subprocess.run(["git", "-C", source, *who, *words], check=True)
    values = {"git": {"repo": "https://git.example.org/schema", "branch": "main", "path": "."}}
    rendered = helm4.render(values)
    clone = git_sync(rendered)
    clone["args"] = [word.replace("https://git.example.org/schema", f"file://{source}") for word in clone["args"]]
    laid = tmp_path / "laid"
    laid.mkdir()
    (laid / "sparse-checkout").write_text("/*\n")
    status, log = run_in_little_room(clone, laid, tmp_path / "room")
    assert status == 0, log
    status, log = run_in_little_room(migrate(rendered), laid, tmp_path / "room", **CREDENTIALS)
    print(log)
    assert status == 1
    assert log.startswith('FAILED: no checkout of "main" from "https://git.example.org/schema": ')
    assert "No space left on device" in log


@pytest.mark.fault(
    "Process and pod",
    fault="The pod's volume is full while pip installs",
    sees="`No space left on device`, and our own line, exit 1",
    state="The database is not contacted",
    do="Make room on the node, or bring an image with its own dependencies; deploy again",
)
@root_only
def test_a_volume_that_is_full_while_pip_installs_is_told(helm4: Helm, tmp_path: Path) -> None:
    laid = tmp_path / "laid"
    laid.mkdir()
    folder = Volume(laid).clone("alembic.ini")
    (folder / "requirements.txt").write_text("large\n")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "large", {"large.py": "x = 1\n" * 1_000_000})
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    status, log = run_in_little_room(migrate(helm4.render()), laid, tmp_path / "room", **CREDENTIALS, **index)
    assert (status, log.startswith(CODE)) == (1, True), log
    assert "No space left on device" in log
    assert log.splitlines()[-1] == (
        "FAILED: pip could not install requirements.txt (exit status 1, reason above): for a mirror, proxy or"
        f' private CA set "extraEnv" ({README}, "Requirements")'
    )
