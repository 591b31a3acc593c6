"""Databases that are away, refuse, break or are in the wrong state: one clear line, and what is left is said."""

import re
import threading
import time

import psycopg2
import pytest

from tests.migrations.conftest import PASSWORD, Database, Project, until
from tests.migrations.test_safety import AUDIT, FILE, SLEEP, audit, audited, sleeping
from tools.postgres import Postgres, dsn

TROUBLE = "see 'Troubleshooting' in README.md"
MEND = "mend it, then run again"
BLOCK = "with op.get_context().autocommit_block():\n"


def place(database: Database) -> str:
    url = database.url
    return f"database {url.database} at {url.host}:{url.port or 5432} as {url.username}"


# ---- connecting


@pytest.mark.fault(
    "Database",
    fault="Wrong password",
    sees="`cannot connect to database ...: password authentication failed ...; check DB_USER and DB_PASSWORD`, at "
    "once, exit 255",
    state="Nothing was changed",
    do="Set the right one, deploy again",
)
def test_a_wrong_password_fails_at_once(project: Project, database: Database) -> None:
    start = time.monotonic()
    result = project.alembic("upgrade", "head", DATABASE_URL=dsn(database.url.set(password=PASSWORD + "x")))
    assert time.monotonic() - start < 15  # of 90
    assert result.returncode == 255
    assert re.fullmatch(
        rf"cannot connect to {place(database)}: connection to server at \S+ port \d+ failed: FATAL: password"
        rf' authentication failed for user "{database.role}"; check DB_USER and DB_PASSWORD',
        result.failure,
    )


@pytest.mark.fault(
    "Database",
    fault="The database is missing, the role may not log in or not connect, no password is set",
    sees="`cannot connect to database ...: <the server's words>; <the cure>`, at once, exit 255",
    state="Nothing was changed",
    do="What the line says, deploy again",
)
@pytest.mark.parametrize(
    ("statement", "change", "said", "cure"),
    [
        (None, {"database": "no such"}, 'database "no such" does not exist', "create it, or set another DB_NAME or"),
        ("ALTER ROLE {0} NOLOGIN", {}, "is not permitted to log in", "grant LOGIN to the role, or set another DB_USER"),
        (
            "REVOKE CONNECT ON DATABASE {0} FROM PUBLIC, {0}",
            {},
            'permission denied for database "{0}" DETAIL: User does not have CONNECT privilege',
            "grant CONNECT on the database to the role",
        ),
        (None, {"password": None}, "no password supplied", "set DB_PASSWORD"),
    ],
)
def test_what_no_waiting_mends_fails_at_once(
    project: Project, database: Database, statement: str | None, change: dict, said: str, cure: str
) -> None:
    if statement:
        database.execute(statement.format(database.name))
    result = project.alembic("upgrade", "head", DATABASE_URL=dsn(database.url._replace(**change)))
    assert result.returncode == 255
    assert result.failure.startswith("cannot connect to database ")
    assert f"{said.format(database.name)}; {cure}" in result.failure


@pytest.mark.fault(
    "Network",
    fault="The host is unknown, or nothing listens on the port",
    sees="`no connection to database ... in N s: ...; check that the server runs and DB_HOST, DB_PORT and the "
    "network, or raise MIGRATION_WAIT_SECONDS`, exit 1",
    state="Nothing was changed",
    do="What the line says, deploy again",
)
@pytest.mark.parametrize("host", ["127.0.0.1", "certificate.invalid"], ids=["closed port", "unknown host"])
def test_a_database_that_cannot_be_reached_is_waited_for_in_vain(files: Project, host: str) -> None:
    start = time.monotonic()
    url = f"postgresql://me:x@{host}:1/db"
    result = files.alembic("upgrade", "head", DATABASE_URL=url, MIGRATION_WAIT_SECONDS="2")
    assert 2 < time.monotonic() - start < 8
    assert result.returncode == 1
    assert result.lines[0].startswith("HH:MM:SS INFO waiting, up to 2 s more: ")
    assert result.failure.startswith(f"no connection to database db at {host}:1 as me in 2 s: ")
    assert result.failure.endswith(
        "; check that the server runs and DB_HOST, DB_PORT and the network, or raise MIGRATION_WAIT_SECONDS"
    )


