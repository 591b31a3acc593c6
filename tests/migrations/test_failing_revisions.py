"""Revisions that fail: one clear line says why, and what is left of them."""

import time

import pytest

from tests.support.database import Database
from tests.support.project import Project
from tests.support.revisions import AUDIT, BLOCK, FILE, FIX, TABLE, audit, audited, building, follow
from tests.support.waiting import until


@pytest.mark.fault(
    "Code and settings",
    fault="A statement of a revision fails",
    sees="`revision 003 (...) failed: <the server's words>, at <file>, line 8; rolled back; the database is at"
    " revision 002; fix it, then retry`, exit 255",
    state="Finished revisions stay, this one is rolled back",
    do="Mend the revision, push, deploy again",
)
def test_a_revision_that_fails_keeps_what_was_finished_before(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    project.add("003", audited("003", 'op.execute("TABLE gone")'))
    project.add("004", audited("004"))
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at, audit(database)) == (255, ["002"], [])
    name = FILE.format("003")
    assert result.failure == (
        f'revision 003 ({name}) failed: relation "gone" does not exist, at {name}, line 8; rolled back; the'
        f" database is at revision 002; {FIX}"
    )


@pytest.mark.fault(
    "Code and settings",
    fault="A downgrade fails",
    sees="`the downgrade of revision 002 (...) failed: ...; rolled back; the database is at revision 002; ...`,"
    " exit 255",
    state="The schema before it",
    do="Mend the downgrade, deploy again",
)
def test_a_downgrade_that_fails_is_named_as_one(project: Project, database: Database) -> None:
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
    sees="`revision 003 (...) failed: duplicate key value ...; rolled back; the database is at revision 002; ...`,"
    " exit 255",
    state="Finished revisions stay, this one is rolled back",
    do="Mend the data or the revision, deploy again",
)
def test_a_constraint_that_fails_at_the_commit_keeps_nothing(project: Project, database: Database) -> None:
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
    fault="An `autocommit_block` fails half way",
    sees="`revision 003 (...) failed: ...; committed outside the transaction and not rolled back: ...; drop with: DROP"
    " INDEX CONCURRENTLY public.one; the database is at revision 002; ...`, exit 255",
    state="What the line lists; finished revisions",
    do="Run that statement, undo the rest of the list, mend the revision, deploy again",
)
def test_what_an_autocommit_block_did_before_it_failed_is_listed(project: Project, database: Database) -> None:
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
    stays = "INSERT INTO audit; CREATE INDEX CONCURRENTLY one ON audit"
    assert result.failure == (
        f"{failed}; committed outside the transaction and not rolled back: {stays}; drop with: DROP INDEX CONCURRENTLY"
        f" public.one; the database is at revision 002; {FIX}"
    )
    assert "waiting" not in result.stderr
    path.write_text(path.read_text().replace("(gone)", "(revision)"))
    database.execute("DELETE FROM audit")
    follow(result, database)
    assert project.alembic("upgrade", "head").returncode == 0
    assert (database.at, audit(database)) == (["003"], ["003"])


@pytest.mark.fault(
    "Partial work",
    fault="A revision fails after its `autocommit_block`",
    sees="As above; only what the block did is listed",
    state="What the line lists; finished revisions",
    do="Undo what is listed, mend the revision, deploy again",
)
def test_what_follows_an_autocommit_block_is_rolled_back_and_not_listed(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    database.execute(f'CREATE SCHEMA "re ports" AUTHORIZATION {database.role}')
    create = """op.execute('CREATE UNIQUE INDEX CONCURRENTLY "o ne" ON "re ports".b (x)')\n"""
    block = f"""op.execute('CREATE TABLE IF NOT EXISTS "re ports".b (x text)')\n{BLOCK}{create}"""
    path = project.add("003", block + audited("003", 'op.execute("SELECT 1 / 0")'))
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at, audit(database)) == (255, ["002"], [])
    name = FILE.format("003")
    assert result.failure == (
        f"revision 003 ({name}) failed: division by zero, at {name}, line 11; committed outside the"
        ' transaction and not rolled back: CREATE TABLE IF NOT EXISTS "re ports".b; CREATE UNIQUE INDEX CONCURRENTLY'
        ' "o ne" ON "re ports".b; drop with: DROP INDEX CONCURRENTLY "re ports"."o ne"; the database is at'
        " revision 002;"
        f" {FIX}"
    )
    path.write_text(path.read_text().replace("1 / 0", "1 / 1"))
    follow(result, database)
    assert project.alembic("upgrade", "head").returncode == 0
    assert (database.at, audit(database)) == (["003"], ["003"])


@pytest.mark.fault(
    "Partial work",
    fault="A table stays locked in an `autocommit_block`",
    sees="`... failed: canceling statement due to lock timeout ...`, exit 255, after 3 s",
    state="What the line lists; finished revisions",
    do="Undo what is listed, deploy again at a quieter time",
)
def test_a_locked_table_in_an_autocommit_block_is_not_tried_again(project: Project, database: Database) -> None:
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
    fault="Other transactions are open for longer than `lock_timeout` while an index is built concurrently",
    sees="Nothing of it: it waits for them, and holds up nobody meanwhile",
    state="All done",
    do="Nothing",
)
def test_an_index_that_is_built_concurrently_waits_for_all_transactions(project: Project, database: Database) -> None:
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


def test_two_grants_at_once_are_tried_again(project: Project, database: Database) -> None:
    """The server says `tuple concurrently updated`, an internal error (XX000)."""
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
    fault="`pg_cancel_backend` in a revision",
    sees="`revision 002 (...) failed: canceling statement due to user request (it was cancelled on the server)...;"
    " rolled back; the database is at revision 001; fix it, then retry`, exit 255",
    state="Finished revisions stay, this one is rolled back",
    do="Ask who cancelled it, deploy again",
)
def test_a_statement_that_is_cancelled_on_the_server_is_not_tried_again(project: Project, database: Database) -> None:
    project.add("002", 'op.execute("SELECT pg_cancel_backend(pg_backend_pid()), pg_sleep(60)")')
    result = project.alembic("upgrade", "head")
    assert (result.returncode, result.failure, database.at) == (
        255,
        f"revision 002 ({FILE.format('002')}) failed: canceling statement due to user request (it was cancelled on the"
        f" server), at {FILE.format('002')}, line 7; rolled back; the database is at revision 001; {FIX}",
        ["001"],
    )


def test_a_limit_that_is_configured_is_final(project: Project, database: Database) -> None:
    database.execute(f"ALTER ROLE {database.role} SET work_mem = '64kB'")
    database.execute(f"ALTER ROLE {database.role} SET temp_file_limit = '100kB'")
    project.add("002", 'op.execute("CREATE TABLE a AS SELECT n FROM generate_series(1, 1000000) n ORDER BY n DESC")')
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["001"])
    assert "temporary file size exceeds" in result.failure
    assert "waiting" not in result.stderr


def test_a_table_that_is_locked_for_the_drivers_own_cursor_is_tried_again(project: Project, database: Database) -> None:
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
    said = error.replace("(0)", ": 0")
    assert result.failure == (
        f"revision 002 ({name}) failed: {said}, at {name}, line 8; rolled back; the database is at revision 001;"
        f" fix it, then retry"
    )
