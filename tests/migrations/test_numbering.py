"""`alembic revision`: the number and the file that it creates; errors in revision files and between them."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.database import Database
from tests.support.messages import RULES
from tests.support.project import Project
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
    sees="`revision 002 is claimed by ... and ...; give the later one the next free number ...`, exit 255",
    state="The database is not contacted",
    do="Follow the message",
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
        f"revision 002 is claimed by {one.name} and {two.name}; give the later one the next free number and the earlier"
        f" one as its 'down_revision', {RULES}"
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
    state="The database is not contacted",
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
