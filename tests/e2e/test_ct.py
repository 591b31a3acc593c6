"""chart-testing, as in a chart repository's CI: `ct lint` and `ct install` with ct.yaml."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cluster import OWN_IMAGE, Shared
from tests.support.database import Database
from tests.support.git import git
from tests.support.kubernetes import TABLE, Api
from tests.support.programs import Result, run
from tools.binaries import find_or_build, source_folder
from tools.cluster import Cluster
from tools.paths import ROOT

Ct = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A clone of a repository with this checkout's charts on main."""
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    shutil.copytree(ROOT / "charts", origin / "charts")
    shutil.copy(ROOT / "ct.yaml", origin)
    git(origin, "init", "--quiet", "--initial-branch=main")
    commit(origin)
    git(tmp_path, "clone", "--quiet", str(origin), str(clone))
    return clone


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=test")


@pytest.fixture
def ct(folder: Path, tmp_path: Path, cluster: Cluster) -> Ct:
    """Runs ct in the clone, with Helm 4 and this project's other tools.

    What a tool printed is in `<tool>.log`: ct may lose the end of it, as it closes the pipe when the tool exits.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    tools = {name: find_or_build(name) for name in ("helm", "kubectl")}
    tools |= {name: Path(sys.executable).with_name(name) for name in ("yamale", "yamllint")}
    for name, path in tools.items():
        log = tmp_path / f"{name}.log"
        (programs / name).write_text(f"#!/bin/bash\nset -o pipefail\n'{path}' \"$@\" | tee -a '{log}'\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path), "KUBECONFIG": cluster.kubeconfig}

    def ct(*arguments: str | Path) -> Result:
        command = [find_or_build("ct"), *arguments, "--config", "ct.yaml"]
        return run(command, cwd=folder, env=environment, one_stream=True, seconds=300)

    return ct


def test_ct_lint_passes_and_requires_a_new_version_for_every_change(ct: Ct, folder: Path, tmp_path: Path) -> None:
    settings = source_folder("ct") / "etc"
    lint = ["lint", "--chart-yaml-schema", settings / "chart_schema.yaml", "--lint-conf", settings / "lintconf.yaml"]
    chart = folder / "charts" / "hcm-db-migrations"
    values = chart / "values.yaml"
    values.write_text(values.read_text() + "# A change.\n")
    commit(folder)
    refused = ct(*lint)
    assert refused.returncode == 1
    assert "chart version not ok. Needs a version bump!" in refused.stdout
    metadata = chart / "Chart.yaml"
    metadata.write_text(metadata.read_text().replace("\nversion: 0.", "\nversion: 1."))
    commit(folder)
    passed = ct(*lint)
    assert passed.returncode == 0, passed.stdout
    assert "All charts linted successfully" in passed.stdout
    for file in sorted(path.name for path in (chart / "ci").iterdir()):
        assert f'Linting chart with values file "{chart.relative_to(folder)}/ci/{file}"' in passed.stdout
    assert "Validation success!" in (tmp_path / "yamale.log").read_text()  # of Chart.yaml


def test_ct_install_installs_and_tests_every_file_in_ci(
    ct: Ct, api: Api, cluster: Cluster, database: Database, folder: Path, tmp_path: Path, shared: Shared
) -> None:
    values = {"namespace": api.namespace}
    images = cluster.image_values()
    for name, image in {"git.image": images.get("git", {}).get("image", {}), "image": images.get("image", {})}.items():
        values |= {f"{name}.{key}": value for key, value in image.items()}
    if shared.preinstalled_image:
        values |= {f"image.{key}": value for key, value in OWN_IMAGE.items()} | {"requirements": ""}
    sets = " ".join(f"--set={key}={value}" for key, value in values.items())
    chart = "charts/hcm-db-migrations"
    installed = ct("install", "--charts", chart, "--namespace", api.namespace, "--helm-extra-set-args", sets)
    assert installed.returncode == 0, installed.stdout
    files = sorted(path.name for path in (folder / chart / "ci").iterdir())
    for file in files:
        assert f'Installing chart with values file "{chart}/ci/{file}"' in installed.stdout
    assert (tmp_path / "helm.log").read_text().count("Phase:          Succeeded") == len(files)
    assert (database.at, database.relations) == (["001"], TABLE)
