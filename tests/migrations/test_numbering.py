"""`alembic revision`: the number and the file that it creates; errors in revision files and between them."""

import ast
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.support.database import Database
from tests.support.fault_injection import root_only
from tests.support.git import Colleague, git
from tests.support.messages import RULES
from tests.support.project import Project, copy
from tests.support.revisions import FIRST, edit


def new_revision(project: Project, *arguments: str) -> Path:
    """Run `alembic revision` and return the one file that it added."""
    before = set(project.files())
    result = project.alembic("revision", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    (name,) = set(project.files()) - before
    return project.versions / name


def fields(path: Path) -> dict[str, object]:
    """The variables that a revision file assigns, and the message in its docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return values | {"doc": (ast.get_docstring(tree, clean=False) or "").split("\n\nRevision ID:")[0]}


def test_the_second_revision_is_002_and_follows_001(offline_project: Project) -> None:
    path = new_revision(offline_project, "-m", "add_status_column")
    assert re.fullmatch(r"\d{8}_\d{6}_002_add_status_column\.py", path.name)
    assert fields(path) == {"revision": "002", "down_revision": "001", "doc": "add_status_column"}
    text = path.read_text()
    assert "# A safe revision (delete these lines when they hold):" in text
    assert text.endswith("def upgrade() -> None:\n    pass\n\n\ndef downgrade() -> None:\n    pass\n")


@pytest.mark.parametrize(("last", "following"), [("099", "100"), ("999", "1000"), ("1000", "1001"), ("009", "010")])
def test_numbers_continue_after(offline_project: Project, last: str, following: str) -> None:
    offline_project.add(last, down="001")
    path = new_revision(offline_project, "-m", "more")
    assert (fields(path)["revision"], fields(path)["down_revision"]) == (following, last)
    assert f"_{following}_more.py" in path.name


def test_the_first_revision_of_an_empty_folder_is_001(offline_project: Project) -> None:
    (offline_project.versions / FIRST).unlink()
    assert fields(new_revision(offline_project, "-m", "start")) == {
        "revision": "001",
        "down_revision": None,
        "doc": "start",
    }


def test_a_given_rev_id_is_used_and_not_counted(offline_project: Project) -> None:
    assert fields(new_revision(offline_project, "-m", "named", "--rev-id", "hotfix"))["revision"] == "hotfix"
    path = new_revision(offline_project, "-m", "next")
    assert (fields(path)["revision"], fields(path)["down_revision"]) == ("002", "hotfix")


def test_an_existing_rev_id_is_refused(offline_project: Project) -> None:
    result = offline_project.alembic("revision", "-m", "again", "--rev-id", "001")
    assert (result.returncode, result.failure) == (
        255,
        f"revision 001 already exists: {FIRST}; choose another --rev-id",
    )
    assert offline_project.files() == [FIRST]


def test_a_rev_id_that_leaves_the_folder_is_refused(offline_project: Project) -> None:
    result = offline_project.alembic("revision", "-m", "away", "--rev-id", "x/../../../away")
    assert (result.returncode, result.failure) == (
        255,
        "--rev-id is 'x/../../../away'; use letters, digits, _ and . only",
    )
    assert offline_project.files() == [FIRST]


def taken(number: str, branch: str, name: str) -> str:
    return (
        f"revision {number} already exists on {branch}: {name}; merge {branch} or rebase onto it first, or choose"
        " another --rev-id"
    )


def refused(project: Project, *arguments: str, **environment: str) -> str:
    """Run `alembic`, which must create no file; return the failure."""
    before = project.files()
    result = project.alembic(*(arguments or ("revision", "-m", "x")), **environment)
    assert (result.returncode, project.files(), result.stderr) == (255, before, "")
    return result.failure


@pytest.mark.fault(
    "Code and settings",
    fault="`alembic revision` or `alembic merge` would use an id that the remote's branch already has",
    sees="`revision 002 already exists on origin/main: ...; merge origin/main or rebase onto it first, ...`, exit 255",
    state="The database is not contacted",
    do="Follow the message",
)
@pytest.mark.parametrize(
    "arguments",
    [("revision", "-m", "x"), ("revision", "--rev-id", "002"), ("merge", "heads", "--rev-id", "002")],
    ids=" ".join,
)
def test_a_number_that_the_remote_uses_is_refused_until_it_is_merged(
    offline_project: Project, arguments: tuple[str, ...]
) -> None:
    name = Colleague.of(offline_project.folder).add("002")
    assert refused(offline_project, *arguments) == taken("002", "origin/main", name)
    other = new_revision(offline_project, "-m", "x", "--rev-id", "x2")
    assert fields(other)["down_revision"] == "001"
    other.unlink()
    git(offline_project.folder, "merge", "--quiet", "--ff-only", "origin/main")
    path = new_revision(offline_project, "-m", "mine")
    assert (fields(path)["revision"], fields(path)["down_revision"]) == ("003", "002")


def test_merge_does_not_reuse_an_id(offline_project: Project) -> None:
    assert refused(offline_project, "merge", "heads", "--rev-id", "001") == (
        f"revision 001 already exists: {FIRST}; choose another --rev-id"
    )


def test_both_the_upstream_branch_and_the_remotes_default_branch_are_checked(offline_project: Project) -> None:
    colleague = Colleague.of(offline_project.folder)
    name = colleague.add("002", branch="feature")
    path = new_revision(offline_project, "-m", "on main")
    assert fields(path)["revision"] == "002"
    path.unlink()
    git(offline_project.folder, "branch", "--set-upstream-to=origin/feature")
    assert refused(offline_project) == taken("002", "origin/feature", name)
    git(offline_project.folder, "merge", "--quiet", "--ff-only", "origin/feature")
    name = colleague.add("003")
    assert refused(offline_project) == taken("003", "origin/main", name)


ODD = "$(touch${IFS}owned)\u00a0;ü"


@pytest.mark.parametrize(
    ("commands", "branch"),
    [
        (["remote set-head origin develop", "update-ref -d refs/remotes/origin/main"], "origin/develop"),
        (["branch --unset-upstream"], "origin/main"),
        (["branch --unset-upstream", "remote rename origin corp"], "corp/main"),
        (["branch --unset-upstream", "push --quiet origin HEAD:refs/heads/master", "fetch --quiet"], "origin/main"),
        (["update-ref refs/remotes/origin/master origin/main", "branch -d -r origin/main"], "origin/master"),
        (["symbolic-ref refs/remotes/origin/HEAD refs/remotes/origin/gone"], "origin/main"),
        (["checkout --quiet --detach"], "origin/main"),
        (["checkout --quiet --orphan empty"], "origin/main"),
        (["fetch --quiet --depth=1"], "origin/main"),
        (["tag origin/main HEAD", "branch origin/main HEAD"], "origin/main"),
        ([f"branch --quiet --set-upstream-to=origin/{ODD}"], f"origin/{ODD}"),
        (["config color.ui always", "config core.quotePath true"], "origin/main"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_a_branch_is_found_however_the_clone_was_made(
    offline_project: Project, commands: list[str], branch: str
) -> None:
    colleague = Colleague.of(offline_project.folder)
    name = colleague.add("002")
    colleague.push("develop")
    colleague.push(ODD)
    for command in commands:
        git(offline_project.folder, *command.split(" "))
    assert refused(offline_project) == taken("002", branch, name)
    assert not list(offline_project.folder.rglob("owned"))


def test_a_hooks_variables_do_not_name_the_repository(offline_project: Project, tmp_path: Path) -> None:
    name = Colleague.of(offline_project.folder).add("002")
    git(tmp_path, "init", "--quiet", "other")
    for folder in (".git", str(tmp_path / "other" / ".git")):
        failure = refused(offline_project, GIT_DIR=folder, GIT_INDEX_FILE=f"{folder}/index")
        assert failure == taken("002", "origin/main", name)


@pytest.mark.parametrize(
    "damage",
    [
        ["remote", "remove", "origin"],
        ["config", "core.bare", "true"],
        ["config", "core.repositoryFormatVersion", "99"],
        ["config", "core.worktree", "/nowhere"],
        ["symbolic-ref", "refs/remotes/origin/main", "refs/heads/main"],
        [],
    ],
    ids=lambda damage: " ".join(damage) or "no git",
)
def test_what_git_cannot_tell_is_not_checked(offline_project: Project, damage: list[str]) -> None:
    Colleague.of(offline_project.folder).add("002")
    if damage:
        git(offline_project.folder, *damage)
    else:
        offline_project.environment["PATH"] = "/nowhere"
    assert fields(new_revision(offline_project, "-m", "x"))["revision"] == "002"


@root_only
def test_a_repository_of_another_user_is_not_checked(offline_project: Project) -> None:
    Colleague.of(offline_project.folder).add("002")
    os.chown(offline_project.folder / ".git", 65534, 65534)
    os.chown(offline_project.folder, 65534, 65534)
    assert fields(new_revision(offline_project, "-m", "x"))["revision"] == "002"


@pytest.mark.parametrize("kind", ["blob:none", "tree:0"])
def test_a_partial_clone_fetches_nothing(offline_project: Project, tmp_path: Path, kind: str) -> None:
    colleague = Colleague.of(offline_project.folder)
    remote, mine = tmp_path / "remote.git", tmp_path / "partial"
    git(remote, "config", "uploadpack.allowFilter", "true")
    git(tmp_path, "clone", "--quiet", f"--filter={kind}", f"file://{remote}", mine)
    name = colleague.add("002")
    git(mine, "fetch", "--quiet")
    assert "\n?" in git(mine, "rev-list", "--objects", "--all", "--missing=print")
    git(mine, "config", "remote.origin.url", f"ext::touch {tmp_path}/fetched")
    git(mine, "config", "protocol.ext.allow", "always")
    partial = Project(mine, offline_project.environment)
    if kind == "blob:none":
        assert refused(partial) == taken("002", "origin/main", name)
    else:  # not even the names are known
        assert fields(new_revision(partial, "-m", "x"))["revision"] == "002"
    assert not (tmp_path / "fetched").exists()


def test_a_project_in_a_folder_of_the_repository_is_checked_and_no_other(
    offline_project: Project, tmp_path: Path
) -> None:
    mine = tmp_path / "mono"
    for path in ("tööls/a b", "other"):
        (mine / path).mkdir(parents=True)
        copy(mine / path)
    project = Project(mine / "tööls/a b", offline_project.environment)
    colleague = Colleague.of(mine)
    colleague.add("002", path="other")
    created = new_revision(project, "-m", "x")
    assert fields(created)["revision"] == "002"
    created.unlink()
    name = colleague.add("002", path="tööls/a b")
    assert refused(project) == taken("002", "origin/main", name)


def test_a_folder_that_has_no_revision_yet_is_checked(offline_project: Project) -> None:
    Colleague.of(offline_project.folder)
    shutil.rmtree(offline_project.versions)
    assert refused(offline_project) == taken("001", "origin/main", FIRST)


def test_a_revision_that_both_sides_have_is_no_conflict_whatever_its_file_is_called(offline_project: Project) -> None:
    colleague = Colleague.of(offline_project.folder)
    name = colleague.add("002")
    git(offline_project.folder, "merge", "--quiet", "--ff-only", "origin/main")
    git(colleague.folder, "mv", f"migrations/versions/{name}", "migrations/versions/20251202_143000_002_renamed.py")
    colleague.push()
    assert fields(new_revision(offline_project, "-m", "x"))["revision"] == "003"


@pytest.mark.parametrize(
    ("rev_id", "file", "content", "is_taken"),
    [
        ("002", "any.py", b"down_revision = '001'\nrevision: str = \"002\"  # a comment\n", True),
        ("002", "any.py", b"\xef\xbb\xbfrevision='002'\r\ndown_revision='001'\r\n", True),
        ("1a2b3c4d5e6f", "x.py", b'"""\nRevision ID: 7\n"""\nrevision = "1a2b3c4d5e6f"\n', True),
        ("002", "20260101_000000_002_x.py", b"revision, down_revision = '002', '001'\n", True),  # by its name
        ("002", "20260101_000000_002_x.py", b"revision = '007'\ndown_revision = '002'\n", False),
        ("002", "20260101_000000_007_fix_002_x.py", b"number = '7'\nrevision = str(number)\n", False),
        ("002", "002.txt", b"revision = '002'\n", False),
        ("002", "more/20260101_000000_002_x.py", b"revision = '002'\n", False),
        ("0.2", "002_x.py", b"\xff\xfe\x00", False),
    ],
)
def test_the_id_in_the_remotes_file_counts_or_else_its_name(
    offline_project: Project, rev_id: str, file: str, content: bytes, is_taken: bool
) -> None:
    colleague = Colleague.of(offline_project.folder)
    path = colleague.folder / "migrations" / "versions" / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    colleague.push()
    if is_taken:
        assert refused(offline_project, "revision", "--rev-id", rev_id) == taken(rev_id, "origin/main", file)
    else:
        assert fields(new_revision(offline_project, "-m", "x", "--rev-id", rev_id))["revision"] == rev_id


@pytest.mark.parametrize(
    "message",
    [
        'it\'s "quoted"',
        'ends with a quote"',
        '"""',
        '""""""',
        "\\",
        "back\\slash \\n \\N{x} \\x",
        'both \\" of them\\',
        "../../etc/passwd",
        "/absolute/path",
        "$(touch owned) `touch owned` ${revision} %(here)s %%",
        "<% x %> ${1/0} # comment ## mako\n% if x:",
        "größe 表 🎉",
        "x" * 300,
        "",
        "   ",
        "two\nlines",
    ],
    ids=lambda message: repr(message)[:20],
)
def test_any_message_creates_one_valid_file_in_the_folder(offline_project: Project, message: str) -> None:
    def all_files() -> set[Path]:
        outside = [path for path in offline_project.folder.parent.iterdir() if not path.name.startswith("run-")]
        inside = {path for folder in outside for path in folder.rglob("*")}
        return {path for path in inside if "__pycache__" not in path.parts}

    before = all_files()
    path = new_revision(offline_project, "-m", message)
    assert all_files() - before == {path}
    assert path.parent == offline_project.versions
    assert re.fullmatch(r"\d{8}_\d{6}_002_\w{0,41}\.py", path.name)
    assert fields(path) == {"revision": "002", "down_revision": "001", "doc": message}
    assert offline_project.alembic("heads").stdout == "002 (head)\n"


