"""Git repositories: this checkout, and clones of it."""

from __future__ import annotations

from pathlib import Path

from tools.paths import ROOT
from tools.steps import UnavailableError, run


def git(*arguments: str | Path) -> str:
    """Run git in this checkout; return its output, stripped. RuntimeError if it fails."""
    return run(["git", "-C", ROOT, *arguments]).strip()


def location() -> tuple[Path, str]:
    """The top level of this checkout's repository and the project's folder in it, such as utilities/hcm-db-migrations;
    "" if it is the top level. Raises UnavailableError if the project is in no commit.
    """
    commit(ROOT)
    top = git("rev-parse", "--show-toplevel")
    if not git("ls-tree", "HEAD"):
        raise UnavailableError(f"{ROOT} is not in the last commit of {top}: git add and commit it")
    return Path(top), git("rev-parse", "--show-prefix").rstrip("/")


def commit(repository: Path, revision: str = "HEAD") -> str:
    """The commit of a revision. Raises UnavailableError, with git's reason, for a folder that has none."""
    try:
        return run(["git", "-C", repository, "rev-parse", "--verify", f"{revision}^{{commit}}"]).strip()
    except RuntimeError as error:
        lines = [line.removeprefix("fatal: ") for line in str(error).splitlines() if line.startswith("fatal: ")]
        raise UnavailableError(
            f"{repository} has no commit {revision} ({lines[0] if lines else error}): this needs a clone that you own,"
            " not an unpacked archive"
        ) from None
