"""Every Alembic command that docs/migrations.md names, run from the repository's root."""

import re
import time
from pathlib import Path

import pytest

from tests.support.database import Database
from tests.support.programs import run
from tests.support.project import Project
from tools.paths import BIN

ADD_STATUS = (
    'op.execute("ALTER TABLE hcm_report_metadata ADD COLUMN status VARCHAR(50)")',
    'op.execute("ALTER TABLE hcm_report_metadata DROP COLUMN status")',
)
CONCURRENTLY = (
    "with op.get_context().autocommit_block():\n"
    '    op.execute("CREATE INDEX CONCURRENTLY idx_tenant ON hcm_report_metadata (tenant_id)")'
)


def test_upgrade_and_downgrade_by_one(project: Project, database: Database) -> None:
    project.add("002", *ADD_STATUS)
    for arguments, at in [
        (("upgrade", "+1"), ["001"]),
        (("upgrade", "+1"), ["002"]),
        (("downgrade", "-1"), ["001"]),
        (("upgrade", "head"), ["002"]),
        (("downgrade", "base"), []),
    ]:
        result = project.alembic(*arguments)
        assert (result.returncode, result.stdout, database.at) == (0, "", at), result.stderr


def test_upgrade_beyond_the_head_changes_nothing(project: Project, database: Database) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    result = project.alembic("upgrade", "+1")
    assert (result.returncode, database.at) == (255, ["001"])
    assert result.failure == "Relative revision +1 didn't produce 1 migrations"


def test_current_prints_the_revision_and_nothing_else(project: Project) -> None:
    assert project.alembic("current").stdout == ""
    assert project.alembic("upgrade", "head").returncode == 0
    result = project.alembic("current")
    assert (result.returncode, result.stdout) == (0, "001 (head)\n")


@pytest.mark.parametrize("arguments", [("current",), ("history", "-i"), ("show", "current")])
def test_commands_that_only_read_change_nothing(project: Project, database: Database, arguments: tuple) -> None:
    assert project.alembic(*arguments).returncode == 0
    assert database.scalar("SELECT to_regclass('alembic_version')") is None


def test_stamp_records_the_head_and_runs_nothing(project: Project, database: Database) -> None:
    result = project.alembic("stamp", "head")
    assert (result.returncode, database.at, database.relations) == (0, ["001"], [])


def test_stamp_purge_removes_an_unknown_revision(project: Project, database: Database) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    database.execute("UPDATE alembic_version SET version_num = 'gone'")
    assert project.alembic("stamp", "--purge", "001").returncode == 0
    assert database.at == ["001"]


HISTORY = "001 -> 002 (head), add\n<base> -> 001, create_hcm_report_metadata\n"


@pytest.mark.parametrize(
    ("arguments", "stdout"),
    [
        (("history",), HISTORY),
        (("history", "-r", "001:"), HISTORY),
        (("heads",), "002 (head)\n"),
        (("branches",), ""),
    ],
    ids=" ".join,
)
def test_commands_on_files_need_no_database(offline_project: Project, arguments: tuple, stdout: str) -> None:
    offline_project.add("002", *ADD_STATUS)
    result = offline_project.alembic(*arguments)
    assert (result.returncode, result.stdout, result.stderr) == (0, stdout, "")


@pytest.mark.parametrize("arguments", [("history", "--verbose"), ("heads", "--verbose"), ("show", "002")], ids=" ".join)
def test_verbose_commands_need_no_database(offline_project: Project, arguments: tuple) -> None:
    path = offline_project.add("002", *ADD_STATUS)
    result = offline_project.alembic(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Rev: 002 (head)\nParent: 001\nPath: {path}\n")


def test_merge_needs_no_database_and_creates_one_head(offline_project: Project) -> None:
    offline_project.add("002", name="left")
    offline_project.add("003", name="right", down="001")
    result = offline_project.alembic("merge", "-m", "both", "002", "003")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"\w+ \(head\)\n", offline_project.alembic("heads").stdout)


def test_history_marks_the_databases_revision(project: Project) -> None:
    project.add("002", *ADD_STATUS)
    assert project.alembic("upgrade", "001").returncode == 0
    result = project.alembic("history", "-i")
    assert result.stdout == "001 -> 002 (head), add\n<base> -> 001 (current), create_hcm_report_metadata\n"
    assert project.alembic("history", "-r", "current:").stdout == result.stdout.replace(" (current)", "")
    assert "Rev: 001\n" in project.alembic("show", "current").stdout


