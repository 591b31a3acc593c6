"""Multiple heads, multiple folders, unusual ids: what Alembic allows works, and an error names its file."""

from __future__ import annotations

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from migration_runner import revisions
from tests.support.database import Database
from tests.support.git import Colleague
from tests.support.messages import FIX, RULES
from tests.support.project import Project
from tests.support.revisions import FIRST, edit


def add_branch(project: Project) -> None:
    """A second branch beside 001: b1, then b2, which depends on 001."""
    project.add("b1", down="000")
    path = project.add("b2", down="b1")
    edit(path, "def upgrade", "depends_on = '001'\ndef upgrade")


def test_two_branches_are_upgraded_and_reported_by_all_their_heads(project: Project, database: Database) -> None:
    add_branch(project)
    result = project.alembic("upgrade", "heads")
    assert (result.returncode, database.at, result.lines[-1]) == (0, ["b2"], "HH:MM:SS INFO now at b2 (head)")
    assert project.alembic("upgrade", "heads").lines[-1] == "HH:MM:SS INFO at b2 (head): nothing to do"
    current = project.alembic("current")
    assert (current.returncode, "b2 (head)" in current.stdout) == (0, True)
    project.add("002")
    refused = project.alembic("current")
    assert (refused.returncode, "(head)" in refused.stdout) == (255, False)
    result = project.alembic("upgrade", "heads")
    assert (result.returncode, sorted(database.at)) == (0, ["002", "b2"])
    assert result.lines[1] == "HH:MM:SS INFO at b2 (the heads are 002, b2); to do: 1 (002 add)"
    assert result.lines[-1] == "HH:MM:SS INFO now at 002, b2 (head)"
    assert project.alembic("current").returncode == 0
    assert project.alembic("downgrade", "b1").returncode == 0


def test_an_error_in_one_branch_names_the_revisions_of_both(project: Project, database: Database) -> None:
    project.add("b1", down="000")
    project.add("002", down="001")
    assert project.alembic("upgrade", "heads").returncode == 0
    path = project.add("003", 'op.execute("SELECT 1 / 0")')
    result = project.alembic("upgrade", "heads")
    assert result.failure == (
        f"revision 003 ({path.name}) failed: division by zero, at {path.name}, line 7; rolled back; the database is at"
        f" revision 002, b1; {FIX}"
    )


@pytest.mark.parametrize("heads", [(), ("001",), ("b2",), ("003", "b2"), ("004",), ("002", "b1")], ids=",".join)
def test_current_in_linear_time_shows_what_alembic_shows(offline_project: Project, heads: tuple[str, ...]) -> None:
    add_branch(offline_project)
    offline_project.add("002")
    offline_project.add("003")
    merge = offline_project.add("004")
    edit(merge, "down_revision = '003'", "down_revision = ('003', 'b2')")
    script = ScriptDirectory.from_config(Config(offline_project.folder / "alembic.ini"))
    assert revisions.branch_heads(script, heads) == script.get_all_current(heads)