@pytest.mark.fault(
    "Code and settings",
    fault="Two files claim the same revision number",
    sees="`revision 002 is claimed by ... and ..., and an environment that has applied one never applies the other;"
    " give the one that no environment has applied the next free number ...`, exit 255",
    state="The database is not contacted",
    do="Follow the message ([Two files with one number](migrations.md#two-files-with-one-number))",
)
@pytest.mark.parametrize(
    "arguments",
    [("upgrade", "head"), ("revision", "-m", "x"), ("upgrade", "head", "--sql"), ("history",)],
    ids=" ".join,
)
def test_two_files_with_the_same_number_are_refused_by_name(offline_project: Project, arguments: tuple) -> None:
    one, two = offline_project.add("002", name="a"), offline_project.add("002", name="b")
    before = offline_project.files()
    result = offline_project.alembic(*arguments)
    assert (result.returncode, offline_project.files()) == (255, before)
    assert result.failure == (
        f"revision 002 is claimed by {one.name} and {two.name}, and an environment that has applied one never"
        " applies the other; give the one that no environment has applied the next free number and the other one as its"
        f" 'down_revision', {RULES}"
    )


@pytest.mark.fault(
    "Code and settings",
    fault="Two heads",
    sees="`there are 2 heads: ... and ...; set the 'down_revision' of one to the other, ...`, exit 255",
    state="The database is not contacted",
    do="Follow the message",
)
@pytest.mark.parametrize("command", ["upgrade", "stamp"])
def test_two_heads_are_refused_by_name(offline_project: Project, command: str) -> None:
    one, two = offline_project.add("002", name="a"), offline_project.add("003", name="b", down="001")
    result = offline_project.alembic(command, "head")
    assert (result.returncode, result.failure) == (
        255,
        f"there are 2 heads: 002 ({one.name}) and 003 ({two.name});"
        f" set the 'down_revision' of one to the other, {RULES}",
    )


