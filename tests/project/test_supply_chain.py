"""What runs on a developer's machine and in CI: nothing that an index builds, actions by commit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.git import git
from tests.support.programs import run
from tools.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").iterdir())
# pip's command and its options, in a shell or as a list in Python.
SEPARATOR = r"""[\s"',\\]+"""
INSTALLATION = re.compile(
    rf"""\bpip3?{SEPARATOR}(?:(?:-\S+|"\$\S+|python){SEPARATOR})*?(?:install|download|wheel)(?:\s|["'],)\s*(?=[\w"'\-.*$])"""
)
OTHERS = re.compile(r"""(?:\buv|-m)["',\s]+build\b|\b(?:uvx|pipx|easy_install)\b|\bpython\S*\s+setup\.py\b""")


def _files() -> list[Path]:
    """Every text of the project in which a command may stand, but this one."""
    listed = git(ROOT, "ls-files", "-z").split("\0")
    files = [ROOT / name for name in listed if name and not re.search(r"\.(sum|golden)$|requirements.*\.txt$", name)]
    return [path for path in files if path != Path(__file__) and path.is_file()]


def _lines(path: Path, pattern: re.Pattern[str]) -> list[str]:
    """Each match in a file, to the end of the second line after it."""
    text = path.read_text()
    return ["\n".join(text[found.start() :].splitlines()[:3]) for found in pattern.finditer(text)]


def test_pip_builds_nothing_with_what_an_index_serves() -> None:
    """A build runs the index's build dependencies, which no hash covers."""
    found = {path.relative_to(ROOT).as_posix(): _lines(path, INSTALLATION) for path in _files()}
    assert {name for name, uses in found.items() if uses} >= {
        "Dockerfile",
        "Makefile",
        "docs/migrations.md",
        "charts/hcm-db-migrations/README.md",
        "charts/hcm-db-migrations/files/migrate.sh",
        "tests/chart/test_scanners.py",
        "tests/migrations/test_package.py",
        "tools/binaries.py",
        "tools/fixtures/__init__.py",
    }
    for name, uses in found.items():
        for use in uses:
            # requirements.txt itself allows only wheels.
            assert re.search(r"only-binary|--no-build-isolation|install -r requirements\.txt\n", use), f"{name}: {use}"


def test_no_other_program_installs_or_builds_a_package() -> None:
    found = {path.name: uses for path in _files() if (uses := _lines(path, OTHERS))}
    assert found == {}


@pytest.mark.parametrize("lock", git(ROOT, "ls-files", "*requirements*.txt").splitlines())
def test_a_lock_allows_only_wheels(lock: str) -> None:
    assert (ROOT / lock).read_text().startswith("--only-binary :all:\n")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_uses_actions_by_commit_and_keeps_no_credentials(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    steps: list[dict[str, Any]] = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = [step for step in steps if "uses" in step]
    pinned = re.findall(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+\n", path.read_text())
    assert len(pinned) == len(used) > 0
    for step in used:
        if step["uses"].startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_except_the_one_that_publishes_a_tag(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    of_jobs = [job["permissions"] for job in workflow["jobs"].values() if "permissions" in job]
    granted = [workflow["permissions"], *of_jobs]
    if path.name == "release.yaml":
        assert workflow[True] == {"push": {"tags": ["hcm-db-migrations-*"]}}  # YAML reads the key `on` as true
        publishing = {"contents": "read", "packages": "write", "id-token": "write"}
        assert granted == [{}, {"contents": "read"}, publishing]
    else:
        assert granted == [{"contents": "read"}]


def test_what_publishes_runs_no_image_and_gets_the_registrys_token_last() -> None:
    build, publish = yaml.safe_load((ROOT / ".github/workflows/release.yaml").read_text())["jobs"].values()
    assert publish["environment"] == "release"
    used = [step["uses"].partition("@")[0] for step in publish["steps"] if "uses" in step]
    assert used == ["actions/checkout", "actions/setup-python", "actions/download-artifact", "docker/login-action"]
    *before, login, last = publish["steps"]
    assert login["uses"].startswith("docker/login-action@")
    assert last["run"].endswith("tools.release publish")
    assert "github.token" not in str([build, before])


def test_each_test_runs_in_one_job_of_the_workflow_those_on_a_cluster_with_public_images(
    pytestconfig: pytest.Config,
) -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yaml").read_text())["jobs"]
    fast, cluster = ([step for step in jobs[name]["steps"] if "run" in step] for name in ("fast", "cluster"))
    assert len(jobs) == 2
    assert "make lint" in [step["run"] for step in fast]
    assert fast[-1]["run"].endswith(" make test-fast")
    (step,) = cluster
    assert (step["run"], step["env"]) == ("make test-e2e", {"PYTEST_ADDOPTS": "--cluster-type docker"})
    recipes = run(["make", "--dry-run", "--old-file=.venv/ready", "test-fast", "test-e2e"], cwd=ROOT, check=True).stdout
    assert sorted(re.findall(r"\btests/\w+", recipes)) == sorted(pytestconfig.getini("testpaths"))
    assert (ROOT / ".ci/run").read_text().endswith("CI=true exec make test\n")  # which runs them all


def test_a_bot_updates_what_is_pinned() -> None:
    configured = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text())["updates"]
    assert {update["package-ecosystem"] for update in configured} == {"github-actions", "gomod", "npm"}
    (folders,) = [update["directories"] for update in configured if "directories" in update]
    modules = {f"/{path.parent.relative_to(ROOT)}" for path in ROOT.glob("[bt]*/**/go.mod")}
    assert set(folders) == {folder for folder in modules if "/offline_cluster/" not in folder}
