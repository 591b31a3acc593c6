"""Revisions that reach for what is the run's: none may pass for done that is not, or spoil the next one's session."""

import pytest

from tests.support.database import Database
from tests.support.project import Project
from tests.support.revisions import BLOCK, FILE, RULES

TABLE = 'op.execute("CREATE TABLE a (x int)")\n'


def test_what_statements_quote_is_not_printed_and_of_many_only_the_ends(project: Project, database: Database) -> None:
    rows = "".join(f"    op.execute(\"INSERT INTO a VALUES ('{n}', 'jane@secret.org')\")\n" for n in range(50))
    table = 'op.execute("CREATE TABLE a (x text, y text)")\n'
    project.add("002", BLOCK + table + rows + "    1 / 0")
    result = project.alembic("upgrade", "head")
    assert result.returncode == 255
    assert "secret" not in result.stderr
    row = "INSERT INTO a"
    listed = f"not rolled back: CREATE TABLE a; {row}; {row}; 47 more; {row}; the database is at revision 001; "
    assert listed in result.failure


def test_savepoints_and_autocommit_blocks_are_a_revisions_own(project: Project, database: Database) -> None:
    project.add("002", "with op.get_bind().begin_nested():\n    op.execute('CREATE TABLE a (x int)')")
    block = f"{BLOCK}op.execute('CREATE INDEX CONCURRENTLY b ON a (x)')\n"
    project.add("003", f"op.execute('INSERT INTO a VALUES (1)')\n{block}op.execute('INSERT INTO a VALUES (2)')")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at, database.execute("SELECT x FROM a")) == (0, ["003"], [(1,), (2,)]), result


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


def test_a_revision_that_moves_the_search_path_moves_nothing_else(project: Project, database: Database) -> None:
    database.execute(f"CREATE SCHEMA other AUTHORIZATION {database.role}")
    database.execute("CREATE TABLE other.alembic_version (version_num varchar(32) PRIMARY KEY)")
    database.execute("INSERT INTO other.alembic_version VALUES ('001')")
    database.execute(f"GRANT ALL ON other.alembic_version TO {database.role}")
    project.add("002", 'op.execute("SET search_path = other")')
    project.add("003", TABLE)
    assert project.alembic("upgrade", "head").returncode == 0
    assert database.at == ["003"]
    assert database.execute("SELECT version_num FROM other.alembic_version") == [("001",)]
    assert database.execute("SELECT schemaname::text FROM pg_tables WHERE tablename = 'a'") == [("public",)]


def test_a_revisions_settings_end_with_it(project: Project, database: Database) -> None:
    asked = ("lock_timeout", "statement_timeout", "search_path", "role")
    settings = " || ' ' || ".join(f"current_setting('{name}')" for name in asked)
    ask = f"""
import logging
logging.getLogger("migrations.test").info("settings %s", op.get_bind().exec_driver_sql("SELECT {settings}").scalar())
"""
    project.add("002", ask)
    sets = f"SET lock_timeout = 0; SET statement_timeout = '60s'; SET search_path = ''; SET ROLE {database.role}"
    project.add("003", f'op.execute("{sets}")')
    project.add("004", ask)
    result = project.alembic("upgrade", "head")
    lines = [line.split("settings ")[1] for line in result.lines if "INFO settings" in line]
    assert lines == ['3s 0 "$user", public none'] * 2, result


def test_a_revision_that_lets_go_of_the_lock_does_not_let_another_run_in(project: Project, database: Database) -> None:
    project.add("002", 'op.execute("SELECT pg_advisory_unlock_all()")')
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    project.add("003", f'assert op.get_bind().exec_driver_sql("{held}").scalar() == 1')
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (0, ["003"]), result


def test_a_blocker_of_one_revision_is_not_named_for_the_next_ones_error(project: Project, database: Database) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    project.add("002", 'op.execute("ALTER TABLE hcm_report_metadata ADD COLUMN a int")')
    project.add("003", 'op.execute("SELECT 1 / 0")')
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM hcm_report_metadata")
        running = project.start("upgrade", "head")
        running.prints("; blocked by pid ")
    result = running.wait()
    assert (result.returncode, database.at) == (255, ["002"])
    assert "blocked" not in result.failure


def test_the_row_of_a_violated_constraint_is_not_printed(project: Project) -> None:
    project.add("002", "op.execute(\"INSERT INTO hcm_report_metadata (dag_name) VALUES ('Jane Doe')\")")
    result = project.alembic("upgrade", "head")
    assert "violates not-null constraint" in result.failure
    assert "Jane" not in result.stdout + result.stderr


def test_the_sql_has_a_percent_sign_as_it_is(project: Project, database: Database) -> None:
    project.add("002", "op.execute(\"CREATE TABLE a AS SELECT format('100%% of %s', 1) AS x\")")
    assert "format('100%% of %s', 1)" in project.alembic("upgrade", "head", "--sql").stdout
    assert project.alembic("upgrade", "head").returncode == 0
    assert database.scalar("SELECT x FROM a") == "100% of 1"


def test_a_destination_that_does_not_exist_is_named_before_connecting(offline_project: Project) -> None:
    result = offline_project.alembic("upgrade", "999")
    assert (result.returncode, result.failure) == (255, "there is no revision 999; 'alembic history' lists them")


def test_the_beginning_of_several_revisions_is_named_before_connecting(offline_project: Project) -> None:
    offline_project.add("ab12", down="001")
    offline_project.add("ab34", down="ab12")
    result = offline_project.alembic("upgrade", "ab")
    assert (result.returncode, result.failure) == (255, "ab is ambiguous: ab12, ab34; 'alembic history' lists them")


def test_a_revision_that_the_version_table_cannot_hold_is_named_before_any_step(
    project: Project, database: Database
) -> None:
    project.add("2" * 33, down="001")
    said = f"revision {'2' * 33} has 33 characters, and the version table holds 32; shorten it{{}}; {RULES}"
    assert project.alembic("upgrade", "head").failure == said.format("")
    assert database.relations == []
    assert project.alembic("upgrade", "001").returncode == 0
    widen = "ALTER TABLE public.alembic_version ALTER version_num TYPE text"
    assert project.alembic("upgrade", "head").failure == said.format(f", or widen the column: {widen}")
    database.execute(widen)
    assert project.alembic("upgrade", "head").returncode == 0
    assert project.alembic("current").stdout == f"{'2' * 33} (head)\n"


def test_current_calls_neither_of_two_heads_the_head(project: Project) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    project.add("002")
    project.add("003", down="001")
    result = project.alembic("current")
    assert (result.returncode, "(head)" in result.stdout) == (255, False)
    assert result.failure.startswith("there are 2 heads: 002 ")


def test_current_of_an_empty_database_says_so(project: Project) -> None:
    result = project.alembic("current")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.lines[-1] == "HH:MM:SS INFO at base (the head is 001)"
