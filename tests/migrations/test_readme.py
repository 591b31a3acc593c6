"""What README.md tells a DBA to run is enough, and `make migrate` is the real thing."""

import os
import re

from tests.support.database import Database
from tests.support.programs import run
from tests.support.project import Project
from tools.paths import ROOT
from tools.postgres import dsn


def _sql(heading: str, database: Database) -> list[str]:
    """The statements under a heading, for the test's database, and roles whose names are free."""
    section = (ROOT / "README.md").read_text().split(f"### {heading}\n")[1].split("\n### ")[0]
    text = "\n".join(re.findall(r"```sql\n(.*?)```", section, re.S))
    names = {"unifieddevdb": database.name, "hcm_migrations": f"m{database.name}", "hcm_app": f"a{database.name}"}
    for name, ours in names.items():
        text = text.replace(name, ours)
    return [statement.strip() for statement in text.split(";") if statement.strip()]


def test_the_least_grants_are_enough_and_the_application_gets_its_own(project: Project, database: Database) -> None:
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
        may = "SELECT has_table_privilege(%s, 'hcm_report_metadata', %s), has_sequence_privilege(%s, %s, 'USAGE')"
        sequence = "hcm_report_metadata_id_seq"
        assert database.execute(may, application, "SELECT, INSERT", application, sequence) == [(True, True)]
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
