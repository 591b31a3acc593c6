"""A failed run prints no data and no secrets: no statement, no literal, no row, no part of a URL."""

from __future__ import annotations

import psycopg2
import pytest

from migration_runner import errors
from tests.support.canary import CANARY
from tests.support.database import Database
from tests.support.messages import FIX
from tests.support.project import Project
from tests.support.revisions import BLOCK

PARAMETER = (
    "SQLAlchemy reads ':{}' in the statement as a bind parameter without a value; write a backslash before"
    " a colon that is a part of the SQL (\\:)"
)


@pytest.mark.fault(
    "Code and settings",
    fault="A colon in the SQL of `op.execute()` is read as a bind parameter",
    sees="`revision 002 (...) failed: SQLAlchemy reads ':<name>' in the statement as a bind parameter without a value;"
    " write a backslash before a colon that is a part of the SQL (\\:), ...`, exit 255; also with --sql",
    state="Finished revisions are kept, this one is rolled back",
    do="Follow the message",
)
@pytest.mark.parametrize(
    ("statement", "name"),
    [
        (f"ALTER ROLE app PASSWORD '{CANARY}!:more'", "more"),
        (f"INSERT INTO hcm_report_metadata (dag_name) VALUES ('{CANARY} {{\"days\":28}}')", "28"),
    ],
    ids=["password", "JSON"],
)
def test_a_colon_is_reported_without_the_statement(
    project: Project, database: Database, statement: str, name: str
) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    path = project.add("002", f"op.execute({statement!r})")
    result = project.alembic("upgrade", "head")
    message = f"revision 002 ({path.name}) failed: {PARAMETER.format(name)}, at {path.name}, line 7"
    assert (result.returncode, result.failure) == (
        255,
        f"{message}; rolled back; the database is at revision 001; {FIX}",
    )
    plan = project.alembic("upgrade", "001:head", "--sql")
    assert (plan.returncode, plan.stdout, plan.failure) == (255, "", message)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (f'SELECT CAST(\'{{"k": "x", "{CANARY}": "z"}}\' AS int)', 'invalid input syntax for type integer: "..."'),
        (f"SELECT CAST('{CANARY}' AS inet)", 'invalid input syntax for type inet: "..."'),
        (f"SELECT CAST('{{{CANARY}' AS json)", "invalid input syntax for type json"),
        (f"SELECT CAST('{CANARY}' AS timestamptz)", 'invalid input syntax for type timestamp with time zone: "..."'),
        (f"CREATE TABLE a (x text UNIQUE); INSERT INTO a VALUES ('{CANARY}'), ('{CANARY}')", "duplicate key value"),
        (
            f"CREATE TABLE a (x text CHECK (x = '')); INSERT INTO a VALUES ('{CANARY}')",
            'new row for relation "a" violates check constraint',
        ),
        (
            f"DO 'BEGIN RAISE EXCEPTION ''no space for {CANARY}'' USING ERRCODE = ''23505''; END'",
            "an error of class 23505, raised by a function",
        ),
        (f"ALTER ROLE app PASSWORD {CANARY}", 'syntax error at or near "..." (character 25)'),
        (f"SELECT 1 '{CANARY}'", 'syntax error at or near "..." (character 10)'),
    ],
    ids=["json", "inet", "detail", "date", "unique", "check", "RAISE", "syntax", "a literal that is a syntax error"],
)
def test_an_error_shows_no_data(project: Project, statement: str, message: str) -> None:
    path = project.add("002", f"op.get_bind().exec_driver_sql({statement!r})")
    result = project.alembic("upgrade", "head")  # any output with the canary fails the test
    assert result.returncode == 255
    assert result.failure.startswith(f"revision 002 ({path.name}) failed: {message}"), result


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("ungültige Eingabesyntax für Typ integer: »{}«", 'ungültige Eingabesyntax für Typ integer: "..."'),
        ("syntaxe en entrée invalide pour le type integer : « {} »", 'pour le type integer : "..."'),
        ("la sintaxis de entrada no es válida para tipo integer: «{}»", 'para tipo integer: "..."'),
        ("неверный синтаксис для типа integer: „{}“", 'для типа integer: "..."'),
    ],
    ids=["German", "French", "Spanish", "other quotes"],
)
def test_an_error_in_another_language_shows_no_data(message: str, shown: str) -> None:
    class Error(psycopg2.DataError):
        pgcode = "22P02"

        class diag:  # noqa: N801
            message_primary = message.format(CANARY)
            message_detail = message_hint = f"{CANARY}"
            source_file = "numutils.c"

    redacted = errors.server_message(Error())
    assert CANARY not in redacted
    assert redacted.endswith(shown)


@pytest.mark.parametrize(
    "statement",
    [
        f"ALTER ROLE {{role}} PASSWORD E'it\\'s {CANARY}'",
        f"/* don't */ SELECT '{CANARY}'",
        f"SELECT 1 AS \"it's\", '{CANARY}'",
        f"SELECT $x$ {CANARY} $x$, U&'{CANARY}'",
        f"-- '\nSELECT '{CANARY}'",
    ],
    ids=["escape string", "comment", "quoted name", "dollar quotes", "line comment"],
)
def test_committed_statements_are_listed_without_literals(project: Project, database: Database, statement: str) -> None:
    text = statement.format(role=database.role)
    project.add("002", f"{BLOCK}op.get_bind().exec_driver_sql({text!r})\n    1 / 0")
    result = project.alembic("upgrade", "head")
    assert result.returncode == 255
    assert "committed outside the transaction and not rolled back: " in result.failure


def test_a_url_is_not_quoted_when_the_connection_fails(project: Project, database: Database) -> None:
    token = f"postgresql://t0k3n@{database.url.host}:{database.url.port or 5432}/{database.name}"
    result = project.alembic("current", DATABASE_URL=token, PGPASSWORD="x")
    assert result.returncode == 255
    assert 'failed: FATAL: password authentication failed for user "..."; check the user' in result.failure
    assert "t0k3n" not in result.stdout + result.stderr


def test_memory_does_not_grow_with_the_number_of_statements(project: Project, database: Database) -> None:
    """Of 30,000 statements of 1 kB each, the first three and the last are kept."""
    body = """
import resource
execute = op.get_bind().connection.cursor().execute
text = "SELECT '" + "x" * 1000 + "'"
for n in range(2000): execute(text + f" AS a{n}")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for n in range(30000): execute(text + f" AS b{n}")
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 4000, f"{grown} kB"
"""
    project.add("002", body)
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (0, ["002"]), result


def test_literals_are_not_listed_and_long_lists_are_shortened(project: Project, database: Database) -> None:
    rows = "".join(f"    op.execute(\"INSERT INTO a VALUES ('{n}', 'jane@secret.org')\")\n" for n in range(50))
    table = 'op.execute("CREATE TABLE a (x text, y text)")\n'
    project.add("002", BLOCK + table + rows + "    1 / 0")
    result = project.alembic("upgrade", "head")
    assert result.returncode == 255
    assert "secret" not in result.stderr
    row = "INSERT INTO a"
    listed = f"not rolled back: CREATE TABLE a; {row}; {row}; 47 more; {row}; the database is at revision 001; "
    assert listed in result.failure


def test_the_row_of_a_violated_constraint_is_not_printed(project: Project) -> None:
    project.add("002", "op.execute(\"INSERT INTO hcm_report_metadata (dag_name) VALUES ('Jane Doe')\")")
    result = project.alembic("upgrade", "head")
    assert "violates not-null constraint" in result.failure
    assert "Jane" not in result.stdout + result.stderr
