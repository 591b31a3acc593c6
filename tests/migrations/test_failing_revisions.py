"""Failing revisions: one line says why they failed and what they committed."""

import time

import pytest

from tests.support.database import Database
from tests.support.messages import FIX
from tests.support.project import Project
from tests.support.revisions import AUDIT, BLOCK, FILE, TABLE, audited, edit
from tests.support.runs import audit, building, follow
from tests.support.waiting import until


@pytest.mark.fault(
    "Code and settings",
    fault="A statement in a revision fails",
    sees="`revision 003 (...) failed: <the server's message>, at <file>, line 8; rolled back; the database is at"
    " revision 002; fix it, then retry`, exit 255",
    state="Finished revisions are kept, this one is rolled back",
    do="Fix the revision, push, deploy again",
)
def test_finished_revisions_are_kept_if_a_later_one_fails(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    project.add("003", audited("003", 'op.execute("TABLE gone")'))
    project.add("004", audited("004"))
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at, audit(database)) == (255, ["002"], [])
    name = FILE.format("003")
    assert result.failure == (
        f'revision 003 ({name}) failed: relation "gone" does not exist, at {name}, line 8; rolled back;'
        f" the database is at revision 002; {FIX}"
    )


@pytest.mark.fault(
    "Code and settings",
    fault="A downgrade fails",
    sees="`the downgrade of revision 002 (...) failed: ...; rolled back;"
    " the database is at revision 002; ...`, exit 255",
    state="The downgrade is rolled back",
    do="Fix the downgrade, push, deploy again",
)
def test_a_failed_downgrade_is_reported_as_a_downgrade(project: Project, database: Database) -> None:
    project.add("002", AUDIT, 'raise RuntimeError("two rows\\nwould be lost")')
    assert project.alembic("upgrade", "head").returncode == 0
    result = project.alembic("downgrade", "base")
    assert (result.returncode, database.at) == (255, ["002"])
    name = FILE.format("002")
    assert result.failure == (
        f"the downgrade of revision 002 ({name}) failed: RuntimeError: two rows would be lost, at {name}, line 9;"
        f" rolled back; the database is at revision 002; {FIX}"
    )


@pytest.mark.fault(
    "Code and settings",
    fault="A deferred constraint fails at a revision's commit",
    sees="`revision 003 (...) failed: duplicate key value ...; rolled back;"
    " the database is at revision 002; ...`, exit 255",
    state="Finished revisions are kept, this one is rolled back",
    do="Fix the data or the revision, deploy again",
)
def test_a_constraint_that_fails_at_commit_rolls_the_revision_back(project: Project, database: Database) -> None:
    project.add("002", 'op.execute("CREATE TABLE a (x int UNIQUE DEFERRABLE INITIALLY DEFERRED)")')
    project.add("003", 'op.execute("INSERT INTO a VALUES (1), (1)")')
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at, database.execute("SELECT * FROM a")) == (255, ["002"], [])
    assert result.failure == (
        f"revision 003 ({FILE.format('003')}) failed: duplicate key value violates unique constraint"
        f' "a_x_key"; rolled back; the database is at revision 002; {FIX}'
    )


