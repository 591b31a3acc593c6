"""Git repositories: this checkout, and clones of it."""

from __future__ import annotations

from pathlib import Path

from tools.paths import ROOT
from tools.steps import UnavailableError, run


def git(*arguments: str | Path) -> str:
    """Run git in this checkout; return its output, stripped. RuntimeError if it fails."""
    return run(["git", "-C", ROOT, *arguments]).strip()


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
