"""Three scanners of Kubernetes manifests find nothing except what is listed here with its reason."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.chart import Helm
from tests.support.programs import run
from tools import steps
from tools.binaries import find_or_build
from tools.paths import CACHE, CHART, ROOT

NETWORK_POLICY = "only the cluster knows where the database, git and the index are; the README names the pod's labels"
CPU_LIMIT = "a limit only makes a migration hold its locks longer; requests say what it needs"
PULL_POLICY = "a digest, which each image accepts, is what fixes an image; a restricted network pulls nothing twice"
PROBE = "a run is finite: its exit code and its deadline show its health"

CHECKOV = {
    "CKV_K8S_8": PROBE,
    "CKV_K8S_9": PROBE,
    "CKV_K8S_11": CPU_LIMIT,
    "CKV_K8S_15": PULL_POLICY,
    "CKV_K8S_35": "the address and the credentials are DB_* variables, which a custom env.py also reads",
    "CKV_K8S_43": "the digests are values, since a mirror's images have others",
    "CKV2_K8S_6": NETWORK_POLICY,
}
KUBE_SCORE = {
    "container-image-pull-policy": PULL_POLICY,
    "container-resources": CPU_LIMIT,
    "pod-networkpolicy": NETWORK_POLICY,
}
TRIVY = {
    "KSV-0011": CPU_LIMIT,
    "KSV-01010": "it takes the git@ of the repository's address, which is ssh's user, for a credential",
    "KSV-0125": "it does not know registry.k8s.io, git-sync's own; a mirror's registry is a value",
}


@pytest.fixture(scope="module")
def manifest(helm4: Helm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart as environments/unified-dev.yaml installs it."""
    overlay = ROOT / "environments" / "unified-dev.yaml"
    path = tmp_path_factory.mktemp("rendered") / "manifest.yaml"
    path.write_text(helm4.run("template", "hcm-db-migrations", CHART, "-n", "health", "-f", overlay).stdout)
    return path


def _checkov() -> Path:
    lock = ROOT / "tools" / "checkov" / "requirements.txt"

    def install(folder: Path) -> None:
        steps.run([sys.executable, "-m", "venv", folder], "installing checkov into the cache", "40 s")
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary", ":all:"]
        steps.run([*pip, "--require-hashes", "-r", lock])

    digest = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
    return steps.cached(CACHE / f"checkov-{digest}", install) / "bin"


def test_checkov_finds_the_exceptions_and_no_more(manifest: Path) -> None:
    folder = _checkov()
    # It would query its vendor's server for descriptions.
    command = [folder / "python", folder / "checkov", "--file", manifest, "--framework", "kubernetes"]
    done = run(
        [*command, "--skip-download", "--output", "json"], env=os.environ | {"HTTPS_PROXY": "http://127.0.0.1:1"}
    )
    results = json.loads(done.stdout)["results"]
    assert len(results["passed_checks"]) > 100
    assert {found["check_id"] for found in results["failed_checks"]} == set(CHECKOV)


def test_kube_score_finds_the_exceptions_and_no_more(manifest: Path) -> None:
    score = find_or_build("kube-score")
    done = run([score, "score", "-o", "json", manifest])
    checks = [check for found in json.loads(done.stdout) for check in found["checks"] if not check["skipped"]]
    assert len(checks) > 20
    # 10 is what kube-score calls OK.
    assert {check["check"]["id"] for check in checks if check["grade"] < 10} == set(KUBE_SCORE)


def test_trivy_finds_the_exceptions_and_no_more(manifest: Path) -> None:
    done = run([find_or_build("trivy"), manifest.parent])
    results = json.loads(done.stdout)
    assert results["passed"] > 200
    assert set(results["failed"]) == set(TRIVY)
