"""The runner manages transactions: a revision that ends its own is refused, however it does so.

A plan (--sql) must have the same effect on a database as the run, or be refused like the run.
"""

from __future__ import annotations

import pytest

from tests.support.database import Database
from tests.support.messages import FIX
from tests.support.project import Project
from tests.support.revisions import BLOCK, FILE, TABLE, edit

RAW = "raw = op.get_bind().connection.dbapi_connection\n"
CURSOR = "cursor = op.get_bind().connection.cursor()\n"
FAILS = 'op.execute("SELECT 1 / 0")'

# A body that ends the transaction, the tables that remain, the statements that are listed to be checked.
ENDS_TRANSACTION = {
    "COMMIT": (TABLE + 'op.execute("COMMIT")', ["a"], "CREATE TABLE a; COMMIT"),
    "END": (TABLE + 'op.execute("end work")', ["a"], "CREATE TABLE a; end work"),
    "ROLLBACK": (TABLE + 'op.execute("ROLLBACK")', [], "CREATE TABLE a; ROLLBACK"),
    "ABORT": (TABLE + 'op.execute("ABORT")', [], "CREATE TABLE a; ABORT"),
    "ROLLBACK; BEGIN": (TABLE + 'op.execute("ROLLBACK; BEGIN")', [], "CREATE TABLE a; ROLLBACK; BEGIN"),
    "COMMIT AND CHAIN": (TABLE + 'op.execute("commit and chain")', ["a"], "CREATE TABLE a; commit and chain"),
    "COMMIT AND CHAIN, then an error": (
        TABLE + f'op.execute("commit and chain")\n{FAILS}',
        ["a"],
        "CREATE TABLE a; commit and chain",
    ),
    "COMMIT and an error in one message": (TABLE + 'op.execute("COMMIT; SELECT 1 / 0")', ["a"], "CREATE TABLE a"),
    "ROLLBACK, a table and an error in one message": (
        'op.execute("ROLLBACK; BEGIN; CREATE TABLE public.a (x int); COMMIT; BEGIN; SELECT 1 / 0")',
        ["a"],
        "no statement was recorded",
    ),
    "BEGIN and COMMIT": (
        f'op.execute("BEGIN; CREATE TABLE a (x int); COMMIT")\n{FAILS}',
        ["a"],
        "BEGIN; CREATE TABLE a; COMMIT",
    ),
    "a comment before COMMIT": (TABLE + 'op.execute("/* x */ COMMIT -- y")', ["a"], "CREATE TABLE a; COMMIT"),
    "get_bind().commit()": (TABLE + "op.get_bind().commit()", ["a"], "CREATE TABLE a"),
    "get_bind().rollback()": (TABLE + "op.get_bind().rollback()", [], "CREATE TABLE a"),
    "get_bind().commit(), then a statement": (
        TABLE + 'op.get_bind().commit()\nop.execute("CREATE TABLE b ()")',
        ["a"],
        "CREATE TABLE a",
    ),
    "get_transaction().commit()": (TABLE + "op.get_bind().get_transaction().commit()", ["a"], "CREATE TABLE a"),
    "commit() of the driver": (TABLE + RAW + "raw.commit()", ["a"], "CREATE TABLE a"),
    "rollback() of the driver": (TABLE + RAW + "raw.rollback()", [], "CREATE TABLE a"),
    "the driver's cursor": (TABLE + CURSOR + 'cursor.execute("COMMIT")', ["a"], "CREATE TABLE a; COMMIT"),
    "the driver's cursor, then a new transaction": (
        TABLE + CURSOR + 'cursor.execute("COMMIT; BEGIN")',
        ["a"],
        "CREATE TABLE a; COMMIT; BEGIN",
    ),
    "the driver's cursor, then an error": (
        CURSOR + 'cursor.execute("CREATE TABLE a (x int); COMMIT; BEGIN")\ncursor.execute("SELECT 1 / 0")',
        ["a"],
        "CREATE TABLE a; COMMIT; BEGIN",
    ),
    "set_isolation_level(0)": (
        TABLE + RAW + 'raw.set_isolation_level(0)\nop.execute("CREATE TABLE b ()")\nraw.set_isolation_level(1)',
        [],
        "CREATE TABLE a",
    ),
    "a savepoint with the name of the runner's": (
        TABLE + 'op.execute("COMMIT; BEGIN; SAVEPOINT migration_runner")',
        ["a"],
        "CREATE TABLE a; COMMIT; BEGIN; SAVEPOINT migration_runner",
    ),
    "a custom cursor class": (
        TABLE
        + "import psycopg2.extras\ncursor = op.get_bind().connection.cursor(cursor_factory=psycopg2.extras.DictCursor)"
        '\ncursor.execute("COMMIT")',
        ["a"],
        "CREATE TABLE a; COMMIT",
    ),
    "COMMIT whose refusal is caught": (
        TABLE + 'try:\n    op.execute("COMMIT")\nexcept Exception:\n    pass',
        ["a"],
        "CREATE TABLE a; COMMIT",
    ),
    "commit() before an autocommit_block": (
        TABLE + f'op.get_bind().commit()\n{BLOCK}op.execute("CREATE TABLE b ()")',
        ["a"],
        "CREATE TABLE a",
    ),
}


