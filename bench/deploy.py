"""What does a deployment take, with only Python in the image, and with the dependencies pre-installed?

The way without this project (`plain`) is a full clone, pip and stock Alembic. Ours runs what the chart's Job runs, with
the tests' stand-in for git-sync, which starts the same git commands. The repository is generated, as large as
health-campaign-services; git daemon and an HTTP server on loopback serve it, and the wheels, to both.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from bench.measure import Results, Sample, alternate, server, table, timed
from bench.peers import ours, stock
from tools.binaries import find_or_build
from tools.fixtures import wheels_for
from tools.network import free_port
from tools.paths import CHART, ROOT
from tools.postgres import Postgres, dsn
from tools.steps import UnavailableError, log, run

FILES, TREE, HISTORY = 2_700, 23_000_000, 328_000_000  # number, bytes, bytes: 340 MB with git's own objects
COMMITS = 100
GIT_SYNC = ROOT / "tools/offline_cluster/images/git-sync"
REPOSITORY = "https://git.example.org/repository"  # of the rendered chart; the chart refuses git's own protocol
OURS, PLAIN = "utilities/hcm-db-migrations", "utilities/plain"  # folders
WAYS = ("plain", "ours", "ours, pre-installed")
GOALS = {"ours": 8, "ours, pre-installed": 15}  # times less than plain
NETWORK = 12.5  # MB/s
STAGES = ("clone", "install, migrate", "total", "with 100 Mbit/s")


def create_repository(bare: Path, projects: Mapping[str, Path], size: float = 1) -> None:
    """Create a bare repository of random files, the same in each run, and with these folders in its last commit.

    `size` is the fraction of the real size.
    """
    source = random.Random(0)  # noqa: S311  no secret
    files, tree, history = int(FILES * size), int(TREE * size), int(HISTORY * size)
    length, changed = tree // files, (history - tree) // (tree // files) // COMMITS

    run(["git", "init", "-q", "--bare", "--initial-branch=main", bare])
    for key in ("uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
        run(["git", "-C", bare, "config", key, "true"])
    # What is random cannot be compressed; and searching for deltas would take minutes.
    command = ["git", "-C", str(bare), "-c", "core.compression=0", "fast-import", "--quiet", "--depth=0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin
        for number in range(COMMITS + 1):
            chosen = range(files) if number == 0 else source.sample(range(files), min(changed, files))
            _commit(process.stdin, number)
            for file in chosen:
                _file(process.stdin, f"services/{file % 90}/{file}.bin", source.randbytes(length))
        for folder, project in projects.items():
            for path in sorted(path for path in project.rglob("*") if path.is_file()):
                _file(process.stdin, f"{folder}/{path.relative_to(project)}", path.read_bytes())
    if process.returncode:
        raise RuntimeError(f"git fast-import: exit status {process.returncode}")
    # As a hosted repository has it: one pack, with a bitmap.
    run(["git", "-C", bare, "-c", "pack.window=0", "-c", "core.compression=0", "repack", "-a", "-d", "-b", "-q"])


def _commit(stream: IO[bytes], number: int) -> None:
    author = f"bench <bench@localhost> {1_700_000_000 + number} +0000"
    stream.write(f"commit refs/heads/main\ncommitter {author}\ndata 6\ncommit\n".encode())


def _file(stream: IO[bytes], path: str, content: bytes) -> None:
    stream.write(f"M 100644 inline {path}\ndata {len(content)}\n".encode() + content + b"\n")


@dataclass(frozen=True)
class Setting:
    """What all ways use: a folder, the repository's URL, the wheels, a container's environment, the database server."""

    folder: Path
    url: str
    packages: Path
    environment: Mapping[str, str]
    server: Postgres

    def image(self, way: str) -> Path:
        """A Python with pip, in place of an image, and if pre-installed with the requirements as well."""
        folder = self.folder / f"image of {way}"
        run([sys.executable, "-m", "venv", folder])
        if way == "ours, pre-installed":
            pip: list[str | Path] = [folder / "bin/python", "-m", "pip", "install", "-q", "--only-binary", ":all:"]
            run([*pip, "-r", ROOT / "requirements.txt"], env=self.environment)
        return folder

    def deploy(self, way: str, image: Path, pod: Path) -> tuple[dict[str, Sample], float]:
        """Deploy to a new database, in an empty folder; return the samples by stage, and the received MB."""
        self.server.execute("CREATE DATABASE deployed")
        url = self.server.url.set(database="deployed")
        env = {"DATABASE_URL": dsn(url), "DB_HOST": "127.0.0.1", "DB_NAME": "deployed", "DB_USER": "postgres"}
        env |= {**self.environment, "DB_PASSWORD": self.server.password}
        samples = self._plain(image, pod, env) if way == "plain" else self._ours(way, image, pod, env)
        if not self.server.execute("SELECT 1 FROM pg_class WHERE relname = 't00001'", database="deployed"):
            raise RuntimeError(f"{way}: the revision was not applied")
        self.server.execute("DROP DATABASE deployed")
        total = Sample(sum(s.seconds for s in samples.values()), max(s.mib for s in samples.values()))
        wheels = 0 if way == "ours, pre-installed" else _size(self.packages)
        received = (_size(pod / "git/.git/objects") + wheels) / 1e6
        slower = Sample(total.seconds + received / NETWORK, total.mib)
        return {**samples, "total": total, "with 100 Mbit/s": slower}, received

    def _plain(self, image: Path, pod: Path, env: Mapping[str, str]) -> dict[str, Sample]:
        """Clone all, install, migrate, as one would write it."""
        own = shutil.copytree(image, pod / "image", symlinks=True)  # as a container has it
        script = '"$0" -m pip install -q --only-binary :all: -r requirements.txt && "$0" -m alembic upgrade head'
        env = {**env, "PYTHONDONTWRITEBYTECODE": "1"}
        return {
            "clone": timed(["git", "clone", "-q", "--branch", "main", self.url, "git"], pod, env),
            "install, migrate": timed(["sh", "-c", script, own / "bin/python"], pod / "git" / PLAIN, env),
        }

    def _ours(self, way: str, image: Path, pod: Path, env: Mapping[str, str]) -> dict[str, Sample]:
        """The commands of both containers of the rendered Job."""
        values: dict[str, Any] = {"git": {"repo": REPOSITORY, "branch": "main", "path": OURS}}
        if way == "ours, pre-installed":
            values["requirements"] = ""
        helm: list[str | Path] = [find_or_build("helm"), "template", "bench", CHART, "-s", "templates/job.yaml"]
        template = yaml.safe_load(run([*helm, "-f", "-"], input=json.dumps(values)))["spec"]["template"]
        for name in ("git-home", "etc"):
            (pod / name).mkdir()
        sparse = template["metadata"]["annotations"]["hcm-db-migrations/sparse-checkout"]
        (pod / "etc/sparse-checkout").write_text(sparse)
        text = json.dumps(template["spec"])
        for there, here in (
            ('"/git-sync"', json.dumps(str(GIT_SYNC))),
            ("/etc/git-sync/", f"{pod}/etc/"),
            ("/git-home", f"{pod}/git-home"),
            ("/workspace", str(pod)),
            (REPOSITORY, self.url),
        ):
            text = text.replace(there, here)
        spec = json.loads(text)
        path = {"PATH": f"{image}/bin:{env['PATH']}"}

        def container(of: dict[str, Any]) -> Sample:
            own = {entry["name"]: entry["value"] for entry in of["env"] if "value" in entry}
            return timed([*of["command"], *of["args"]], pod, {**env, **own, **path})

        return {"clone": container(spec["initContainers"][0]), "install, migrate": container(spec["containers"][0])}


@contextlib.contextmanager
def serve(size: float) -> Iterator[Setting]:
    """Generate the repository, and serve all that the ways use. Raises UnavailableError without `git daemon`."""
    if not Path(run(["git", "--exec-path"]).strip(), "git-daemon").exists():
        raise UnavailableError("git has no daemon: install it (Fedora: git-daemon)")
    with tempfile.TemporaryDirectory(prefix="hcm-bench-") as name, Postgres() as database:
        top = Path(name)
        projects = {OURS: top / "ours", PLAIN: top / "plain"}
        ours().write(projects[OURS], 1)
        stock().write(projects[PLAIN], 1)
        shutil.copy(ROOT / "requirements.txt", projects[OURS])
        shutil.copy(ROOT / "requirements.in", projects[PLAIN] / "requirements.txt")
        log("generating the repository (usually 20 s)")
        create_repository(top / "served/repository", projects, size)
        packages = wheels_for(f"{sys.version_info.major}.{sys.version_info.minor}")
        git, http = free_port(), free_port()
        daemon = ["git", "daemon", "--listen=127.0.0.1", f"--port={git}", "--reuseaddr", "--export-all"]
        index = [sys.executable, "-m", "http.server", "--bind=127.0.0.1", f"--directory={packages}", str(http)]
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(top),
            "GIT_CONFIG_NOSYSTEM": "1",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_FIND_LINKS": f"http://127.0.0.1:{http}/",
            "PIP_NO_CACHE_DIR": "1",
            "PIP_NO_INDEX": "1",
        }
        with server([*daemon, f"--base-path={top}/served", f"{top}/served"], git), server(index, http):
            yield Setting(top, f"git://127.0.0.1:{git}/repository", packages, environment, database)


def measure(rounds: int, size: float = 1, ways: Sequence[str] = WAYS) -> tuple[Results, dict[str, float]]:
    """The samples by way and stage, and the MB of git objects and wheels that each way receives.

    `size` is the fraction of the repository's real size.
    """
    results, received = Results(), {}
    with serve(size) as setting:
        images = {way: setting.image(way) for way in ways}
        pod = setting.folder / "pod"
        for number in range(rounds):
            for way in alternate(ways, number):
                pod.mkdir()
                samples, received[way] = setting.deploy(way, images[way], pod)
                shutil.rmtree(pod)
                for stage, sample in samples.items():
                    results.samples[way, stage].append(sample)
            log(f"deploying: round {number + 1} of {rounds}")
    return results, received


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def section(rounds: int) -> str:
    """The table, and whether the goals are met."""
    results, received = measure(rounds)
    rows, goals = [], []
    for way in WAYS:
        cells = [results.cell(way, stage, "plain") for stage in STAGES]
        rows.append([way, *cells, f"{received[way]:.1f} MB", results.peak(way)])
        for stage in STAGES[2:] if way in GOALS else ():
            ratio = (results.seconds("plain", stage) or 0) / (results.seconds(way, stage) or 1)
            verdict = "met" if ratio >= GOALS[way] else "not met"
            goals.append(f"- {way}, {stage}: at most 1/{GOALS[way]} of `plain`: {verdict}, 1/{ratio:.1f}\n")
    text = table(["Way", *STAGES, "received", "peak"], rows)
    return f"{text}\n{results.behind('ours', ['plain'], STAGES)}\nGoals:\n\n{''.join(goals)}"
