"""A package index as a compromised mirror would be: without the wheel of a package, with its genuine source, and with
its own `setuptools`, which pip would run to build the package.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.pod_scripts import make_wheel
from tests.support.servers import serving

BUILD_SYSTEM = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
# Without any build dependency: the code that builds the package is in its source.
IN_TREE = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
# Leaves a mark as soon as it is imported. What it builds is the wheel in the source.
BACKEND = """
import os, pathlib, shutil

pathlib.Path(os.environ["HOME"], "code-of-the-index-ran").write_text(os.environ.get("DB_PASSWORD", ""))

def build_wheel(folder, config_settings=None, metadata_directory=None):
    (wheel,) = pathlib.Path().glob("*.whl")
    return pathlib.Path(shutil.copy(wheel, folder)).name
"""


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class HostileIndex:
    """`url` is for PIP_INDEX_URL; `requirement` is the package with the hash of its genuine source.

    The others are URLs of that source, of one that builds itself, and of one with a setup.py only.
    """

    url: str
    requirement: str
    source: str
    in_tree: str
    setup_py: str
    home: Path

    @property
    def ran(self) -> bool:
        """Whether code of the index ran with this HOME."""
        return (self.home / "code-of-the-index-ran").exists()


@contextmanager
def hostile_index(folder: Path, home: Path, name: str, files: dict[str, str]) -> Iterator[HostileIndex]:
    """Serve version 0.0.1 of a package with these files, in `folder`, on the loopback interface."""
    folder.mkdir()
    made_of = {
        name: {"pyproject.toml": BUILD_SYSTEM},
        "in_tree": {"pyproject.toml": IN_TREE, "backend.py": BACKEND},
        "setup_py": {"setup.py": BACKEND},
    }
    for package, parts in made_of.items():
        source = folder / f"{package}-0.0.1"
        source.mkdir()
        make_wheel(source, package, files)
        parts["PKG-INFO"] = f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n"
        for part, text in parts.items():
            (source / part).write_text(text)
        with tarfile.open(folder / f"{source.name}.tar.gz", "w:gz") as archive:
            archive.add(source, source.name)
        shutil.rmtree(source)
    make_wheel(folder, "setuptools", {"setuptools/__init__.py": "", "setuptools/build_meta.py": BACKEND})
    for file in [path for path in folder.iterdir() if path.is_file()]:
        page = folder / "simple" / re.sub(r"[-_.]+", "-", file.name.split("-")[0])
        page.mkdir(parents=True)
        (page / "index.html").write_text(f'<a href="/{file.name}">{file.name}</a>')
    digest = hashlib.sha256((folder / f"{name}-0.0.1.tar.gz").read_bytes()).hexdigest()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
    address = f"http://127.0.0.1:{server.server_port}"
    requirement = f"{name}==0.0.1 --hash=sha256:{digest}"
    source_url, in_tree, setup_py = (f"{address}/{package}-0.0.1.tar.gz" for package in made_of)
    with serving(server):
        yield HostileIndex(f"{address}/simple/", requirement, source_url, in_tree, setup_py, home)