@pytest.mark.parametrize("schema", [None, "re ports", ":name"])
@pytest.mark.parametrize("upgrade", [ADD_STATUS[0], CONCURRENTLY], ids=["transaction", "autocommit_block"])
def test_the_sql_of_an_upgrade_has_the_same_effect_as_the_upgrade(
    project: Project, database: Database, upgrade: str, schema: str | None
) -> None:
    project.add("002", upgrade)
    plan = project.alembic(
        "upgrade", "head", "--sql", DATABASE_URL="postgresql://nobody@127.0.0.1:1/x", DB_SCHEMA=schema
    )
    assert plan.returncode == 0, plan
    assert plan.stdout.startswith(
        "-- Run it with psql --set=ON_ERROR_STOP=1: after an error, the rest must not be applied\n"
    )
    if schema:
        database.execute(f'CREATE SCHEMA "{schema}" AUTHORIZATION {database.role}')
    empty = database.dump()
    assert database.psql(plan.stdout).returncode == 0
    planned = database.dump()
    namespace = f'"{schema}".' if schema else ""
    database.execute(
        f"DROP TABLE {namespace}hcm_report_metadata, {namespace}alembic_version, {namespace}alembic_version_history"
    )
    assert database.dump() == empty
    result = project.alembic("upgrade", "head", DB_SCHEMA=schema)
    assert result.returncode == 0, result
    assert database.dump() == planned


def test_incomplete_sql_output_is_reported(offline_project: Project) -> None:
    with Path("/dev/full").open("w") as full:
        result = run([BIN / "alembic", "upgrade", "head", "--sql"], cwd=offline_project.folder, env={}, stdout=full)
    assert result.returncode == 255
    assert result.stderr == "FAILED: the SQL output is incomplete, do not run it: No space left on device\n"


def test_the_sql_of_a_downgrade_undoes_the_upgrade(project: Project, database: Database) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    plan = project.alembic("downgrade", "001:base", "--sql")
    assert database.psql(plan.stdout).returncode == 0
    assert (database.relations, database.at) == ([], [])


def test_the_name_and_schema_of_the_version_table_can_be_set(project: Project, database: Database) -> None:
    database.execute(f'CREATE SCHEMA "re ports" AUTHORIZATION {database.role}')
    for _ in range(2):
        result = project.alembic("upgrade", "head", DB_SCHEMA="re ports", ALEMBIC_VERSION_TABLE="Hcm-Version")
        assert result.returncode == 0, result
    assert result.lines[-1] == "HH:MM:SS INFO at 001 (head): nothing to do"
    query = "SELECT tablename FROM pg_tables WHERE schemaname = 're ports' ORDER BY 1"
    assert database.execute(query) == [("Hcm-Version",), ("Hcm-Version_history",), ("hcm_report_metadata",)]
    assert database.scalar('SELECT version_num FROM "re ports"."Hcm-Version"') == "001"
    assert database.relations == []


@pytest.mark.fault(
    "Database",
    fault="Other transactions stay open longer than `lock_timeout` while a plan (--sql) builds an index concurrently",
    sees="No visible effect: the plan waits for them, as a run does",
    state="Complete",
    do="Nothing",
)
def test_a_plan_that_builds_an_index_concurrently_waits_for_all_transactions(
    project: Project, database: Database
) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    project.add(
        "002", f'{CONCURRENTLY}\n    op.execute("CREATE TABLE after AS SELECT current_setting($$lock_timeout$$)")'
    )
    plan = project.alembic("upgrade", "001:head", "--sql").stdout
    with database.session() as report:
        report.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        report.execute("SELECT count(*) FROM pg_class")
        psql = database.start_psql(plan)
        time.sleep(4)  # lock_timeout is 3 s
        assert psql.running
        report.connection.commit()
        assert psql.wait().returncode == 0
    assert database.at == ["002"]
    assert database.scalar("SELECT indisvalid FROM pg_index WHERE indexrelid = 'idx_tenant'::regclass") is True
    assert database.execute("TABLE after") == [("3s",)]