@pytest.mark.fault(
    "Database",
    fault="The server is not there yet",
    sees="`waiting, up to N s more: ...`, then it goes on by itself",
    state="All done",
    do="Nothing",
)
def test_a_server_that_starts_late_is_waited_for(files: Project, own_server: Postgres) -> None:
    own_server.kill()
    running = files.popen("upgrade", "head", DATABASE_URL=dsn(own_server.url))
    running.says(" waiting, ")
    own_server.start()
    result = running.wait()
    assert (result.returncode, own_server.execute("SELECT version_num FROM alembic_version")) == (0, [("001",)])
    assert " INFO waiting, up to 90 s more: connection to server at " in result.lines[0]


@pytest.mark.fault(
    "Database",
    fault="The role's connection limit is reached",
    sees="`waiting, up to N s more: ... too many connections for role ...`, then it goes on by itself",
    state="All done",
    do="Nothing; raise the limit where it takes long",
)
def test_a_database_that_takes_no_more_connections_is_waited_for(project: Project, database: Database) -> None:
    database.execute(f"ALTER ROLE {database.role} CONNECTION LIMIT 0")
    running = project.popen("upgrade", "head")
    running.says(" waiting, ")
    database.execute(f"ALTER ROLE {database.role} CONNECTION LIMIT -1")
    result = running.wait()
    assert (result.returncode, database.at) == (0, ["001"]), result
    assert f'FATAL: too many connections for role "{database.role}"' in result.lines[0]


# ---- breaking in the middle


@pytest.mark.fault(
    "Database",
    fault="`pg_terminate_backend`, or kill of the server's process, in a revision",
    sees="`waiting, ...: revision 003 (...) failed: server closed the connection unexpectedly ...; rolled back at "
    "002`, then it goes on by itself",
    state="All done, each revision once",
    do="Nothing",
)
@pytest.mark.parametrize(
    "execute", ["op.execute", "op.get_bind().connection.cursor().execute"], ids=["op", "the driver's cursor"]
)
def test_a_backend_that_is_terminated_in_a_revision_is_tried_again(
    project: Project, database: Database, execute: str
) -> None:
    project.add("002", AUDIT)
    project.add("003", audited("003", f'{execute}("SELECT pg_sleep(2)")'))
    running = project.popen("upgrade", "head")
    until(lambda: sleeping(database))
    database.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'")
    result = running.wait()
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
    assert "Traceback" not in result.stderr
    waited = next(line for line in result.lines if " waiting, " in line)
    assert f"revision 003 ({FILE.format('003')}) failed: server closed the connection unexpectedly" in waited
    assert waited.endswith("; rolled back at 002")


@pytest.mark.fault(
    "Database",
    fault="The server is killed (-9) in a revision, and restarted",
    sees="`waiting, ...`, then it goes on by itself",
    state="All done, each revision once",
    do="Nothing",
)
def test_a_server_that_is_killed_in_a_revision_and_restarted_is_migrated(files: Project, own_server: Postgres) -> None:
    files.add("002", AUDIT)
    files.add("003", audited("003", 'op.execute("SELECT pg_sleep(2)")'))
    running = files.popen("upgrade", "head", DATABASE_URL=dsn(own_server.url))
    until(lambda: own_server.execute("SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(2)'"))
    own_server.kill()
    time.sleep(1)
    own_server.start()
    result = running.wait()
    assert "Traceback" not in result.stderr, result.stderr
    assert (result.returncode, own_server.execute("SELECT * FROM alembic_version, audit")) == (0, [("003", "003")])
    assert result.lines[-1] == "HH:MM:SS INFO now at 003 (head)"


