"""git, isolated from the user's settings."""

import os
from pathlib import Path

from tests.support.programs import run


def git(folder: Path, *arguments: str | Path) -> str:
    """Run git in a folder, with a dedicated author; return its output, stripped."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    command = ["git", "-C", folder, *author, *arguments]
    return run(command, env=environment, verbatim=True, check=True).stdout.strip()
