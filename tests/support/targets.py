"""Several targets of one release: schemas of the test's database."""

from __future__ import annotations

from tests.support.database import Database

Target = dict[str, str]


def schemas(database: Database, *names: str) -> list[Target]:
    """Targets that are schemas of the test's database, which are created."""
    for name in names:
        database.execute(f"CREATE SCHEMA {name} AUTHORIZATION {database.role}")
    return [{"name": name, "schema": name} for name in names]


def applied(database: Database, *names: str) -> dict[str, list[str]]:
    """The revisions that the record of each schema has, in their order."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for name in names:
        table = f"{name}.alembic_version_history"
        if database.scalar("SELECT to_regclass(%s) IS NOT NULL", table):
            found[name] = [revision for (revision,) in database.execute(f"SELECT revision FROM {table} ORDER BY id")]
    return found