@pytest.mark.fault(
    "Database",
    fault="The server is killed (-9) in a revision, and stays away",
    sees="`no connection to database ... in N s: ...`, exit 1",
    state="Finished revisions stay, this one is rolled back",
    do="Start the server, deploy again",
)
def test_a_server_that_is_killed_in_a_revision_and_stays_away_is_an_error(files: Project, own_server: Postgres) -> None:
    files.add("002", SLEEP)
    running = files.popen("upgrade", "head", DATABASE_URL=dsn(own_server.url), MIGRATION_WAIT_SECONDS="2")
    until(lambda: own_server.execute("SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'"))
    own_server.kill()
    result = running.wait()
    assert result.returncode == 1
    where = f"database postgres at 127.0.0.1:{own_server.port} as postgres"
    assert result.failure.startswith(f"no connection to {where} in 2 s: ")
    own_server.start()
    assert own_server.execute("SELECT * FROM alembic_version") == [("001",)]


# ---- revisions that fail


@pytest.mark.fault(
    "Code and settings",
    fault="A statement of a revision fails",
    sees="`revision 003 (...) failed: <the server's words>, at <file>, line 8; rolled back at 002; mend it, then "
    "run again`, exit 255",
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
        f'revision 003 ({name}) failed: relation "gone" does not exist, at {name}, line 8; rolled back at 002; {MEND}'
    )


@pytest.mark.fault(
    "Code and settings",
    fault="A downgrade fails",
    sees="`the downgrade of revision 002 (...) failed: ...; rolled back at 002; ...`, exit 255",
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
        f" rolled back at 002; {MEND}"
    )


@pytest.mark.fault(
    "Code and settings",
    fault="A deferred constraint fails at a revision's commit",
    sees="`revision 003 (...) failed: duplicate key value ...; rolled back at 002; ...`, exit 255",
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
        f' "a_x_key"; rolled back at 002; {MEND}'
    )


@pytest.mark.fault(
    "Partial work",
    fault="An `autocommit_block` fails half way",
    sees="`revision 003 (...) failed: ...; outside its transaction it had done, and this stays: ...; rolled back "
    "at 002; ...`, exit 255",
    state="What the line lists; finished revisions",
    do="Undo what is listed, mend the revision, deploy again",
)
def test_what_an_autocommit_block_did_before_it_failed_is_listed(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    body = [
        audited("003").strip(),
        BLOCK + '    op.execute("CREATE INDEX CONCURRENTLY one\\n ON audit (revision)")',
        '    op.execute("CREATE INDEX CONCURRENTLY two ON audit (gone)")',
    ]
    project.add("003", "\n".join(body))
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at, audit(database)) == (255, ["002"], ["003"])
    name = FILE.format("003")
    failed = f'revision 003 ({name}) failed: column "gone" does not exist, at {name}, line 10'
    stays = "INSERT INTO audit VALUES ('...'); CREATE INDEX CONCURRENTLY one ON audit (revision)"
    assert result.failure == (
        f"{failed}; outside its transaction it had done, and this stays: {stays}; rolled back at 002; {MEND}"
    )
    assert "waiting" not in result.stderr


@pytest.mark.fault(
    "Partial work",
    fault="A revision fails after its `autocommit_block`",
    sees="As above; only what the block did is listed",
    state="What the line lists; finished revisions",
    do="Undo what is listed, mend the revision, deploy again",
)
def test_what_follows_an_autocommit_block_is_rolled_back_and_not_listed(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    block = BLOCK + '    op.execute("CREATE INDEX CONCURRENTLY one ON audit (revision)")\n'
    project.add("003", block + audited("003", 'op.execute("SELECT 1 / 0")'))
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at, audit(database)) == (255, ["002"], [])
    name = FILE.format("003")
    assert result.failure == (
        f"revision 003 ({name}) failed: division by zero, at {name}, line 10; outside its transaction it had done, and"
        f" this stays: CREATE INDEX CONCURRENTLY one ON audit (revision); rolled back at 002; {MEND}"
    )


