"""The session is reset after each revision: search_path, settings, lock, and recorded blockers."""

from tests.support.database import Database
from tests.support.project import Project
from tests.support.revisions import TABLE


def test_a_changed_search_path_is_reset_after_the_revision(project: Project, database: Database) -> None:
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


def test_changed_settings_are_reset_after_the_revision(project: Project, database: Database) -> None:
    names = ("lock_timeout", "statement_timeout", "search_path", "role")
    settings = " || ' ' || ".join(f"current_setting('{name}')" for name in names)
    log_settings = f"""
import logging
logging.getLogger("migrations.test").info("settings %s", op.get_bind().exec_driver_sql("SELECT {settings}").scalar())
"""
    project.add("002", log_settings)
    changes = f"SET lock_timeout = 0; SET statement_timeout = '60s'; SET search_path = ''; SET ROLE {database.role}"
    project.add("003", f'op.execute("{changes}")')
    project.add("004", log_settings)
    result = project.alembic("upgrade", "head")
    lines = [line.split("settings ")[1] for line in result.lines if "INFO settings" in line]
    assert lines == ['3s 0 "$user", public none'] * 2, result


def test_a_released_lock_is_acquired_again_after_the_revision(project: Project, database: Database) -> None:
    project.add("002", 'op.execute("SELECT pg_advisory_unlock_all()")')
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    project.add("003", f'assert op.get_bind().exec_driver_sql("{held}").scalar() == 1')
    result = project.alembic("upgrade", "head")
    assert (result.returncode, database.at) == (0, ["003"]), result


def test_a_blocker_of_one_revision_is_not_named_in_the_error_of_the_next(project: Project, database: Database) -> None:
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
