"""A run with nothing to do runs no revision file, and says what it would say if it had."""

from __future__ import annotations

import socket
import socketserver
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from hypothesis import given, settings
from hypothesis import strategies as st

from migration_runner import headers
from tests.support.database import Database
from tests.support.project import Project
from tests.support.revisions import edit
from tests.support.servers import serving
from tools.paths import ROOT
from tools.postgres import dsn

VERSIONS = ROOT / "migrations" / "versions"
DONE = "HH:MM:SS INFO at 002 (head): nothing to do"
FILE = '''"""add \\"a\\" status

Revision ID: 002
Revises: 001
revision = "000"
"""
from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op  # as always

# revision identifiers, used by Alembic.
revision: str = "002"
down_revision: str | Sequence[str] | None = "001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    """Upgrade."""
    revision = "003"
    op.execute("""
    CREATE TABLE a (x int)
    """)


def downgrade() -> None:
    global revision
    revision = "003"
'''
# Before the functions: what assigns again, and how.
AGAIN = {
    "an assignment": 'revision = "003"',
    "an addition": 'revision += "b"',
    "a tuple": 'revision, x = "003", 1',
    "a walrus": '(revision := "003")',
    "a loop": 'for revision in ["003"]: pass',
    "a condition": 'if True: revision = "003"',
    "a class": 'class revision: pass\nrevision = "003"',
    "an import": "from string import digits as revision",
    "a deletion": 'del revision\nrevision = "003"',
    "globals()": 'globals().update({"rev" "ision": "003"})',
    "exec()": 'exec("rev" "ision = \'003\'")',
    "a call": 'def f():\n    global revision\n    revision = "003"\nf()',
    "a decorator": 'def f(_):\n    global revision\n    revision = "003"\n@f\ndef g(): pass',
    "a default": 'def f(x=globals().update({"rev" "ision": "003"})): pass',
    "an annotation": 'def f() -> globals().update({"rev" "ision": "003"}): pass',
    "another form of the letter": '\uff52evision = "003"',
    "a form feed": 'def f():\n    pass\n \frevision = "003"',
    "a carriage return": '# \rrevision = "003"',
    "a carriage return in a function": 'def f():\n    pass # \rrevision = "003"',
    "another parent": "down_revision = None",
    "a label": 'branch_labels = "b"',
    "a dependency": 'depends_on = "001"',
    "a dependency in another form of the letter": '\uff44epends_on = "001"',
    "a function": "def branch_labels(): pass\nbranch_labels = ['b']",
    "a function of that name": "def revision(): pass\nrevision = '003'",
    "a function instead": "def depends_on(): return []\ndepends_on = '001'",
    "a class variable that is global": "class A:\n    global revision\n    revision = '003'",
    "a star": "from os.path import *\nrevision = '003'",
    "vars()": "vars()['rev' + 'ision'] = '003'",
    "a frame": "import inspect\ninspect.currentframe().f_globals['rev' + 'ision'] = '003'",
    "an exception": "try: raise ValueError\nexcept ValueError as revision: pass\nrevision = '003'",
    "a pattern": "match '003':\n    case revision: pass",
    "a with statement": "import contextlib\nwith contextlib.nullcontext('003') as revision: pass",
    "a comprehension": "[revision := x for x in ['003']]",
    "a default with a walrus": "def f(x=(revision := '003')): pass",
}
# In place of the assignment.
OTHERWISE = {
    "in a string": 'revision = "003"\nx = """\nrevision: str = "002"\n"""',
    "in a branch": 'revision = "003"\nif False:\n    revision: str = "002"',
    "a concatenation": 'revision: str = "00" "3"',
    "a continued line": 'revision: str = "002" \\\n    "3"',
    "a semicolon": 'revision: str = "002"; revision = "003"',
    "an escape": 'revision: str = "00\\x33"',
    "in a comment": '# revision: str = "002"\nrevision = "003"',
}
REAL = 'revision = "003"; down_revision = "001"'
CHANGES = {f"again by {name}": ("\n\n\ndef upgrade", f"\n{text}\n\n\ndef upgrade") for name, text in AGAIN.items()}
CHANGES |= {name: ('revision: str = "002"', text) for name, text in OTHERWISE.items()}
CHANGES |= {
    "an encoding": (FILE, "# coding: utf-7\n" + FILE.replace("\n\n\ndef up", "\n# +AAo-revision = '003'\n\n\ndef up")),
    "a byte order mark": ('"""add', '\ufeff"""add'),
    "CRLF": ("\n", "\r\n"),
    "no functions": (FILE[FILE.index("def upgrade") :], ""),
    "a list": ('None = "001"', 'None = ["001"]'),
    **{
        f"in {name}": (FILE, f'{begin}\nrevision = "002"\ndown_revision = "001"\ndef f():\n """; {REAL}\n')
        for name, begin in (
            ("a docstring", '"""'),
            ("a docstring with quotes", '"""\\\\\\"""'),
            ("a docstring with two quotes", '"""a\n""'),
            ("a string after a docstring", '"""a"""\nx = """'),
            ("a string after another", '"""a""" """'),
        )
    },
}