@pytest.mark.fault(
    "Code and settings",
    fault="A revision ends its own transaction",
    sees="`revision 002 (...) committed or rolled back its own transaction (COMMIT or ROLLBACK, commit() or"
    " rollback()); ...; check which of these were committed: ...; the database is at revision 001; ...`, exit 255",
    state="What the message lists may be committed",
    do="Undo it, remove the `commit()`, deploy again",
)
@pytest.mark.parametrize("name", ENDS_TRANSACTION)
def test_a_revision_that_ends_its_transaction_is_refused(project: Project, database: Database, name: str) -> None:
    body, remaining, listed = ENDS_TRANSACTION[name]
    assert project.alembic("upgrade", "head").returncode == 0
    before = set(database.relations)
    project.add("002", body)
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at, sorted(set(database.relations) - before)) == (255, ["001"], remaining), (
        result
    )
    failure = result.failure.replace("/* x */ COMMIT -- y", "COMMIT")
    file = FILE.format("002")
    start = (
        f"revision 002 ({file}) committed or rolled back its own transaction (COMMIT or ROLLBACK, commit() or"
        " rollback()); transactions are managed by the runner: use op.get_context().autocommit_block()"
    )
    assert failure.startswith(start)
    assert failure.endswith(
        f"; check which of these were committed: {listed}; the database is at revision 001; {FIX}"
    ), failure
    assert "rolled back; " not in failure
    assert "waiting" not in result.stderr


NESTED = "try:\n    with op.get_bind().begin_nested():\n        op.execute('SELECT 1 / 0')\nexcept Exception: pass\n"
FUNCTION = "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN 1; END $$"
LOCKED = 'op.execute("SET LOCAL lock_timeout = 100")\n'

# A body that does not end the transaction, the tables that it creates.
KEEPS_TRANSACTION = {
    "a savepoint of SQLAlchemy": (NESTED + TABLE, ["a"]),
    "a savepoint in SQL": (
        'op.execute("SAVEPOINT s; CREATE TABLE gone (); ROLLBACK TO s; RELEASE s")\n' + TABLE,
        ["a"],
    ),
    "PL/pgSQL's END": (f'op.execute("{FUNCTION}")\n{TABLE}op.execute("INSERT INTO a VALUES (f())")', ["a"]),
    "a DO block that catches an error": (
        TABLE + "op.execute(\"DO 'BEGIN PERFORM 1 / 0; EXCEPTION WHEN OTHERS THEN NULL; END'\")",
        ["a"],
    ),
    "COMMIT in a comment and in a string": (
        TABLE + "op.execute(\"SELECT 'x; COMMIT; ROLLBACK' -- COMMIT; CREATE INDEX CONCURRENTLY\\n/* ROLLBACK; */\")",
        ["a"],
    ),
    "an autocommit_block in the middle": (
        f'{TABLE}{BLOCK}op.execute("CREATE TABLE b ()")\nop.execute("CREATE TABLE c ()")',
        ["a", "b", "c"],
    ),
    "an autocommit_block whose error is caught": (
        f"{TABLE}try:\n    {BLOCK}    {FAILS}\nexcept Exception:\n    pass\n" + 'op.execute("CREATE TABLE c ()")',
        ["a", "c"],
    ),
    "two autocommit_blocks": (
        f'{BLOCK}op.execute("CREATE TABLE a ()")\n{BLOCK}op.execute("CREATE TABLE b ()")',
        ["a", "b"],
    ),
    "SET ROLE and settings": (
        TABLE
        + 'op.execute("SET ROLE other_{role}; SET search_path = pg_catalog; SET statement_timeout = 1; RESET ALL")',
        ["a"],
    ),
    "a second connection": (
        TABLE + "with op.get_bind().engine.begin() as other:\n    other.exec_driver_sql('CREATE TABLE b ()')",
        ["a", "b"],
    ),
}


