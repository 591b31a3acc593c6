"""What a tag releases: the chart, and an image with its requirements, in a registry, signed.

    python -m tools.release check       the tag, the chart's version and the CHANGELOG agree
    python -m tools.release build       in the folder dist/release: the image, its SBOMs, and the chart's package
    python -m tools.release publish     push, sign and attest them; a published version is never replaced

The steps of .github/workflows/release.yaml; docs/releases.md says what a user finds, and how to verify it. Environment:
GITHUB_* and RUNNER_ENVIRONMENT as in a workflow; DEFAULT_BRANCH, REGISTRY and PLATFORMS (comma-separated) as in that
file; if needed, DOCKER_BUILD_OPTIONS (a mirror: see Dockerfile) and COSIGN_OPTIONS (a key; else the signer is the
workflow's identity).

The chart's package is the same, to the byte, whoever builds it from the commit: by the pinned Helm, with its date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import yaml

from tools.binaries import find_or_build
from tools.checkout import git
from tools.paths import CHART, ROOT
from tools.steps import remove, run

NAME = CHART.name
DIST = ROOT / "dist/release"
PROVENANCE = DIST / "provenance.json"
# https://keepachangelog.com/en/1.1.0/ and Artifact Hub have the same kinds.
KINDS = ("added", "changed", "deprecated", "removed", "fixed", "security")


class Change(TypedDict):
    kind: str
    description: str


def check() -> None:
    """Raises RuntimeError with a line for each reason why the tag is not released."""
    chart, tag = _chart_metadata(), _setting("GITHUB_REF_NAME")
    version, app = str(chart["version"]), str(chart["appVersion"])
    problems = []
    if tag != f"{NAME}-{version}":
        problems.append(
            f"the tag is {tag}, and Chart.yaml has version {version}: set the tag {NAME}-{version}, or bump it"
        )
    if app != version:
        problems.append(f"Chart.yaml has version {version} and appVersion {app}: set both to the same")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        problems.append(f"Chart.yaml has version {version}: only MAJOR.MINOR.PATCH is released")
    problems += _changelog_problems(version)
    if changed := git("status", "--porcelain"):
        names = ", ".join(line.split(maxsplit=1)[1] for line in changed.splitlines())
        problems.append(f"the checkout has changes: commit or remove them: {names}")
    if not git("tag", "--list", tag):
        problems.append(f"git has no tag {tag}: git fetch --tags, or git tag {tag}")
    elif git("rev-parse", f"{tag}^{{commit}}") != git("rev-parse", "HEAD"):
        problems.append(f"{tag} is another commit than the one that is checked out: git checkout {tag}")
    branch = f"origin/{_setting('DEFAULT_BRANCH')}"
    try:
        git("merge-base", "--is-ancestor", "HEAD", branch)
    except RuntimeError:
        problems.append(f"the commit is not on {branch}: merge it first, then tag what is merged")
    released = re.findall(rf"^{NAME}-(\d+\.\d+\.\d+)$", git("tag", "--list"), re.M)
    newer = [each for each in released if tag != f"{NAME}-{each}" and _order(each) >= _order(version)]
    if newer:
        problems.append(
            f"{', '.join(newer)} is already released, and {version} is not newer: bump version in Chart.yaml"
        )
    if problems:
        raise RuntimeError("\nerror: ".join(problems))
    print(f"{tag}: commit {git('rev-parse', 'HEAD')}, {len(changes(version))} changes in CHANGELOG.md")


def _changelog_problems(version: str) -> list[str]:
    text = (ROOT / "CHANGELOG.md").read_text()
    problems = []
    if not re.search(r"^## \[Unreleased\]$", text, re.M):
        problems.append("CHANGELOG.md has no section `## [Unreleased]`: add it above the others")
    if not _section(version):
        problems.append(
            f"CHANGELOG.md has no section `## [{version}] - YYYY-MM-DD`: move what is released from [Unreleased] to it"
        )
    elif not changes(version):
        problems.append(f"CHANGELOG.md, section [{version}]: it lists no change")
    kinds = {change["kind"] for change in changes(version)}
    if others := sorted(kinds - set(KINDS)):
        problems.append(f"CHANGELOG.md, section [{version}]: {', '.join(others)} is none of {', '.join(KINDS)}")
    return problems


def changes(version: str) -> list[Change]:
    """The entries of a version's section in CHANGELOG.md."""
    found: list[Change] = []
    for heading, entries in re.findall(r"^### (.+)\n((?:(?!### ).*\n?)*)", _section(version), re.M):
        for entry in re.findall(r"^- (.+(?:\n  .+)*)", entries, re.M):
            found.append({"kind": heading.strip().lower(), "description": " ".join(entry.split())})
    return found


