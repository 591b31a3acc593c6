"""A revision that was changed after it was applied is refused; a change that does nothing is not one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from migration_runner import checksum
from tests.support.database import Database
from tests.support.programs import Result
from tests.support.project import Project
from tests.support.revisions import edit
from tools.paths import BIN, ROOT

REVISION = '''"""add

Revision ID: 002
"""
import sqlalchemy as sa
from alembic import op

revision = "002"
down_revision = "001"

meta = sa.MetaData()
SIZE = 50
UNDONE = 1
BOTH = ("a", "b")


def columns(size):
    """The columns."""
    yield sa.Column("status", sa.String(size))


def undo():
    op.drop_column("hcm_report_metadata", "status")


def upgrade():
    """Upgrade."""
    # a comment
    for column in columns(SIZE):
        op.add_column("hcm_report_metadata", column)
    op.execute(f"COMMENT ON TABLE hcm_report_metadata IS '{BOTH[0]!r:>5}' " "x")


def downgrade():
    undo()
'''
UNCHANGED = {
    "a comment": ("    # a comment", "    # another\n\n    # and one more"),
    "the module's docstring": ("add\n\nRevision", "add the status\n\nRevision"),
    "a function's docstring": ('    """Upgrade."""\n', ""),
    "quotes and parentheses": (
        'op.add_column("hcm_report_metadata", column)', "(op.add_column('hcm_report_metadata',\n column,))"
    ),
    "indentation": ("        op.add_column", "                op.add_column"),
    "line ends": ("\n", "\r\n"),
    "annotations": ("def upgrade():", "def upgrade() -> None:"),
    "an annotation of an argument and of a constant": ("columns(size):", "columns(size: int = 1):".replace(" = 1", "")),
    "an annotated constant": ("SIZE = 50", "SIZE: int = 50"),
    "a pass": ("    # a comment", "    pass"),
    "downgrade()": ("    undo()", "    raise RuntimeError('it cannot be undone')"),
    "a function that only downgrade() uses": ('op.drop_column("hcm_report_metadata", "status")', "print(UNDONE, meta)"),
    "a constant that only downgrade() uses": ("UNDONE = 1", "UNDONE = 2"),
    "an import that only downgrade() uses": ("\nrevision = ", "\nimport os, re\nrevision = "),
    "the order of imports": (
        "import sqlalchemy as sa\nfrom alembic import op", "from alembic import context, op\nimport sqlalchemy as sa"
    ),
    "its place": ('down_revision = "001"', 'down_revision = ("001", "a1")\ndepends_on = "b2"'),
    "an implicit concatenation": ("' \" \"x\")", "' x\")"),
    "an f-string without a placeholder": ("' \" \"x\")", "' \" f\"x\")"),
    "an import for type checkers": (
        "\nmeta", "\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import b\nmeta"
    ),
    "a byte order mark": ('"""add', '\ufeff"""add'),
}  # fmt: skip
CHANGED = {
    "a statement": ("    # a comment", "    op.execute('SELECT 1')"),
    "a literal": ('"hcm_report_metadata", column', '"other", column'),
    "a constant": ("SIZE = 50", "SIZE = 51"),
    "a constant's type": ("SIZE = 50", "SIZE = 50.0"),
    "a true constant": ("SIZE = 50", "SIZE = True"),
    "a helper function": ('sa.Column("status"', 'sa.Column("state"'),
    "a default of an argument": ("columns(size):", "columns(size, x=1):"),
    "an import under another name": ("import sqlalchemy as sa", "import datetime as sa"),
    "the conversion in an f-string": ("!r:>5", "!s:>5"),
    "the format in an f-string": ("!r:>5", "!r:>6"),
    "an assignment instead": ("def upgrade():", "upgrade = undo\n\n\ndef other():"),
    "a decorator": ("def upgrade():", "@__import__('functools').cache\ndef upgrade():"),
    "a statement that runs on import": ("SIZE = 50", "SIZE = 50\nop.SIZE = 51"),
    "a condition on import": ("SIZE = 50", "if True:\n    SIZE = 51"),
    "a second assignment": ("SIZE = 50", "SIZE = 50\nSIZE = 51"),
    "a changed constant": ("SIZE = 50", "SIZE = 50\nSIZE += 1"),
    "another loop": ("for column in columns(SIZE):", "for column in ():"),
    "a second function of that name": ("def downgrade", "def columns(size):\n    return ()\n\n\ndef downgrade"),
    "a decorator that registers": ("def undo", "@sa.event.listens_for(sa.Table, 'x')\ndef undo"),
    "a walrus": ("UNDONE = 1", "UNDONE = (SIZE := 51)"),
    "a name that is found dynamically": ("op.execute(f", "globals()['undo']\n    op.execute(f"),
}
REGISTERED = 'meta = sa.MetaData()\nt = sa.Table("t", meta, sa.Column("x", sa.Integer))'


class Source:
    def __init__(self, text: str, name: str = "20260101_000000_002_add.py") -> None:
        self.revision, self.path, self.module = "002", f"versions/{name}", self
        self.revision_source = text.encode("utf-8", "surrogatepass")
        self.__loader__ = self


def of(text: str, name: str = "20260101_000000_002_add.py") -> str:
    found = checksum.RevisionFile(Source(text, name)).checksum  # type: ignore[arg-type]
    assert found is not None
    return found


def replaced(old: str, new: str) -> str:
    assert old in REVISION
    return REVISION.replace(old, new)


@pytest.mark.parametrize("what", UNCHANGED)
def test_what_does_nothing_keeps_the_checksum(what: str) -> None:
    text = replaced(*UNCHANGED[what])
    compile(text.encode(), what, "exec")
    assert text != REVISION and of(text) == of(REVISION)


@pytest.mark.parametrize("what", CHANGED)
def test_what_does_something_else_changes_the_checksum(what: str) -> None:
    text = replaced(*CHANGED[what])
    compile(text, what, "exec")
    assert of(text) != of(REVISION)


def test_a_table_counts_if_its_metadata_does() -> None:
    """`meta.create_all(op.get_bind())` creates what is registered, and does not name it."""
    text = replaced("meta = sa.MetaData()", REGISTERED)
    assert of(text) == of(REVISION)
    creates = text.replace("    # a comment", "    meta.create_all(op.get_bind())")
    assert of(creates) != of(creates.replace('"t"', '"u"'))
    mixed = creates.replace("t = sa.Table", "class M(meta.x): pass\nclass T(M):\n    x: Mapped[int]\nt = sa.Table")
    assert of(mixed) != of(mixed.replace("[int]", "[str]"))
    subclass = creates.replace("t = sa.Table", "class T(meta.x): pass\nt = sa.Table")
    assert of(subclass) != of(subclass.replace("pass", "x = 1"))


def test_the_order_of_two_functions_of_one_name_counts() -> None:
    one, other = "def columns(size):\n    return (1,)\n\n\n", "def columns(size):\n    return (2,)\n\n\n"
    assert of(one + other + REVISION) != of(other + one + REVISION)


def test_a_file_that_is_nested_too_deeply_has_no_checksum() -> None:
    chain = "if SIZE == 0:\n        pass\n" + "".join(f"    elif SIZE == {n}:\n        op.f()\n" for n in range(1000))
    assert checksum.RevisionFile(Source(replaced("# a comment", chain))).checksum is None  # type: ignore[arg-type]


def test_the_slug_counts_and_the_date_and_the_number_do_not() -> None:
    assert of(REVISION) == of(REVISION, "20270101_000000_002_add.py") == of(REVISION, "002_add.py")
    assert len({of(REVISION), of(REVISION, "20260101_000000_002_add_theirs.py"), of(REVISION, "other.py")}) == 3


SYNTAX = """
from __future__ import annotations
import a, b as c, d.e
from . import f
class K(c, metaclass=d):
    x: int
    y = b"\\xff\\x00"
    def m(self, /, p, *q, r=1_000_000_000_000_000_000_000_000, **s): return super().m(*q, **{**s, "t": ...})