def test_a_revision_after_two_heads_is_refused(offline_project: Project) -> None:
    one, two = offline_project.add("002", name="a"), offline_project.add("003", name="b", down="001")
    before = offline_project.files()
    result = offline_project.alembic("revision", "-m", "x")
    assert (result.returncode, offline_project.files()) == (255, before)
    assert result.failure == (
        f"there are 2 heads: 002 ({one.name}) and 003 ({two.name});"
        f" set the 'down_revision' of one to the other, {RULES}"
    )


@pytest.mark.fault(
    "Code and settings",
    fault="A revision's parent is missing",
    sees="`... references down_revision ..., which does not exist; ...`, exit 255",
    state="The database is not contacted",
    do="Follow the message",
)
def test_a_missing_parent_is_named_with_the_file_that_references_it(offline_project: Project) -> None:
    path = offline_project.add("003")
    result = offline_project.alembic("upgrade", "head")
    assert (result.returncode, result.failure) == (
        255,
        f"{path.name} references down_revision 002, which does not exist; add the missing file, or name the one that it"
        f" follows, {RULES}",
    )


def test_a_cycle_is_refused(offline_project: Project) -> None:
    offline_project.add("002", down="003")
    offline_project.add("003")
    result = offline_project.alembic("upgrade", "head")
    assert result.returncode == 255
    assert result.failure == (
        f"Cycle is detected in revisions (002, 003); fix the 'down_revision' of one of them, {RULES}"
    )


