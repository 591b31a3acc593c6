"""Programs from Debian packages, extracted into a folder: nothing is installed into the system."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tools.steps import UnavailableError, remove, run

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def extract(
    partial: Path, packages: Sequence[str], what: str, *, sources: str | None = None, preferences: str = ""
) -> None:
    """Download packages, and those dependencies that this system lacks, with apt and extract all into `partial`.

    `sources` and `preferences` are the contents of apt's files of these names; without `sources`, the system's are
    used. apt works in a dedicated folder, so root is not needed. Raises UnavailableError if there is no apt-get.
    """
    if not shutil.which("apt-get"):
        raise UnavailableError(f"{' and '.join(packages)}: cannot be downloaded without apt-get; install manually")
    apt = partial / "apt"
    for folder in ("lists/partial", "cache/archives/partial", "empty"):
        (apt / folder).mkdir(parents=True)
    config = f"""Dir::State::lists "{apt}/lists"; Dir::Cache "{apt}/cache"; Dir::Etc::preferences "{apt}/preferences";
        Dir::Etc::preferencesparts "{apt}/empty"; Acquire::Languages "none"; Debug::NoLocking "true";
        Acquire::Retries "5";"""
    if sources is not None:
        (apt / "sources.list").write_text(sources)
        config += f"""Dir::Etc::sourcelist "{apt}/sources.list"; Dir::Etc::sourceparts "{apt}/empty";
            Dir::Etc::parts "{apt}/empty";"""
    (apt / "preferences").write_text(preferences)
    (apt / "apt.conf").write_text(config)
    env = os.environ | {"APT_CONFIG": str(apt / "apt.conf"), "LC_ALL": "C"}
    run(["apt-get", "update"], what, "10 s", env=env)
    run(
        ["apt-get", "install", "--yes", "--download-only", "--reinstall", "--no-install-recommends", *packages], env=env
    )
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        run(["dpkg-deb", "--extract", package, partial])
    remove(apt)


def codename() -> str:
    """The codename of this system's release, such as bookworm. Raises UnavailableError if it has none."""
    if found := platform.freedesktop_os_release().get("VERSION_CODENAME"):
        return found
    raise UnavailableError("/etc/os-release has no VERSION_CODENAME: this needs a release of Debian")


def sources_list(suite: str) -> str:
    """sources.list for a Debian suite, with the mirrors that this machine uses."""
    own = codename()
    listed = run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"])
    lines = sorted({line for line in listed.splitlines() if re.search(rf" {own}(-security|-updates)? main$", line)})
    if not lines:
        raise UnavailableError(f"apt has no source for Debian {own}: add one to /etc/apt/sources.list.d")
    return "".join(f"deb [signed-by={KEYRING}] {line.replace(f' {own}', f' {suite}')}\n" for line in lines)
