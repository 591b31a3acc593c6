"""The SQL in README.md is sufficient for a DBA, and `make migrate` migrates a real database."""

import os
import re

from tests.support.database import Database
from tests.support.programs import run
from tests.support.project import Project
from tools.paths import ROOT
from tools.postgres import dsn


def _sql(heading: str, database: Database) -> list[str]:
    """The SQL under a heading, with the test's database and role names that are free."""
    section = (ROOT / "README.md").read_text().split(f"### {heading}\n")[1].split("\n### ")[0]
    text = "\n".join(re.findall(r"```sql\n(.*?)```", section, re.S))
    names = {"unifieddevdb": database.name, "hcm_migrations": f"m{database.name}", "hcm_app": f"a{database.name}"}
    for name, replacement in names.items():
        text = text.replace(name, replacement)
    return [statement.strip() for statement in text.split(";") if statement.strip()]


def test_the_minimum_privileges_are_sufficient_for_migrations_and_application(
    project: Project, database: Database
) -> None:
    migrations, application = f"m{database.name}", f"a{database.name}"
    database.execute(f"ALTER DATABASE {database.name} OWNER TO CURRENT_USER")
    database.execute(f"CREATE ROLE {application} LOGIN PASSWORD 'unused'")
    try:
        for statement in _sql("Minimum privileges", database):
            database.execute(statement)
        database.execute(f"ALTER ROLE {migrations} PASSWORD 'unused'")
        url = database.url.set(username=migrations, password="unused")  # noqa: S106
        assert project.alembic("upgrade", "head", DATABASE_URL=dsn(url)).returncode == 0
        assert database.execute("SELECT tableowner FROM pg_tables WHERE tablename = 'hcm_report_metadata'") == [
            (migrations,)
        ]
        privileges = (
            "SELECT has_table_privilege(%s, 'hcm_report_metadata', %s), has_sequence_privilege(%s, %s, 'USAGE')"
        )
        sequence = "hcm_report_metadata_id_seq"
        assert database.execute(privileges, application, "SELECT, INSERT", application, sequence) == [(True, True)]
        assert project.alembic("downgrade", "base", DATABASE_URL=dsn(url)).returncode == 0
    finally:
        for role in (migrations, application):
            database.execute(f"DROP OWNED BY {role}")
            database.execute(f"DROP ROLE {role}")


def test_make_migrate_migrates_the_database_of_database_url(database: Database) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DB_", "PG"))}
    run(["make", "migrate"], cwd=ROOT, env=environment | {"DATABASE_URL": dsn(database.url)}, check=True)
    assert database.at == ["001"]
    assert "hcm_report_metadata" in database.relations