@pytest.mark.fault(
    "Code and settings",
    fault="A revision file has a syntax error or a failing import",
    sees="`<file>, line N: <error>; fix the file, ...`, exit 255",
    state="Nothing was changed",
    do="Fix the file, push, deploy again",
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("revision = '002'\ndef upgrade(:\n", "line 2: SyntaxError: "),
        (
            "import no_such\nrevision = '002'\n",
            "line 1: ModuleNotFoundError: No module named 'no_such'; ",
        ),
        ("revision = '002'\ndown_revision = 1 / 0\n", "line 2: ZeroDivisionError: division by zero; "),
        ("revision = '002'\nraise SystemExit('gone')\n", "line 2: SystemExit: gone; "),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "line 1: SyntaxError: "),
    ],
    ids=["syntax", "import", "error", "exit", "git-lfs pointer"],
)
@pytest.mark.parametrize("arguments", [("upgrade", "head"), ("revision", "-m", "x")], ids=" ".join)
def test_a_file_that_does_not_load_is_named_with_its_line(
    offline_project: Project, content: str, message: str, arguments: tuple
) -> None:
    path = offline_project.versions / "20251202_143000_002_broken.py"
    path.write_text(content)
    result = offline_project.alembic(*arguments)
    assert result.returncode == 255
    assert result.failure.startswith(f"{path.name}, {message}")
    assert result.failure.endswith(f"; fix the file, {RULES}")


