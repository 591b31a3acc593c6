"""The record: a row for each step, in its transaction; nothing fails for lack of it."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

import alembic
import pytest

from migration_runner import record
from tests.support.database import Database, fresh_database
from tests.support.programs import start
from tests.support.project import Project
from tests.support.revisions import AUDIT, BLOCK, FIRST, audited
from tests.support.waiting import until
from tools.postgres import Postgres, dsn

FROM_JOB = {"GIT_REPO": "https://git.example.org/reports", "GIT_REF": "it's 100 %s $1 %I", "GIT_COMMIT": "5e0f" * 10}
COLUMNS = "revision, direction, applied_by, file, repository, ref, commit, runner, alembic"
SEE_DOCS = "see 'The record of what was applied' in docs/operations.md"


def test_each_step_has_a_row_with_its_origin(project: Project, database: Database) -> None:
    before = database.scalar("SELECT clock_timestamp()")
    file = project.add("002", 'op.execute("SELECT pg_sleep(0.2)")')
    assert project.alembic("upgrade", "head", **FROM_JOB).returncode == 0
    versions = (record.VERSION, alembic.__version__)
    rows = [("001", "upgrade", "run", FIRST), ("002", "upgrade", "run", file.name)]
    assert database.history(COLUMNS) == [(*row, *FROM_JOB.values(), *versions) for row in rows]
    ((at, duration, role, host, digest),) = database.execute(
        "SELECT applied_at, duration, role, host, file_sha256 FROM alembic_version_history WHERE revision = '002'"
    )
    assert before < at < database.scalar("SELECT clock_timestamp()")
    assert timedelta(seconds=0.2) < duration < at - before
    assert (role, host) == (database.role, start(["hostname"]).wait(verbatim=True).stdout.strip())
    assert digest == start(["sha256sum", file]).wait(verbatim=True).stdout.split()[0]


def test_a_downgrade_and_an_upgrade_again_have_rows(project: Project, database: Database) -> None:
    project.add("002")
    for command in (("upgrade", "head"), ("downgrade", "-1"), ("upgrade", "head")):
        assert project.alembic(*command).returncode == 0
    assert database.history() == [("001", "upgrade"), ("002", "upgrade"), ("002", "downgrade"), ("002", "upgrade")]


@pytest.mark.parametrize(
    ("commands", "rows"),
    [
        ([("stamp", "002")], [("002", "stamp")]),
        ([("upgrade", "001"), ("stamp", "head")], [("001", "upgrade"), ("003", "stamp")]),
        ([("stamp", "head"), ("stamp", "base")], [("003", "stamp"), ("base", "stamp")]),
        ([("stamp", "head"), ("stamp", "--purge", "002")], [("003", "stamp"), ("002", "stamp")]),
        ([("stamp", "head"), ("stamp", "--purge", "base")], [("003", "stamp"), ("base", "stamp")]),
    ],
)
def test_a_stamp_has_a_row(
    project: Project, database: Database, commands: list[tuple[str, ...]], rows: list[tuple[str, str]]
) -> None:
    project.add("002")
    project.add("003")
    for command in commands:
        result = project.alembic(*command)
        assert result.returncode == 0, result
    assert database.history() == rows
    revision, direction = rows[-1]
    since = f"HH:MM:SS INFO since YYYY-MM-DD HH:MM:SS UTC: {direction} {revision} by {database.role}"
    assert since in project.alembic("current").lines


def test_merged_and_named_revisions_have_rows(project: Project, database: Database) -> None:
    project.add("a1", down="001")
    project.add("b2", down="001")
    merge = project.alembic("merge", "-m", "both", "a1", "b2")
    assert merge.returncode == 0, merge
    assert project.alembic("upgrade", "head").returncode == 0
    rows = database.history("revision")
    assert {"001", "a1", "b2", *database.at} == {row for (row,) in rows} and len(rows) == 4
    assert project.alembic("stamp", "base").returncode == 0
    assert project.alembic("stamp", "a1", "b2").returncode == 0
    assert sorted(database.history()[4:]) == [("a1", "stamp"), ("b2", "stamp"), ("base", "stamp")]
    assert project.alembic("upgrade", "head").returncode == 0


def test_a_failed_step_has_no_row_and_a_step_outside_its_transaction_has_one(
    project: Project, database: Database
) -> None:
    project.add("002", AUDIT)
    project.add("003", BLOCK + 'op.execute("CREATE INDEX CONCURRENTLY x ON audit (revision)")')
    project.add("004", audited("004") + 'op.execute("SELECT 1 / 0")')
    assert project.alembic("upgrade", "head").returncode == 255
    assert (database.at, database.history("revision")) == (["003"], [("001",), ("002",), ("003",)])


RESETS = [
    'op.execute("SET ROLE other_{role}")',
    'op.execute("SET search_path = nowhere")',
    'op.execute("RESET ALL")',
    'op.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")',
    f'{BLOCK}op.execute("DISCARD ALL")',
]


@pytest.mark.parametrize("body", RESETS)
def test_a_step_that_changes_its_session_has_a_row(project: Project, database: Database, body: str) -> None:
    database.execute(f"CREATE ROLE other_{database.role} ROLE {database.role}")
    try:
        project.add("002", body.replace("{role}", database.role))
        result = project.alembic("upgrade", "head")
        if result.returncode:  # DISCARD ALL releases the lock
            assert "released the migration lock" in result.failure
        else:
            assert database.history() == [("001", "upgrade"), ("002", "upgrade")]
    finally:
        database.execute(f"DROP ROLE other_{database.role}")


def test_an_existing_database_starts_with_an_empty_record(project: Project, database: Database) -> None:
    project.add("002")
    assert project.alembic("upgrade", "001").returncode == 0
    database.execute("DROP TABLE alembic_version_history")
    nothing = project.alembic("upgrade", "001")
    assert nothing.lines[1:] == ["HH:MM:SS INFO at 001 (the head is 002): nothing to do"]
    assert "\nApplied: not recorded\n" in project.alembic("current", "--verbose").stdout
    assert database.scalar("SELECT to_regclass('alembic_version_history')") is None
    assert project.alembic("upgrade", "head").returncode == 0
    assert database.history() == [("002", "upgrade")]


def test_something_else_that_moved_the_database_is_noticed(project: Project, database: Database) -> None:
    project.add("002")
    assert project.alembic("upgrade", "head").returncode == 0
    database.execute("UPDATE alembic_version SET version_num = '001'")
    assert "since" not in project.alembic("current").text
    assert project.alembic("downgrade", "base").returncode == 0
    assert project.alembic("upgrade", "001").returncode == 0
    database.execute("UPDATE alembic_version SET version_num = '002'")
    assert "since" not in project.alembic("current").text
    assert project.alembic("upgrade", "head").returncode == 0


@pytest.mark.parametrize("version_table", ["Hcm-Version", "v" * 59])
def test_it_is_beside_the_version_table(project: Project, database: Database, version_table: str) -> None:
    database.execute(f"CREATE SCHEMA elsewhere AUTHORIZATION {database.role}")
    environment = {"ALEMBIC_VERSION_TABLE": version_table, "DB_SCHEMA": "elsewhere"}
    assert project.alembic("upgrade", "head", **environment).returncode == 0
    result = project.alembic("upgrade", "head", **environment)
    assert "since" in result.lines[1]
    history = f"{version_table}_history"[:63]
    assert database.scalar(f'SELECT revision FROM elsewhere."{history}"') == "001"


def test_credentials_in_the_repositorys_url_are_not_recorded(project: Project, database: Database) -> None:
    for url in (
        "https://u:hunter2@git.example.org/reports?token=hunter2#hunter2",
        "https://hunter2@git.example.org/reports",
    ):
        assert project.alembic("stamp", "head", GIT_REPO=url).returncode == 0
        assert project.alembic("stamp", "base", GIT_REPO=url).returncode == 0
    assert set(database.history("repository")) == {("https://git.example.org/reports",)}
    for url, recorded in (
        ("git@git.example.org:reports", "git@git.example.org:reports"),
        ("ssh://git@git.example.org:22/reports", "ssh://git.example.org:22/reports"),
        ("https://u:p/hunter2@git.example.org/reports", None),
        ("u:hunter2@git.example.org/reports", None),
    ):
        assert project.alembic("stamp", "--purge", "head", GIT_REPO=url).returncode == 0
        assert database.history("repository")[-1] == (recorded,)


def test_it_holds_no_value_and_no_statement(project: Project, database: Database) -> None:
    project.add("002", "op.execute(\"CREATE TABLE hunter2 AS SELECT 'hunter2'::text\")")
    assert project.alembic("upgrade", "head").returncode == 0
    (row,) = database.execute("SELECT t::text FROM alembic_version_history t WHERE revision = '002'")
    assert "hunter2" not in row[0] and "CREATE" not in row[0]


def test_names_that_the_servers_encoding_lacks_are_recorded_as_far_as_possible(
    project: Project, database: Database
) -> None:
    database.execute(f"CREATE DATABASE {database.name}_latin ENCODING latin1 TEMPLATE template0 OWNER {database.role}")
    try:
        url = database.url.set(database=f"{database.name}_latin")
        result = project.alembic("upgrade", "head", DATABASE_URL=dsn(url), GIT_REF="größe/€/'x'\\")
        assert result.returncode == 0, result
        latin = Database(database.admin.set(database=url.database), url, str(url.database), database.role)
        assert latin.history("ref") == [("größe/?/'x'\\",)]
    finally:
        database.execute(f"DROP DATABASE {database.name}_latin")


NOT_RECORDED = "`WARNING nothing is recorded: ...; see 'The record of what was applied' in docs/operations.md`, exit 0"


@pytest.mark.fault(
    "Database",
    fault="The record of what was applied cannot be created: no CREATE privilege on the schema",
    sees=NOT_RECORDED,
    state="Complete",
    do="Grant it",
)
def test_a_role_that_may_not_create_it_migrates_without(project: Project, database: Database) -> None:
    project.add("002", 'op.execute("UPDATE hcm_report_metadata SET id = id")')
    assert project.alembic("upgrade", "001").returncode == 0
    database.execute("DROP TABLE alembic_version_history")
    database.execute("ALTER SCHEMA public OWNER TO postgres; REVOKE ALL ON SCHEMA public FROM PUBLIC")
    database.execute(f"GRANT USAGE ON SCHEMA public TO {database.role}")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (0, ["002"]), result
    warning = "public.alembic_version_history cannot be created: permission denied for schema public"
    result.line(f"HH:MM:SS WARNING nothing is recorded: {warning}; {SEE_DOCS}")
    assert "WARNING" not in project.alembic("current", "--verbose").text


OTHERS = {
    "a table of another role": (
        "CREATE TABLE alembic_version_history (x int); ALTER TABLE alembic_version_history OWNER TO {other}",
        "is owned by {other}: connect as that role, or grant it to this one",
    ),
    "a record of another role": (
        record.create_sql("alembic_version_history") + "; ALTER TABLE alembic_version_history OWNER TO {other}",
        "is owned by {other}: connect as that role, or grant it to this one",
    ),
    "another table": ("CREATE TABLE alembic_version_history (id int)", "is another table: its columns differ"),
    "a record with row-level security": (
        record.create_sql("alembic_version_history")
        + "; ALTER TABLE alembic_version_history ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY,"
        " OWNER TO {role}",
        "has row-level security, which applies to the role",
    ),
    "a view": ("CREATE VIEW alembic_version_history AS SELECT 1 AS x", "is a view, not an ordinary table"),
    "a sequence": ("CREATE SEQUENCE alembic_version_history", "is a sequence, not an ordinary table"),
    "a type": (
        "CREATE TYPE alembic_version_history AS ENUM ()",
        'cannot be created: type "alembic_version_history" already exists (A relation has an associated type of the'
        " same name, so you must use a name that doesn't conflict with any existing type)",
    ),
    "another role's trigger": (
        record.create_sql("alembic_version_history")
        + "; CREATE FUNCTION grab() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''grabbed''; END';"
        " ALTER FUNCTION grab() OWNER TO {other}; CREATE TRIGGER grab BEFORE INSERT ON alembic_version_history"
        " EXECUTE FUNCTION grab()",
        "runs the function public.grab(), which is owned by {other}",
    ),
}


@pytest.mark.fault(
    "Database",
    fault="Something else has the name of the record: a view, a table with other columns, a table of an untrusted role",
    sees=f"{NOT_RECORDED}; of a plan, `WARNING:  nothing is recorded: ...`",
    state="Complete; the other object is unchanged",
    do="Drop or rename it, or set `ALEMBIC_VERSION_TABLE`",
)
@pytest.mark.parametrize("planned", [False, True], ids=["run", "plan"])
@pytest.mark.parametrize("name", OTHERS)
def test_something_else_of_its_name_is_left_alone(
    project: Project, database: Database, name: str, planned: bool
) -> None:
    other = f"other_{database.role}"
    database.execute(f"CREATE ROLE {other}; GRANT CREATE ON SCHEMA public TO {other}")
    try:
        statement, problem = (text.replace("{other}", other).replace("{role}", database.role) for text in OTHERS[name])
        database.execute(statement)
        ours = "another table" in problem
        if ours and "VIEW" not in statement:
            database.execute(f"ALTER TABLE alembic_version_history OWNER TO {database.role}")
        what = (
            "SELECT relkind, relowner, relnatts, relhastriggers FROM pg_class WHERE relname = 'alembic_version_history'"
        )
        before = database.execute(what)
        if planned:
            plan = project.alembic("upgrade", "head", "--sql")
            result = database.psql(plan.stdout)
            assert (
                f"WARNING:  nothing is recorded: public.alembic_version_history {problem.partition(' (')[0]}"
                in result.text
            )
        else:
            result = project.alembic("upgrade", "head")
            line = f"HH:MM:SS WARNING nothing is recorded: public.alembic_version_history {problem}; {SEE_DOCS}"
            assert result.lines.count(line) == 1, result
        assert (result.returncode, database.at) == (0, ["001"]), result
        assert database.execute(what) == before
        again = project.alembic("upgrade", "head")
        assert again.returncode == 0, again
        if "CREATE TABLE" in statement:
            assert database.scalar("SELECT count(*) FROM alembic_version_history") == 0
    finally:
        database.execute(f"DROP OWNED BY {other} CASCADE; DROP ROLE {other}")


@pytest.mark.parametrize("granted", ["", "SELECT", "INSERT"])
def test_a_role_without_privileges_on_it_migrates_without(project: Project, database: Database, granted: str) -> None:
    project.add("002")
    assert project.alembic("upgrade", "001").returncode == 0
    database.execute("ALTER TABLE alembic_version_history OWNER TO postgres")
    if granted:
        database.execute(f"GRANT {granted} ON alembic_version_history TO {database.role}")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (0, ["002"]), result
    problem = "public.alembic_version_history may not be read and written by the role"
    result.line(f"HH:MM:SS WARNING nothing is recorded: {problem}; {SEE_DOCS}")
    assert ("Applied: YYYY" in project.alembic("history", "-i", "--verbose").stdout) == (granted == "SELECT")
    database.execute(f"GRANT SELECT, INSERT ON alembic_version_history TO {database.role}")
    assert project.alembic("downgrade", "001").returncode == 0
    assert database.history() == [("001", "upgrade"), ("002", "downgrade")]


def test_a_read_only_server_shows_it(project: Project, database: Database) -> None:
    """A standby is read-only in the same way."""
    project.add("002", 'op.execute("CREATE TABLE a ()")')
    assert project.alembic("upgrade", "001").returncode == 0
    database.execute(f"ALTER ROLE {database.role} SET default_transaction_read_only = on")
    assert "\nApplied: " in project.alembic("current", "--verbose").stdout
    failed = project.alembic("upgrade", "head")
    assert failed.returncode == 255 and "cannot execute CREATE TABLE in a read-only transaction" in failed.failure
    database.execute("DROP TABLE alembic_version_history")
    failed = project.alembic("upgrade", "head")
    assert "WARNING" not in failed.text and failed.failure.startswith("revision 002 "), failed


def test_two_runs_record_each_step_once(project: Project, database: Database) -> None:
    for number in range(2, 7):
        project.add(f"{number:03}", 'op.execute("SELECT pg_sleep(0.1)")')
    runs = [project.fork("upgrade", "head") for _ in range(4)]
    assert [run.wait().returncode for run in runs] == [0] * 4
    assert database.history("revision") == [(f"{number:03}",) for number in range(1, 7)]


def test_a_run_killed_before_its_commit_leaves_no_row(project: Project, database: Database) -> None:
    """A deferred constraint trigger keeps the commit, which follows the row, waiting."""
    project.add(
        "002",
        'op.execute("CREATE TABLE a (x int); CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS'
        " 'BEGIN PERFORM pg_sleep(60); RETURN NULL; END'; CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON a"
        ' DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait(); INSERT INTO a VALUES (1)")',
    )
    run = project.start("upgrade", "head")
    until(lambda: "active: COMMIT" in database.activity())
    assert database.history() == [("001", "upgrade")]
    run.kill()
    until(lambda: not database.activity(), 30)
    assert (database.at, database.history()) == (["001"], [("001", "upgrade")])


def test_a_session_that_is_terminated_while_it_creates_it_is_retried(project: Project, database: Database) -> None:
    project.add("002")
    assert project.alembic("upgrade", "001").returncode == 0
    database.execute("DROP TABLE alembic_version_history")
    with database.session() as other:
        other.execute("LOCK TABLE pg_class IN SHARE MODE")
        run = project.start("upgrade", "head")
        until(lambda: any("CREATE TABLE" in line for line in database.activity()))
        database.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database()"
            " AND query LIKE 'CREATE TABLE %'"
        )
    result = run.wait()
    result.line("INFO waiting, ", "server closed the connection")
    assert (result.returncode, database.history()) == (0, [("002", "upgrade")]), result


UNRECORDED = {
    "dropped by the revision": (
        "",
        'op.execute("DROP TABLE alembic_version_history")',
        'relation "public.alembic_version_history" does not exist',
    ),
    "privileges revoked by the revision": (
        "ALTER TABLE alembic_version_history OWNER TO postgres; GRANT ALL ON alembic_version_history TO {role}",
        'op.get_bind().exec_driver_sql("SELECT revoke()")',
        "permission denied for table alembic_version_history",
    ),
    "a trigger that fails": (
        "CREATE FUNCTION fails() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO nowhere SELECT 1; END';"
        " CREATE TRIGGER fails BEFORE INSERT ON alembic_version_history EXECUTE FUNCTION fails()",
        "pass",
        'relation "nowhere" does not exist',
    ),
    "a column more": ("ALTER TABLE alembic_version_history ADD x int NOT NULL DEFAULT 1", "pass", None),
    "a column that must have a value": (
        "DELETE FROM alembic_version_history; ALTER TABLE alembic_version_history ADD x int NOT NULL",
        "pass",
        'null value in column "x" of relation "alembic_version_history" violates not-null constraint',
    ),
    "a trigger that skips the row": (
        "CREATE FUNCTION skips() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        " CREATE TRIGGER skips BEFORE INSERT ON alembic_version_history FOR EACH ROW EXECUTE FUNCTION skips()",
        "pass",
        None,
    ),
    "a sequence that starts again": ("ALTER TABLE alembic_version_history ALTER id RESTART", "pass", None),
}


@pytest.mark.fault(
    "Database",
    fault="The record refuses a row, or a revision drops it",
    sees="`WARNING revision 002 (...) is not recorded: ...`, exit 0; of a plan `WARNING:  a step is not recorded: ...`",
    state="Complete",
    do="Fix the record",
)
@pytest.mark.parametrize("planned", [False, True], ids=["run", "plan"])
@pytest.mark.parametrize("name", [name for name, case in UNRECORDED.items() if case[2]])
def test_a_row_that_is_refused_does_not_fail_the_step(
    project: Project, database: Database, name: str, planned: bool
) -> None:
    _with_a_record_that_is(name, project, database, planned=planned)


@pytest.mark.parametrize("planned", [False, True], ids=["run", "plan"])
@pytest.mark.parametrize("name", [name for name, case in UNRECORDED.items() if not case[2]])
def test_a_record_that_is_unusual_does_not_fail_the_step(
    project: Project, database: Database, name: str, planned: bool
) -> None:
    _with_a_record_that_is(name, project, database, planned=planned)


def _with_a_record_that_is(name: str, project: Project, database: Database, *, planned: bool) -> None:
    before, body, reason = UNRECORDED[name]
    assert project.alembic("upgrade", "head").returncode == 0
    database.execute(
        "CREATE FUNCTION revoke() RETURNS int SECURITY DEFINER LANGUAGE plpgsql AS"
        f" 'BEGIN REVOKE ALL ON alembic_version_history FROM {database.role}; RETURN 1; END'"
    )
    if before:
        database.execute(before.replace("{role}", database.role))
        for function in ("fails", "skips"):
            if f"FUNCTION {function}" in before:
                database.execute(f"ALTER FUNCTION {function}() OWNER TO {database.role}")
    file = project.add("002", f'{body}\nop.execute("CREATE TABLE done ()")')
    if planned:
        result = database.psql(project.alembic("upgrade", "001:head", "--sql").stdout)
        warning = f"WARNING:  a step is not recorded: {reason}" if reason else ""
    else:
        result = project.alembic("upgrade", "head")
        warning = f"HH:MM:SS WARNING revision 002 ({file.name}) is not recorded: {reason}" if reason else ""
    assert result.returncode == 0 and warning in result.text and ("WARNING" in result.text) == bool(reason), result
    assert (database.at, "done" in database.relations) == (["002"], True)


@pytest.mark.parametrize("planned", [False, True], ids=["run", "plan"])
def test_an_event_trigger_that_refuses_the_table_does_not_fail_the_run(
    project: Project, database: Database, planned: bool
) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    database.execute("DROP TABLE alembic_version_history")
    database.execute(
        "CREATE FUNCTION naming() RETURNS event_trigger LANGUAGE plpgsql AS"
        " 'BEGIN RAISE ''table names must begin with hcm_''; END';"
        " CREATE EVENT TRIGGER naming ON ddl_command_start WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION naming()"
    )
    project.add("002", 'op.execute("COMMENT ON TABLE hcm_report_metadata IS NULL")')
    plan = project.alembic("upgrade", "001:head", "--sql").stdout
    result = database.psql(plan) if planned else project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (0, ["002"]), result
    assert "cannot be created: table names must begin with hcm_" in result.text


def test_another_roles_trigger_is_not_run_by_a_plan_whose_revision_resets_all(
    project: Project, database: Database
) -> None:
    other = f"other_{database.role}"
    database.execute(f"CREATE ROLE {other}; GRANT CREATE ON SCHEMA public TO {other}")
    try:
        assert project.alembic("upgrade", "head").returncode == 0
        trap = OTHERS["another role's trigger"][0].replace("{other}", other)
        trap = trap.replace("RAISE ''grabbed''", "INSERT INTO grabbed VALUES (current_user); RETURN NULL")
        database.execute(
            f"DROP TABLE alembic_version_history; CREATE TABLE grabbed (x text); {trap};"
            f" ALTER TABLE alembic_version_history OWNER TO {other};"
            " GRANT ALL ON grabbed, alembic_version_history TO PUBLIC"
        )
        project.add("002", 'op.execute("RESET ALL")')
        project.add("003", 'op.execute("CREATE TABLE a ()")')
        plan = project.alembic("upgrade", "001:head", "--sql")
        assert database.psql(plan.stdout).returncode == 0
        assert (database.at, database.execute("SELECT * FROM grabbed")) == (["003"], [])
    finally:
        database.execute(f"DROP OWNED BY {other} CASCADE; DROP ROLE {other}")


@pytest.mark.parametrize("style", ["postgres", "postgres_verbose", "sql_standard", "iso_8601"])
def test_it_is_read_with_any_intervalstyle(project: Project, database: Database, style: str) -> None:
    database.execute(f"ALTER ROLE {database.role} SET intervalstyle = '{style}'")
    assert project.alembic("upgrade", "head").returncode == 0
    database.execute("UPDATE alembic_version_history SET duration = '01:02:03.5'")
    current = project.fork("current", "--verbose").wait(verbatim=True)
    assert current.returncode == 0 and " in 3723.50 s, by " in current.stdout, current


@pytest.mark.parametrize("at", ["infinity", "12000-01-01"])
def test_a_row_that_cannot_be_read_does_not_fail_the_run(project: Project, database: Database, at: str) -> None:
    project.add("002")
    assert project.alembic("upgrade", "001").returncode == 0
    database.execute("UPDATE alembic_version_history SET applied_at = %s", at)
    assert project.alembic("current").returncode == 0
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (0, ["002"]), result
    assert at == "infinity" or "nothing is recorded: public.alembic_version_history cannot be read: " in result.text


@pytest.mark.fault(
    "Rolling back",
    fault="A plan is applied with psql, and the next run is an ordinary one",
    sees="`INFO since ...: upgrade 002 by ...`, exit 0",
    state="Complete; the record says that it was applied by a plan",
    do="Nothing",
)
def test_a_plan_writes_the_same_rows(project: Project, database: Database) -> None:
    file = project.add("002", f'op.execute("SELECT pg_sleep(0.2)")\n{BLOCK}op.execute("CHECKPOINT")')
    file.write_text(file.read_text().replace("CHECKPOINT", "SELECT '100 %'"))
    plan = project.fork("upgrade", "head", "--sql", **FROM_JOB).wait(verbatim=True)
    assert database.psql(plan.stdout).returncode == 0
    assert project.alembic("upgrade", "head").returncode == 0
    versions = (record.VERSION, alembic.__version__)
    rows = [("001", "upgrade", "plan", FIRST), ("002", "upgrade", "plan", file.name)]
    assert database.history(COLUMNS) == [(*row, *FROM_JOB.values(), *versions) for row in rows]
    assert set(database.history("role, host")) == {(database.role, None)}
    assert all(timedelta() < duration < timedelta(seconds=10) for (duration,) in database.history("duration"))
    current = project.alembic("current", "--verbose")
    assert re.search(r"Applied: .* by \w+ with a plan\n", current.stdout), current
    assert project.alembic("downgrade", "001").returncode == 0
    downgrade = project.alembic("downgrade", "001:base", "--sql")
    assert database.psql(downgrade.stdout).returncode == 0
    assert database.history()[2:] == [("002", "downgrade"), ("001", "downgrade")]


def test_current_and_history_show_it(project: Project, database: Database) -> None:
    project.add("002")
    project.add("003")
    assert project.alembic("upgrade", "head", **FROM_JOB).returncode == 0
    assert project.alembic("downgrade", "-1").returncode == 0
    current = project.alembic("current", "--verbose")
    host = start(["hostname"]).wait(verbatim=True).stdout.strip()
    applied = f"Applied: YYYY-MM-DD HH:MM:SS UTC in N.NN s, by {database.role} on {host}"
    origin = f"From: https://git.example.org/reports, ref {FROM_JOB['GIT_REF']}, commit <commit>"
    assert f"Rev: 002\nParent: 001\nPath: {project.versions}" in current.stdout
    assert f"\n{applied}\n{origin}\n\n    add\n" in current.stdout
    history = project.alembic("history", "-i", "--verbose").stdout
    assert history.count(applied) == 2
    assert f"Undone: YYYY-MM-DD HH:MM:SS UTC in N.NN s, by {database.role} on {host}\n\n" in history
    assert "Applied" not in project.alembic("history", "--verbose").stdout
    assert current.stderr == project.alembic("current").stderr


def test_a_no_op_reads_it_with_one_query(own_server: Postgres, offline_project: Project) -> None:
    with fresh_database(own_server.url) as database:
        offline_project.environment["DATABASE_URL"] = dsn(database.url)
        assert offline_project.alembic("upgrade", "head").returncode == 0
        database.execute(f"ALTER ROLE {database.role} SET log_statement = 'all'")
        assert offline_project.alembic("upgrade", "head").returncode == 0
        database.execute(f"ALTER ROLE {database.role} RESET log_statement")
        statements = re.findall("statement: (.*)", (own_server.folder / "log").read_text())
    assert len([line for line in statements if "FROM public.alembic_version_history" in line]) == 1
    assert len(statements) < 40


def test_the_time_is_shown_in_utc() -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, 999999, timezone(timedelta(hours=5.5)))
    entry = record.Entry(1, "002", "upgrade", "run", at, None, "app", *[None] * 7)
    assert entry.summary == "2026-01-01 21:34:05 UTC: upgrade 002 by app"
