"""git, isolated from the user's settings."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from tests.support import revisions
from tests.support.programs import run
from tools import checkout
from tools.paths import ROOT


def git(folder: Path, *arguments: str | Path) -> str:
    """Run git in a folder, with a dedicated author; return its output, stripped."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    command = ["git", "-C", folder, *author, *arguments]
    return run(command, env=environment, verbatim=True, check=True).stdout.strip()


def clone_checkout(folder: Path, *options: str) -> Path:
    """Clone the repository of this checkout; return the project's folder in the clone."""
    repository, path = checkout.location()
    git(folder.parent, "clone", "--quiet", *options, f"file://{repository}", folder)
    return folder / path


def nested_checkout(folder: Path) -> Path:
    """Make a repository whose folder utilities/hcm-db-migrations is this checkout's last commit; return that folder."""
    project = folder / "utilities/hcm-db-migrations"
    project.mkdir(parents=True)
    archive = folder / ".git.tar"
    git(ROOT, "archive", f"--output={archive}", "HEAD")
    with tarfile.open(archive) as packed:
        packed.extractall(project, filter="data")
    archive.unlink()
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=test")
    return project


@dataclass(frozen=True)
class Colleague:
    """Another clone of the remote of `mine`, whose pushes are fetched there, and not merged."""

    mine: Path  # a repository
    folder: Path

    @classmethod
    def of(cls, mine: Path) -> Colleague:
        """Make the folder a repository with a remote, to which all is pushed, and clone that."""
        git(mine, "init", "--quiet", "--initial-branch=main")
        (mine / ".gitignore").write_text("__pycache__\n")
        git(mine, "add", "--all")
        git(mine, "commit", "--quiet", "--message=test")
        remote, folder = mine.parent / "remote.git", mine.parent / "colleague"
        git(mine, "clone", "--quiet", "--bare", mine, remote)
        git(mine, "remote", "add", "origin", remote)
        git(mine, "clone", "--quiet", remote, folder)
        git(mine, "fetch", "--quiet")
        git(mine, "branch", "--quiet", "--set-upstream-to=origin/main")
        return cls(mine, folder)

    def push(self, branch: str = "main") -> None:
        """Commit all changes, push them, and fetch them in `mine`."""
        git(self.folder, "add", "--all")
        git(self.folder, "commit", "--quiet", "--allow-empty", "--message=test")
        git(self.folder, "push", "--quiet", "origin", f"HEAD:refs/heads/{branch}")
        git(self.mine, "fetch", "--quiet", "--all")

    def add(self, number: str, *, path: str = ".", versions: str = "versions", branch: str = "main") -> str:
        """Push a revision of the project in the folder `path`; return its file's name."""
        folder = self.folder / path / "migrations" / versions
        folder.mkdir(parents=True, exist_ok=True)
        name = revisions.write(folder, number, "pass", "pass", down="001", name="theirs").name
        self.push(branch)
        return name