async def g():
    async with a() as (h, *i), b(): return [j async for j in g() if await j]
def upgrade():
    global Z
    match Z:
        case None | True | 1.5 | -2 | 3j | "x" | b"y": pass
        case {"k": v, **rest} if (w := rest): yield from v
        case K(x=[_, *others]) as z: raise E from None
        case _: assert z, f"{z=} {w!r:>{v}} {{}}" "tail" f"{'nested'}" rf"\\d{z}" f"" f"plain"
    try: del g.h[1:2, ::3, ...], K
    except (A, B) as e: nonlocal_ = lambda *n, k=0: n[0] if k else not k
    else: a @ b // ~c ** -d << 1 is not None in ()
    finally: print(0xFF, 1e400, -0.0, "\\u0301\\ud800\\U0001fae8", u"u", r"\\r", 'a' "b")
    for x, in y: continue
    while 1: break
    x += 1; x: int = {1, 2}; (x) = {k: v for k, v in x for _ in v}
"""
# Computed with 3.10, 3.11, 3.12, 3.13 and 3.14.
EXPECTED = "1:ecb98a4b1d09022101adb2a2a5bac90b0dc4f9878bebef745e290e9087fc23c6"


def test_it_is_the_same_in_every_version_of_python() -> None:
    """In those that this machine has."""
    script = (
        "import importlib.util, json, sys\nspec = importlib.util.spec_from_file_location('checksum', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        "class Source: pass\nsource = Source()\nsource.revision, source.path = '002', '002_add.py'\n"
        "source.module = source.__loader__ = source\nsource.revision_source = json.load(sys.stdin).encode()\n"
        "print(module.RevisionFile(source).checksum)"
    )
    pythons = [sys.executable, *filter(None, (shutil.which(f"python3.{minor}") for minor in range(10, 15)))]
    for python in pythons:
        command = [python, "-c", script, ROOT / "migration_runner/checksum.py"]
        result = subprocess.run(command, input=json.dumps(SYNTAX), capture_output=True, text=True)
        if "not found" not in result.stderr:  # a version manager's shim for a version that is not installed
            assert (python, result.stdout, result.stderr) == (python, f"{EXPECTED}\n", "")


def test_a_comment_and_a_new_downgrade_are_not_a_change(project: Project, database: Database) -> None:
    file = project.add("002", 'op.execute("CREATE TABLE a ()")', "pass")
    project.add("003")
    assert project.alembic("upgrade", "002").returncode == 0
    edit(file, "def downgrade():\n    pass", "# it was forgotten\ndef downgrade() -> None:\n    op.drop_table('a')")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (0, ["003"]), result
    assert project.alembic("downgrade", "001").returncode == 0
    assert database.scalar("SELECT to_regclass('a')") is None


REFUSED = (
    "revision 002 was changed after it was applied: on YYYY-MM-DD HH:MM:SS UTC{commit} it was {file}{now}; if two files"
    " had one number, renumber the one that is not recorded here; if it was edited on purpose, write a new revision"
    " instead or, if the database has that change, UPDATE public.alembic_version_history SET checksum = '1:{checksum}'"
    " WHERE id = {id}; see 'The record of what was applied' in docs/operations.md"
)


def refusal(result: Result, file: str, now: str, commit: str = "") -> str:
    """Assert that the run was refused; the statement that accepts the change."""
    found = re.search(r"UPDATE .*? WHERE id = (\d+)", result.failure)
    assert found and result.returncode == 255, result
    digest = found[0].split("'")[1].removeprefix("1:")
    assert result.failure == REFUSED.format(file=file, now=now, commit=commit, checksum=digest, id=found[1])
    return found[0]


@pytest.mark.fault(
    "Code and settings",
    fault="Two branches had one number: the environment has applied one of the files, and the merge gave that number to"
    " the other one",
    sees="`revision 002 was changed after it was applied: on ... from commit ... it was ..._002_mine.py, and now"
    " ..._002_theirs.py claims it; ...`, exit 255",
    state="Nothing was changed",
    do="Follow the message ([Two files with one number](migrations.md#two-files-with-one-number)), deploy again",
)
def test_the_other_file_with_the_same_number_is_refused(project: Project, database: Database) -> None:
    mine = project.add("002", 'op.execute("CREATE TABLE mine ()")', 'op.execute("DROP TABLE mine")', name="mine")
    assert project.alembic("upgrade", "head", GIT_COMMIT="5e0f" * 10).returncode == 0
    mine.unlink()
    theirs = project.add("002", 'op.execute("CREATE TABLE theirs ()")', name="theirs")
    project.add("003", 'op.execute("CREATE TABLE mine ()")', name="mine")
    before = (database.dump(), database.history())
    now = f", and now {theirs.name} claims it"
    for command in (("upgrade", "head"), ("downgrade", "-1"), ("stamp", "head"), ("upgrade", "002")):
        refusal(project.alembic(*command), mine.name, now, " from commit <commit>")
    assert (database.at, database.dump(), database.history()) == (["002"], *before)
    theirs.unlink()
    project.add("002", 'op.execute("CREATE TABLE mine ()")', name="mine")
    project.add("003", 'op.execute("CREATE TABLE theirs ()")', name="theirs")
    (project.versions / "20251202_143000_003_mine.py").unlink()
    assert project.alembic("upgrade", "head").returncode == 0
    assert database.relations[-1] == "theirs"


@pytest.mark.fault(
    "Code and settings",
    fault="A revision was edited after it was applied",
    sees="`revision 002 was changed after it was applied: on ... it was ..., which now does something else; ...`,"
    " exit 255; in the log of alembic current and helm test `WARNING revision 002 was changed ...`, exit 0",
    state="Nothing was changed",
    do="Undo the edit, and write a new revision; or run the `UPDATE` that the line shows",
)
def test_an_edited_revision_is_refused_until_the_record_says_otherwise(project: Project, database: Database) -> None:
    file = project.add("002", 'op.execute("CREATE TABLE a (x int)")')
    assert project.alembic("upgrade", "head").returncode == 0
    edit(file, "x int", "x bigint")
    statement = refusal(project.alembic("upgrade", "head"), file.name, ", which now does something else")
    current = project.alembic("current")
    assert (current.returncode, current.stdout) == (0, "002 (head)\n")
    assert "WARNING revision 002 was changed after it was applied" in current.stderr
    assert database.psql("ALTER TABLE a ALTER x TYPE bigint").returncode == 0
    assert database.psql(statement).returncode == 0
    assert project.alembic("upgrade", "head").lines[-1] == "HH:MM:SS INFO at 002 (head): nothing to do"
    edit(file, "x bigint", "x numeric")
    assert project.alembic("upgrade", "head").returncode == 255


def test_a_plan_refuses_a_changed_revision(project: Project, database: Database) -> None:
    file = project.add("002", 'op.execute("CREATE TABLE a ()")')
    assert project.alembic("upgrade", "head").returncode == 0
    project.add("003")
    unchanged = project.alembic("upgrade", "002:head", "--sql")
    edit(file, "TABLE a", "TABLE b")
    edited = project.alembic("upgrade", "002:head", "--sql")
    result = database.psql(edited.stdout)
    assert result.returncode == 3 and "revision 002 was changed after it was applied" in result.text, result
    assert database.at == ["002"]
    database.execute("UPDATE alembic_version_history SET checksum = '1:accepted'")  # and then the edit was undone
    assert database.psql(unchanged.stdout).returncode == 0
    assert database.at == ["003"]


@pytest.mark.parametrize("name", ["ae1027a6acf", "ünïcode"])
def test_an_id_that_is_not_a_number_is_compared(project: Project, database: Database, name: str) -> None:
    file = project.add(name, 'op.execute("CREATE TABLE a ()")', down="001")
    assert project.alembic("upgrade", "head").returncode == 0
    edit(file, "TABLE a", "TABLE b")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, f"revision {name} was changed" in result.failure) == (255, True), result
    statement = re.search(r"UPDATE .*?;", result.failure)
    assert statement and database.psql(statement[0]).returncode == 0
    assert project.alembic("upgrade", "head").returncode == 0


def test_what_was_undone_or_never_recorded_may_change(project: Project, database: Database) -> None:
    file = project.add("002", 'op.execute("CREATE TABLE a ()")', 'op.execute("DROP TABLE a")')
    assert project.alembic("upgrade", "head").returncode == 0
    assert project.alembic("downgrade", "001").returncode == 0
    edit(file, "CREATE TABLE a ()", "CREATE TABLE a (x int)")
    assert project.alembic("upgrade", "head").returncode == 0
    database.execute("UPDATE alembic_version_history SET checksum = NULL")
    edit(file, "x int", "y int")
    assert project.alembic("upgrade", "head").returncode == 0
    database.execute("UPDATE alembic_version_history SET checksum = '2:unknown'")
    assert project.alembic("upgrade", "head").returncode == 0
    database.execute("DELETE FROM alembic_version_history")
    assert project.alembic("upgrade", "head").returncode == 0


def test_a_stamped_revision_is_compared(project: Project) -> None:
    file = project.add("002", 'op.execute("CREATE TABLE a ()")')
    assert project.alembic("stamp", "head").returncode == 0
    edit(file, "TABLE a", "TABLE b")
    assert "revision 002 was changed" in project.alembic("upgrade", "head").failure
    assert project.alembic("stamp", "--purge", "002").returncode == 0  # says what the database has
    assert project.alembic("upgrade", "head").returncode == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_no_file_is_read_twice(project: Project, tmp_path: Path, compiled: bool) -> None:
    """Counted by an audit hook, in an upgrade, in a run with nothing to do, and in one that finds a comment changed."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, sys\ndef hook(event, arguments):\n"
        "    if event == 'open' and '/versions/2' in str(arguments[0]) and str(arguments[0]).endswith('.py'):\n"
        "        os.write(3, f'{arguments[0]}\\n'.encode())\n"
        "sys.addaudithook(hook)\n"
    )
    file = project.add("002")
    opened = tmp_path / "opened"
    environment = {"PYTHONPATH": str(hook)} | ({} if compiled else {"PYTHONDONTWRITEBYTECODE": "1"})
    script = f"exec 3>{opened}; exec {BIN / 'alembic'} upgrade head"
    for change in (False, False, True):
        if change:
            file.write_text(f"{file.read_text()}# changed\n")
        result = project.start("-c", script, program=Path("/bin/sh"), **environment).wait()
        assert result.returncode == 0, result
        names = [Path(line).name for line in opened.read_text().splitlines()]
        assert sorted(names) == project.files(), result