@pytest.mark.parametrize("name", KEEPS_TRANSACTION)
def test_a_revision_that_keeps_its_transaction_is_applied(project: Project, database: Database, name: str) -> None:
    body, created = KEEPS_TRANSACTION[name]
    database.execute(f"CREATE ROLE other_{database.role} ROLE {database.role}")
    try:
        project.add("002", body.replace("{role}", database.role))
        assert project.alembic("upgrade", "001").returncode == 0
        before = set(database.relations)
        result = project.alembic("upgrade", "head")
        assert (result.returncode, database.at) == (0, ["002"]), result
        assert sorted(set(database.relations) - before) == created
    finally:
        database.execute(f"DROP ROLE other_{database.role}")


def test_a_failure_after_an_autocommit_block_lists_what_was_committed(project: Project, database: Database) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    project.add("002", f'{TABLE}{BLOCK}op.execute("CREATE TABLE b ()")\nop.execute("CREATE TABLE c ()")\n{FAILS}')
    result = project.alembic("upgrade", "head")
    file = FILE.format("002")
    assert (result.returncode, result.failure) == (
        255,
        f"revision 002 ({file}) failed: division by zero, at {file}, line 11; committed outside the transaction and not"
        f" rolled back: CREATE TABLE a; CREATE TABLE b; the database is at revision 001; {FIX}",
    )


def test_an_error_that_a_revision_swallows_fails_the_revision(project: Project, database: Database) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    project.add("002", f"{TABLE}try:\n    {FAILS}\nexcept Exception:\n    pass")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["001"])
    assert result.failure == (
        f"revision 002 ({FILE.format('002')}) failed: current transaction is aborted, commands ignored until end of"
        " transaction block (an earlier statement failed and the revision caught its error; use"
        f" op.get_bind().begin_nested()); rolled back; the database is at revision 001; {FIX}"
    )


