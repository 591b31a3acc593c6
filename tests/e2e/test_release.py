"""A release: the steps of .github/workflows/release.yaml on a registry on loopback, then what docs/releases.md says.

Only what the workflow's runner has is different: the registry, a key instead of the workflow's identity, and one
platform, the engine's own.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import servers
from tests.support.chart import MINIMAL, Helm, migrate
from tests.support.cluster import Shared
from tests.support.database import Database
from tests.support.documents import block
from tests.support.git import git
from tests.support.kubernetes import TABLE, Api
from tests.support.packages import debian_program
from tests.support.programs import Result, run, start
from tests.support.release import Release
from tests.support.waiting import until
from tools.binaries import find_or_build
from tools.cluster import NAME, Cluster
from tools.network import free_port, is_listening
from tools.paths import BIN, CACHE, CHART, ROOT

pytestmark = pytest.mark.timeout(1200)  # cosign is built first, once
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/release.yaml").read_text())
STEPS = [each["run"] for job in WORKFLOW["jobs"].values() for each in job["steps"] if "run" in each]
METADATA = yaml.safe_load((CHART / "Chart.yaml").read_text())
VERSION = METADATA["version"]
TAG = f"{NAME}-{VERSION}"
_DOCUMENTED = re.fullmatch(
    r"(VERSION=.*\"\)\n)(DIGEST=.*\n)(helm upgrade .*\n)", block("--certificate-oidc-issuer="), re.S
)
assert _DOCUMENTED
VARIABLES, VERIFY, INSTALL = _DOCUMENTED.groups()
SECTION = f"## [{VERSION}] - 2026-11-27\n"
ENTRIES = "\n### Added\n\n- Something: with a colon,\n  and a second line.\n\n### Security\n\n- A fix.\n\n"
CHANGES = [
    {"kind": "added", "description": "Something: with a colon, and a second line."},
    {"kind": "security", "description": "A fix."},
]
GITHUB = {
    "GITHUB_EVENT_NAME": "push",
    "GITHUB_REF": f"refs/tags/{TAG}",
    "GITHUB_REF_NAME": TAG,
    "GITHUB_REPOSITORY": "example/schema",
    "GITHUB_REPOSITORY_ID": "1",
    "GITHUB_REPOSITORY_OWNER_ID": "2",
    "GITHUB_RUN_ATTEMPT": "1",
    "GITHUB_RUN_ID": "3",
    "GITHUB_SERVER_URL": "https://github.com",
    "GITHUB_WORKFLOW_REF": f"example/schema/.github/workflows/release.yaml@refs/tags/{TAG}",
    "RUNNER_ENVIRONMENT": "github-hosted",
}


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    """A repository with this checkout's files, and a section of the version in its CHANGELOG; other tags are older, or
    not of this chart.
    """
    folder, origin = tmp_path / "clone", tmp_path / "origin.git"
    for name in git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    before = (folder / "CHANGELOG.md").read_text().partition("## [")[0]
    (folder / "CHANGELOG.md").write_text(f"{before}## [Unreleased]\n\n{SECTION}{ENTRIES}")
    os.utime(folder / "requirements-dev.txt", (0, 0))  # older than what it was installed from
    git(tmp_path, "init", "--quiet", "--bare", origin)
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "remote", "add", "origin", origin)
    commit(folder)
    git(folder, "push", "--quiet", "origin", "main")
    for tag in (f"{NAME}-0.0.1", "v9.9.9", f"other-{NAME}-9.9.9"):
        git(folder, "tag", tag)
    (folder / ".git/info/exclude").write_text("/.venv\n")
    (folder / ".venv").symlink_to(BIN.parent)
    yield folder
    shutil.rmtree(folder / "dist", ignore_errors=True)  # 300 MB, which pytest would keep


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message=test")


def step(folder: Path, name: str, environment: dict[str, str]) -> Result:
    """Run the one step of the workflow whose command ends with this name."""
    command = next(each for each in STEPS if each.endswith(f" {name}"))
    result = run(["bash", "-e", "-c", command], cwd=folder, env=environment, verbatim=True, seconds=400)
    assert "Traceback" not in result.text, result.text
    return result


def refused(result: Result) -> list[str]:
    """The lines that say why a step failed."""
    assert result.returncode == 1, result.text
    return [line.removeprefix("error: ") for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_a_tag_that_does_not_fit_the_chart_or_the_changelog_is_refused(clone: Path) -> None:
    chart, changelog = clone / "charts" / NAME / "Chart.yaml", clone / "CHANGELOG.md"

    def check(tag: str = TAG) -> Result:
        return step(clone, "check", {**os.environ, "GITHUB_REF_NAME": tag, "DEFAULT_BRANCH": "main"})

    def replace(path: Path, old: str, new: str) -> list[str]:
        """The problems with this replacement, which is undone."""
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        tag_commit()
        problems = refused(check())
        path.write_text(text)
        tag_commit()
        return problems

    def tag_commit() -> None:
        commit(clone)
        git(clone, "push", "--quiet", "origin", "main")
        git(clone, "tag", "--force", TAG)

    assert refused(check()) == [f"git has no tag {TAG}: git fetch --tags, or git tag {TAG}"]
    tag_commit()
    passed = check()
    assert passed.returncode == 0, passed.text
    assert re.fullmatch(rf"{TAG}: commit [0-9a-f]{{40}}, 2 changes in CHANGELOG.md\n", passed.stdout)
    git(clone, "tag", f"{NAME}-0.0.9")
    assert refused(check(f"{NAME}-0.0.9")) == [
        f"the tag is {NAME}-0.0.9, and Chart.yaml has version {VERSION}: set the tag {TAG}, or bump it",
        f"{VERSION} is already released, and {VERSION} is not newer: bump version in Chart.yaml",
    ]
    assert refused(step(clone, "check", {**os.environ, "GITHUB_REF_NAME": "", "DEFAULT_BRANCH": "main"})) == [
        "GITHUB_REF_NAME is not set: .github/workflows/release.yaml has its value; see docs/releases.md"
    ]
    assert replace(chart, f"appVersion: {VERSION}", "appVersion: 9.9.9") == [
        f"Chart.yaml has version {VERSION} and appVersion 9.9.9: set both to the same"
    ]
    section = f"CHANGELOG.md, section [{VERSION}]:"
    assert replace(changelog, SECTION, f"## [{VERSION}]\n") == [
        f"CHANGELOG.md has no section `## [{VERSION}] - YYYY-MM-DD`: move what is released from [Unreleased] to it"
    ]
    assert replace(changelog, "## [Unreleased]\n", "") == [
        "CHANGELOG.md has no section `## [Unreleased]`: add it above the others"
    ]
    assert replace(changelog, ENTRIES, "") == [f"{section} it lists no change"]
    assert replace(changelog, "### Security", "### Faster") == [
        f"{section} faster is none of added, changed, deprecated, removed, fixed, security"
    ]
    (clone / "new").touch()
    assert refused(check()) == ["the checkout has changes: commit or remove them: new"]
    (clone / "new").unlink()
    commit(clone)
    git(clone, "tag", "--force", TAG)
    assert refused(check()) == ["the commit is not on origin/main: merge it first, then tag what is merged"]
    git(clone, "push", "--quiet", "origin", "main")
    git(clone, "tag", "--force", TAG, "HEAD~1")
    git(clone, "tag", f"{NAME}-10.0.0")
    assert refused(check()) == [
        f"{TAG} is another commit than the one that is checked out: git checkout {TAG}",
        f"10.0.0 is already released, and {VERSION} is not newer: bump version in Chart.yaml",
    ]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """The certificate of a server on 127.0.0.1; its key is beside it."""
    return servers.certificate(tmp_path / "server.crt", "registry", "subjectAltName=IP:127.0.0.1")


@contextmanager
def serve(folder: Path, **tls: str) -> Iterator[str]:
    """A registry with what is in the folder; yields its address."""
    address = f"127.0.0.1:{free_port()}"
    configuration = {
        "version": "0.1",
        "log": {"accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder)}},
        "http": {"addr": address, "tls": tls},
    }
    file = folder.with_name(f"{address}.yaml")
    file.write_text(yaml.safe_dump(configuration))
    server = start([debian_program("docker-registry")[0], "serve", file], is_evidence=False)
    until(lambda: is_listening(int(address.partition(":")[2])) or not server.running)
    assert server.running, server.output
    yield address
    server.kill()


@pytest.fixture
def registry(tmp_path: Path, certificate: Path) -> Iterator[str]:
    """The address of an empty registry with TLS."""
    files = {"certificate": str(certificate), "key": str(certificate.with_suffix(".key"))}
    with serve(tmp_path / "registry", **files) as address:
        yield address
    shutil.rmtree(tmp_path / "registry", ignore_errors=True)


@pytest.fixture
def plain_registry(tmp_path: Path) -> Iterator[str]:
    """The same registry for Helm 3, which uses no TLS on loopback."""
    with serve(tmp_path / "registry") as address:
        yield address


@pytest.fixture
def environment(tmp_path: Path, cluster: Cluster, shared: Shared, registry: str, certificate: Path) -> dict[str, str]:
    """The environment of the workflow's steps and of a user's commands."""
    if not shared.preinstalled_image:
        pytest.skip("builds an image, which requires a kind cluster of the tests: omit --kubeconfig")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("cosign", "crane", "helm"):
        (programs / name).symlink_to(find_or_build(name))
    found = cluster.engine_environment()
    found |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(CACHE.parent), "SSL_CERT_FILE": str(certificate)}
    found |= {"PATH": f"{programs}:{found['PATH']}", "COSIGN_PASSWORD": ""}
    for name in ("cosign", "other"):
        run(["cosign", "generate-key-pair", f"--output-key-prefix={name}"], cwd=tmp_path, env=found, check=True)
    # No transparency log and no timestamp server.
    run(["cosign", "signing-config", "create", "--out=signing.json"], cwd=tmp_path, env=found, check=True)
    (tmp_path / "pip.conf").write_text(cluster.pip_configuration())
    secret = f"--secret=id=pip.conf,src={tmp_path}/pip.conf"
    replaced = {
        "PLATFORMS": cluster.docker("version", "--format", "{{.Server.Os}}/{{.Server.Arch}}").strip(),
        "REGISTRY": f"{registry}/Example",
        "DEFAULT_BRANCH": "main",
    }
    assert set(replaced) == set(WORKFLOW["env"])
    return {
        **found,
        **GITHUB,
        **replaced,
        "COSIGN_OPTIONS": f"--key={tmp_path}/cosign.key --signing-config={tmp_path}/signing.json",
        "DOCKER_BUILD_OPTIONS": f"--network=host --build-arg=PYTHON={cluster.images['python']} {secret}",
    }


def release_the_tag(clone: Path, environment: dict[str, str]) -> str:
    """Push the tag as documented, and run the workflow's steps; return what the last one printed."""
    run(
        ["bash", "-e", "-c", f"VERSION={VERSION}\n" + block('git push origin "hcm-db-migrations-$VERSION"')],
        cwd=clone,
        check=True,
    )
    assert git(clone, "ls-remote", "--tags", "origin", TAG)
    assert [each.rpartition(" ")[2] for each in STEPS] == ["venv", "check", "build", "venv", "publish"]
    for name in ("venv", "check", "build"):
        done = step(clone, name, environment)
        assert done.returncode == 0, done.text
    # A failed run can be repeated.
    (failure,) = refused(step(clone, "publish", {**environment, "COSIGN_OPTIONS": "--key=missing"}))
    assert "cosign sign --yes --key=missing" in failure
    done = step(clone, "publish", environment)
    assert done.returncode == 0, done.text
    return done.stdout