@pytest.mark.fault(
    "Partial work",
    fault="A table stays locked in an `autocommit_block`",
    sees="`... failed: canceling statement due to lock timeout ...`, exit 255, after 3 s",
    state="What the line lists; finished revisions",
    do="Undo what is listed, deploy again at a quieter time",
)
def test_a_locked_table_in_an_autocommit_block_is_not_tried_again(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    project.add("003", BLOCK + '    op.execute("ALTER TABLE hcm_report_metadata ADD COLUMN status text")')
    assert project.alembic("upgrade", "002").returncode == 0
    with database.session() as reader:
        reader.execute("SELECT count(*) FROM hcm_report_metadata")
        result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["002"])
    assert "waiting" not in result.stderr


@pytest.mark.fault(
    "Partial work",
    fault="Other transactions are open for longer than `lock_timeout` while an index is built concurrently",
    sees="Nothing of it: it waits for them, and holds up nobody meanwhile",
    state="All done",
    do="Nothing",
)
def test_an_index_that_is_built_concurrently_waits_for_all_transactions(project: Project, database: Database) -> None:
    project.add("002", AUDIT)
    build = '    op.execute("CREATE INDEX CONCURRENTLY slow ON audit (revision)")\n'
    after = "    op.execute(\"CREATE TABLE after AS SELECT current_setting('lock_timeout') AS lock_timeout\")"
    project.add("003", BLOCK + build + after)
    assert project.alembic("upgrade", "002").returncode == 0
    with database.session() as writer:
        writer.execute("INSERT INTO audit VALUES ('writer')")
        running = project.popen("upgrade", "head")
        until(lambda: database.scalar("SELECT count(*) FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting%'"))
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
        running = project.popen("upgrade", "head")
        until(lambda: any("GRANT SELECT" in statement for statement in database.activity()))
        other.connection.commit()
        result = running.wait()
    assert (result.returncode, database.at) == (0, ["002"]), result


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
        running = project.popen("upgrade", "head")
        running.says("failed: canceling statement due to lock timeout")
        other.connection.commit()
        result = running.wait()
    assert (result.returncode, database.at) == (0, ["002"]), result


# ---- INVALID indexes

UNIQUE = 'CREATE UNIQUE INDEX CONCURRENTLY {}"Only" ON audit (revision)'
DROP = 'INVALID, and of no use: public."Only"; remove with: DROP INDEX CONCURRENTLY public."Only"'


@pytest.fixture
def duplicates(project: Project, database: Database) -> Project:
    project.add("002", AUDIT)
    assert project.alembic("upgrade", "head").returncode == 0
    database.execute("INSERT INTO audit VALUES ('x'), ('x')")
    return project


@pytest.mark.fault(
    "Partial work",
    fault="`CREATE UNIQUE INDEX CONCURRENTLY` meets duplicates",
    sees="`...; INVALID, and of no use: <index>; remove with: DROP INDEX CONCURRENTLY <index>; rolled back at 002;"
    " ...`, exit 255",
    state="An INVALID index; finished revisions",
    do="Mend the rows, run the statement that the line shows, deploy again",
)
def test_an_index_that_fails_on_duplicates_is_named_and_following_the_message_reaches_the_head(
    duplicates: Project, database: Database
) -> None:
    duplicates.add("003", f"{BLOCK}    op.execute('{UNIQUE.format('')}')")
    result = duplicates.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["002"])
    name = FILE.format("003")
    assert result.failure == (
        f'revision 003 ({name}) failed: could not create unique index "Only",'
        f" at {name}, line 8; {DROP}; rolled back at 002; {MEND}"
    )
    again = duplicates.alembic("upgrade", "head")  # the message not followed
    assert again.failure.startswith(
        f'revision 003 ({name}) failed: relation "Only" already exists (made by hand, or by '
    )
    assert f"; {DROP}; rolled back at 002; " in again.failure
    database.execute("DELETE FROM audit")
    database.execute(re.search("DROP INDEX .*?(?=;)", result.failure)[0])
    assert duplicates.alembic("upgrade", "head").returncode == 0
    assert database.at == ["003"]
    assert database.scalar("SELECT indisvalid FROM pg_index WHERE indexrelid = '\"Only\"'::regclass") is True