def state(database: Database) -> tuple[list[str], str, list[tuple], dict[str, list[tuple]]]:
    """The result of a run or a plan: revision, schema, INVALID indexes, rows."""
    indexes = "SELECT indexrelid::regclass::text, indisvalid FROM pg_index WHERE NOT indisvalid"
    tables = [name for (name,) in database.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
    rows = {name: database.execute(f"SELECT t::text FROM {name} t ORDER BY 1") for name in tables}
    if "alembic_version_history" in rows:
        rows["alembic_version_history"] = database.history("revision, direction, file, file_sha256, checksum")
    return database.at, database.dump(), database.execute(indexes), rows


INDEX = f'{BLOCK}op.execute("CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS UX_Twice ON twice (x)")'
PLANNED = {
    **{name: body for name, (body, *_) in {**ENDS_TRANSACTION, **KEEPS_TRANSACTION}.items()},
    "a statement that fails": TABLE + FAILS,
    "an error in Python": TABLE + "1 / 0",
    "a colon that looks like a parameter": "op.execute('SELECT $${\"days\":28}$$')",
    "an index that fails on duplicates": INDEX,
    "an index that is already INVALID": f'op.execute("DELETE FROM twice")\n{INDEX}',
    "a search_path that is not reset": 'op.execute("CREATE SCHEMA s; SET search_path = s; CREATE TABLE a ()")',
    "a role that is not reset": 'op.execute("SET ROLE other_{role}")',
    "a concurrent index in the transaction": 'op.execute("CREATE INDEX CONCURRENTLY x ON twice (x)")',
    "a parameter": "import sqlalchemy as sa\nop.get_bind().execute(sa.text('INSERT INTO twice VALUES (:x)'), {'x': 3})",
    "backslashes and bytes": "import sqlalchemy as sa\n"
    "t = op.create_table('a', sa.Column('x', sa.Text, comment='e\\\\f'), sa.Column('b', sa.LargeBinary))\n"
    "op.bulk_insert(t, [{'x': 'C:\\\\dir', 'b': b'\\\\x41\\xff'}])",
    "a default computed in Python": "import sqlalchemy as sa\n"
    "t = op.create_table('a', sa.Column('x', sa.Integer, default=lambda: 7))\nop.bulk_insert(t, [{}])",
    "an insert without values": "import sqlalchemy as sa\nop.execute(sa.table('twice', sa.column('x')).insert())",
    "a query whose refusal is caught": "import sqlalchemy as sa\n"
    "try:\n    x = op.get_bind().execute(sa.text('SELECT 5')).scalar()\nexcept Exception:\n    x = 0\n"
    "op.execute(f'INSERT INTO twice VALUES ({x})')",
    "an attribute of the connection": "name = 'a' if hasattr(op.get_bind(), 'in_transaction') else 'b'\n"
    "op.execute(f'CREATE TABLE {name} ()')",
    "two percent signs for the driver": "op.get_bind().exec_driver_sql(\"CREATE TABLE a AS SELECT '50%%' AS x\")",
    "a block that a Python error ends": f"try:\n    {BLOCK}    op.execute('CREATE TABLE a ()')\n"
    "        raise ValueError\nexcept ValueError:\n    pass",
    "two statements in a block": f"{BLOCK}op.execute('INSERT INTO twice VALUES (3); SELECT 1 / 0')",
    "another index that is already INVALID": f'{BLOCK}op.execute("CREATE INDEX CONCURRENTLY mine ON twice (x)")',
    "a percent sign": "op.execute(\"CREATE TABLE a AS SELECT format('100%% of %s', 1) AS x\")",
}


# psql stops at an error, which a revision's Python may catch: that cannot be known without a database.
del PLANNED["an autocommit_block whose error is caught"]


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_has_the_same_effect_as_the_run_or_is_refused(project: Project, database: Database, name: str) -> None:
    database.execute(f"CREATE ROLE other_{database.role} ROLE {database.role}")
    try:
        assert project.alembic("upgrade", "head").returncode == 0
        database.execute("CREATE TABLE twice AS SELECT 1 AS x FROM generate_series(1, 2)")
        database.execute(f"ALTER TABLE twice OWNER TO {database.role}")
        if "already" in name:
            with pytest.raises(Exception, match="could not create unique index"):
                database.execute("CREATE UNIQUE INDEX CONCURRENTLY UX_Twice ON twice (x)")
        database.execute(f"CREATE DATABASE {database.name}_plan TEMPLATE {database.name} OWNER {database.role}")
        copy = Database(
            database.admin.set(database=f"{database.name}_plan"),
            database.url.set(database=f"{database.name}_plan"),
            f"{database.name}_plan",
            database.role,
        )
        try:
            project.add("002", PLANNED[name].replace("{role}", database.role))
            project.add("003", 'op.execute("CREATE TABLE afterwards ()")')
            plan = project.alembic("upgrade", "001:head", "--sql")
            run = project.alembic("upgrade", "head")
            assert run.returncode in (0, 255)
            if plan.returncode == 255:  # nothing to apply; the run may do what cannot be planned, or is also refused
                assert plan.stdout == ""
                assert run.returncode == 255 or "it cannot be planned" in plan.failure, (plan, run)
                return
            applied = copy.psql(plan.stdout)
            assert (applied.returncode == 0, state(copy)) == (run.returncode == 0, state(database)), (
                plan,
                applied,
                run,
            )
        finally:
            database.execute(f"DROP DATABASE {copy.name} WITH (FORCE)")
    finally:
        database.execute(f"DROP OWNED BY other_{database.role}; DROP ROLE other_{database.role}")


def test_a_command_error_in_a_revision_is_reported_as_its_failure(project: Project, database: Database) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    path = project.add("002", f"{TABLE}from alembic.util import CommandError\nraise CommandError('two\\nlines')")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, result.failure) == (
        255,
        f"revision 002 ({path.name}) failed: alembic.util.exc.CommandError: two lines, at {path.name}, line 9; rolled"
        f" back; the database is at revision 001; {FIX}",
    )


