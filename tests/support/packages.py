"""Programs that are not on PyPI, and neither built nor installed."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import pytest

from tools import debian
from tools.paths import CACHE
from tools.steps import UnavailableError, cached


def debian_program(name: str) -> tuple[Path, dict[str, str]]:
    """A program and its environment: from PATH, else from Debian's package of that name, in the cache.

    Skips the test if there is neither.
    """
    if path := shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin"):
        return Path(path), {}
    try:
        release = platform.freedesktop_os_release()
        folder = cached(
            CACHE / f"{name}-{release.get('VERSION_ID', '')}-{release['ID']}",
            lambda partial: debian.extract(partial, [name], f"downloading Debian's package {name} into the cache"),
        )
    except (UnavailableError, RuntimeError, OSError) as error:
        pytest.skip(f"{name} is not available: {error}; install it")
    (program,) = folder.glob(f"usr/*bin/{name}")
    libraries = [str(path) for path in folder.glob("usr/lib/*-linux-gnu")]
    return program, {"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {}
