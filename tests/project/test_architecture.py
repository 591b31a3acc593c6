"""docs/architecture.md lists every folder and module, and only the imports that it allows exist."""

import ast
import re
from pathlib import Path

import grimp
import pytest

from tests.support.git import git
from tests.support.programs import run
from tools.paths import BIN, ROOT

PAGE = (ROOT / "docs/architecture.md").read_text()
NAMES = re.findall(r"`([^`\s]+)`", PAGE.split("```")[2])
PATH = re.compile(r"\.?[\w-][\w./-]*(/|\.(py|md|yaml|json|toml|mod|mako|tpl|example))[\w.-]*")
ROWS = [line for line in PAGE.split("## Where to change what")[1].splitlines() if line.startswith("| ")][1:]


def _tracked() -> list[Path]:
    return [Path(line) for line in git(ROOT, "ls-files").splitlines()]


def _imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}}


def test_packages_import_only_what_they_may() -> None:
    run([BIN / "lint-imports", "--no-cache", "--no-logo"], cwd=ROOT, check=True)


def test_tests_share_code_in_support_only() -> None:
    graph = grimp.build_graph("tests", cache_dir=None)
    found = [
        f"{importer} imports {name}"
        for name in graph.modules
        if not name.startswith("tests.support")
        for importer in graph.find_modules_that_directly_import(name)
    ]
    assert sorted(found) == []


def test_migrations_which_is_no_package_imports_only_what_it_may() -> None:
    project = {path.parts[0] for path in _tracked() if len(path.parts) > 1}
    for path in (ROOT / "migrations").rglob("*.py"):
        assert _imports(path) & project <= ({"migration_runner"} if "versions" not in path.parts else set()), path


def test_every_path_on_the_page_exists() -> None:
    missing = {name for name in NAMES if PATH.fullmatch(name) and not (ROOT / name).exists()}
    assert missing == set()


@pytest.mark.parametrize("row", ROWS)
def test_every_name_on_the_page_occurs_in_a_file_of_its_row(row: str) -> None:
    names = re.findall(r"`([^`\s]+)`", row.split(" | ")[1])
    paths = [name for name in names if PATH.fullmatch(name)]
    text = "".join((ROOT / path).read_text() for path in paths if (ROOT / path).is_file())
    identifiers = [name.rpartition(".")[2] for name in names if name not in paths and re.fullmatch(r"[\w.]+", name)]
    assert [name for name in identifiers if not re.search(rf"\b{name}\b", text)] == []


def test_every_folder_and_every_module_of_the_runner_is_on_the_page() -> None:
    folders = {path.parts[0] for path in _tracked() if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    modules = {path.stem for path in _tracked() if path.match("migration_runner/*.py")} - {"__init__"}
    assert folders - {"charts"} | {"charts/hcm-db-migrations"} | modules <= set(NAMES)