def test_lock_timeout_is_restored_after_a_failed_concurrent_build(project: Project, database: Database) -> None:
    body = f"""
{BLOCK}try:
        op.execute("CREATE INDEX CONCURRENTLY x ON gone (y)")
    except Exception:
        pass
    op.execute("CREATE TABLE a AS SELECT current_setting('lock_timeout') AS lock_timeout")
"""
    project.add("002", body.strip())
    assert project.alembic("upgrade", "head").returncode == 0
    assert database.execute("TABLE a") == [("3s",)]


PARTIAL = "op.execute(\"DO 'BEGIN INSERT INTO a VALUES (1); COMMIT; PERFORM 1 / 0; END'\")"


@pytest.mark.fault(
    "Partial work",
    fault="A `DO` block or procedure in an `autocommit_block` fails after its own COMMIT",
    sees="`revision 002 (...) failed: ...; committed outside the transaction and not rolled back: ...; check what was"
    " committed by: DO; the database is at revision 001; ...`, exit 255",
    state="What it committed; finished revisions are kept",
    do="Undo or complete it, fix the revision, deploy again",
)
def test_a_statement_that_commits_before_it_fails_is_not_reported_as_rolled_back(
    project: Project, database: Database
) -> None:
    project.add("002", f"{BLOCK}{TABLE}    {PARTIAL}")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.execute("SELECT x FROM a")) == (255, [(1,)])
    assert "; check what was committed by: DO; the database is at revision 001; " in result.failure
    assert "rolled back; " not in result.failure


@pytest.mark.parametrize(
    "body",
    [
        "import psycopg2.extras\n"
        "    raw.cursor(cursor_factory=psycopg2.extras.DictCursor).execute('CREATE TABLE a ()')",
        "import io\n"
        "    raw.cursor().execute('CREATE TABLE a (x int)')\n"
        "    raw.cursor().copy_from(io.StringIO('1\\n'), 'a')",
        "from psycopg2.extensions import AsIs\n    raw.cursor().execute('CREATE %s', (AsIs('TABLE a ()'),))",
    ],
    ids=["DictCursor", "copy_from", "AsIs"],
)
def test_the_statements_of_any_cursor_are_listed(project: Project, database: Database, body: str) -> None:
    project.add("002", f"{BLOCK}raw = op.get_bind().connection.dbapi_connection\n    {body}\n    raise ValueError")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, "a" in database.relations) == (255, True), result
    assert "committed outside the transaction and not rolled back: CREATE TABLE a" in result.failure


@pytest.mark.fault(
    "Partial work",
    fault="A revision commits on a second connection, and fails",
    sees="`revision 003 (...) failed: ...; check for changes committed on the revision's second connection; the"
    " database is at revision 002; ...`, exit 255, not retried",
    state="What it committed there; finished revisions are kept",
    do="Undo it, use only `op.get_bind()`, deploy again",
)
@pytest.mark.parametrize("error", ["SELECT 1 / 0", "LOCK TABLE hcm_report_metadata"], ids=["error", "lock timeout"])
def test_a_commit_on_a_second_connection_is_neither_reported_as_rolled_back_nor_retried(
    project: Project, database: Database, error: str
) -> None:
    project.add("002", f'{BLOCK}op.execute("CREATE TABLE a (x int)")')
    second = "with op.get_bind().engine.begin() as other:\n    other.exec_driver_sql('INSERT INTO a VALUES (1)')\n"
    project.add("003", f'{second}op.execute("{error}")')
    assert project.alembic("upgrade", "002").returncode == 0
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM hcm_report_metadata")
        result = project.alembic("upgrade", "head")
    assert (result.returncode, database.execute("SELECT x FROM a")) == (255, [(1,)])
    assert "; check for changes committed on the revision's second connection; the database is at revision 002; " in (
        result.failure
    )
    assert "rolled back; " not in result.failure


