"""Values that values.schema.json accepts render objects that an API server accepts, in a server-side dry run."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema_rs import Draft7Validator

from tests.support.chart import TEXT
from tests.support.release import Release
from tools.cluster import Cluster
from tools.paths import CHART
from tools.values import merged

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFINITIONS = SCHEMA["definitions"]
TOP = DEFINITIONS["values"]["properties"]
ASCII = st.characters(codec="ascii", exclude_categories=("Cc",))

# Values that the schema does not fully check: the templates do, or they are passed to the pod unchanged.
SUBSTITUTES: dict[str, st.SearchStrategy[Any]] = {
    "enabled": st.just(True),
    "git.repo": st.sampled_from(["https://git.example.org/a", "git@git.example.org:a", "ssh://git@[::1]:22/a/b.git"]),
    "git.path": st.sampled_from([".", "a", "a/b", "größe/表"]),
    "extraPodSpec": st.sampled_from([{}, {"hostUsers": False}, {"dnsConfig": {"options": [{"name": "ndots"}]}}]),
    "hook": st.sampled_from(["", "pre-install", "pre-install,pre-upgrade", "post-install,post-upgrade"]),
    "args": st.lists(TEXT, min_size=1, max_size=4),
    "affinity.nodeAffinity": st.just(
        {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "a/b", "operator": "In", "values": ["c"]}]}]
            }
        }
    ),
    "affinity.podAffinity": st.just({}),
    "affinity.podAntiAffinity": st.just({}),
    "extraEnv": st.lists(
        st.one_of(
            st.fixed_dictionaries(
                {"name": st.from_regex(r"[A-Za-z_]\w{0,9}", fullmatch=True, alphabet=ASCII)},
                optional={"value": TEXT},
            ),
            st.just({"name": "X", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}),
            st.just({"name": "Y", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}),
        ),
        max_size=3,
        unique_by=lambda entry: entry["name"],
    ),
    "extraVolumes": st.sampled_from([[], [{"name": "a", "configMap": {"name": "b"}}, {"name": "c", "emptyDir": {}}]]),
    "extraVolumeMounts": st.just([]),
    "serviceAccountName": st.sampled_from(["", "default"]),  # a pod is rejected if it is missing
}


def drawn(schema: dict[str, Any], path: str) -> st.SearchStrategy[Any]:
    """Values that `schema` accepts, for the JSON Schema keywords that the chart's schema uses."""
    if path in SUBSTITUTES:
        return SUBSTITUTES[path]
    if "$ref" in schema:
        return drawn(DEFINITIONS[schema["$ref"].rpartition("/")[2]], path)
    if "anyOf" in schema:
        return st.one_of([drawn(part, path) for part in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kinds = schema.get("type", "string")
    found = st.one_of([_of_type(kind, schema, path) for kind in ([kinds] if isinstance(kinds, str) else kinds)])
    valid = Draft7Validator({**schema, "definitions": DEFINITIONS})
    checked = {"not", "if", "allOf", "minLength", "maxLength", "minProperties"}
    return found.filter(valid.is_valid) if checked & set(schema) else found


def _of_type(kind: str, schema: dict[str, Any], path: str) -> st.SearchStrategy[Any]:
    if kind == "null":
        return st.none()
    if kind == "boolean":
        return st.booleans()
    if kind in ("integer", "number"):
        return st.integers(schema.get("minimum", -(2**31)), schema.get("maximum", 2**31 - 1))
    if kind == "array":
        size = schema.get("minItems", 0)
        return st.lists(drawn(schema["items"], f"{path}[]"), min_size=size, max_size=size + 2)
    if kind == "object":
        known = {name: drawn(part, f"{path}.{name}") for name, part in schema.get("properties", {}).items()}
        required = {name: known.pop(name) for name in schema.get("required", [])}
        if schema.get("additionalProperties"):
            names = drawn(schema["propertyNames"], f"{path}{{}}") if "propertyNames" in schema else st.just("a")
            return st.dictionaries(names, drawn(schema["additionalProperties"], f"{path}.*"), max_size=2)
        return st.fixed_dictionaries(required, optional=known)
    if "pattern" in schema:
        return st.from_regex(schema["pattern"], fullmatch=True, alphabet=ASCII)
    return TEXT


def test_the_schema_uses_only_keywords_that_drawn_handles() -> None:
    """Otherwise a new one would be ignored."""
    keywords = {
        *("$ref", "additionalProperties", "allOf", "anyOf", "const", "description", "else", "enum", "examples", "if"),
        *("items", "maxLength", "maxProperties", "maximum", "minItems", "minLength", "minProperties", "minimum", "not"),
        *("pattern", "properties", "propertyNames", "required", "then", "type"),
    }

    def used_by(schema: Any) -> set[str]:
        if not isinstance(schema, dict):
            return set()
        found = set(schema)
        for keyword, part in schema.items():
            if keyword in ("properties", "definitions"):
                found |= {inner for child in part.values() for inner in used_by(child)}
            elif keyword in ("allOf", "anyOf"):
                found |= {inner for child in part for inner in used_by(child)}
            else:
                found |= used_by(part)
        return found

    assert {keyword for definition in DEFINITIONS.values() for keyword in used_by(definition)} <= keywords


@pytest.mark.fault(
    "Code and settings",
    fault="Any values that the chart's schema accepts",
    sees="The chart renders, or prints `Invalid values for hcm-db-migrations:`; the API server accepts the result",
    state="Nothing was changed",
    do="Follow the message",
)
@pytest.mark.timeout(600)
def test_the_api_server_accepts_what_the_schema_accepts(release: Release, cluster: Cluster) -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.fixed_dictionaries({}, optional={name: drawn(part, name) for name, part in TOP.items()}))
    def check(values: dict[str, Any]) -> None:
        values = merged({"git": {"repo": "https://git.example.org/a", "branch": "main"}}, values)
        for part in (values, values["git"]):
            if part.get("resources"):
                part["resources"]["requests"] = None  # may not exceed the limits, which a schema cannot express
        file = release.home / "values.yaml"
        file.write_text(json.dumps(values | {"namespace": "default"}, ensure_ascii=False))  # JSON is valid YAML
        rendered = release.start("template", release.name, CHART, "-f", file)
        outcome = "rendered" if rendered.wait().returncode == 0 else "rejected"
        outcomes[outcome] += 1
        if outcome == "rejected":
            assert 'Invalid values for hcm-db-migrations:\n\n- "' in rendered.output, rendered.output
        else:
            cluster.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", input=rendered.output)

    check()
    assert outcomes["rendered"] > outcomes["rejected"]
