"""A pod's volume that is full: the containers' own scripts, with real git and pip, on a disk with little room."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.chart import Helm, environment, git_sync, migrate
from tests.support.fault_injection import namespace, root_only
from tests.support.git import git
from tests.support.pod_scripts import CODE, CREDENTIALS, README, Volume, make_wheel
from tests.support.programs import Result, run
from tools.paths import ROOT


def run_on_small_disk(container: dict[str, Any], laid: Path, room: Path, **references: str) -> Result:
    """Run the container's command in `room`, 1 MB of memory with a copy of what is in `laid`."""
    room.mkdir(exist_ok=True)
    script = f"mount -t tmpfs -o size=1m,mode=777 tmpfs {room}; cp -a {laid}/. {room}"
    text = json.dumps(container).replace("/workspace", str(room)).replace("/etc/git-sync/", f"{room}/")
    container = json.loads(text.replace('"/git-sync"', f'"{ROOT}/tools/offline_cluster/images/git-sync"'))
    values = {name: value for name, value in environment(container).items() if isinstance(value, str)}
    path = f"{laid}/bin:/usr/bin:/bin"
    with namespace("mount", script) as enter:
        inside = [*enter, "sh", "-c", f'cd {room} && exec "$@"', "sh"]
        command = [*inside, "sh", *container["command"][1:], *container["args"]]
        variables = values | {"PATH": path, **references}
        result = run(command, env=variables, one_stream=True)
        error = run([*enter, "cat", f"{room}/git-error"], verbatim=True)
        (laid / "git-error").write_text(error.stdout)
    return result


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
    for command in (
        ["init", "--quiet", "--initial-branch=main"],
        ["add", "."],
        ["commit", "--quiet", "--message=test"],
    ):
        git(source, *command)
    values = {"git": {"repo": "https://git.example.org/schema", "branch": "main", "path": "."}}
    rendered = helm4.render(values)
    clone = git_sync(rendered)
    clone["args"] = [word.replace("https://git.example.org/schema", f"file://{source}") for word in clone["args"]]
    laid = tmp_path / "laid"
    laid.mkdir()
    (laid / "sparse-checkout").write_text("/*\n")
    assert run_on_small_disk(clone, laid, tmp_path / "room").returncode == 0
    result = run_on_small_disk(migrate(rendered), laid, tmp_path / "room", **CREDENTIALS)
    assert result.returncode == 1
    assert result.text.startswith('FAILED: no checkout of "main" from "https://git.example.org/schema": ')
    assert "No space left on device" in result.text


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
    result = run_on_small_disk(migrate(helm4.render()), laid, tmp_path / "room", **CREDENTIALS, **index)
    assert (result.returncode, result.text.startswith(CODE)) == (1, True), result
    assert "No space left on device" in result.text
    assert result.lines[-1] == (
        "FAILED: pip could not install requirements.txt (exit status 1, reason above): for a mirror, proxy or"
        f' private CA set "extraEnv" ({README}, "Requirements")'
    )
