"""Several targets: databases and schemas, each migrated by a pod of an Indexed Job."""

from __future__ import annotations

from typing import Any

from tests.support.database import Database
from tests.support.kubernetes import Api
from tests.support.programs import Result
from tests.support.release import Release

Target = dict[str, Any]


def schemas(database: Database, *names: str) -> list[Target]:
    """Targets that are schemas of the test's database, which are created."""
    for name in names:
        database.execute(f"CREATE SCHEMA {name} AUTHORIZATION {database.role}")
    return [{"name": name, "schema": name} for name in names]


def applied(database: Database, schema: str) -> list[str]:
    """The revisions that the record of a schema has, in their order."""
    if not database.scalar("SELECT to_regclass(%s) IS NOT NULL", f"{schema}.alembic_version_history"):
        return []
    return [revision for (revision,) in database.execute(f"SELECT revision FROM {schema}.alembic_version_history")]


def rows(result: Result) -> dict[str, list[str]]:
    """The report's rows: {target: the rest of its line, by columns}."""
    lines = result.text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("target ") and line.endswith(" result")]
    found = [line.split(None, 4) for line in lines[starts[-1] + 1 :]]
    return {line[0]: line[1:] for line in found}


def test_schemas_are_migrated_the_canary_first(release: Release, api: Api, database: Database) -> None:
    targets = schemas(database, "kano", "lagos", "oyo")
    result = release.upgrade({"targets": targets})
    assert result.returncode == 0, result.text
    print(result.text)
    assert {name: applied(database, name) for name in ("kano", "lagos", "oyo")} == dict.fromkeys(
        ("kano", "lagos", "oyo"), ["001"]
    )


def test_big(release: Release, api: Api, database: Database) -> None:
    import time

    names = [f"t{i:02}" for i in range(24)]
    targets = schemas(database, *names)
    targets[5]["secret"] = {"passwordKey": "nope"}
    targets[6]["secret"] = {"name": "wrong"}
    targets[7]["configMap"] = {"name": "missing"}
    api.secret("wrong", username=database.role, password="not it")
    start = time.time()
    result = release.upgrade(
        {"targets": targets, "rollout": {"parallelism": 5, "maxFailures": 1}, "job": {"backoffLimit": 0}}
    )
    print(result.text)
    print(time.time() - start)
    result = release.upgrade(
        {"targets": targets, "rollout": {"parallelism": 5, "maxFailures": None}, "job": {"backoffLimit": 0}},
        "--timeout",
        "15m",
    )
    print(result.text[-6000:])
    print(time.time() - start)
    print(api.batch.read_namespaced_job("hcm-db-migration-2", api.namespace).status)
