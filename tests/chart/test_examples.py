"""The chart accepts the documents' examples."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.support.chart import MINIMAL, Helm
from tests.support.documents import DOCUMENTS, block, blocks
from tools.paths import CHART, ROOT

PLACEHOLDERS = {"version": "1.0", "gitCommit": "c" * 40, "digest": "d" * 64}


def _values() -> list[Any]:
    """Every YAML block with values of the chart, named by its file and line."""
    found = []
    for path in DOCUMENTS:
        for each in blocks(path.read_text()):
            try:
                text = re.sub("<(version|gitCommit|digest)>", lambda found: PLACEHOLDERS[found[1]], each.text)
                values = yaml.safe_load(text)
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