def alembic_says(folder: Path) -> tuple[list[str], set[str]] | None:
    """The heads and all revisions, after running the files; None if it refuses them."""
    script = ScriptDirectory(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return script.get_heads(), {revision.revision for revision in script.walk_revisions()}
    except Exception:
        return None


def read(folder: Path) -> tuple[list[str], set[str]] | None:
    """What is read of the files: the same, or None."""
    found = headers.read(ScriptDirectory(str(folder)))
    return ([found.head], set(found.files)) if found else None


def write(folder: Path, number: str, parents: str) -> None:
    text = FILE.replace('= "001"', f"= {parents}").replace('str = "002"', f'str = "{number}"')
    (folder / "versions" / f"{number}.py").write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of Alembic's, with revision 001."""
    (tmp_path / "versions").mkdir()
    write(tmp_path, "001", "None")
    return tmp_path


@pytest.mark.parametrize("source", [FILE.encode(), *(path.read_bytes() for path in VERSIONS.glob("*.py"))])
def test_a_file_as_a_template_makes_it_is_read(source: bytes) -> None:
    assert headers._match(source)


def test_a_long_file_ends_the_match_at_its_first_odd_line() -> None:
    """Not after trying all ways to match the lines before it, which would not end."""
    assert headers._match((FILE + "    # a comment\n\n" * 10_000 + "@add\ndef f():\n    pass\n").encode()) is None


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_file_is_read_as_python_runs_it(folder: Path, change: tuple[str, str]) -> None:
    assert change[0] in FILE
    (folder / "versions" / "002.py").write_bytes(FILE.replace(*change).encode())
    assert alembic_says(folder)
    assert read(folder) in (None, alembic_says(folder))


FIELDS = ("revision", "down_revision", "branch_labels", "depends_on")
PIECES = st.sampled_from(
    [*"\n\r\f\t\\'\"(){}#;:=@,", '"""', "'''", "\r\n", "\\\n", "    ", ' f"{', '}"', "\npass", "\nif 1:\n    "]
    + [f"\n{name} = {value}" for name in FIELDS for value in ('"003"', "None")]
    + ["\ndef f():\n    ", "\nglobal revision", "\nfrom os import *", "\nimport os as revision", "\n\uff52evision = 1"]
)  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(FILE)), PIECES), min_size=1, max_size=4))
def _read_and_run(insertions: list[tuple[int, str]]) -> None:
    text = FILE
    for at, piece in sorted(insertions, reverse=True):
        text = text[:at] + piece + text[at:]
    read = headers._match(text.encode()) or headers._parse(text.encode())
    module: dict[str, Any] = {}
    try:
        exec(compile(text.encode(), "002.py", "exec"), module)  # noqa: S102
    except Exception:
        return
    parents = module.get("down_revision")
    answer = (module.get("revision"), (parents,) if parents else ())
    if module.get("branch_labels") or module.get("depends_on") or "down_revision" not in module:
        assert read is None, text
    assert read in (None, answer), text
    SEEN.append(read is None)


SEEN: list[bool] = []  # for each file that Python could run: whether it was not read


def test_any_file_is_read_as_python_runs_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python, of the files
        _read_and_run()
    assert {True, False} == set(SEEN)


@pytest.mark.parametrize(
    ("parents", "understood"),
    [
        ({"002": '"001"', "003": '"001"', "004": '("002", "003")'}, True),
        ({"002": '"001"', "003": '"001"'}, False),  # two heads
        ({"002": "None"}, False),
        ({"002": '"000"'}, False),  # no such file
        ({"002": '"002"'}, False),  # a cycle
        ({"002": '("001", "003")', "003": '"002"', "004": '"003"'}, False),
        ({"002": "{[]: 1}"}, False),  # a TypeError
        ({"002": f"{'-' * 100_000}1"}, False),  # a MemoryError
        ({"002": "+".join(["1"] * 100_000)}, False),  # a RecursionError
        ({}, True),
    ],
)
def test_what_alembic_refuses_is_left_to_it(folder: Path, parents: dict[str, str], understood: bool) -> None:
    for number, names in parents.items():
        write(folder, number, names)
    assert read(folder) == (alembic_says(folder) if understood else None)
    assert not understood or alembic_says(folder)


