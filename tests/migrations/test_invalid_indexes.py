"""INVALID indexes: named with the statement that drops them, if this run left them."""

import threading

import psycopg2
import pytest

from tests.support.database import Database
from tests.support.messages import FIX
from tests.support.project import Project
from tests.support.revisions import AUDIT, BLOCK, FILE, audited
from tests.support.runs import audit, follow, sleeping
from tests.support.waiting import until

UNIQUE = 'CREATE UNIQUE INDEX CONCURRENTLY {}"Only" ON audit (revision)'
DROP = 'left INVALID: public."Only"; drop with: DROP INDEX CONCURRENTLY public."Only"; the database is at revision 002'


@pytest.fixture
def duplicates(project: Project, database: Database) -> Project:
    project.add("002", AUDIT)
    assert project.alembic("upgrade", "head").returncode == 0
    database.execute("INSERT INTO audit VALUES ('x'), ('x')")
    return project


@pytest.mark.fault(
    "Partial work",
    fault="`CREATE UNIQUE INDEX CONCURRENTLY` fails on duplicate rows",
    sees="`...; left INVALID: <index>; drop with: DROP INDEX CONCURRENTLY <index>;"
    " the database is at revision 002; ...`, exit 255",
    state="An INVALID index; finished revisions are kept",
    do="Remove the duplicates, run the statement in the message, deploy again",
)
def test_an_index_that_fails_on_duplicates_is_named_and_following_the_message_reaches_the_head(
    duplicates: Project, database: Database
) -> None:
    duplicates.add("003", f"{BLOCK}op.execute('{UNIQUE.format('')}')")
    result = duplicates.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["002"])
    name = FILE.format("003")
    assert result.failure == (
        f'revision 003 ({name}) failed: could not create unique index "Only", at {name}, line 8; {DROP}; {FIX}'
    )
    again = duplicates.alembic("upgrade", "head")  # without following the message
    assert again.failure.startswith(
        f'revision 003 ({name}) failed: relation "Only" already exists (created manually, or by '
    )
    assert f"; {DROP}; " in again.failure
    database.execute("DELETE FROM audit")
    follow(result, database)
    assert duplicates.alembic("upgrade", "head").returncode == 0
    assert database.at == ["003"]
    assert database.scalar("SELECT indisvalid FROM pg_index WHERE indexrelid = '\"Only\"'::regclass") is True


@pytest.mark.fault(
    "Partial work",
    fault="`CREATE INDEX CONCURRENTLY IF NOT EXISTS` on an INVALID index of an earlier run",
    sees="`revision 003 (...) is incomplete; ...; left INVALID: ...; drop with: ...`, exit 255",
    state="The INVALID index; the revision is not recorded",
    do="Run the statement in the message, deploy again",
)
def test_if_not_exists_does_not_accept_an_invalid_index(duplicates: Project, database: Database) -> None:
    path = duplicates.add("003", f"{BLOCK}op.execute('{UNIQUE.format('IF NOT EXISTS ')}')")
    assert duplicates.alembic("upgrade", "head").returncode == 255
    database.execute("DELETE FROM audit")
    result = duplicates.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["002"])
    assert 'WARNING ignoring pre-existing INVALID indexes: public."Only"' in result.stderr
    assert result.failure == (
        f"revision 003 ({path.name}) is incomplete; committed outside the transaction and not rolled back: CREATE"
        f' UNIQUE INDEX CONCURRENTLY IF NOT EXISTS "Only" ON audit; {DROP}; {FIX}'
    )
    database.execute('DROP INDEX CONCURRENTLY public."Only"')
    assert duplicates.alembic("upgrade", "head").returncode == 0


@pytest.mark.fault(
    "Partial work",
    fault="An INVALID index that the run did not create",
    sees="`WARNING ignoring pre-existing INVALID indexes: ...`, exit 0",
    state="Complete",
    do="Nothing",
)
def test_a_pre_existing_invalid_index_is_logged_and_does_not_fail_the_run(
    duplicates: Project, database: Database
) -> None:
    with pytest.raises(Exception, match="could not create unique index"):
        database.execute(UNIQUE.format(""))
    duplicates.add("003", audited("003"))
    result = duplicates.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (0, ["003"])
    assert 'HH:MM:SS WARNING ignoring pre-existing INVALID indexes: public."Only"' in result.lines


