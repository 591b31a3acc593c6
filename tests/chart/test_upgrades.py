"""From the last release to this chart: the values that it had are accepted or refused with what to set instead, and the
version says what kind of change it is.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from migration_runner.record import VERSION
from tests.support.chart import MINIMAL, Helm
from tests.support.documents import block
from tests.support.git import git
from tests.support.released import FOLDER, Change, changes, chart_version, defaults, least_version, released_chart
from tools.paths import CHART, ROOT
from tools.values import merged


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart of the last release."""
    return released_chart(tmp_path_factory.mktemp("released"))


def _unexplained(helm: Helm, old: Path, new: Path) -> list[str]:
    """What a user of the chart `old` may have set, and the chart `new` ignores, or refuses without naming what to set
    instead: names of values, and of files with values.
    """
    before, now = defaults(old), defaults(new)

    def explained(values: dict[str, Any], *, accepted: bool = True) -> bool:
        result = helm.template(values, chart=new)
        problems = re.findall(r"^- .*", result.stderr, re.M)
        named = [re.match(r'- "\S+" .*: set "(\S+)"', problem) for problem in problems]
        return all(found and found[1] in now for found in named or [None]) if result.returncode else accepted

    def kept(names: list[str]) -> list[str]:
        if explained(functools.reduce(merged, [*(_only(name, before[name]) for name in names), MINIMAL])):
            return []
        middle = len(names) // 2
        return kept(names[:middle]) + kept(names[middle:]) if middle else names

    def removed(name: str) -> bool:
        return not explained(merged(_only(name, _other(before[name])), MINIMAL), accepted=False)

    found = kept([name for name in before if name in now]) + [
        name for name in before if name not in now and removed(name)
    ]
    files = sorted(old.glob("ci/*-values.yaml"))
    return found + [file.name for file in files if not explained(yaml.safe_load(file.read_text()))]


