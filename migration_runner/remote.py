"""Which revision ids the remote's branch has, as of the last `git fetch`: never uses the network, and never fails."""

from __future__ import annotations

import io
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

ID = re.compile(r"""^\ufeff?revision(?:\s*:[^=]+)?\s*=\s*(['"])(.*?)\1""", re.M)


def find(rev_id: str, locations: Iterable[Path], recursive: bool) -> tuple[str, str] | None:
    """The file that has this id on a remote's branch, and that branch; None if there is none, or git cannot tell."""
    in_name = re.compile(rf"(\d{{8}}_\d{{6}}_)?{re.escape(rev_id)}[_.]")  # as alembic.ini's file_template
    for location in locations:
        path = location.resolve()
        folder = next(parent for parent in (path, *path.parents) if parent.is_dir())  # git keeps no empty folder
        files = {ref: _files(folder, f"{ref}:./{path.relative_to(folder)}", recursive) for ref in _branches(folder)}
        sources = _sources(folder, {blob for names in files.values() for blob in names.values()})
        for ref, names in files.items():
            for name, blob in names.items():
                ids = [found[2] for found in ID.finditer(sources.get(blob, ""))]
                if ids[-1] == rev_id if ids else in_name.match(name.rpartition("/")[2]):
                    return _printable(name.rpartition("/")[2]), _printable(re.sub("^refs/(remotes|heads)/", "", ref))
    return None


def _branches(folder: Path) -> list[str]:
    """The upstream branch of the current one, and the default branch of the remote, as full names."""
    upstream = _git(folder, "rev-parse", "--symbolic-full-name", "@{upstream}").splitlines()
    defaults: dict[str, str] = {}
    names = [f"refs/remotes/*/{name}" for name in ("HEAD", "main", "master")]  # HEAD: if cloned, or set by a newer git
    for line in _git(folder, "for-each-ref", "--sort=refname", "--format=%(refname) %(symref)", *names).splitlines():
        ref, _, target = os.fsdecode(line).partition(" ")
        defaults.setdefault(ref.split("/")[2], target or ref)
    default = defaults.get("origin") or (next(iter(defaults.values())) if len(defaults) == 1 else None)
    return list(dict.fromkeys([*map(os.fsdecode, upstream), *([default] if default else [])]))


def _files(folder: Path, tree: str, recursive: bool) -> dict[str, str]:
    """The paths of the .py files in a tree, and their blobs."""
    files = {}
    listed = _git(folder, "ls-tree", "-z", "--full-tree", *(["-r"] if recursive else []), tree)
    for entry in os.fsdecode(listed).split("\0"):
        attributes, _, name = entry.partition("\t")
        if attributes.startswith("100") and name.endswith(".py"):
            files[name] = attributes.split()[2]
    return files


def _sources(folder: Path, blobs: set[str]) -> dict[str, str]:
    """The contents of blobs; none in a partial clone, which may have to fetch them."""
    if not blobs or _git(folder, "config", "--get-regexp", r"^(extensions\.partialclone|remote\..*\.promisor)$"):
        return {}
    sources = {}
    output = io.BytesIO(_git(folder, "cat-file", "--batch", stdin="".join(f"{blob}\n" for blob in blobs).encode()))
    while header := output.readline():
        blob, *kind = header.decode().split()
        if len(kind) == 2:  # else it is `missing`
            sources[blob] = output.read(int(kind[1])).decode(errors="replace")
            output.read(1)
    return sources


def _printable(name: str) -> str:
    return os.fsencode(name).decode(errors="replace")


def _git(folder: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    """What git prints, or nothing; its own variables are unset, because a hook's name another repository."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    offline = {"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
    command = ["git", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(
            command, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=inherited | offline, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return b""
    return b"" if result.returncode else result.stdout