@pytest.mark.fault(
    "Concurrency",
    fault="Another service builds an index concurrently at the same time",
    sees="No visible effect, exit 0",
    state="Complete",
    do="Nothing",
)
def test_an_index_that_another_session_builds_is_not_reported(project: Project, database: Database) -> None:
    database.execute("CREATE TABLE theirs (x int)")
    project.add("002", AUDIT)
    project.add("003", audited("003", 'op.execute("SELECT pg_sleep(2)")'))
    with database.session() as writer:
        writer.execute("INSERT INTO theirs VALUES (1)")  # the build waits for this transaction to end
        running = project.start("upgrade", "head")
        until(lambda: sleeping(database))
        build = "CREATE INDEX CONCURRENTLY theirs_x ON theirs (x)"
        thread = threading.Thread(target=database.execute, args=(build,))
        thread.start()
        until(lambda: database.execute("SELECT 1 FROM pg_index WHERE NOT indisvalid"))
        result = running.wait()
        assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
        assert thread.is_alive()
    assert "INVALID" not in result.stderr
    thread.join()


@pytest.mark.fault(
    "Partial work",
    fault="An index of another service becomes INVALID during the run",
    sees="`WARNING became INVALID during the run, not caused by it: ...`, exit 0",
    state="Complete",
    do="Inform its owner",
)
def test_an_index_of_another_session_that_becomes_invalid_does_not_fail_the_run(
    project: Project, database: Database
) -> None:
    database.execute("CREATE TABLE theirs AS SELECT 1 AS x FROM generate_series(1, 2)")
    project.add("002", AUDIT)
    ours = 'op.execute("CREATE INDEX CONCURRENTLY ours ON audit (revision)")\n'
    wait = 'open("started", "w")\nwhile __import__("os").path.exists("started"): time.sleep(0.05)'
    project.add("003", BLOCK + ours + wait)
    running = project.start("upgrade", "head")
    started = project.folder / "started"
    until(started.exists)
    with pytest.raises(psycopg2.errors.UniqueViolation):
        database.execute("CREATE UNIQUE INDEX CONCURRENTLY theirs_x ON theirs (x)")
    started.unlink()
    result = running.wait()
    assert (result.returncode, database.at) == (0, ["003"]), result
    assert database.execute("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid") == [("theirs_x",)]
    assert result.lines[-3:] == [
        "HH:MM:SS WARNING became INVALID during the run, not caused by it: public.theirs_x",
        f"HH:MM:SS INFO since YYYY-MM-DD HH:MM:SS UTC: upgrade 003 by {database.role}",
        "HH:MM:SS INFO now at 003 (head)",
    ]