def _only(name: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    first, _, rest = name.partition(".")
    return {first: _only(rest, value) if rest else value}


def _other(default: Any) -> Any:
    """Another value of the same type."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    return {str: f"other{default}", list: ["other"], dict: {"other": "other"}}[type(default)]


def test_a_value_of_the_last_release_is_accepted_or_refused_with_what_to_set_instead(
    helm: Helm, released: Path
) -> None:
    assert _unexplained(helm, released, CHART) == []


def _copy(folder: Path, *replacements: tuple[str, str, str]) -> Path:
    """A copy of the chart; each replacement is (file, old text, new text)."""
    chart = shutil.copytree(CHART, folder / "chart")
    for file, old, new in replacements:
        text = (chart / file).read_text()
        assert old in text
        (chart / file).write_text(text.replace(old, new))
    return chart


SCHEMA, VALUES, VALIDATION = "values.schema.json", "values.yaml", "templates/_validation.tpl"
RENAMED = [
    (VALUES, "  backoffLimit: 1", "  retries: 1"),
    ("files/defaults.json", '"backoffLimit"', '"retries"'),
    (SCHEMA, '"backoffLimit"', '"retries"'),
    (VALIDATION, '"job.backoffLimit"', '"job.retries"'),
    *((f"templates/{name}.tpl", "job.backoffLimit", "job.retries") for name in ("_job", "_rollout", "_validation")),
]
RETYPED = [
    (VALUES, "knownHosts: true", 'knownHosts: "true"'),
    ("files/defaults.json", '"knownHosts": true', '"knownHosts": "true"'),
    (SCHEMA, 'trusts any server.",\n              "type": "boolean"', '",\n              "type": "string"'),
]
# How a value is renamed: the schema still has its old name, and the templates say what to set.
EXPLAINED = [
    (SCHEMA, '"retries": {', '"backoffLimit": true,\n            "retries": {'),
    (
        VALIDATION,
        "{{- if eq .enabled false -}}",
        """{{- if hasKey .job "backoffLimit" -}}
{{- $problems = append $problems "\\"job.backoffLimit\\" was renamed: set \\"job.retries\\"" -}}
{{- end -}}
{{- if eq .enabled false -}}""",
    ),
]


@pytest.mark.parametrize(
    ("replacements", "unexplained"),
    [
        ([], []),
        (RENAMED, ["job.backoffLimit"]),
        ([*RENAMED, EXPLAINED[0]], ["job.backoffLimit"]),  # it would be ignored
        ([*RENAMED, *EXPLAINED], []),
        (RETYPED, ["git.knownHosts"]),
    ],
    ids=["the same", "renamed", "renamed, ignored", "renamed, explained", "retyped"],
)
def test_a_renamed_or_retyped_value_is_reported_unless_it_is_refused_with_its_new_name(
    helm: Helm, tmp_path: Path, replacements: list[tuple[str, str, str]], unexplained: list[str]
) -> None:
    assert _unexplained(helm, CHART, _copy(tmp_path, *replacements)) == unexplained


def test_the_version_is_that_of_the_next_release(released: Path) -> None:
    found = changes(released, CHART)
    least = least_version(chart_version(released), found)
    numbers = [tuple(map(int, version.split("."))) for version in (chart_version(CHART), least)]
    assert numbers[0] >= numbers[1], f"set version in Chart.yaml to {least} or higher: {found}"


def test_one_version_everywhere() -> None:
    version = chart_version(CHART)
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == VERSION == version
    argocd, flux = (yaml.safe_load_all((ROOT / f"gitops/{tool}/oci.yaml").read_text()) for tool in ("argocd", "flux"))
    assert next(argocd)["spec"]["source"]["targetRevision"] == version
    assert next(flux)["spec"]["ref"]["tag"] == version
    assert block("--certificate-oidc-issuer=").startswith(f"VERSION={version}\n")


@pytest.mark.parametrize(
    ("replacements", "expected"),
    [
        ([("Chart.yaml", "\nversion: ", "\nversion: 9")], {}),
        ([("ci/default-values.yaml", "git:", "# for ct\ngit:")], {}),
        ([("templates/job.yaml", "{{", "{{/* a comment */}}{{")], {"templates/job.yaml is changed": Change.FIX}),
        ([(VALUES, "args:", "added: 1\nargs:")], {"added is new": Change.ADDITION}),
        ([(VALUES, "args: [upgrade, head]", "args: [current]")], {"the default of args is changed": Change.BREAKING}),
        ([(VALUES, "args: [upgrade, head]", "")], {"args is removed": Change.BREAKING}),
        (
            RENAMED[:3],
            {"job.backoffLimit is removed": Change.BREAKING, "job.retries is new": Change.ADDITION},
        ),
        (
            [(SCHEMA, '"knownHosts": {', '"knownHosts": {"type": "string"}, "other": {')],
            {"git.knownHosts has another type": Change.BREAKING},
        ),
    ],
    ids=["version", "not packaged", "fix", "new", "default", "removed", "renamed", "retyped"],
)
def test_the_kind_of_a_change(
    tmp_path: Path, replacements: list[tuple[str, str, str]], expected: dict[str, Change]
) -> None:
    found = changes(CHART, _copy(tmp_path, *replacements))
    files = {f"{file} is changed": Change.FIX for file, *_ in replacements if expected}
    assert found == files | expected


@pytest.mark.parametrize(
    ("released_version", "change", "least"),
    [
        ("0.1.9", Change.NONE, "0.1.9"),
        ("0.1.9", Change.FIX, "0.1.10"),
        ("0.1.9", Change.ADDITION, "0.2.0"),
        ("0.1.9", Change.BREAKING, "0.2.0"),
        ("1.2.3", Change.FIX, "1.2.4"),
        ("1.2.3", Change.ADDITION, "1.3.0"),
        ("1.2.3", Change.BREAKING, "2.0.0"),
    ],
)
def test_the_least_version_after_a_change(released_version: str, change: Change, least: str) -> None:
    assert least_version(released_version, {"": Change.NONE, "x": change}) == least


@pytest.fixture
def history(tmp_path: Path) -> Callable[[str], Path]:
    """Adds a commit with a version of the chart to a repository, and returns that."""
    repository = tmp_path / "repository"
    (repository / FOLDER).mkdir(parents=True)
    git(repository, "init", "--quiet", "--initial-branch=main")

    def commit(version: str) -> Path:
        (repository / FOLDER / "Chart.yaml").write_text(f"name: x\nversion: {version}\n")
        git(repository, "add", "--all")
        git(repository, "commit", "--quiet", "--allow-empty", f"--message={version}")
        return repository

    return commit


def test_the_last_release_is_the_tag_or_the_newest_commit_with_another_version(
    history: Callable[[str], Path], tmp_path: Path
) -> None:
    def found(repository: Path) -> str:
        chart = released_chart(tmp_path, repository)
        return chart_version(chart)

    repository = history("0.1.0")
    with pytest.raises(pytest.skip.Exception, match="git fetch --unshallow --tags"):
        found(repository)
    history("0.2.0")
    history("0.2.0")
    assert found(repository) == "0.1.0"
    (repository / FOLDER / "Chart.yaml").write_text("version: 0.3.0\n")  # not committed
    assert found(repository) == "0.2.0"
    git(repository, "checkout", "--quiet", ".")
    git(repository, "tag", f"{CHART.name}-0.2.0")
    assert found(repository) == "0.2.0"
    git(repository, "clone", "--quiet", "--depth=1", "--no-tags", f"file://{repository}", tmp_path / "shallow")
    with pytest.raises(pytest.skip.Exception):
        found(tmp_path / "shallow")