@pytest.mark.fault(
    "Partial work",
    fault="`CREATE INDEX CONCURRENTLY IF NOT EXISTS` on the INVALID remains of an earlier run",
    sees="`revision 003 (...) is not done: INVALID, and of no use: ...; remove with: ...`, exit 255",
    state="The INVALID index; the revision is not recorded",
    do="Run the statement that the line shows, deploy again",
)
def test_an_index_that_is_invalid_already_does_not_pass_by_if_not_exists(
    duplicates: Project, database: Database
) -> None:
    path = duplicates.add("003", f"{BLOCK}    op.execute('{UNIQUE.format('IF NOT EXISTS ')}')")
    assert duplicates.alembic("upgrade", "head").returncode == 255
    database.execute("DELETE FROM audit")
    result = duplicates.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, ["002"])
    assert 'WARNING INVALID already, and not looked at further: public."Only"' in result.stderr
    assert result.failure == (f"revision 003 ({path.name}) is not done: {DROP}; then run again, the database is at 002")
    database.execute('DROP INDEX CONCURRENTLY public."Only"')
    assert duplicates.alembic("upgrade", "head").returncode == 0


@pytest.mark.fault(
    "Partial work",
    fault="An INVALID index of somebody else",
    sees="`WARNING INVALID already, and not looked at further: ...`, exit 0",
    state="All done",
    do="Nothing",
)
def test_an_invalid_index_of_others_is_mentioned_and_does_not_fail_the_run(
    duplicates: Project, database: Database
) -> None:
    with pytest.raises(Exception, match="could not create unique index"):
        database.execute(UNIQUE.format(""))
    duplicates.add("003", audited("003"))
    result = duplicates.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (0, ["003"])
    assert 'HH:MM:SS WARNING INVALID already, and not looked at further: public."Only"' in result.lines


@pytest.mark.fault(
    "Concurrency",
    fault="Another service builds an index concurrently at the same time",
    sees="Nothing of it, exit 0",
    state="All done",
    do="Nothing",
)
def test_an_index_that_another_session_builds_meanwhile_is_not_blamed(project: Project, database: Database) -> None:
    database.execute("CREATE TABLE theirs (x int)")
    project.add("002", AUDIT)
    project.add("003", audited("003", 'op.execute("SELECT pg_sleep(2)")'))
    with database.session() as writer:
        writer.execute("INSERT INTO theirs VALUES (1)")  # the build waits for this transaction to end
        running = project.popen("upgrade", "head")
        until(lambda: sleeping(database))
        build = "CREATE INDEX CONCURRENTLY theirs_x ON theirs (x)"
        thread = threading.Thread(target=database.execute, args=(build,))
        thread.start()
        until(lambda: database.execute("SELECT 1 FROM pg_index WHERE NOT indisvalid"))
        result = running.wait()
        assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
    thread.join()


def test_an_index_that_becomes_invalid_elsewhere_meanwhile_is_not_blamed(project: Project, database: Database) -> None:
    database.execute("CREATE TABLE theirs AS SELECT 1 AS x FROM generate_series(1, 2)")
    project.add("002", AUDIT)
    ours = '    op.execute("CREATE INDEX CONCURRENTLY ours ON audit (revision)")\n    op.execute("SELECT pg_sleep(2)")'
    project.add("003", BLOCK + ours)
    running = project.popen("upgrade", "head")
    until(lambda: sleeping(database))
    with pytest.raises(psycopg2.errors.UniqueViolation):
        database.execute("CREATE UNIQUE INDEX CONCURRENTLY theirs_x ON theirs (x)")
    result = running.wait()
    assert (result.returncode, database.at) == (0, ["003"]), result
    assert database.execute("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid") == [("theirs_x",)]


# ---- databases in the wrong state