def test_a_second_file_of_a_revision_is_left_to_alembic(folder: Path) -> None:
    (folder / "versions" / "other.py").write_bytes((folder / "versions" / "001.py").read_bytes())
    assert (read(folder), alembic_says(folder)) == (None, None)


def loads(project: Project, number: str, **options: Any) -> Path:
    """Add a revision that logs, in `loaded`, that it was run as a module."""
    (project.folder / "witness.py").write_text("open('loaded', 'w')\n")
    file = project.add(number, **options)
    edit(file, "import signal", "import witness, signal")
    return file


def test_no_revision_file_is_run(project: Project, database: Database) -> None:
    loads(project, "002")
    log = project.folder / "loaded"
    for command, times in (("upgrade", 1), ("upgrade", 0), ("downgrade", 1), ("stamp", 1), ("upgrade", 0)):
        target = "001" if command == "downgrade" else "head"
        result = project.alembic(command, target)
        assert result.returncode == 0, result
        assert (log.exists() and log.unlink() is None) is bool(times), result
        if not times:
            assert [line.split(" INFO ")[1].split()[0] for line in result.lines] == ["database", "since", "at"]
            assert result.lines[-1] == DONE
    database.execute("UPDATE alembic_version_history SET file_sha256 = NULL WHERE revision = '002'")
    assert project.alembic("upgrade", "head").lines[-1] == DONE and log.exists()  # its checksum was compared
    database.execute("DROP TABLE alembic_version_history")
    log.unlink()
    assert project.alembic("upgrade", "head").lines[-1] == DONE and not log.exists()


def test_a_file_of_another_form_is_run_only_if_it_may_change_what_it_assigns(project: Project) -> None:
    file = loads(project, "002")
    edit(file, "def upgrade", "X = sa.table('x')\ndef upgrade")
    edit(file, "import witness", "import sqlalchemy as sa\nimport witness")
    log = project.folder / "loaded"
    for last, is_run in (("HH:MM:SS INFO now at 002 (head)", True), (DONE, False)):
        assert project.alembic("upgrade", "head").lines[-1] == last
        assert log.exists() is is_run
        log.unlink(missing_ok=True)
    project.add("003", down="001")
    assert "there are 2 heads" in project.alembic("upgrade", "head").failure


@pytest.mark.parametrize("when", ["something to do", "unreachable", "refused", "settings"])
def test_a_broken_file_is_reported_first(project: Project, database: Database, when: str) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    project.add("002", "1 +")
    environment = {
        "something to do": {},
        "unreachable": {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"},
        "refused": {"DATABASE_URL": dsn(database.url.set(password="wrong"))},  # noqa: S106
        "settings": {"DB_SCHEMA": ""},
    }[when]
    before = (database.dump(), database.history())
    result = project.alembic("upgrade", "head", **environment)
    where = "20251202_143000_002_add.py, line 7"
    assert (result.returncode, result.failure.split(":")[0]) == (255, where), result
    assert "waiting" not in result.text
    assert (database.dump(), database.history()) == before


def test_a_broken_file_that_was_applied_is_no_failure_unless_it_was_changed(
    project_at_002: Project, database: Database
) -> None:
    file = next(project_at_002.versions.glob("*_002_*"))
    edit(file, "CREATE TABLE", "CREATE TABLE (")
    edit(file, "op.execute", "1 + op.execute(")
    assert project_at_002.alembic("upgrade", "head").failure.startswith(f"{file.name}, line")
    database.execute("DELETE FROM alembic_version_history WHERE revision = '002'")
    assert project_at_002.alembic("upgrade", "head").lines[-1] == DONE


def test_the_round_trips(project_at_002: Project, database: Database) -> None:
    """Without those of the authentication; the first eight are of the connection."""
    turns: list[bytes] = []

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((database.url.host, database.url.port)) as server:
                thread = threading.Thread(target=self.answer, args=(server,), daemon=True)
                thread.start()
                while data := self.request.recv(1 << 20):
                    turns.append(data[:1])
                    server.sendall(data)
                server.shutdown(socket.SHUT_WR)
                thread.join()

        def answer(self, server: socket.socket) -> None:
            while data := server.recv(1 << 20):
                self.request.sendall(data)

    relay = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay)
    with serving(relay):
        url = dsn(database.url.set(host="127.0.0.1", port=relay.server_address[1]))
        assert project_at_002.alembic("upgrade", "head", DATABASE_URL=url, PGSSLMODE="disable").lines[-1] == DONE
    assert turns.count(b"Q") == 20