@pytest.mark.fault(
    "Code and settings",
    fault="An empty revision file",
    sees="`... has no 'revision'; fix or delete the file, ...`, exit 255",
    state="The database is not contacted",
    do="Follow the message",
)
@pytest.mark.parametrize("content", ["", "x = 1\n"], ids=["empty", "no revision"])
def test_a_file_without_a_revision_is_named(offline_project: Project, content: str) -> None:
    path = offline_project.versions / "20251202_143000_002_empty.py"
    path.write_text(content)
    result = offline_project.alembic("upgrade", "head")
    assert (result.returncode, result.failure) == (
        255,
        f"{path.name} has no 'revision'; fix or delete the file, {RULES}",
    )


@pytest.mark.parametrize("arguments", [("upgrade", "head"), ("upgrade", "head", "--sql")], ids=" ".join)
@pytest.mark.parametrize("name", ["upgrade", "downgrade"])
@pytest.mark.parametrize("replacement", ["def other()", "def {}(op)"])
def test_a_file_without_both_functions_is_named_before_connecting(
    offline_project: Project, arguments: tuple, name: str, replacement: str
) -> None:
    path = offline_project.add("002")
    edit(path, f"def {name}()", replacement.format(name))
    result = offline_project.alembic(*arguments)
    assert (result.returncode, result.failure) == (255, f"{path.name} has no {name}(); fix the file, {RULES}")


