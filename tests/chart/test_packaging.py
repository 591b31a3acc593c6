"""The chart as others use it: linted, packaged, below an umbrella."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.chart import MINIMAL, Helm
from tools.paths import CHART, ROOT

VALUES_FILES = sorted([*CHART.glob("ci/*-values.yaml"), *ROOT.glob("environments/*.yaml")])


@pytest.mark.parametrize("values", [None, *VALUES_FILES], ids=lambda path: path.name if path else "defaults")
def test_the_chart_passes_helms_linter(helm: Helm, values: Path | None) -> None:
    done = helm.run("lint", "--strict", CHART, *(["-f", values] if values else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 chart(s) linted, 0 chart(s) failed" in done.stdout + done.stderr


@pytest.mark.parametrize("values", VALUES_FILES, ids=lambda path: path.name)
def test_a_values_file_of_the_repository_renders(helm: Helm, values: Path) -> None:
    objects = helm.objects(yaml.safe_load(values.read_text()))
    assert {document["kind"] for document in objects} == {"Job", "ConfigMap", "Pod"}


@pytest.fixture(scope="module")
def umbrella(helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of a chart that depends on this one."""
    folder = tmp_path_factory.mktemp("umbrella")
    chart = {
        "apiVersion": "v2",
        "name": "hcm",
        "version": "1.0.0",
        "dependencies": [
            {
                "name": "hcm-db-migrations",
                "version": yaml.safe_load((CHART / "Chart.yaml").read_text())["version"],
                "repository": f"file://{CHART}",
                "condition": "hcm-db-migrations.enabled",
            }
        ],
    }
    (folder / "Chart.yaml").write_text(yaml.safe_dump(chart))
    for command in (
        ("dependency", "update", folder),
        ("dependency", "build", folder),
        ("package", folder, "-d", folder),
    ):
        done = helm.run(*command)
        assert done.returncode == 0, done.stderr
    return folder / "hcm-1.0.0.tgz"


def _names(objects: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(document["kind"], document["metadata"]["name"]) for document in objects}


def test_below_an_umbrella_everything_is_the_same(helm: Helm, umbrella: Path) -> None:
    values = {"hcm-db-migrations": {**MINIMAL, "enabled": True}, "global": {"domain": "example.org"}, "other": {"a": 1}}
    found = helm.objects(values, chart=umbrella, release="digit")
    assert sorted(found, key=str) == sorted(helm.render({}, release="digit"), key=str)
    assert _names(found) == {
        ("Job", "digit-hcm-db-migration-1"),
        ("ConfigMap", "digit-hcm-db-migration"),
        ("Pod", "digit-hcm-db-migration-test"),
    }


def test_the_umbrella_accepts_the_same_overlay(helm: Helm, umbrella: Path) -> None:
    overlay = yaml.safe_load((ROOT / "environments" / "unified-dev.yaml").read_text())
    assert sorted(helm.objects(overlay, chart=umbrella), key=str) == sorted(helm.objects(overlay), key=str)


def test_the_umbrella_may_disable_it(helm: Helm, umbrella: Path) -> None:
    assert helm.objects({"hcm-db-migrations": {"enabled": False}}, chart=umbrella) == []


def test_null_below_an_umbrella_removes_a_default(helm: Helm, umbrella: Path) -> None:
    values = {
        "hcm-db-migrations": {**MINIMAL, "podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}}
    }
    (job,) = [document for document in helm.objects(values, chart=umbrella) if document["kind"] == "Job"]
    security = job["spec"]["template"]["spec"]["securityContext"]
    assert security == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_a_mistake_below_an_umbrella_has_the_same_message(helm: Helm, umbrella: Path) -> None:
    done = helm.template({}, chart=umbrella)
    assert done.returncode != 0
    message = '- "git.repo" and "git.branch" are not set: add to a values file (-f)\n\n    hcm-db-migrations:\n'
    assert message in done.stderr


def test_a_package_has_what_the_templates_read(helm: Helm, tmp_path: Path) -> None:
    done = helm.run("package", CHART, "-d", tmp_path)
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    assert helm.objects(MINIMAL, chart=package) == helm.render()
    with tarfile.open(package) as archive:
        packed = {name.removeprefix("hcm-db-migrations/") for name in archive.getnames()}
    tracked = {str(path.relative_to(CHART)) for path in CHART.rglob("*") if path.is_file()}
    assert packed == {name for name in tracked if not name.startswith("ci/")}


def test_the_images_of_the_annotation_are_those_of_the_values() -> None:
    """Artifact Hub scans what the annotation lists."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    listed = yaml.safe_load(yaml.safe_load((CHART / "Chart.yaml").read_text())["annotations"]["artifacthub.io/images"])
    images = {"git-sync": values["git"]["image"], "python": values["image"]}
    assert {image["name"]: image["image"] for image in listed} == {
        name: f"{image['repository']}:{image['tag']}" for name, image in images.items()
    }


def test_every_failure_of_a_script_names_a_section_of_the_readme() -> None:
    sections = set(re.findall(r"^## (.+)$", (CHART / "README.md").read_text(), re.M))
    named = set(re.findall(r'fail \d+ ".*" "([^"]+)"$', (CHART / "files" / "migrate.sh").read_text(), re.M))
    assert named == {"Git access", "Database", "Requirements", "helm test"}
    assert named <= sections