@pytest.mark.fault(
    "Code and settings",
    fault="A plan (--sql) is requested for a revision that reads the database",
    sees="`revision 002 (...) reads the database or depends on its answers, so it cannot be planned; run it without"
    " --sql, at <file>, line 8`, exit 255",
    state="The database is not contacted",
    do="Follow the message",
)
@pytest.mark.parametrize(
    "body",
    [
        "import sqlalchemy as sa\nsa.inspect(op.get_bind()).get_columns('hcm_report_metadata')",
        "import sqlalchemy as sa\nop.get_bind().execute(sa.text('SELECT 1')).scalar()",
        "import sqlalchemy as sa\nlist(op.get_bind().execute(sa.text('SELECT 1')))",
        "import sqlalchemy as sa\nop.get_bind().scalar(sa.text('SELECT 1'))",
        "import sqlalchemy as sa\nop.get_bind().begin_nested()",
        "import sqlalchemy as sa\nop.get_bind().connection.cursor()",
        "import sqlalchemy as sa\nop.get_bind().engine.begin()",
    ],
)
def test_a_revision_that_reads_has_no_plan_and_is_reported_once(project: Project, body: str) -> None:
    path = project.add("002", body)
    result = project.alembic("upgrade", "001:head", "--sql")
    assert (result.returncode, result.stdout) == (255, "")
    assert result.stderr == (
        f"FAILED: revision 002 ({path.name}) reads the database or depends on its answers, so it cannot be planned;"
        f" run it without --sql, at {path.name}, line 8\n"
    )
    assert project.alembic("upgrade", "head").returncode == 0


@pytest.mark.parametrize("prepare", [("stamp", "head"), ("upgrade", "head")], ids=" ".join)
def test_a_plan_stops_if_the_database_is_at_another_revision(
    project: Project, database: Database, prepare: tuple[str, ...]
) -> None:
    plan = project.alembic("upgrade", "head", "--sql").stdout
    assert project.alembic(*prepare).returncode == 0
    before = database.dump()
    refused = database.psql(plan)
    assert refused.returncode != 0
    assert "the database is not at base, where this plan starts" in refused.stderr
    assert database.dump() == before


def test_a_plan_is_refused_during_a_run(project: Project, database: Database) -> None:
    plan = project.alembic("upgrade", "head", "--sql").stdout
    project.add("002", 'op.execute("SELECT pg_sleep(60)")')
    running = project.start("upgrade", "head")
    running.prints("running upgrade 001 -> 002")
    refused = database.psql(plan)
    assert refused.returncode != 0
    assert "another migration is running" in refused.stderr
    assert running.stop().returncode == 143


def test_a_plan_after_a_downgrade_to_base_is_applied(project: Project, database: Database) -> None:
    plan = project.alembic("upgrade", "head", "--sql").stdout
    assert project.alembic("upgrade", "head").returncode == 0
    assert project.alembic("downgrade", "base").returncode == 0
    assert database.psql(plan).returncode == 0
    assert database.at == ["001"]


def test_the_sql_has_percent_signs_unchanged(project: Project, database: Database) -> None:
    project.add("002", "op.execute(\"CREATE TABLE a AS SELECT format('100%% of %s', 1) AS x\")")
    assert "format('100%% of %s', 1)" in project.alembic("upgrade", "head", "--sql").stdout
    assert project.alembic("upgrade", "head").returncode == 0
    assert database.scalar("SELECT x FROM a") == "100% of 1"


def test_an_unknown_target_revision_is_named_before_connecting(offline_project: Project) -> None:
    result = offline_project.alembic("upgrade", "999")
    assert (result.returncode, result.failure) == (255, "there is no revision 999; 'alembic history' lists them")


def test_an_ambiguous_prefix_is_named_before_connecting(offline_project: Project) -> None:
    offline_project.add("ab12", down="001")
    offline_project.add("ab34", down="ab12")
    result = offline_project.alembic("upgrade", "ab")
    assert (result.returncode, result.failure) == (255, "ab is ambiguous: ab12, ab34; 'alembic history' lists them")


def test_current_marks_neither_of_two_heads_as_the_head(project: Project) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    project.add("002")
    project.add("003", down="001")
    result = project.alembic("current")
    assert (result.returncode, "(head)" in result.stdout) == (255, False)
    assert result.failure.startswith("there are 2 heads: 002 ")


def test_current_of_an_empty_database_reports_base(project: Project) -> None:
    result = project.alembic("current")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.lines[-1] == "HH:MM:SS INFO at base (the head is 001)"
