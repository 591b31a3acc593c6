"""`make bundle`: everything that deploying in a restricted network needs, in one archive.

It is dist/hcm-db-migrations-<version>-bundle.tar, with HEAD's history, chart, images and wheels, SHA256SUMS, and
docs/restricted-network.md as its README.md, which says how to use it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from tools.checkout import git, location
from tools.cluster import NAME, PUBLIC_IMAGES, ClusterKind, Provider, select_engine
from tools.fixtures import python_version, wheels_for
from tools.network import SETTINGS
from tools.offline_cluster import engine, images
from tools.paths import BIN, CHART, ROOT
from tools.steps import UnavailableError, interrupt_on_signals, locked, log, run

DIST = ROOT / "dist"
PAGE = ROOT / "docs/restricted-network.md"
MACHINES = ["x86_64", "aarch64"]
# pip in the Dockerfile's build: the wheels of this bundle, and no index.
PIP_CONF = "[global]\nno-index = true\nfind-links = /wheels\n"


def create() -> Path:
    """Write the archive, print what it contains, and return its path.

    Raises UnavailableError if the checkout or the machine cannot provide the content, RuntimeError if a step fails,
    and OSError if the archive cannot be written; then there is no archive, or an earlier one.
    """
    _, path = location()
    _check_checkout()
    version: str = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    DIST.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=DIST) as folder, _engine() as provider:
        content = Path(folder, f"{NAME}-{version}-bundle")
        content.mkdir()
        _add_wheels(content / "wheels", provider)
        lines = _add_images(content / "images", content / "wheels", provider, version)
        run([BIN / "helm", "package", CHART, "--destination", content])
        branch = git("branch", "--show-current")
        git("bundle", "create", "--quiet", content / f"{NAME}.bundle", "HEAD", *([branch] if branch else []))
        (content / "README.md").write_text(_page(version, path))
        checksum = _add_checksums(content)
        archive = Path(folder, f"{content.name}.tar")
        _pack(content, archive)
        result = archive.replace(DIST / archive.name)
    print(f"{result.relative_to(ROOT)}: {result.stat().st_size / 1e6:.0f} MB, commit {git('rev-parse', 'HEAD')}")
    print(*lines, f"SHA256SUMS: sha256 {checksum}", sep="\n")
    return result


def _check_checkout() -> None:
    """Raise UnavailableError unless HEAD is what would be deployed, with its history."""
    if git("rev-parse", "--is-shallow-repository") == "true":
        raise UnavailableError(
            "this checkout is shallow, and no server accepts a push of a partial history: git fetch --unshallow"
        )
    tracked = git("status", "--porcelain", "--untracked-files=no", "--", ROOT)
    if changed := tracked or git("status", "--porcelain", "--", CHART):
        name = changed.splitlines()[0].split(maxsplit=1)[1]
        raise UnavailableError(f"not committed, so not in the bundle: {name}; commit it, or git stash")


def _page(version: str, path: str) -> str:
    """The page of the bundle: its values are for the project's folder in the repository, its links lead to the clone
    that it makes.
    """
    page = PAGE.read_text().replace("<version>", version).replace('path: "."', f'path: "{path or "."}"')
    return page.replace("](../", f"](code/{path}/" if path else "](code/")


@contextlib.contextmanager
def _engine() -> Iterator[Provider]:
    """The container engine; the private one is stopped again unless it was running."""
    with locked("cluster"):
        was_running = engine.running()
        try:
            provider, reason = select_engine(PUBLIC_IMAGES["git_sync"])
        except UnavailableError as error:
            raise UnavailableError(f"cannot get the images: {error}") from None
        if reason:
            log(f"images: those of the tests' cluster, for a try only, because {reason}")
        else:
            log("images: public ones, because the container engine on this machine can pull them")
        try:
            yield provider
        finally:
            if reason and not was_running:
                engine.stop()


def _add_wheels(folder: Path, provider: Provider) -> None:
    """The wheels for the chart's default Python, the Dockerfile's, and that of the image that is built here."""
    found = re.search(r"^ARG PYTHON=(\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    if not found:
        raise RuntimeError("the Dockerfile has no line ARG PYTHON=<image>")
    versions = sorted(
        {python_version(image) for image in (PUBLIC_IMAGES["python"], found[1], provider.images["python"])}
    )
    folder.mkdir()
    with ThreadPoolExecutor() as pool:
        for wheels in pool.map(_wheels, *zip(*itertools.product(versions, MACHINES), strict=True)):
            for wheel in wheels.iterdir():
                shutil.copy(wheel, folder)


def _wheels(version: str, machine: str) -> Path:
    try:
        return wheels_for(version, machine)
    except RuntimeError as error:
        # After the error and its causes, which may be wrapped, uv prints hints for its command line.
        text = str(error).partition("\nhint: ")[0]
        reason = " ".join(re.split(r"^(?:error|ERROR): ", text, flags=re.MULTILINE)[-1].split())
        raise RuntimeError(
            f"no wheels of requirements.txt for Python {version} on {machine}: {reason} ({SETTINGS})"
        ) from error


def _add_images(folder: Path, wheels: Path, provider: Provider, version: str) -> list[str]:
    """git-sync, and the Dockerfile's image with these wheels; return a line about each."""

    def docker(*arguments: str | Path, what: str = "", expected: str = "") -> str:
        environment = provider.environment | {"DOCKER_BUILDKIT": "1"}
        return run(["docker", *arguments], what, expected, env=environment).strip()

    folder.mkdir()
    base = ["--pull"]
    if provider.kind is ClusterKind.LOCAL_BUILD:
        images.build_job_images()
        base = [f"--build-arg=PYTHON={provider.images['python']}"]
    own = f"{NAME}:{version}"
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as configuration:
        configuration.write(PIP_CONF)
        configuration.flush()
        options = [f"--build-context=wheels={wheels}", f"--secret=id=pip.conf,src={configuration.name}", *base]
        # An attestation would be one more manifest.
        options += ["--provenance=false", "--progress=plain", "--network=none", f"--tag={own}"]
        docker("build", *options, ROOT, what=f"building {own}", expected="15 s")
    lines = []
    # Since Docker 28: containerd's image store may have several platforms of an image.
    selects_platform = tuple(map(int, docker("version", "--format={{.Client.APIVersion}}").split("."))) >= (1, 48)
    for name, image in (("git-sync", provider.images["git_sync"]), (NAME, own)):
        file = folder / f"{name}.tar"
        inspected = docker("image", "inspect", '--format={{.Os}}/{{.Architecture}} {{join .RepoDigests " "}}', image)
        options = [f"--platform={inspected.partition(' ')[0]}"] if selects_platform else []
        docker("save", *options, "--output", file, image, what=f"saving {image}", expected="10 s")
        lines.append(f"{folder.name}/{file.name}: {image}, manifest {_manifest(file)}, {inspected}".rstrip())
    return lines