def test_the_cost_of_current_is_linear_in_the_number_of_revisions(
    offline_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lookups(count: int) -> int:
        for number in range(len(offline_project.files()) + 1, count + 1):
            offline_project.add(f"{number:03}")
        script = ScriptDirectory.from_config(Config(offline_project.folder / "alembic.ini"))
        seen: list[str] = []
        get = script.get_revision
        monkeypatch.setattr(script, "get_revision", lambda name: seen.append(name) or get(name))
        assert [revision.revision for revision in revisions.branch_heads(script, [f"{count:03}"])] == [f"{count:03}"]
        return len(seen)

    assert lookups(200) <= 2.1 * lookups(100)


def add_folders(project: Project, *names: str, recursive: bool = False) -> None:
    """Let Alembic also find revisions in these folders below migrations/."""
    ini = project.folder / "alembic.ini"
    locations = ":".join(f"%(here)s/migrations/{name}" for name in ("versions", *names))
    line = "recursive_version_locations = true" if recursive else f"version_locations = {locations}"
    edit(ini, "path_separator = os\n", f"path_separator = os\n{line}\n")
    for name in names:
        (project.folder / "migrations" / name).mkdir(parents=True)


@pytest.mark.parametrize("recursive", [False, True], ids=["two folders", "nested folder"])
def test_revisions_in_all_folders_are_run_and_checked_the_same_way(
    project: Project, database: Database, recursive: bool
) -> None:
    name = "versions/2026" if recursive else "more"
    add_folders(project, name, recursive=recursive)
    path = project.add("002", 'op.execute("SELECT 1 / 0")')
    path = path.rename(project.folder / "migrations" / name / path.name)
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["001"])
    assert f"failed: division by zero, at {path.name}, line 7; " in result.failure
    edit(path, "1 / 0", "1")
    assert project.alembic("upgrade", "head").returncode == 0
    edit(path, "def downgrade", "def other")
    assert project.alembic("upgrade", "head").failure == f"{path.name} has no downgrade(); fix the file, {RULES}"
    text = path.rename(project.folder / "002.txt")
    path.symlink_to(text)
    assert project.alembic("upgrade", "head").failure == f"{path.name} is a symlink; commit the file itself, {RULES}"
    path.unlink()
    (path.parent / f"{FIRST}.bak").write_text("not a revision")
    duplicate = path.parent / "20260101_000000_001_again.py"
    duplicate.write_text((project.versions / FIRST).read_text())
    assert "revision 001 is claimed by " in project.alembic("upgrade", "head").failure


@pytest.mark.parametrize("recursive", [False, True], ids=["two folders", "nested folder"])
def test_revisions_of_the_remote_are_found_in_all_folders(offline_project: Project, recursive: bool) -> None:
    versions = "versions/2026" if recursive else "more"
    add_folders(offline_project, versions, recursive=recursive)
    name = Colleague.of(offline_project.folder).add("002", versions=versions)
    assert offline_project.alembic("revision", "-m", "x").failure == (
        f"revision 002 already exists on origin/main: {name}; merge origin/main or rebase onto it first, or choose"
        " another --rev-id"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("revision = '2024-01-02'", "has the revision id '2024-01-02', and an id must not contain -; rename it"),
        ("revision = '2024:01'", "has the revision id '2024:01', and an id must not contain :; rename it"),
        ("revision = 'a@b+c'", "has the revision id 'a@b+c', and an id must not contain + or @; rename it"),
        ("revision = 2", "has a 'revision' that is not a string; fix the file"),
        ("revision = '002'\ndown_revision = 1", "has a 'down_revision' that is not a string; fix the file"),
        ("revision = '002'\ndepends_on = 'zzz'", "has the 'depends_on' zzz, which does not exist; fix the file"),
    ],
    ids=["dash", "colon", "at and plus", "integer", "integer parent", "missing dependency"],
)
def test_an_invalid_id_or_reference_is_named_with_its_file(offline_project: Project, fields: str, message: str) -> None:
    path = offline_project.versions / "20260101_000000_002_wrong.py"
    path.write_text(f"down_revision = '001'\n{fields}\n\ndef upgrade(): pass\n\ndef downgrade(): pass\n")
    result = offline_project.alembic("upgrade", "head")
    assert (result.returncode, result.failure) == (255, f"{path.name} {message}, {RULES}")


@pytest.mark.parametrize("arguments", [("revision", "--autogenerate", "-m", "x"), ("check",)], ids=" ".join)
def test_commands_that_compare_models_report_that_there_are_none(
    offline_project: Project, arguments: tuple[str, ...]
) -> None:
    result = offline_project.alembic(*arguments)
    assert (result.returncode, result.failure, offline_project.files()) == (
        255,
        "--autogenerate and check compare models with the database, and there are no models here; write the revision"
        ' yourself: alembic revision -m "what"',
        [FIRST],
    )
