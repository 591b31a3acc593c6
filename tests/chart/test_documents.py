"""The chart accepts the READMEs' examples, and their links resolve."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.chart import MINIMAL, Helm
from tests.support.readme import DOCUMENTS, block, blocks
from tools.paths import CHART, ROOT


def _values() -> list[Any]:
    """Every YAML block with values of the chart, named by its file and line."""
    found = []
    for path in DOCUMENTS:
        for each in blocks(path.read_text()):
            try:
                values = yaml.safe_load(each.text)
            except yaml.YAMLError:
                continue
            keys = set(values) if isinstance(values, dict) else set()
            if keys and keys <= {"hcm-db-migrations", *yaml.safe_load((CHART / "values.yaml").read_text())}:
                found.append(pytest.param(values, id=f"{path.relative_to(ROOT)}:{each.line}"))
    return found


def test_there_are_examples_to_check() -> None:
    assert len(_values()) >= 9


@pytest.mark.parametrize("values", _values())
def test_an_example_of_values_renders(helm4: Helm, values: dict[str, Any]) -> None:
    git = MINIMAL["git"] | values.get("hcm-db-migrations", values).get("git", {})
    if "hcm-db-migrations" in values:
        assert helm4.objects({"hcm-db-migrations": values["hcm-db-migrations"] | {"git": git}})
    else:
        assert helm4.objects(values | {"git": git})


@pytest.mark.parametrize("release", ["hcm-db-migrations", "digit"])
@pytest.mark.parametrize("hook", ["", "pre-install,pre-upgrade"])
def test_the_alert_matches_the_job_of_every_release(helm4: Helm, release: str, hook: str) -> None:
    """Prometheus matches the whole name."""
    targets = [{"name": "a", "schema": "a"}, {"name": "b", "schema": "b"}]
    of_targets = {"targets": targets, "rollout": {"canary": int(bool(hook))}}
    alerts = block("alert: HcmMigrationFailed"), block("alert: HcmMigrationTargetFailed")
    for text, values in zip(alerts, ({}, of_targets), strict=True):
        (alert,) = yaml.safe_load(text)
        (pattern,) = re.findall(r'job_name=~"(.+?)"', alert["expr"])
        objects = helm4.render({"hook": hook, **values}, release=release)
        jobs = [each for each in objects if each["kind"] == "Job" and not each["metadata"]["name"].endswith("-test")]
        assert jobs
        for job in jobs:
            assert re.fullmatch(pattern, job["metadata"]["name"])
            assert ("completions > 1" in alert["expr"]) == (job["spec"].get("completions", 1) > 1)


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_within_the_repository_resolves(path: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_every_document_and_heading_that_a_message_names_exists() -> None:
    """A run's message ends with what to read."""
    sources = "\n".join(path.read_text() for path in (ROOT / "migration_runner").glob("*.py"))
    named = re.findall(r"(?:'([A-Z][\w ]+)' in )?\b((?:docs/)?\w+\.md)", sources)
    assert {document for _, document in named} >= {
        "docs/troubleshooting.md",
        "docs/operations.md",
        "docs/migrations.md",
    }
    for heading, document in named:
        assert not heading or heading.lower().replace(" ", "-") in _anchors(ROOT / document), heading
