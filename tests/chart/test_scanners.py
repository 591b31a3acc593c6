"""Two scanners of Kubernetes manifests find nothing, but for what is excepted here with its reason."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chart.conftest import Helm
from tools.binaries import find_or_build
from tools.paths import CACHE, CHART, ROOT
from tools.steps import cached, run

NETWORK_POLICY = (
    "where the database, git and the index are is the cluster's knowledge; the README names the pod's labels"
)
CPU_LIMIT = "a limit only makes a migration hold its locks longer; requests say what it needs"
PULL_POLICY = "tags are versions and not moved; a restricted network pulls nothing twice; each image takes a digest"
PROBE = "a run has an end: its exit status and its deadline say how it is"

CHECKOV = {
    "CKV_K8S_8": PROBE,
    "CKV_K8S_9": PROBE,
    "CKV_K8S_11": CPU_LIMIT,
    "CKV_K8S_15": PULL_POLICY,
    "CKV_K8S_35": "the address and the credentials are DB_* variables, which an env.py that is not ours reads, too",
    "CKV_K8S_43": "the digests are values, since a mirror's images have others",
    "CKV2_K8S_6": NETWORK_POLICY,
}
KUBE_SCORE = {
    "container-image-pull-policy": PULL_POLICY,
    "container-resources": CPU_LIMIT,
    "pod-networkpolicy": NETWORK_POLICY,
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
        run([sys.executable, "-m", "venv", folder], "installing checkov into the cache", "40 s")
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary", ":all:"]
        run([*pip, "--require-hashes", "-r", lock])

    digest = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
    return cached(CACHE / f"checkov-{digest}", install) / "bin"


def test_checkov_finds_what_is_excepted_and_no_more(manifest: Path) -> None:
    folder = _checkov()
    # It would ask its makers' server for texts.
    command = [folder / "python", folder / "checkov", "--file", manifest, "--framework", "kubernetes"]
    done = subprocess.run(
        [*command, "--skip-download", "--output", "json"],
        env=os.environ | {"HTTPS_PROXY": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
        check=False,
    )
    results = json.loads(done.stdout)["results"]
    assert len(results["passed_checks"]) > 100
    assert {found["check_id"] for found in results["failed_checks"]} == set(CHECKOV)


def test_kube_score_finds_what_is_excepted_and_no_more(manifest: Path) -> None:
    score = find_or_build("kube-score")
    done = subprocess.run([score, "score", "-o", "json", manifest], capture_output=True, text=True, check=False)
    checks = [check for found in json.loads(done.stdout) for check in found["checks"] if not check["skipped"]]
    assert len(checks) > 20
    # 10 is what kube-score calls OK.
    assert {check["check"]["id"] for check in checks if check["grade"] < 10} == set(KUBE_SCORE)