LONG = "ux_" + 70 * "x"
SPELLINGS = {
    "capitals": ("CREATE UNIQUE INDEX CONCURRENTLY {}UX_Audit ON AUDIT (revision)", "public.ux_audit"),
    "more than 63 bytes": (f"CREATE UNIQUE INDEX CONCURRENTLY {{}}{LONG} ON audit (revision)", f"public.{LONG[:63]}"),
    "quotes": (
        'CREATE UNIQUE INDEX CONCURRENTLY {}"UX ""au"" dit" ON public."audit" (revision)',
        'public."UX ""au"" dit"',
    ),
    "comments": (
        "/* DROP INDEX x; */ CREATE UNIQUE -- y\n INDEX /* z */ CONCURRENTLY {}ux ON ONLY public . audit (revision)",
        "public.ux",
    ),
    "another schema": ('CREATE UNIQUE INDEX CONCURRENTLY {}ux ON "re ports".audit (revision)', '"re ports".ux'),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_an_invalid_index_is_named_however_the_statement_spells_it(
    duplicates: Project, database: Database, name: str
) -> None:
    database.execute(f'CREATE SCHEMA "re ports" AUTHORIZATION {database.role}')
    database.execute('CREATE TABLE "re ports".audit AS TABLE audit')
    database.execute(f'ALTER TABLE "re ports".audit OWNER TO {database.role}')
    statement, index = SPELLINGS[name]
    path = duplicates.add("003", f"{BLOCK}op.execute({statement.format('')!r})")
    drop = f"left INVALID: {index}; drop with: DROP INDEX CONCURRENTLY {index}; the database is at revision 002; {FIX}"
    failed = duplicates.alembic("upgrade", "head")
    assert (failed.returncode, database.at) == (255, ["002"])
    assert failed.failure.endswith(f"; {drop}")
    duplicates.add("003", f"{BLOCK}op.execute({statement.format('IF NOT EXISTS ')!r})")
    again = duplicates.alembic("upgrade", "head")
    assert (again.returncode, database.at) == (255, ["002"])
    assert again.failure.startswith(f"revision 003 ({path.name}) is incomplete; ")
    assert again.failure.endswith(f"; {drop}")
    database.execute('DELETE FROM audit; DELETE FROM "re ports".audit')
    follow(again, database)
    assert duplicates.alembic("upgrade", "head").returncode == 0
    assert database.execute("SELECT 1 FROM pg_index WHERE NOT indisvalid") == []


def test_an_invalid_index_of_op_create_index_is_named(duplicates: Project, database: Database) -> None:
    create = "op.create_index('UX audit', 'audit', ['revision'], unique=True, postgresql_concurrently=True{})"
    duplicates.add("003", BLOCK + create.format(""))
    drop = 'left INVALID: public."UX audit"; drop with: DROP INDEX CONCURRENTLY public."UX audit"; '
    assert drop in duplicates.alembic("upgrade", "head").failure
    duplicates.add("003", BLOCK + create.format(", if_not_exists=True"))
    assert drop in duplicates.alembic("upgrade", "head").failure
    assert database.at == ["002"]


def test_a_pre_existing_invalid_index_on_the_same_table_does_not_fail_the_revision(
    duplicates: Project, database: Database
) -> None:
    with pytest.raises(psycopg2.errors.UniqueViolation):
        database.execute("CREATE UNIQUE INDEX CONCURRENTLY theirs ON audit (revision)")
    duplicates.add("003", f"{BLOCK}op.execute('CREATE INDEX CONCURRENTLY ours ON audit (revision)')")
    result = duplicates.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (0, ["003"]), result
    assert "HH:MM:SS WARNING ignoring pre-existing INVALID indexes: public.theirs" in result.lines


@pytest.mark.parametrize("statement", ["REINDEX INDEX CONCURRENTLY good", "REINDEX TABLE CONCURRENTLY audit"])
def test_a_reindex_next_to_a_pre_existing_invalid_index_succeeds(
    duplicates: Project, database: Database, statement: str
) -> None:
    database.execute(f"CREATE INDEX good ON audit (revision); ALTER TABLE audit OWNER TO {database.role}")
    with pytest.raises(psycopg2.errors.UniqueViolation):
        database.execute("CREATE UNIQUE INDEX CONCURRENTLY theirs ON audit (revision)")
    duplicates.add("003", f"{BLOCK}op.execute('{statement}')")
    result = duplicates.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (0, ["003"]), result


def test_an_invalid_index_of_a_failed_reindex_in_a_partition_is_named(project: Project, database: Database) -> None:
    body = """
op.execute("CREATE FUNCTION f(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS 'BEGIN RETURN $1; END'")
op.execute("CREATE TABLE a (x int) PARTITION BY LIST (x)")
op.execute("CREATE TABLE a1 PARTITION OF a FOR VALUES IN (1)")
op.execute("INSERT INTO a VALUES (1)")
op.execute("CREATE INDEX a_f ON a (f(x))")
op.execute("CREATE OR REPLACE FUNCTION f(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS 'BEGIN RETURN 1 / 0; END'")
"""
    project.add("002", body)
    project.add("003", f"{BLOCK}op.execute('REINDEX TABLE CONCURRENTLY a')")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["002"])
    index = "public.a1_f_idx_ccnew"
    assert f"left INVALID: {index}; drop with: DROP INDEX CONCURRENTLY {index}; " in result.failure


def test_an_index_name_with_unicode_escapes_is_accepted(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    statement = 'CREATE INDEX CONCURRENTLY U&"a\\0078" ON audit (revision)'
    project.add("003", f"{BLOCK}op.execute({statement!r})")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, "ax" in database.relations) == (0, True), result