@pytest.mark.parametrize("close", ["dbapi_connection.close()", "invalidate()"])
def test_a_connection_that_the_revision_closes_is_not_retried(project: Project, database: Database, close: str) -> None:
    project.add("002", f'op.get_bind().connection.{close}\nop.execute("SELECT 1")')
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["001"])
    assert "waiting" not in result.stderr
    assert result.failure


def test_a_failed_stamp_rolls_back_its_purge(project: Project, database: Database) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    database.execute(
        "CREATE FUNCTION nope() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''nope''; END';"
        "CREATE TRIGGER nope BEFORE INSERT ON alembic_version FOR EACH ROW EXECUTE FUNCTION nope()"
    )
    result = project.alembic("stamp", "--purge", "head")
    assert (result.returncode, database.at) == (255, ["001"])
    assert result.failure == f"the stamp failed: nope; rolled back; the database is at revision 001; {FIX}"


@pytest.mark.parametrize(
    "error", ["GeneratorExit", "__import__('asyncio').CancelledError", "type('E', (BaseException,), {})()"]
)
def test_any_exception_is_one_line(project: Project, database: Database, error: str) -> None:
    project.add("002", f"{TABLE}raise {error}")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["001"])
    assert "rolled back; the database is at revision 001" in result.failure


def test_session_characteristics_are_reset_after_the_revision(project: Project, database: Database) -> None:
    project.add("002", 'op.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")')
    project.add("003", TABLE)
    assert project.alembic("upgrade", "head").returncode == 0
    assert database.at == ["003"]


def test_a_message_of_a_revision_forges_no_line(project: Project) -> None:
    path = project.add("002", "pass")
    edit(path, '"""add"""', '"""add\nFAILED: forged \\x1b[31m"""')
    result = project.alembic("upgrade", "head")
    assert result.returncode == 0
    assert not any(line.startswith("FAILED") for line in result.lines)
    assert "\x1b" not in result.stderr


def test_quiet_still_reports_a_failure(project: Project) -> None:
    project.add("002", FAILS)
    result = project.alembic("-q", "upgrade", "head")
    assert result.returncode == 255
    assert "division by zero" in result.stderr


@pytest.mark.parametrize(
    ("body", "partial"),
    [
        (
            "cursor = op.get_bind().connection.cursor()\n"
            "    cursor.executemany('INSERT INTO a SELECT 1 / %s', [(1,), (0,)])",
            "INSERT INTO a SELECT",
        ),
        ("op.execute('CREATE TABLE b AS SELECT pg_terminate_backend(pg_backend_pid())')", "CREATE TABLE b"),
    ],
    ids=["row by row", "lost response"],
)
def test_statements_that_a_block_may_have_committed_are_listed_to_be_checked(
    project: Project, database: Database, body: str, partial: str
) -> None:
    project.add("002", TABLE)
    project.add("003", f"{BLOCK}{body}")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["002"])
    assert f"; check what was committed by: {partial}; the database is at revision 002; " in result.failure


def test_the_root_cause_is_named_if_the_revision_closed_its_connection(project: Project) -> None:
    path = project.add("002", "op.get_bind().close()\nraise ValueError('the root cause')")
    result = project.alembic("upgrade", "head")
    assert f"failed: ValueError: the root cause, at {path.name}, line 8; " in result.failure


def test_a_revision_may_use_savepoints_and_autocommit_blocks(project: Project, database: Database) -> None:
    project.add("002", "with op.get_bind().begin_nested():\n    op.execute('CREATE TABLE a (x int)')")
    block = f"{BLOCK}op.execute('CREATE INDEX CONCURRENTLY b ON a (x)')\n"
    project.add("003", f"op.execute('INSERT INTO a VALUES (1)')\n{block}op.execute('INSERT INTO a VALUES (2)')")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at, database.execute("SELECT x FROM a")) == (0, ["003"], [(1,), (2,)]), result