def _section(version: str) -> str:
    """A released version's section in CHANGELOG.md, with its heading; empty if there is none."""
    text = (ROOT / "CHANGELOG.md").read_text()
    found = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n.*?(?=^## |\Z)", text, re.M | re.S)
    return found[0] if found else ""


def _order(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def build() -> None:
    """Build everything from the commit, not from the checkout. Raises RuntimeError if a platform is missing."""
    remove(DIST)
    source, image = DIST / "source", DIST / "image"
    source.mkdir(parents=True)
    git("archive", f"--output={DIST / 'source.tar'}", "HEAD")
    run(["tar", "--extract", f"--file={DIST / 'source.tar'}", f"--directory={source}"])
    remove(DIST / "source.tar")
    _build_image(source, image)
    documents = json.loads(run([find_or_build("osv-scalibr"), image, NAME]))
    for platform, document in documents.items():
        packages = len(document["components"])
        print(f"image for {platform}: {document['metadata']['component']['version']}, {packages} packages")
        _write(_sbom(platform), document)
    if missing := sorted(set(_platforms()) - set(documents)):
        raise RuntimeError(f"the image lacks {', '.join(missing)}, which PLATFORMS names: nothing can be published")
    package = _package(source / CHART.relative_to(ROOT))
    remove(source)
    print(f"chart: {package.name}, {_digest(package.read_bytes())}")


def _build_image(source: Path, layout: Path) -> None:
    """Build the image with docker, and save it as an OCI layout."""
    tag = f"{NAME}:{_version()}"
    labels = {"source": _repository(), "revision": git("rev-parse", "HEAD"), "version": _version()}
    options = [f"--label=org.opencontainers.image.{name}={value}" for name, value in labels.items()]
    # An attestation of BuildKit's would be one more manifest, of the platform unknown/unknown.
    options += ["--provenance=false", f"--platform={_setting('PLATFORMS')}", f"--tag={tag}"]
    options += shlex.split(os.environ.get("DOCKER_BUILD_OPTIONS", ""))
    command: list[str | Path] = ["docker", "build", *options, source]
    try:
        run(command, f"building the image for {_setting('PLATFORMS')}", env=os.environ | {"DOCKER_BUILDKIT": "1"})
    except RuntimeError as error:
        raise RuntimeError(
            f"docker cannot build the image for {_setting('PLATFORMS')}: several platforms require containerd's image "
            f"store, and another than the machine's own requires QEMU:\n{error}"
        ) from error
    layout.mkdir()
    run(["docker", "save", f"--output={DIST / 'image.tar'}", tag])
    run(["tar", "--extract", f"--file={DIST / 'image.tar'}", f"--directory={layout}"])
    remove(DIST / "image.tar")


def _package(chart: Path) -> Path:
    """Package the chart, with Artifact Hub's annotations of this release; return the package."""
    metadata = yaml.safe_load((chart / "Chart.yaml").read_text())
    released = changes(_version())
    images = yaml.safe_load(metadata["annotations"]["artifacthub.io/images"])
    images.append({"name": NAME, "image": f"{_image()}:{_version()}", "platforms": _platforms()})
    metadata["annotations"] |= {
        "artifacthub.io/changes": yaml.safe_dump(released, sort_keys=False),
        "artifacthub.io/containsSecurityUpdates": json.dumps(any(change["kind"] == "security" for change in released)),
        "artifacthub.io/images": yaml.safe_dump(images, sort_keys=False),
    }
    (chart / "Chart.yaml").write_text(yaml.safe_dump(metadata, sort_keys=False))
    _date(chart / "Chart.yaml")
    run([_helm(), "package", chart, "--destination", DIST])
    return _package_file()


def _date(path: Path) -> None:
    """Give a file the commit's date, as `git archive` does."""
    time = int(git("log", "-1", "--format=%ct"))
    os.utime(path, (time, time))


def _package_file() -> Path:
    return DIST / f"{NAME}-{_version()}.tgz"


def _provenance() -> dict[str, Any]:
    """SLSA provenance, v1: https://slsa-framework.github.io/github-actions-buildtypes/workflow/v1"""
    repository, ref, workflow = _repository(), _setting("GITHUB_REF"), _setting("GITHUB_WORKFLOW_REF")
    path = workflow.partition("@")[0].removeprefix(f"{_setting('GITHUB_REPOSITORY')}/")
    names = ("GITHUB_EVENT_NAME", "GITHUB_REPOSITORY_ID", "GITHUB_REPOSITORY_OWNER_ID", "RUNNER_ENVIRONMENT")
    run_id, attempt = _setting("GITHUB_RUN_ID"), _setting("GITHUB_RUN_ATTEMPT")
    return {
        "buildDefinition": {
            "buildType": "https://slsa-framework.github.io/github-actions-buildtypes/workflow/v1",
            "externalParameters": {"workflow": {"ref": ref, "repository": repository, "path": path}},
            "internalParameters": {"github": {name.lower().removeprefix("github_"): _setting(name) for name in names}},
            "resolvedDependencies": [
                {"uri": f"git+{repository}@{ref}", "digest": {"gitCommit": git("rev-parse", "HEAD")}}
            ],
        },
        "runDetails": {
            "builder": {"id": f"{_setting('GITHUB_SERVER_URL')}/{workflow}"},
            "metadata": {"invocationId": f"{repository}/actions/runs/{run_id}/attempts/{attempt}"},
        },
    }


def publish() -> None:
    """Push, sign and attest what `build` has built. Raises RuntimeError if the version has other content already.

    The image gets its tag at the end, and the chart is the same in each run: a failed run can be repeated.
    """
    version, package = _version(), _package_file()
    if not package.exists():
        raise RuntimeError(f"{package.relative_to(ROOT)} is missing: run python -m tools.release build")
    manifest = json.loads((DIST / "image/index.json").read_text())["manifests"][0]
    image, chart = f"{_image()}@{manifest['digest']}", f"{_registry()}/charts/{NAME}"
    _refuse_to_replace(f"{_image()}:{version}", manifest["digest"])
    _refuse_to_replace(f"{chart}:{version}", _digest(package.read_bytes()))
    _write(PROVENANCE, _provenance())
    _crane("push", DIST / "image", image)
    _sign(image)
    for platform in _platforms():
        _attest(image, "cyclonedx", _sbom(platform))
    _attest(image, "slsaprovenance1", PROVENANCE)
    digest = _push_chart(package)
    _sign(f"{chart}@{digest}")
    _attest(f"{chart}@{digest}", "slsaprovenance1", PROVENANCE)
    _crane("tag", image, version)
    print(f"chart  {chart}:{version}@{digest}\nimage  {_image()}:{version}@{manifest['digest']}")


def _push_chart(package: Path) -> str:
    """Push the chart's package; return the digest of its manifest."""
    _date(package)  # the manifest has it, in this time zone
    command: list[str | Path] = [_helm(), "push", package, f"oci://{_registry()}/charts"]
    printed = run(command, env=os.environ | {"TZ": "UTC"})
    found = re.search(r"^Digest: (sha256:\w+)$", printed, re.M)
    if not found:
        raise RuntimeError(f"helm push printed no digest: {printed}")
    return found[1]


def _refuse_to_replace(reference: str, content: str) -> None:
    """Raise RuntimeError if the registry has the reference, and neither its manifest nor a layer is this content."""
    try:
        manifest = _crane("manifest", reference)
    except RuntimeError as error:
        if re.search(r"MANIFEST_UNKNOWN|NAME_UNKNOWN|404 Not Found", str(error)):
            return
        raise
    layers = [layer["digest"] for layer in json.loads(manifest).get("layers", [])]
    if content not in [_digest(manifest.encode()), *layers]:
        raise RuntimeError(f"{reference} is already published, with other content: release a new version")


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _sign(reference: str) -> None:
    _cosign("sign", reference)


def _attest(reference: str, kind: str, predicate: Path) -> None:
    _cosign("attest", f"--type={kind}", f"--predicate={predicate}", reference)


def _cosign(command: str, *arguments: str) -> None:
    options = shlex.split(os.environ.get("COSIGN_OPTIONS", ""))
    run([find_or_build("cosign"), command, "--yes", *options, *arguments])


def _helm() -> Path:
    """The one that go.mod pins: another one's package of the same files may differ."""
    return find_or_build("helm", pinned=True)


def _crane(*arguments: str | Path) -> str:
    return run([find_or_build("crane"), *arguments])


def _setting(name: str) -> str:
    if value := os.environ.get(name):
        return value
    raise RuntimeError(f"{name} is not set: .github/workflows/release.yaml has its value; see docs/releases.md")


def _platforms() -> list[str]:
    return _setting("PLATFORMS").split(",")


def _repository() -> str:
    return f"{_setting('GITHUB_SERVER_URL')}/{_setting('GITHUB_REPOSITORY')}"


def _image() -> str:
    return f"{_registry()}/{NAME}"


def _registry() -> str:
    """Registries refuse capitals, which an owner's name may have."""
    return _setting("REGISTRY").lower()


def _sbom(platform: str) -> Path:
    return DIST / f"{platform.replace('/', '-')}.cdx.json"


def _version() -> str:
    return str(_chart_metadata()["version"])


def _chart_metadata() -> dict[str, Any]:
    metadata: dict[str, Any] = yaml.safe_load((CHART / "Chart.yaml").read_text())
    return metadata


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


def main() -> None:
    steps = {"check": check, "build": build, "publish": publish}
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=__doc__.partition("\n")[0])
    parser.add_argument("step", choices=steps)
    try:
        steps[parser.parse_args().step]()
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