def documented(text: str, folder: Path, environment: dict[str, str], key: str = "cosign") -> Result:
    """Run documented commands with this test's registry, version and signer."""
    signer = f"--key={folder}/{key}.pub --insecure-ignore-tlog=true"
    first = f"VERSION={VERSION}\nREGISTRY={environment['REGISTRY'].lower()}\nSIGNER=({signer})\n"
    assert re.findall(r"^\w+=", VARIABLES, re.M) == re.findall(r"^\w+=", first, re.M)
    return run(["bash", "-e", "-c", first + text], cwd=folder, env=environment, verbatim=True)


def predicates(path: Path) -> list[dict[str, Any]]:
    """The statements of attestations that cosign has verified."""
    return [json.loads(base64.b64decode(json.loads(line)["payload"])) for line in path.read_text().splitlines()]


def test_the_documented_signer_is_the_workflow() -> None:
    path = "/.github/workflows/release.yaml@refs/tags/hcm-db-migrations-$VERSION"
    assert f"--certificate-identity={METADATA['home']}{path}" in VARIABLES
    owner = METADATA["home"].split("/")[3]
    assert WORKFLOW["env"]["REGISTRY"].replace("${{ github.repository_owner }}", owner) in VARIABLES


def test_a_tag_publishes_what_the_documents_say(
    clone: Path,
    environment: dict[str, str],
    tmp_path: Path,
    certificate: Path,
    plain_registry: str,
    helm4: Helm,
    releases: Callable[..., Release],
    namespaces: Callable[[], Api],
    database: Database,
) -> None:
    registry = environment["REGISTRY"].lower()
    verify = f"{VERIFY}echo ${{DIGEST:?not verified}}\n" + block("cosign verify-attestation --type=cyclonedx")
    published = release_the_tag(clone, environment)
    digests = dict(re.findall(rf"(\S+):{re.escape(VERSION)}@(sha256:[0-9a-f]{{64}})\n", published))
    assert set(digests) == {f"{registry}/charts/{NAME}", f"{registry}/{NAME}"}

    verified = documented(verify, tmp_path, environment)
    assert verified.returncode == 0, verified.text
    chart, image = digests[f"{registry}/charts/{NAME}"], digests[f"{registry}/{NAME}"]
    assert verified.stdout.splitlines()[0] == chart
    assert f'"docker-manifest-digest":"{image}"' in verified.stdout
    commit_id = git(clone, "rev-parse", f"{TAG}^{{commit}}")
    for name, subject in (("chart", f"{registry}/charts/{NAME}"), ("image", f"{registry}/{NAME}")):
        (statement,) = predicates(tmp_path / f"{name}-provenance.json")
        assert statement["subject"] == [{"name": subject, "digest": {"sha256": digests[subject].partition(":")[2]}}]
        assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
        (source,) = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
        assert source == {
            "uri": f"git+https://github.com/example/schema@refs/tags/{TAG}",
            "digest": {"gitCommit": commit_id},
        }
    (sbom,) = predicates(tmp_path / "image-sbom.json")
    component = sbom["predicate"]["metadata"]["component"]
    assert (component["name"], component["version"]) == (NAME, image)
    packages = {each["purl"].partition("?")[0] for each in sbom["predicate"]["components"]}
    pins = re.findall(r"^(alembic|sqlalchemy|psycopg2-binary)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert {f"pkg:pypi/{name}@{version}" for name, version in pins} <= packages
    assert any(purl.startswith("pkg:deb/debian/libc6@") for purl in packages)

    pulled = documented(block("helm pull "), tmp_path, environment)
    assert f"Digest: {chart}" in pulled.text
    assert_the_package_is_complete(tmp_path, registry, helm4)
    assert_it_installs(releases(namespaces(), 3), registry.replace(registry.partition("/")[0], plain_registry), chart)
    assert_it_installs(releases(namespaces(), 4), registry, chart, f"--ca-file={certificate}")
    assert (database.at, database.relations) == (["001"], TABLE)
    assert_nothing_is_replaced(clone, environment)
    assert_what_another_signed_is_rejected(clone, tmp_path, environment, verify)


def assert_the_package_is_complete(folder: Path, registry: str, helm4: Helm) -> None:
    """The chart as it was pulled, and the documented values, with the published image."""
    package = folder / f"{NAME}-{VERSION}.tgz"
    with tarfile.open(package) as archive:
        metadata = yaml.safe_load(archive.extractfile(f"{NAME}/Chart.yaml"))
    annotations = {name.removeprefix("artifacthub.io/"): text for name, text in metadata.pop("annotations").items()}
    assert metadata == {name: value for name, value in METADATA.items() if name != "annotations"}
    assert yaml.safe_load(annotations["changes"]) == CHANGES
    assert (annotations["containsSecurityUpdates"], annotations["prerelease"]) == ("true", "false")
    image = f"{registry}/{NAME}:{VERSION}"
    assert image in [each["image"] for each in yaml.safe_load(annotations["images"])]
    text = block("repository: ghcr.io/egovernments/hcm-db-migrations")
    replaced = {"ghcr.io/egovernments": registry, "<version>": VERSION, "<gitCommit>": "c" * 40, "<digest>": "d" * 64}
    for placeholder, replacement in replaced.items():
        text = text.replace(placeholder, replacement)
    values = yaml.safe_load(text)[NAME]
    objects = helm4.objects(values | {"git": MINIMAL["git"] | values["git"]}, chart=package)
    assert migrate(objects)["image"] == f"{image}@sha256:{'d' * 64}"


def assert_it_installs(release: Release, registry: str, digest: str, *options: str) -> None:
    """By the documented command."""
    command = INSTALL.strip().replace("$REGISTRY", registry).replace("${DIGEST:?not verified}", digest)
    installed = release.documented(" ".join([command, *options]))
    assert installed.returncode == 0, installed.text
    assert f"Digest: {digest}\n" in installed.text
    (found,) = json.loads(release.start("list", "--output=json").program.wait(verbatim=True).stdout)
    assert (found["chart"], found["status"]) == (f"{NAME}-{VERSION}", "deployed")


def assert_nothing_is_replaced(clone: Path, environment: dict[str, str]) -> None:
    """The same can be published again; another chart, and another image, cannot."""
    registry, package = environment["REGISTRY"].lower(), clone / "dist/release" / f"{NAME}-{VERSION}.tgz"
    before = package.read_bytes()
    again = step(clone, "publish", environment)
    assert again.returncode == 0, again.text
    package.write_bytes(gzip.compress(gzip.decompress(before) + b"\0" * 512))
    other = "is already published, with other content: release a new version"
    assert refused(step(clone, "publish", environment)) == [f"{registry}/charts/{NAME}:{VERSION} {other}"]
    options = f"{environment['DOCKER_BUILD_OPTIONS']} --label=changed=yes"
    assert step(clone, "build", {**environment, "DOCKER_BUILD_OPTIONS": options}).returncode == 0
    assert package.read_bytes() == before  # the chart's package is reproducible
    assert refused(step(clone, "publish", environment)) == [f"{registry}/{NAME}:{VERSION} {other}"]


def assert_what_another_signed_is_rejected(clone: Path, folder: Path, environment: dict[str, str], verify: str) -> None:
    wrong = documented(verify, folder, environment, key="other")
    assert wrong.returncode != 0, wrong.text
    assert "failed to verify signature" in wrong.text
    assert "DIGEST: not verified" in wrong.text
    # Whoever can write to the registry replaces the chart.
    tampered = folder / "tampered"
    shutil.copytree(clone / "charts" / NAME, tampered)
    (tampered / "values.yaml").write_text((tampered / "values.yaml").read_text() + "# tampered\n")
    push = f"helm package {tampered} && helm push {NAME}-{VERSION}.tgz oci://$REGISTRY/charts"
    assert documented(push, folder, environment).returncode == 0
    rejected = documented(verify, folder, environment)
    assert rejected.returncode != 0, rejected.text
    assert "no signatures found" in rejected.text


def test_a_platform_that_cannot_be_built_is_not_left_out(clone: Path, environment: dict[str, str]) -> None:
    both, own = WORKFLOW["env"]["PLATFORMS"], environment["PLATFORMS"]
    failed = step(clone, "build", {**environment, "PLATFORMS": both})
    assert refused(failed) == [
        f"docker cannot build the image for {both}: several platforms require containerd's image store, and another "
        "than the machine's own requires QEMU:"
    ]
    assert re.search(r"^ERROR: ", failed.stderr, re.M)  # docker's own reason
    variant = f"{own}/{'v2' if own.endswith('amd64') else 'v8'}"  # which docker builds, and ignores
    assert refused(step(clone, "build", {**environment, "PLATFORMS": variant})) == [
        f"the image lacks {variant}, which PLATFORMS names: nothing can be published"
    ]
    assert refused(step(clone, "publish", environment)) == [
        f"dist/release/{NAME}-{VERSION}.tgz is missing: run python -m tools.release build"
    ]
