"""Several targets of one release: schemas of the test's database."""

from __future__ import annotations

from tests.support.database import Database

Target = dict[str, str]

# A loop that waits while the table `gate` has a row; a revision that does so if its schema has that table.
WAIT = "WHILE EXISTS (SELECT FROM gate) LOOP PERFORM pg_sleep(0.1); END LOOP;"
WAITING = f"DO $$ BEGIN IF to_regclass(current_schema() || '.gate') IS NOT NULL THEN {WAIT} END IF; END $$"


def schemas(database: Database, *names: str) -> list[Target]:
    """Targets that are schemas of the test's database, which are created."""
    for name in names:
        database.execute(f"CREATE SCHEMA {name} AUTHORIZATION {database.role}")
    return [{"name": name, "schema": name} for name in names]


def close_gates(database: Database, *names: str) -> None:
    """Let WAITING wait in these schemas, until the row of their `gate` is deleted."""
    for name in names:
        database.execute(f"CREATE TABLE {name}.gate AS SELECT 1")
        database.execute(f"GRANT SELECT ON {name}.gate TO {database.role}")


def applied(database: Database, *names: str) -> dict[str, list[str]]:
    """The revisions that the record of each schema has, in their order."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for name in names:
        table = f"{name}.alembic_version_history"
        if database.scalar("SELECT to_regclass(%s) IS NOT NULL", table):
            found[name] = [revision for (revision,) in database.execute(f"SELECT revision FROM {table} ORDER BY id")]
    return found
