"""The schema of a run: DB_SCHEMA, else the first in the role's search_path that the role may use."""

import pytest

from tests.support.database import Database
from tests.support.project import Project


@pytest.mark.fault(
    "Code and settings",
    fault="`DB_SCHEMA` does not exist",
    sees="`DB_SCHEMA is 'reports', a schema that does not exist; create it, or set another`, exit 255",
    state="Nothing was changed",
    do="Follow the message",
)
def test_a_schema_that_does_not_exist_is_refused(project: Project) -> None:
    result = project.alembic("upgrade", "head", DB_SCHEMA="reports")
    assert (result.returncode, result.failure) == (
        255,
        "DB_SCHEMA is 'reports', a schema that does not exist; create it, or set another",
    )


def test_a_schema_that_the_role_may_not_use_is_refused(project: Project, database: Database) -> None:
    database.execute("CREATE SCHEMA reports")
    result = project.alembic("upgrade", "head", DB_SCHEMA="reports")
    assert (result.returncode, result.failure) == (
        255,
        f"the role {database.role} can use no schema in its search_path (reports); create one or grant USAGE on"
        " one, set DB_SCHEMA, or fix the role's search_path",
    )


@pytest.mark.fault(
    "Database",
    fault="The role may use no schema in its search_path",
    sees="`the role ... can use no schema in its search_path (nothing); create one or grant USAGE on one, set"
    " DB_SCHEMA, or fix the role's search_path`, exit 255",
    state="Nothing was changed",
    do="Follow the message",
)
def test_a_role_without_a_usable_schema_is_refused(project: Project, database: Database) -> None:
    database.execute(f"ALTER ROLE {database.role} SET search_path = nothing")
    result = project.alembic("upgrade", "head")
    assert (result.returncode, result.failure) == (
        255,
        f"the role {database.role} can use no schema in its search_path (nothing); create one or grant USAGE on"
        " one, set DB_SCHEMA, or fix the role's search_path",
    )


@pytest.mark.fault(
    "Database",
    fault="The role's search_path is not public",
    sees="`schema reports` in the first line",
    state="Complete in that schema, nothing in public",
    do="Nothing",
)
def test_a_search_path_that_is_not_public_is_used(project: Project, database: Database) -> None:
    database.execute(f"CREATE SCHEMA reports AUTHORIZATION {database.role}")
    database.execute(f"ALTER ROLE {database.role} SET search_path = reports")
    assert project.alembic("upgrade", "head").returncode == 0
    assert database.scalar("SELECT version_num FROM reports.alembic_version") == "001"
    assert database.relations == []
