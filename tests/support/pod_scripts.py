"""A plugin: the scripts of both containers, run as in the rendered pod, on a folder in place of its volume."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.chart import Helm, containers, environment, migrate
from tests.support.programs import Program, Result, normalize, start
from tests.support.waiting import until
from tools.paths import ROOT

SHA = "0123456789abcdef0123456789abcdef01234567"
COMMIT = "<commit>"  # in a Result
CODE = f"code: repository https://git.example.org/schema, ref main, commit {COMMIT}, path utilities/hcm-db-migrations\n"
README = "README.md of the chart"
CREDENTIALS = {"DB_HOST": "db", "DB_NAME": "n", "DB_USER": "u", "DB_PASSWORD": "p"}
# In git-sync's image sh is bash; in Debian's and python's images it is dash.
SHELLS = ["sh", "bash"]
# A prefix: as in a pod, root cannot read and write every file.
WITHOUT_CAPABILITIES = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
STAND_IN = ROOT / "tools" / "offline_cluster" / "images" / "git-sync"


def relocate(container: dict[str, Any], workspace: Path, home: Path, secrets: Path, git_sync: Path) -> dict[str, Any]:
    """The container with these paths in place of the real ones."""
    text = json.dumps(container)
    paths = {"/workspace": workspace, "/git-home": home, "/etc/git-sync/": f"{secrets}/"}
    paths |= {f"/{folder}/": f"{secrets}/{folder}/" for folder in ("etc/target", "etc/targets")}
    for path, here in {**paths, "/dev/termination-log": secrets / "bin/termination-log"}.items():
        text = text.replace(path, str(here))
    relocated: dict[str, Any] = json.loads(text.replace('"/git-sync"', f'"{git_sync}"'))
    return relocated


class Volume:
    """A folder as a pod's volume, and the containers that run on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workspace = folder  # where the containers work
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.home = folder / "git-home"
        self.home.mkdir()
        self.termination_log = self.bin / "termination-log"
        (self.bin / "python3").symlink_to(sys.executable)
        self.checkout = folder / "git" / ".worktrees" / SHA / "utilities" / "hcm-db-migrations"

    def clone(self, *names: str) -> Path:
        """Create a checkout like git-sync's, with these files in git.path; return that folder."""
        self.checkout.mkdir(parents=True)
        (self.folder / "git" / "code").symlink_to(Path(".worktrees") / SHA)
        for name in names:
            (self.checkout / name).touch()
        return self.checkout

    def program(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def start(
        self, container: dict[str, Any], shell: str = "sh", prefix: Sequence[str] = (), **references: str
    ) -> Program:
        """Start the container; `references` are values that the cluster would resolve, or overrides.

        git-sync is the program of the test, or else the stand-in. `prefix` is a command that runs the container.
        """
        git_sync = self.bin / "git-sync"
        container = relocate(
            container, self.workspace, self.home, self.folder, git_sync if git_sync.exists() else STAND_IN
        )
        values = {name: value for name, value in environment(container).items() if isinstance(value, str)}
        here = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOSTNAME": "pod-1"}
        program, *arguments = container["command"]
        command = [*prefix, shell if program == "sh" else self.bin / program, *arguments, *container.get("args", [])]
        return start(command, cwd=self.workspace, env=values | here | references, one_stream=True)

    def run(
        self, container: dict[str, Any], shell: str = "sh", prefix: Sequence[str] = (), **references: str
    ) -> Result:
        """Run the container to its end; its log is `stdout`. If it failed, its last line is the termination message."""
        self.termination_log.write_text("")
        result = self.start(container, shell, prefix, **references).wait()
        if container["name"] == "migrate" and result.returncode > 0:
            message, last = normalize(self.termination_log.read_text()), result.stdout.splitlines()[-1]
            if (self.workspace / "target").exists():
                message = message.partition("\n")[2]  # after the database's revision
            assert message == last or (not message and last.startswith("code: "))  # alembic may print nothing
        return result

    def stop(self, program: Program) -> Result:
        """Send SIGTERM as soon as one of the test's programs has created the file "running" in the volume."""
        until(lambda: (self.folder / "running").exists() or not program.running)
        return program.stop()

    def target(self, job: dict[str, Any], index: int, objects: dict[str, dict[str, str]] | None = None) -> Result:
        """Mount the volume "targets" of a Job's pod, and run the pod's container "rollout".

        `objects` are the data of the ConfigMaps and Secrets that exist, by name.
        """
        template = job["spec"]["template"]
        folder = self.folder / "etc"
        for name in ("target", "targets"):
            (folder / name).mkdir(parents=True)
        (folder / "targets" / "list").write_text(template["metadata"]["annotations"]["hcm-db-migrations/targets"])
        (volume,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == "targets"]
        for source in volume["projected"]["sources"]:
            for of in source.values():
                for item in of["items"]:
                    of_index, _, name = item["path"].partition("/")
                    value = (objects or {}).get(of.get("name", ""), {}).get(item.get("key"))
                    if of_index == str(index) and value is not None:
                        (folder / "target" / name).write_text(value)
        rollout = containers(job)["rollout"]
        no_api = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"}
        return self.run(rollout, JOB=job["metadata"]["name"], POD="pod-1", JOB_COMPLETION_INDEX=str(index), **no_api)


def make_wheel(folder: Path, name: str, files: dict[str, str], metadata: str = "") -> Path:
    """Create version 0.0.1 of a package; `files` has the contents by name, with additional `.dist-info` files."""
    info = f"{name}-0.0.1.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n{metadata}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    hashes = {
        file: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        for file, text in files.items()
    }
    record = "".join(f"{file},sha256={digest},\n" for file, digest in hashes.items())
    path = folder / f"{name}-0.0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            wheel.writestr(file, text)
    return path


def wheels_in(folder: Path) -> dict[str, str]:
    """The variables for a pip that has the wheels in `folder`, and no index."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path)


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def container(helm4: Helm) -> Callable[..., dict[str, Any]]:
    """Renders the migrate container with these values; without pip by default."""
    return lambda **values: migrate(helm4.render({"requirements": "", **values}))
