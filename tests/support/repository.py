"""Git repositories on the server in the tests' cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import revisions
from tests.support.git import git
from tests.support.project import copy
from tools.cluster import Cluster


@dataclass
class Repository:
    """A test's git repository, on the server in the cluster; it starts with this checkout's migrations."""

    folder: Path  # the project's, in the repository
    cluster: Cluster
    name: str
    branch: str = "main"

    @classmethod
    def create(
        cls, folder: Path, cluster: Cluster, name: str, path: str = ".", branch: str = "main", more: Sequence[str] = ()
    ) -> Repository:
        """Create it in `folder`, with the project in its folder `path`, and with `more` of this checkout's folders."""
        created = cls(folder / path, cluster, name, branch)
        created.folder.mkdir(parents=True)
        git(folder, "init", "--quiet", "--initial-branch=main")
        copy(created.folder, "requirements.txt", *more)
        created.push()
        return created

    @property
    def url(self) -> str:
        """For pods."""
        return f"{self.cluster.git_in_cluster}/{self.name}.git"

    @property
    def remote(self) -> str:
        """For this process, which has push access."""
        return f"{self.cluster.git_url}/{self.name}.git"

    def git(self, *arguments: str) -> str:
        return git(self.folder, *arguments)

    def push(self, ref: str = "") -> str:
        """Commit all changes and push them, by default to the branch; return the commit."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message=test")
        self.git("push", "--quiet", "--force", self.remote, f"HEAD:{ref or f'refs/heads/{self.branch}'}")
        return self.git("rev-parse", "HEAD")

    def revision(self, number: str, *upgrade: str, downgrade: str = "SELECT 1") -> Path:
        """Write a revision that runs these SQL statements."""
        versions = self.folder / "migrations" / "versions"
        body = "\n".join(f"op.execute({statement!r})" for statement in upgrade)
        return revisions.write(versions, number, body, f"op.execute({downgrade!r})", down=None, name="add")
