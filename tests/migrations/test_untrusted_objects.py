"""Objects of untrusted roles: the run uses none of their functions, operators, tables or schemas, and names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg2
import pytest
from sqlalchemy import URL

from tests.support.database import Database
from tests.support.project import Project
from tests.support.revisions import AUDIT, audited
from tools.postgres import execute

OTHERS = "if it is another project's, set ALEMBIC_VERSION_TABLE or DB_SCHEMA; see docs/troubleshooting.md"
CREATE_WARNING = "WARNING untrusted roles may CREATE in public ({}), and revisions may call what they create there: see"


@pytest.fixture
def other(database: Database) -> Iterator[Callable[..., None]]:
    """Run statements as another role, which may CREATE in public, as every role may before PostgreSQL 15."""
    role = f"other_{database.role}"
    database.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'unused'; GRANT CREATE ON SCHEMA public TO {role}")
    url: URL = database.admin.set(username=role, password="unused")  # noqa: S106

    def run(*statements: str) -> None:
        for statement in statements:
            execute(url, statement)

    yield run
    database.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


CALLS = "CREATE TABLE calls (function text, caller text); GRANT INSERT ON calls TO PUBLIC"


def trap(signature: str, returns: str, value: str) -> str:
    """A function that matches the runner's own calls better than PostgreSQL's, and records its caller."""
    name = signature.split("(")[0]
    return (
        f"CREATE FUNCTION public.{signature} RETURNS {returns} LANGUAGE plpgsql AS $f$ BEGIN"
        f" INSERT INTO public.calls VALUES ('{name}', current_user); RETURN {value}; END $f$"
    )


TRAPS = [
    trap("json_each_text(t text)", "text", "t"),
    trap("pg_try_advisory_lock(t text)", "boolean", "true"),
    trap("pg_try_advisory_lock(t bigint)", "boolean", "true"),
    trap("quote_ident(t name)", "text", "t"),
    trap("set_config(a text, b text, c boolean)", "text", "b"),
    trap("current_schema()", "name", "'public'::name"),
    trap("version()", "text", "'PostgreSQL 18.0'"),
    trap("pg_backend_pid()", "int", "1"),
    trap("concat_text_int(a text, b int)", "text", "a"),
    "CREATE OPERATOR public.|| (LEFTARG = text, RIGHTARG = int, PROCEDURE = public.concat_text_int)",
    trap("same(a varchar, b varchar)", "boolean", "a::text = b::text"),
    "CREATE OPERATOR public.= (LEFTARG = varchar, RIGHTARG = varchar, PROCEDURE = public.same)",
    trap('same_char(a "char", b text)', "boolean", "true"),
    'CREATE OPERATOR public.= (LEFTARG = "char", RIGHTARG = text, PROCEDURE = public.same_char)',
]


@pytest.mark.fault(
    "Database",
    fault="Another role has created functions or operators in a schema of the role's search_path",
    sees="`WARNING untrusted roles may CREATE in public (...), and revisions may call what they create there: see"
    " 'Minimum privileges' in docs/operations.md`",
    state="Complete; the run itself called none of them",
    do="`REVOKE CREATE ON SCHEMA public FROM` each role in the parentheses; if it is the migrating role, run as that"
    " role",
)
@pytest.mark.parametrize("path", ['"$user", public', "public, pg_catalog"])
def test_functions_and_operators_of_other_roles_are_not_called(
    project: Project, database: Database, other: Callable[..., None], path: str
) -> None:
    other(CALLS, *TRAPS, "CREATE TABLE twice AS SELECT 1 AS x FROM generate_series(1, 2)")
    with pytest.raises(psycopg2.Error, match="could not create unique index"):
        other("CREATE UNIQUE INDEX CONCURRENTLY theirs ON twice (x)")  # an INVALID index to be listed
    database.execute(f"ALTER ROLE {database.role} SET search_path = {path}")
    project.add("002", 'op.execute("CREATE TABLE a ()")', 'op.execute("DROP TABLE a")')
    for arguments in (("current",), ("upgrade", "head"), ("downgrade", "001"), ("upgrade", "+1"), ("history", "-i")):
        result = project.alembic(*arguments)
        assert result.returncode == 0, result
        warned = CREATE_WARNING.format(f"other_{database.role}") in result.stderr
        assert warned is ("grade" in arguments[0])  # `current` and `history` call nothing there
    assert database.execute("SELECT * FROM calls") == []
    assert database.at == ["002"]


VERSION_TABLE = "CREATE TABLE public.alembic_version (version_num varchar(32) PRIMARY KEY)"
TRIGGER = "CREATE FUNCTION public.theirs() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END'"
CHECK = "CREATE FUNCTION public.theirs(text) RETURNS boolean LANGUAGE sql AS 'SELECT true'"


@pytest.mark.fault(
    "Database",
    fault="The version table is owned by another role, is a view, or runs another role's code",
    sees="`the version table public.alembic_version ...; if it is another project's, set ALEMBIC_VERSION_TABLE or"
    " DB_SCHEMA; ...`, exit 255",
    state="Nothing was changed, and that code was not run",
    do="If its owner is the migrating role, connect as it. Otherwise find out who created it: if it is the right table,"
    " grant that role to the migrating role, or `ALTER TABLE ... OWNER TO` the migrating role; if not, set"
    " `ALEMBIC_VERSION_TABLE`",
)
@pytest.mark.parametrize(
    ("other_statements", "admin_statements", "problem"),
    [
        (
            ["CREATE VIEW public.alembic_version AS SELECT '001'::varchar AS version_num"],
            ["ALTER VIEW public.alembic_version OWNER TO {role}"],
            "is a view, not an ordinary table",
        ),
        (
            [CHECK, VERSION_TABLE.replace("KEY", "KEY CHECK (theirs(version_num))")],
            ["GRANT SELECT ON alembic_version TO {role}"],
            "runs the function public.theirs(text), which is owned by {other}",
        ),
        (
            [VERSION_TABLE, TRIGGER],
            [
                "ALTER TABLE alembic_version OWNER TO {role}",
                "CREATE TRIGGER t BEFORE INSERT ON alembic_version FOR EACH ROW EXECUTE FUNCTION theirs()",
            ],
            "runs the function public.theirs(), which is owned by {other}",
        ),
        (
            [VERSION_TABLE, CHECK],
            [
                "ALTER TABLE alembic_version OWNER TO {role}",
                "ALTER TABLE alembic_version ADD CHECK (theirs(version_num))",
            ],
            "runs the function public.theirs(text), which is owned by {other}",
        ),
        (
            [VERSION_TABLE, CHECK],
            [
                "ALTER TABLE alembic_version OWNER TO {role}",
                "CREATE RULE r AS ON INSERT TO alembic_version WHERE theirs(new.version_num) DO ALSO SELECT 1",
            ],
            "runs the function public.theirs(text), which is owned by {other}",
        ),
        (
            [VERSION_TABLE, CHECK],
            [
                "ALTER TABLE alembic_version OWNER TO {role}; ALTER TABLE alembic_version FORCE ROW LEVEL SECURITY",
                "CREATE POLICY p ON alembic_version USING (theirs(version_num))",
            ],
            "runs the function public.theirs(text), which is owned by {other}",
        ),
    ],
    ids=["view", "owner's check", "trigger", "check", "rule", "policy"],
)
@pytest.mark.parametrize("arguments", [("current",), ("upgrade", "head")], ids=" ".join)
def test_an_untrusted_version_table_is_refused(
    project: Project,
    database: Database,
    other: Callable[..., None],
    other_statements: list[str],
    admin_statements: list[str],
    problem: str,
    arguments: tuple[str, ...],
) -> None:
    other(*other_statements)
    names = {"role": database.role, "other": f"other_{database.role}"}
    for statement in admin_statements:
        database.execute(statement.format(**names))
    result = project.alembic(*arguments)
    assert (result.returncode, result.failure) == (
        255,
        f"the version table public.alembic_version {problem.format(**names)}; {OTHERS}",
    )
    assert "hcm_report_metadata" not in database.relations


def test_a_version_table_of_another_owner_is_read_but_not_written(
    project: Project, database: Database, other: Callable[..., None]
) -> None:
    other(VERSION_TABLE, "INSERT INTO alembic_version VALUES ('001')", "GRANT SELECT ON alembic_version TO PUBLIC")
    assert project.alembic("current").stdout == "001 (head)\n"
    result = project.alembic("upgrade", "head")
    problem = f"is owned by other_{database.role}: connect as that role, or grant it to this one; {OTHERS}"
    assert (result.returncode, result.failure) == (255, f"the version table public.alembic_version {problem}")


@pytest.mark.fault(
    "Database",
    fault="A schema with the role's name, created by another role, comes first because of `$user`",
    sees="`the schema ... comes first only because it has the role's name, and it is owned by ...; set DB_SCHEMA to"
    " the schema of the tables`, exit 255",
    state="Nothing was changed",
    do="Follow the message",
)
def test_a_schema_with_the_roles_name_and_another_owner_is_refused(
    project: Project, database: Database, server: URL, other: Callable[..., None]
) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    execute(server, f"GRANT CREATE ON DATABASE {database.name} TO other_{database.role}")
    other(f"CREATE SCHEMA {database.role}", f"GRANT ALL ON SCHEMA {database.role} TO PUBLIC")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, result.failure) == (
        255,
        f"the schema {database.role} comes first only because it has the role's name, and it is owned by"
        f" other_{database.role}; set DB_SCHEMA to the schema of the tables",
    )
    assert project.alembic("upgrade", "head", DB_SCHEMA="public").returncode == 0


def test_a_schema_with_the_roles_name_that_the_role_owns_is_used(project: Project, database: Database) -> None:
    database.execute(f"CREATE SCHEMA {database.role} AUTHORIZATION {database.role}")
    assert project.alembic("upgrade", "head").returncode == 0
    assert database.scalar(f"SELECT version_num FROM {database.role}.alembic_version") == "001"


@pytest.mark.parametrize("owner", ["the role", "a role granted to it", "a superuser"])
def test_an_audit_trigger_of_a_trusted_role_is_allowed(project: Project, database: Database, owner: str) -> None:
    project.add("002", AUDIT)
    assert project.alembic("upgrade", "head").returncode == 0
    database.execute(
        "CREATE FUNCTION log_version() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN INSERT INTO audit VALUES (''now at '' || new.version_num); RETURN NULL; END';"
        "CREATE TRIGGER log_version AFTER UPDATE ON alembic_version FOR EACH ROW EXECUTE FUNCTION log_version()"
    )
    group = f"group_{database.role}"
    if owner == "the role":
        database.execute(f"ALTER FUNCTION log_version() OWNER TO {database.role}")
    elif owner == "a role granted to it":
        database.execute(f"CREATE ROLE {group} ROLE {database.role}; ALTER FUNCTION log_version() OWNER TO {group}")
    try:
        project.add("003", audited("003"))
        result = project.alembic("upgrade", "head")
        assert (result.returncode, database.execute("SELECT * FROM audit")) == (0, [("003",), ("now at 003",)]), result
    finally:
        if owner == "a role granted to it":
            database.execute(f"DROP OWNED BY {group} CASCADE; DROP ROLE {group}")


@pytest.mark.parametrize(
    ("column", "rows", "problem"),
    [
        ("version_num int", "(1)", "has a version_num of type integer, so it is not Alembic's"),
        ("version_num bytea", "('x')", "has a version_num of type bytea, so it is not Alembic's"),
        ("version_num text[]", "('{a}')", "has a version_num of type text[], so it is not Alembic's"),
        ("x int", "(1)", "has no column version_num, so it is not Alembic's"),
        (
            "version_num text",
            "(NULL)",
            "has a row without a revision: DELETE FROM public.alembic_version WHERE version_num IS NULL",
        ),
        (
            "version_num text",
            "('001'), ('001')",
            "has a duplicate revision: DELETE FROM public.alembic_version a USING public.alembic_version b"
            " WHERE a.version_num = b.version_num AND a.ctid > b.ctid",
        ),
    ],
    ids=["integer", "bytea", "array", "wrong column", "NULL", "duplicate"],
)
@pytest.mark.parametrize("arguments", [("current",), ("upgrade", "head"), ("stamp", "head")], ids=" ".join)
def test_an_invalid_version_table_is_one_line(
    project: Project, database: Database, column: str, rows: str, problem: str, arguments: tuple[str, ...]
) -> None:
    database.execute(f"CREATE TABLE alembic_version ({column}); GRANT ALL ON alembic_version TO PUBLIC")
    database.execute(f"INSERT INTO alembic_version VALUES {rows}")
    result = project.alembic(*arguments)
    assert (result.returncode, result.failure) == (
        255,
        f"the version table public.alembic_version {problem}; {OTHERS}",
    )


def test_a_stale_row_is_named_with_the_statement_that_deletes_it(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    assert project.alembic("upgrade", "head").returncode == 0
    database.execute("INSERT INTO alembic_version VALUES ('001')")
    result = project.alembic("upgrade", "head")
    delete = "DELETE FROM public.alembic_version WHERE version_num = '001'"
    assert (result.returncode, result.failure) == (
        255,
        f"the version table has 001, 002, and 001 is an ancestor of another; delete the stale row: {delete}",
    )
    database.execute(delete)
    assert project.alembic("upgrade", "head").returncode == 0


def test_a_revision_with_control_characters_forges_no_line(project: Project, database: Database) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    database.execute("UPDATE alembic_version SET version_num = E'x\\nFAILED: forged\\x1b[31m'")
    result = project.alembic("current")
    assert result.returncode == 255
    assert result.failure.startswith(r"the database is at x\nFAILED: forged\x1b[31m, which this code ")