@pytest.mark.fault(
    "Code and settings",
    fault="The database is ahead of the code (after `helm rollback`)",
    sees="`the database is at 002, which this code (head 001) does not know; deploy the code that knows it, ...`, "
    "exit 255",
    state="Nothing was changed",
    do="Deploy the newer code, or downgrade with it first",
)
@pytest.mark.parametrize("arguments", [("upgrade", "head"), ("downgrade", "base"), ("current",)], ids=" ".join)
def test_a_database_ahead_of_the_code_is_refused(project: Project, database: Database, arguments: tuple) -> None:
    path = project.add("002", AUDIT)
    assert project.alembic("upgrade", "head").returncode == 0
    path.unlink()
    result = project.alembic(*arguments)
    assert (result.returncode, database.at) == (255, ["002"])
    assert result.failure == (
        "the database is at 002, which this code (head 001) does not know; deploy the code that knows it, or, where the"
        f" version table is another project's, set ALEMBIC_VERSION_TABLE or DB_SCHEMA; {TROUBLE}"
    )


@pytest.mark.fault(
    "Code and settings",
    fault="Another project's `alembic_version` in the schema",
    sees="`the database is at a1b2c3, which this code (head 001) does not know; ... set ALEMBIC_VERSION_TABLE or "
    "DB_SCHEMA`, exit 255",
    state="Nothing was changed",
    do="Set `ALEMBIC_VERSION_TABLE` or `DB_SCHEMA`, deploy again",
)
def test_another_projects_version_table_is_left_alone_under_another_name(project: Project, database: Database) -> None:
    database.execute("CREATE TABLE alembic_version (version_num varchar(32)); GRANT ALL ON alembic_version TO PUBLIC")
    database.execute("INSERT INTO alembic_version VALUES ('a1b2c3')")
    result = project.alembic("upgrade", "head")
    assert result.returncode == 255
    assert result.failure.startswith("the database is at a1b2c3, which this code (head 001) does not know; ")
    assert project.alembic("upgrade", "head", ALEMBIC_VERSION_TABLE="hcm_version").returncode == 0
    assert (database.at, database.execute("SELECT * FROM hcm_version")) == (["a1b2c3"], [("001",)])


@pytest.mark.fault(
    "Database",
    fault="`default_transaction_read_only` is on",
    sees="`cannot execute CREATE TABLE in a read-only transaction (the server only reads ...): set DB_HOST to the "
    "primary)`, exit 255",
    state="Nothing was changed",
    do="Set the host to the primary's address, or mend the role",
)
def test_a_server_that_only_reads_is_named(project: Project, database: Database) -> None:
    database.execute(f"ALTER ROLE {database.role} SET default_transaction_read_only = on")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, result.failure) == (
        255,
        "cannot execute CREATE TABLE in a read-only transaction (the server only reads (a standby, or"
        " default_transaction_read_only): set DB_HOST to the primary); the database is at base; " + MEND,
    )
    assert project.alembic("current").returncode == 0


@pytest.mark.fault(
    "Database",
    fault="No CREATE privilege on the schema (PostgreSQL 15's `public`)",
    sees="`permission denied for schema public (grant what is missing, see 'Least grants' in README.md)`, exit 255",
    state="Nothing was changed",
    do="Grant it, deploy again",
)
def test_a_role_that_may_not_create_is_named(project: Project, database: Database) -> None:
    database.execute("ALTER SCHEMA public OWNER TO postgres; REVOKE ALL ON SCHEMA public FROM PUBLIC")
    database.execute(f"GRANT USAGE ON SCHEMA public TO {database.role}")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, result.failure) == (
        255,
        "permission denied for schema public (grant what is missing, see 'Least grants' in README.md);"
        f" the database is at base; {MEND}",
    )


@pytest.mark.fault(
    "Database",
    fault="`statement_timeout`, `idle_in_transaction_session_timeout` and others are set on the role",
    sees="The same as without",
    state="All done",
    do="Nothing",
)
def test_time_limits_of_the_role_do_not_end_a_migration(project: Project, database: Database) -> None:
    for name in ("statement_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout", "lock_timeout"):
        database.execute(f"ALTER ROLE {database.role} SET {name} = '100ms'")
    if database.scalar("SELECT current_setting('server_version_num')::int") >= 170000:
        database.execute(f"ALTER ROLE {database.role} SET transaction_timeout = '100ms'")
    project.add("002", AUDIT)
    project.add("003", audited("003", 'op.execute("SELECT pg_sleep(0.5)")\ntime.sleep(0.5)'))
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