@pytest.mark.fault(
    "Partial work",
    fault="An `autocommit_block` fails after it has committed statements",
    sees="`revision 003 (...) failed: ...; committed outside the transaction and not rolled back: ...; drop with: DROP"
    " INDEX CONCURRENTLY public.one; the database is at revision 002; ...`, exit 255",
    state="What the message lists; finished revisions are kept",
    do="Run the statement in the message, undo the other changes it lists, fix the revision, deploy again",
)
def test_statements_that_a_failed_autocommit_block_committed_are_listed(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    body = [
        audited("003").strip(),
        BLOCK + 'op.execute("CREATE INDEX CONCURRENTLY one\\n ON audit (revision)")',
        '    op.execute("CREATE INDEX CONCURRENTLY two ON audit (gone)")',
    ]
    path = project.add("003", "\n".join(body))
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at, audit(database)) == (255, ["002"], ["003"])
    name = FILE.format("003")
    failed = f'revision 003 ({name}) failed: column "gone" does not exist, at {name}, line 10'
    committed = "INSERT INTO audit; CREATE INDEX CONCURRENTLY one ON audit"
    assert result.failure == (
        f"{failed}; committed outside the transaction and not rolled back: {committed}; drop with: DROP INDEX"
        f" CONCURRENTLY public.one; the database is at revision 002; {FIX}"
    )
    assert "waiting" not in result.stderr
    edit(path, "(gone)", "(revision)")
    database.execute("DELETE FROM audit")
    follow(result, database)
    assert project.alembic("upgrade", "head").returncode == 0
    assert (database.at, audit(database)) == (["003"], ["003"])


@pytest.mark.fault(
    "Partial work",
    fault="A revision fails after its `autocommit_block`",
    sees="As above; only what the block committed is listed",
    state="What the message lists; finished revisions are kept",
    do="Undo what is listed, fix the revision, deploy again",
)
def test_statements_after_an_autocommit_block_are_rolled_back_and_not_listed(
    project: Project, database: Database
) -> None:
    project.add("002", AUDIT)
    database.execute(f'CREATE SCHEMA "re ports" AUTHORIZATION {database.role}')
    create = """op.execute('CREATE UNIQUE INDEX CONCURRENTLY "o ne" ON "re ports".b (x)')\n"""
    block = f"""op.execute('CREATE TABLE IF NOT EXISTS "re ports".b (x text)')\n{BLOCK}{create}"""
    path = project.add("003", block + audited("003", 'op.execute("SELECT 1 / 0")'))
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at, audit(database)) == (255, ["002"], [])
    name = FILE.format("003")
    assert result.failure == (
        f"revision 003 ({name}) failed: division by zero, at {name}, line 11;"
        " committed outside the transaction and not rolled back:"
        ' CREATE TABLE IF NOT EXISTS "re ports".b; CREATE UNIQUE INDEX CONCURRENTLY "o ne" ON "re ports".b;'
        f' drop with: DROP INDEX CONCURRENTLY "re ports"."o ne"; the database is at revision 002; {FIX}'
    )
    edit(path, "1 / 0", "1 / 1")
    follow(result, database)
    assert project.alembic("upgrade", "head").returncode == 0
    assert (database.at, audit(database)) == (["003"], ["003"])


@pytest.mark.fault(
    "Partial work",
    fault="A table stays locked in an `autocommit_block`",
    sees="`... failed: canceling statement due to lock timeout ...`, exit 255, after 3 s",
    state="What the message lists; finished revisions are kept",
    do="Undo what is listed, deploy again off-peak",
)
def test_a_lock_timeout_in_an_autocommit_block_is_not_retried(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    project.add("003", BLOCK + 'op.execute("ALTER TABLE hcm_report_metadata ADD COLUMN status text")')
    assert project.alembic("upgrade", "002").returncode == 0
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM hcm_report_metadata")
        result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["002"])
    assert "failed: canceling statement due to lock timeout, at " in result.failure
    assert "waiting" not in result.stderr
    assert project.alembic("upgrade", "head").returncode == 0


