"""A full pod volume: the containers' scripts, with real git and pip, on a small disk."""

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


def run_on_small_disk(
    container: dict[str, Any], files: Path, disk: Path, limit: str = "size=1m", **references: str
) -> Result:
    """Run the container's command in `disk`, a tmpfs of 1 MB with a copy of `files`."""
    disk.mkdir(exist_ok=True)
    script = f"mount -t tmpfs -o {limit},mode=777 tmpfs {disk}; cp -a {files}/. {disk}"
    text = json.dumps(container).replace("/workspace", str(disk)).replace("/etc/git-sync/", f"{disk}/")
    container = json.loads(text.replace('"/git-sync"', f'"{ROOT}/tools/offline_cluster/images/git-sync"'))
    values = {name: value for name, value in environment(container).items() if isinstance(value, str)}
    path = f"{files}/bin:/usr/bin:/bin"
    with namespace("mount", script) as enter:
        inside = [*enter, "sh", "-c", f'cd {disk} && exec "$@"', "sh"]
        command = [*inside, "sh", *container["command"][1:], *container["args"]]
        variables = values | {"PATH": path, **references}
        result = run(command, env=variables, one_stream=True)
        error = run([*enter, "cat", f"{disk}/git-error"], verbatim=True)
        (files / "git-error").write_text(error.stdout)
    return result


@pytest.mark.fault(
    "Process and pod",
    fault="The pod's volume fills up during the clone",
    sees="`FAILED: no checkout of ... from ...: ... No space left on device ...`, exit 1",
    state="The database is not contacted",
    do="Free disk space on the node, or make the repository smaller; deploy again",
)
@root_only
def test_a_full_volume_during_the_clone_is_reported(helm4: Helm, tmp_path: Path) -> None:
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
    clone["args"] = [arg.replace("https://git.example.org/schema", f"file://{source}") for arg in clone["args"]]
    files = tmp_path / "files"
    files.mkdir()
    (files / "sparse-checkout").write_text("/*\n")
    assert run_on_small_disk(clone, files, tmp_path / "disk").returncode == 0
    result = run_on_small_disk(migrate(rendered), files, tmp_path / "disk", **CREDENTIALS)
    assert result.returncode == 1
    assert result.text.startswith('FAILED: no checkout of "main" from "https://git.example.org/schema": ')
    assert "No space left on device" in result.text


@pytest.mark.fault(
    "Process and pod",
    fault="The pod's volume fills up while pip installs",
    sees="`No space left on device`, then `FAILED: pip could not install requirements.txt ...`, exit 1",
    state="The database is not contacted",
    do="Free disk space on the node, or use an image with pre-installed dependencies; deploy again",
)
@root_only
def test_a_full_volume_while_pip_installs_is_reported(helm4: Helm, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    folder = Volume(files).clone("alembic.ini")
    (folder / "requirements.txt").write_text("large\n")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "large", {"large.py": "x = 1\n" * 1_000_000})
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    result = run_on_small_disk(migrate(helm4.render()), files, tmp_path / "disk", **CREDENTIALS, **index)
    assert (result.returncode, result.text.startswith(CODE)) == (1, True), result
    assert "No space left on device" in result.text
    assert result.lines[-1] == (
        "FAILED: pip could not install requirements.txt (exit status 1, reason above): for a mirror, proxy or"
        f' private CA set "extraEnv" ({README}, "Requirements")'
    )


@pytest.mark.fault(
    "Process and pod",
    fault="The pod's volume has no free inode when Alembic starts",
    sees="`No space left on device`, then `FAILED: no file can be created in the pod's volume (reason above): ...`,"
    " exit 1",
    state="The database is not contacted",
    do="Follow the message, deploy again",
)
@root_only
def test_a_volume_without_a_free_inode_is_reported(helm4: Helm, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    volume = Volume(files)
    volume.clone("alembic.ini")
    volume.program("alembic", "echo not reached")
    rendered = migrate(helm4.render({"requirements": ""}))
    inodes = f"nr_inodes={len(list(files.rglob('*'))) + 1}"
    result = run_on_small_disk(rendered, files, tmp_path / "disk", inodes, **CREDENTIALS)
    assert (result.returncode, result.text.startswith(CODE)) == (1, True), result
    assert "No space left on device" in result.text
    assert result.lines[-1] == (
        "FAILED: no file can be created in the pod's volume (reason above): free disk space on the node, or make the"
        f' repository smaller ({README}, "Git access")'
    )
