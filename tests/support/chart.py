"""A plugin: the chart, rendered with Helm 3 and Helm 4; every object is validated against Kubernetes' schemas."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from jsonschema_rs import Draft202012Validator, Registry
from kubernetes_validate.utils import schema_contents
from typing_extensions import TypedDict, Unpack

from tests.support.programs import Result, observed, start
from tools.binaries import find_or_build, helm_3
from tools.paths import CHART
from tools.steps import UnavailableError

SUPPORTED = [f"1.{minor}" for minor in range(28, 38)]

# The required values, and nothing else.
MINIMAL: dict[str, Any] = {"git": {"repo": "https://git.example.org/schema", "branch": "main"}}

# Text that YAML can represent and that a person might write.
TEXT = st.text(st.characters(codec="utf-8", max_codepoint=0xFFFD, exclude_categories=["Cc"]), max_size=40)

Objects = list[dict[str, Any]]


class Target(TypedDict, total=False):
    """The chart, release and namespace to render; by default this chart as hcm-db-migrations in health."""

    release: str
    namespace: str
    chart: Path


@dataclass(frozen=True)
class Helm:
    """One Helm, isolated from the user's own settings, repositories and clusters."""

    path: Path
    home: Path

    def run(self, *command: str | Path, stdin: str = "") -> Result:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "KUBECONFIG": str(self.home / "no-cluster")}
        environment["GOGC"] = "400"  # garbage collection is a fifth of its time
        # What is rendered, scripts among it, is no evidence of what they print.
        return start([self.path, *command], stdin=stdin, env=environment, is_evidence=False).wait(verbatim=True)

    def render(self, values: dict[str, Any] | None = None, *options: str | Path, **target: Unpack[Target]) -> Objects:
        """Return the objects rendered from `values` (merged over MINIMAL), each valid in every supported Kubernetes.

        `options` are additional options of `helm template`.
        """
        return self.objects({**MINIMAL, **(values or {})}, *options, **target)

    def objects(self, values: dict[str, Any], *options: str | Path, **target: Unpack[Target]) -> Objects:
        """Like render, without MINIMAL."""
        result = self.template(values, *options, **target)
        assert result.returncode == 0, result.stderr
        objects: Objects = json.loads(_validated(result.stdout))
        return objects

    def refuse(self, values: dict[str, Any], *options: str | Path) -> str:
        """Return the error message for invalid `values` (without MINIMAL)."""
        result = self.template(values, *options)
        assert result.returncode != 0, result.stdout
        return result.stderr

    def template(
        self,
        values: dict[str, Any],
        *options: str | Path,
        release: str = "hcm-db-migrations",
        namespace: str = "health",
        chart: Path = CHART,
    ) -> Result:
        command = ("template", release, chart, "-n", namespace, "-f", "-", *options)
        result = _cached(self, command, json.dumps(values, ensure_ascii=False))
        if result.returncode:
            observed.add(result.stderr, result.returncode)  # also of a test that finds it in the cache
        return result


@functools.cache
def _cached(helm: Helm, command: tuple[str | Path, ...], values: str) -> Result:
    return helm.run(*command, stdin=values)


@functools.cache
def _validated(manifest: str) -> str:
    """The objects of a manifest as JSON, validated."""
    found = [document for document in yaml.load_all(manifest, yaml.CSafeLoader) if document]
    for document in found:
        for version in SUPPORTED:
            _validator(version, document["kind"], document["apiVersion"]).validate(document)
    return json.dumps(found)


@functools.cache
def _validator(version: str, kind: str, api_version: str) -> Draft202012Validator:
    """The strict schema of one kind of object: unknown fields are errors."""
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    group = re.sub(r"(\.[^/]*)?/", "-", api_version)  # rbac-v1 of rbac.authorization.k8s.io/v1
    schema = schema_contents(f"{folder}/{kind.lower()}-{group}.json", version)
    return Draft202012Validator(schema, registry=_definitions(version))


@functools.cache
def _definitions(version: str) -> Registry:
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    definitions = schema_contents(f"{folder}/_definitions.json", version)
    return Registry([(definitions["$id"], definitions)])


def one(objects: Objects, kind: str) -> dict[str, Any]:
    """The only object of that kind."""
    (found,) = [document for document in objects if document["kind"] == kind]
    return found


def pod(objects: Objects) -> dict[str, Any]:
    """The Job's pod: {metadata, spec}."""
    template: dict[str, Any] = one(objects, "Job")["spec"]["template"]
    return template


def migrate(objects: Objects) -> dict[str, Any]:
    """The migrate container."""
    container: dict[str, Any]
    (container,) = pod(objects)["spec"]["containers"]
    return container


def git_sync(objects: Objects) -> dict[str, Any]:
    """The git-sync init container."""
    container: dict[str, Any] = pod(objects)["spec"]["initContainers"][-1]
    assert container["name"] == "git-sync"
    return container


def containers(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The containers of a Job's pod by name, in the order in which they start."""
    spec = job["spec"]["template"]["spec"]
    return {container["name"]: container for container in spec["initContainers"] + spec["containers"]}


def environment(container: dict[str, Any]) -> dict[str, Any]:
    """{name: value or reference}; a duplicate name is an error."""
    names = [entry["name"] for entry in container["env"]]
    assert len(names) == len(set(names)), names
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b", merged over MINIMAL."""
    values: dict[str, Any] = json.loads(json.dumps(MINIMAL))
    *parents, last = path.split(".")
    functools.reduce(lambda at, key: at.setdefault(key, {}), parents, values)[last] = value
    return values


@functools.cache
def _helm4() -> Path:
    return find_or_build("helm")


@pytest.fixture(scope="session", params=["Helm 3", "Helm 4"])
def helm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Helm 3 from the development requirements, and Helm 4 from PATH or built from source."""
    return _find_helm(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def helm4(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """One Helm, if another test shows that both render the same."""
    return _find_helm("Helm 4", tmp_path_factory)


def _find_helm(name: str, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    try:
        path = helm_3() if name == "Helm 3" else _helm4()
    except UnavailableError as error:
        pytest.skip(str(error))
    found = Helm(path, tmp_path_factory.getbasetemp())
    version = found.run("version", "--short").stdout
    assert version.startswith(f"v{name[-1]}."), f"{path} is {version}, not {name}: run `make venv`"
    return found


Read = Callable[[Objects], Any]
