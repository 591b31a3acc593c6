"""The chart of the last release, from git's history, and what the values have become since then."""

from __future__ import annotations

import enum
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.git import git
from tests.support.programs import run
from tools.paths import CHART, ROOT
from tools.values import leaves

TYPES = {str: "string", bool: "boolean", int: "integer", type(None): "null"}
FOLDER = CHART.relative_to(ROOT)
NO_HISTORY = "the history of this checkout has no other version of the chart: git fetch --unshallow --tags"


def released_chart(folder: Path, root: Path = ROOT) -> Path:
    """Write the chart of the last release of the repository into `folder`, and return its path there.

    It is that of the tag <name>-<version>, if the chart's version has one; else that of the newest commit with another
    version, because the first change after a release raises it. Skips the test in a checkout without that history.
    """
    version = chart_version(root / FOLDER)
    commit = git(root, "tag", "--list", f"{CHART.name}-{version}")
    if not commit and yaml.safe_load(git(root, "show", f"HEAD:./{FOLDER}/Chart.yaml"))["version"] != version:
        commit = "HEAD"
    if not commit:
        newest = ["log", "-1", "--first-parent", "--format=%H", "-G^version: "]
        commit = f"{git(root, *newest, '--', FOLDER / 'Chart.yaml')}~1"
    archive = folder / "released.tar"
    command: list[str | Path] = ["git", "-C", root, "archive", f"--output={archive}", commit, FOLDER]
    if run(command).returncode:
        pytest.skip(NO_HISTORY)
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / FOLDER


def chart_version(chart: Path) -> str:
    return str(yaml.safe_load((chart / "Chart.yaml").read_text())["version"])


def defaults(chart: Path) -> dict[str, Any]:
    """{dotted name: default} of a chart's values."""
    return dict(leaves(yaml.safe_load((chart / "values.yaml").read_text())))


class Change(enum.IntEnum):
    """What a change of the chart means for those who deploy it."""

    NONE = 0
    FIX = 1  # no value is concerned
    ADDITION = 2  # new values
    BREAKING = 3  # a value is removed, renamed or retyped, or its default changed


def changes(old: Path, new: Path) -> dict[str, Change]:
    """What differs between two versions of the chart: {description: its meaning}."""
    before, now = defaults(old), defaults(new)
    found = {f"{name} is new": Change.ADDITION for name in now if name not in before}
    for name, default in before.items():
        if name not in now:
            found[f"{name} is removed"] = Change.BREAKING
        elif now[name] != default:
            found[f"the default of {name} is changed"] = Change.BREAKING
        elif not _types(old, name) <= _types(new, name):
            found[f"{name} has another type"] = Change.BREAKING
    files = _packaged(old), _packaged(new)
    found |= {f"{name} is changed": Change.FIX for name, _ in files[0].items() ^ files[1].items()}
    return found


def _packaged(chart: Path) -> dict[str, str]:
    """The text of each packaged file, without the versions in Chart.yaml."""
    files = [path for path in chart.rglob("*") if path.is_file() and path.parent.name != "ci"]
    version = re.compile(r"^(version|appVersion): .*\n", re.M)
    texts = {str(path.relative_to(chart)): path.read_text() for path in files}
    return texts | {"Chart.yaml": version.sub("", texts["Chart.yaml"])}


def _types(chart: Path, name: str) -> set[str]:
    """The JSON types that the schema accepts for a value; all, if it says nothing about it."""
    schema = json.loads((chart / "values.schema.json").read_text())

    def resolved(node: dict[str, Any]) -> dict[str, Any]:
        return resolved(schema["definitions"][node["$ref"].rpartition("/")[2]]) if "$ref" in node else node

    def of(node: dict[str, Any]) -> set[str]:
        if "anyOf" in node:
            return set().union(*(of(resolved(each)) for each in node["anyOf"]))
        constants = node.get("enum", [node["const"]] if "const" in node else [])
        types = node.get("type") or [TYPES[type(value)] for value in constants]
        found = {types} if isinstance(types, str) else set(types)
        return found | {"integer"} if "number" in found else found or {*TYPES.values(), "number", "array", "object"}

    node = schema["definitions"]["values"]
    for key in name.split("."):
        node = resolved(node)
        node = node.get("properties", {}).get(key) or node.get("additionalProperties") or {}
    return of(resolved(node))


def least_version(released: str, found: dict[str, Change]) -> str:
    """The lowest version that these changes of a released one may have. Before 1.0, the second number is the first."""
    major, minor, patch = map(int, released.split("."))
    change = max(found.values(), default=Change.NONE)
    if change is Change.NONE:
        return released
    if change is Change.FIX:
        return f"{major}.{minor}.{patch + 1}"
    if change is Change.BREAKING and major:
        return f"{major + 1}.0.0"
    return f"{major}.{minor + 1}.0"