def test_an_error_in_a_revision_with_sql_is_one_line(offline_project: Project) -> None:
    path = offline_project.add("002", "1 / 0")
    result = offline_project.alembic("upgrade", "head", "--sql")
    failure = f"{path.name}, line 7: ZeroDivisionError: division by zero; fix the file, {RULES}"
    assert (result.returncode, result.stderr) == (255, f"FAILED: {failure}\n")
    assert result.stdout == ""  # no SQL of 001 either: half a plan could be taken for a whole one


@pytest.mark.fault(
    "Code and settings",
    fault="No revisions are found (wrong branch or path)",
    sees="`no revisions found in ...; nothing to do, treated as an error: check the branch and"
    " the path of the checkout ...`, exit 255",
    state="The database is not contacted",
    do="Set `git.branch` or `git.path`, deploy again",
)
@pytest.mark.parametrize("arguments", [("upgrade", "head"), ("current",), ("upgrade", "head", "--sql")], ids=" ".join)
def test_an_empty_folder_is_an_error_before_connecting(offline_project: Project, arguments: tuple) -> None:
    (offline_project.versions / FIRST).unlink()
    result = offline_project.alembic(*arguments)
    assert (result.returncode, result.failure) == (
        255,
        f"no revisions found in {offline_project.versions}; nothing to do, treated as an error: check the branch and"
        " the path of the checkout (in the chart: 'git.branch' and 'git.path')",
    )


def test_a_file_with_crlf_line_endings_and_a_byte_order_mark_loads(offline_project: Project) -> None:
    path = offline_project.add("002")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert offline_project.alembic("heads").stdout == "002 (head)\n"
    assert fields(new_revision(offline_project, "-m", "x"))["revision"] == "003"


def test_an_id_that_is_too_long_for_the_version_table_is_named_before_any_step(
    project: Project, database: Database
) -> None:
    project.add("2" * 33, down="001")
    message = f"revision {'2' * 33} has 33 characters, and the version table holds 32; shorten it{{}}; {RULES}"
    assert project.alembic("upgrade", "head").failure == message.format("")
    assert database.relations == []
    assert project.alembic("upgrade", "001").returncode == 0
    widen = "ALTER TABLE public.alembic_version ALTER version_num TYPE text"
    assert project.alembic("upgrade", "head").failure == message.format(f", or widen the column: {widen}")
    database.execute(widen)
    assert project.alembic("upgrade", "head").returncode == 0
    assert project.alembic("current").stdout == f"{'2' * 33} (head)\n"