def _manifest(file: Path) -> str:
    """The digest of the image's manifest in an OCI layout.

    With containerd's image store, the layout has the index of all platforms, and the manifest of the one that is there.
    """
    with tarfile.open(file) as layout:
        members = {member.name: member for member in layout}

        def manifests(name: str) -> list[dict[str, Any]]:
            opened = layout.extractfile(members[name]) if name in members else None
            if not opened:
                raise UnavailableError("docker save writes no OCI layout: Docker 25 or newer does")
            found: list[dict[str, Any]] = json.load(opened)["manifests"]
            return found

        (found,) = manifests("index.json")
        while "index" in found["mediaType"] or "manifest.list" in found["mediaType"]:
            found = next(each for each in manifests(_blob(found)) if _blob(each) in members)
        return str(found["digest"])


def _blob(descriptor: dict[str, Any]) -> str:
    return f"blobs/{descriptor['digest'].replace(':', '/')}"


def _add_checksums(content: Path) -> str:
    """Write SHA256SUMS of all files, for `sha256sum --check`; return its own checksum."""
    files = sorted(path for path in content.rglob("*") if path.is_file())
    lines = [f"{_sha256(path)}  {path.relative_to(content)}\n" for path in files]
    (content / "SHA256SUMS").write_text("".join(lines))
    return _sha256(content / "SHA256SUMS")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _pack(content: Path, archive: Path) -> None:
    """Write the folder as an archive; it shows nothing of this machine."""
    date = int(git("show", "--no-patch", "--format=%ct", "HEAD"))

    def normalized(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mtime, member.mode = date, 0o755 if member.isdir() else 0o644
        return member

    with tarfile.open(archive, "w") as output:
        output.add(content, content.name, filter=normalized)


def main() -> None:
    interrupt_on_signals()
    try:
        create()
    except RuntimeError as error:
        first, *others = str(error).strip().splitlines()
        sys.exit(f"FAILED: {': '.join([first, *others[-1:]])}")
    except OSError as error:
        sys.exit(f"FAILED: {error.filename2 or error.filename or DIST}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