@pytest.mark.fault(
    "Partial work",
    fault="Other transactions stay open longer than `lock_timeout` while an index is built concurrently",
    sees="No visible effect: the build waits for them and blocks no session",
    state="Complete",
    do="Nothing",
)
def test_a_concurrent_index_build_waits_for_all_transactions(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    build = 'op.execute("CREATE INDEX CONCURRENTLY slow ON audit (revision)")\n'
    after = "    op.execute(\"CREATE TABLE after AS SELECT current_setting('lock_timeout') AS lock_timeout\")"
    project.add("003", BLOCK + build + after)
    assert project.alembic("upgrade", "002").returncode == 0
    with database.session() as writer:
        writer.execute("INSERT INTO audit VALUES ('writer')")
        running = project.start("upgrade", "head")
        until(lambda: building(database))
        time.sleep(4)  # lock_timeout is 3 s
        writer.connection.commit()
        result = running.wait()
    assert (result.returncode, database.at) == (0, ["003"]), result
    assert database.scalar("SELECT indisvalid FROM pg_index WHERE indexrelid = 'slow'::regclass") is True
    assert database.execute("SELECT lock_timeout FROM after") == [("3s",)]


def test_concurrent_grants_are_retried(project: Project, database: Database) -> None:
    """The server reports `tuple concurrently updated`, an internal error (XX000)."""
    project.add("002", 'op.execute("GRANT SELECT ON hcm_report_metadata TO public")')
    assert project.alembic("upgrade", "001").returncode == 0
    with database.session() as other:
        other.execute("GRANT INSERT ON hcm_report_metadata TO public")
        running = project.start("upgrade", "head")
        until(lambda: any("GRANT SELECT" in statement for statement in database.activity()))
        other.connection.commit()
        result = running.wait()
    assert (result.returncode, database.at) == (0, ["002"]), result


@pytest.mark.fault(
    "Database",
    fault="`pg_cancel_backend` during a revision",
    sees="`revision 002 (...) failed: canceling statement due to user request (it was cancelled on the server)...;"
    " rolled back; the database is at revision 001; fix it, then retry`, exit 255",
    state="Finished revisions are kept, this one is rolled back",
    do="Find out who cancelled it, deploy again",
)
def test_a_statement_that_is_cancelled_on_the_server_is_not_retried(project: Project, database: Database) -> None:
    project.add("002", 'op.execute("SELECT pg_cancel_backend(pg_backend_pid()), pg_sleep(60)")')
    result = project.alembic("upgrade", "head")
    assert (result.returncode, result.failure, database.at) == (
        255,
        f"revision 002 ({FILE.format('002')}) failed: canceling statement due to user request (it was cancelled on the"
        f" server), at {FILE.format('002')}, line 7; rolled back; the database is at revision 001; {FIX}",
        ["001"],
    )


def test_a_configured_limit_is_not_retried(project: Project, database: Database) -> None:
    database.execute(f"ALTER ROLE {database.role} SET work_mem = '64kB'")
    database.execute(f"ALTER ROLE {database.role} SET temp_file_limit = '100kB'")
    project.add("002", 'op.execute("CREATE TABLE a AS SELECT n FROM generate_series(1, 1000000) n ORDER BY n DESC")')
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["001"])
    assert "temporary file size exceeds" in result.failure
    assert "waiting" not in result.stderr


def test_a_lock_timeout_of_a_driver_cursor_is_retried(project: Project, database: Database) -> None:
    project.add("002", "op.get_bind().connection.cursor().execute('LOCK TABLE hcm_report_metadata')")
    assert project.alembic("upgrade", "001").returncode == 0
    with database.session() as other:
        other.execute("LOCK TABLE hcm_report_metadata")
        running = project.start("upgrade", "head")
        running.prints("failed: canceling statement due to lock timeout")
        other.connection.commit()
        result = running.wait()
    assert (result.returncode, database.at) == (0, ["002"]), result


@pytest.mark.parametrize("error", ["SystemExit(0)", "SystemExit", "KeyboardInterrupt"])
def test_a_revision_that_exits_is_a_failure(project: Project, database: Database, error: str) -> None:
    project.add("002", f"{TABLE}raise {error}")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["001"])
    name = FILE.format("002")
    message = error.replace("(0)", ": 0")
    assert result.failure == (
        f"revision 002 ({name}) failed: {message}, at {name}, line 8; rolled back;"
        f" the database is at revision 001; {FIX}"
    )
