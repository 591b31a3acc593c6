"""Unsuitable databases: ahead of the code, of another project, read-only, or without the privileges."""

import pytest

from tests.support.database import Database, parts
from tests.support.messages import FIX
from tests.support.project import Project
from tests.support.revisions import AUDIT, audited
from tests.support.runs import audit

SEE_TROUBLESHOOTING = "see docs/troubleshooting.md"


@pytest.mark.fault(
    "Code and settings",
    fault="The database is ahead of the code (after `helm rollback`)",
    sees="`the database is at 002, which this code (head 001) does not know;"
    " deploy the code that knows it ...`, exit 255",
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
        "the database is at 002, which this code (head 001) does not know; deploy the code that knows it or, if the"
        f" version table is another project's, set ALEMBIC_VERSION_TABLE or DB_SCHEMA; {SEE_TROUBLESHOOTING}"
    )


@pytest.mark.fault(
    "Code and settings",
    fault="Another project's `alembic_version` in the schema",
    sees="`the database is at a1b2c3, which this code (head 001) does not know; ... set"
    " ALEMBIC_VERSION_TABLE or DB_SCHEMA`, exit 255",
    state="Nothing was changed",
    do="Set `ALEMBIC_VERSION_TABLE` or `DB_SCHEMA`, deploy again",
)
def test_another_projects_version_table_is_refused_and_another_name_avoids_it(
    project: Project, database: Database
) -> None:
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
    sees="`cannot execute CREATE TABLE in a read-only transaction (...; otherwise, reset"
    " default_transaction_read_only)`, exit 255",
    state="Nothing was changed",
    do="`ALTER ROLE ... RESET default_transaction_read_only`, or the same with `ALTER DATABASE`",
)
def test_a_read_only_server_is_named(project: Project, database: Database) -> None:
    database.execute(f"ALTER ROLE {database.role} SET default_transaction_read_only = on")
    result = project.alembic("upgrade", "head", **parts(database.url))
    assert (result.returncode, result.failure) == (
        255,
        "cannot execute CREATE TABLE in a read-only transaction (on a standby, set DB_HOST to the primary;"
        " otherwise, reset default_transaction_read_only); the database is at revision base; " + FIX,
    )
    assert project.alembic("current").returncode == 0


@pytest.mark.fault(
    "Database",
    fault="No CREATE privilege on the schema (PostgreSQL 15's `public`) or database, or the table is another role's",
    sees="`permission denied for schema public (grant what is missing, ...)`, `permission denied for database ..."
    " (grant what is missing, ...)`, `permission denied to create extension ... (grant what is missing, ...)` or `must"
    " be owner of table ... (grant what is missing, see 'Minimum privileges' in docs/operations.md)`, exit 255",
    state="Nothing was changed",
    do="Grant it ([Minimum privileges](operations.md#minimum-privileges)), deploy again",
)
def test_a_missing_create_privilege_is_named(project: Project, database: Database) -> None:
    database.execute("ALTER SCHEMA public OWNER TO postgres; REVOKE ALL ON SCHEMA public FROM PUBLIC")
    database.execute(f"GRANT USAGE ON SCHEMA public TO {database.role}")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, result.failure) == (
        255,
        "permission denied for schema public (grant what is missing, see 'Minimum privileges' in docs/operations.md);"
        f" the database is at revision base; {FIX}",
    )
    database.execute(f"ALTER DATABASE {database.name} OWNER TO CURRENT_USER; CREATE TABLE theirs ()")
    database.execute(f"GRANT CREATE ON SCHEMA public TO {database.role}")
    for statement, message in [
        ("CREATE SCHEMA more", f"permission denied for database {database.name}"),
        ("CREATE EXTENSION pageinspect", 'permission denied to create extension "pageinspect"'),
        ("ALTER TABLE theirs ADD x int", "must be owner of table theirs"),
    ]:
        path = project.add("002", f'op.execute("{statement}")')
        failure = project.alembic("upgrade", "head").failure
        assert f" failed: {message} (" in failure
        assert "(grant what is missing, see 'Minimum privileges' in docs/operations.md), at " in failure
        path.unlink()


@pytest.mark.fault(
    "Database",
    fault="A table, column or constraint of a revision was created manually",
    sees="`relation ... already exists (created manually, ...: see docs/troubleshooting.md)`, or `column ... already"
    " exists (created manually, ...: see docs/troubleshooting.md)`, exit 255",
    state="Nothing was changed",
    do="Compare it with the revision. If they are the same, `alembic stamp <revision>` (in a cluster:"
    ' `args: [stamp, "<revision>"]` for one upgrade), which marks all revisions before as applied, too; then'
    " `make drift` shows what differs, and a stamp of the revision before undoes it. Deploy again",
)
def test_a_table_that_was_created_manually_is_named_and_can_be_stamped(project: Project, database: Database) -> None:
    database.execute(f"CREATE TABLE hcm_report_metadata (); ALTER TABLE hcm_report_metadata OWNER TO {database.role}")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (255, [])
    assert (
        ' failed: relation "hcm_report_metadata" already exists (created manually, or by a run that was killed before'
        " the revision was stamped: see docs/troubleshooting.md), at "
    ) in result.failure
    assert project.alembic("stamp", "001").returncode == 0
    database.execute(
        "ALTER TABLE hcm_report_metadata ADD note text; ALTER TABLE hcm_report_metadata ADD CONSTRAINT c CHECK (true)"
    )
    column = "ALTER TABLE hcm_report_metadata ADD note text"
    constraint = "ALTER TABLE hcm_report_metadata ADD CONSTRAINT c CHECK (true)"
    for statement, exists in ((column, 'column "note" of relation'), (constraint, 'constraint "c" for relation')):
        path = project.add("002", f'op.execute("{statement}")')
        failure = project.alembic("upgrade", "head").failure
        assert f' failed: {exists} "hcm_report_metadata" already exists (created manually, or by a run' in failure
        path.unlink()
    assert project.alembic("upgrade", "head").returncode == 0
    assert database.at == ["001"]


@pytest.mark.fault(
    "Database",
    fault="`statement_timeout`, `idle_in_transaction_session_timeout` and other timeouts are set on the role",
    sees="No visible effect",
    state="Complete",
    do="Nothing",
)
def test_timeouts_of_the_role_do_not_cancel_a_migration(project: Project, database: Database) -> None:
    for name in ("statement_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout", "lock_timeout"):
        database.execute(f"ALTER ROLE {database.role} SET {name} = '1s'")
    if database.scalar("SELECT current_setting('server_version_num')::int") >= 170000:
        database.execute(f"ALTER ROLE {database.role} SET transaction_timeout = '1s'")
    project.add("002", AUDIT)
    project.add("003", audited("003", 'op.execute("SELECT pg_sleep(1.5)")\ntime.sleep(1.5)'))
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at, audit(database)) == (0, ["003"], ["003"]), result
