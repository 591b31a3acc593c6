"""A database that is only read, and the same roles, schemas and revisions on an embedded server.

Roles, schemas that the revisions use but do not create, and the migrating role's default privileges are the operator's:
they are copied from the database (target.sql).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psycopg2
from dotenv import load_dotenv
from sqlalchemy import URL, make_url

from tools.paths import BIN, ROOT
from tools.postgres import Postgres
from tools.steps import run

# The same object must have the same definition on both servers.
SESSION = """SET search_path = pg_catalog; SET TimeZone = 'UTC'; SET DateStyle = 'ISO'; SET IntervalStyle = 'postgres';
SET quote_all_identifiers = off; SET lock_timeout = '5s'"""
# As the role resolves names, without calling what other roles have created there.
ROLE = """SELECT pg_catalog.current_setting('search_path'), pg_catalog.current_setting('TimeZone'),
pg_catalog.current_schemas(false)::pg_catalog.text[],
pg_catalog.to_regclass(pg_catalog.quote_ident(%(table)s))::pg_catalog.oid"""
DATABASE = """SELECT current_database()::text, current_user::text, current_setting('server_version_num')::int,
(SELECT nspname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %(found)s)"""
VERSION_TABLE = """SELECT c.oid::regclass::text, pg_get_userbyid(c.relowner)::text
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %(schema)s AND c.relname = %(table)s"""

Query = Callable[..., list[tuple[Any, ...]]]


def database_url() -> URL:
    """DATABASE_URL, else DB_*, which the runner has checked: with the defaults of migration_runner/settings.py."""
    get = os.environ.get
    if given := get("DATABASE_URL"):
        url = make_url(given)
        return url.set(drivername="postgresql", database=unquote(url.database or ""))
    password = get("DB_PASSWORD", None if get("PGPASSWORD") or get("PGPASSFILE") else "postgres")
    host, port = get("DB_HOST", "localhost").strip("[]"), int(get("DB_PORT", "5432"))
    user, database = get("DB_USER", "postgres"), get("DB_NAME", "unifieddevdb")
    return URL.create("postgresql", user, password or None, host, port, database)


@contextmanager
def reading(url: URL) -> Iterator[Query]:
    """A function that queries one snapshot of the database, and cannot write."""
    _, options = url.set(drivername="postgresql+psycopg2").get_dialect()().create_connect_args(url)
    defaults = {"connect_timeout": 5, "fallback_application_name": "hcm-tools", "client_encoding": "utf8"}
    connection = psycopg2.connect(**{**defaults, **options})
    try:
        connection.set_session(isolation_level="REPEATABLE READ", readonly=True)
        with connection.cursor() as cursor:

            def query(statement: str, **parameters: object) -> list[tuple[Any, ...]]:
                cursor.execute(statement, parameters or None)
                return cursor.fetchall() if cursor.description else []

            yield query
    finally:
        connection.close()


class Target:
    """The database that the settings name, which the runner has accepted, and what is read from it."""

    def __init__(self, query: Query) -> None:
        self.version_table = os.environ.get("ALEMBIC_VERSION_TABLE", "alembic_version")
        self.revisions: list[str] = []
        self.setup: dict[str | None, list[str]] = {None: []}  # statements by schema, and those without one
        path, zone, schemas, found = query(ROLE, table=self.version_table)[0]
        query(SESSION)
        self.name, self.owner, self.version, place = query(DATABASE, found=found)[0]
        schema = os.environ.get("DB_SCHEMA") or place or schemas[0]
        self.schemas = {schema, *schemas}  # in which the revisions create what they do not qualify
        self.options = " ".join(
            "-c " + re.sub(r"([\\\s])", r"\\\1", setting) for setting in (f"search_path={path}", f"TimeZone={zone}")
        )
        for table, owner in query(VERSION_TABLE, schema=schema, table=self.version_table):
            self.owner = owner
            self.revisions = [row[0] for row in query(f"SELECT version_num FROM {table} ORDER BY 1")]  # noqa: S608
        for place, statement in query(Path(__file__).with_suffix(".sql").read_text(), owner=self.owner):
            self.setup.setdefault(place, []).append(statement)

    def environment(self, server: Postgres) -> dict[str, str]:
        """The settings for the same database on this server."""
        ours = {"DB_HOST": "127.0.0.1", "DB_PORT": str(server.port), "DB_NAME": self.name, "DB_USER": self.owner}
        return without_database(os.environ) | ours | {"DB_PASSWORD": server.password, "PGOPTIONS": self.options}

    def upgrade(self, server: Postgres, revisions: Sequence[str]) -> None:
        """Create it on this server, and run the revisions up to these, as the migrating role."""
        name, owner = ('"' + text.replace('"', '""') + '"' for text in (self.name, self.owner))
        if self.name != "postgres":
            server.execute(f"CREATE DATABASE {name}")
        waiting = dict(self.setup)
        setup = [*waiting.pop(None), f"ALTER ROLE {owner} SUPERUSER LOGIN PASSWORD '{server.password}'"]
        setup += ["DROP SCHEMA public", f"ALTER DATABASE {name} OWNER TO {owner}"]
        for schema in {"public"} | self.schemas:
            setup += waiting.pop(schema, [])
        server.execute("; ".join(setup), database=self.name)
        for revision in revisions:
            while True:
                try:
                    alembic("upgrade", revision, what="on an empty PostgreSQL: ", env=self.environment(server))
                    break
                except RuntimeError as error:
                    # Which schemas the operator has created, only the revisions show: by not creating them.
                    missing = re.search('schema "(.*?)" does not exist', str(error))
                    if not missing or missing[1] not in waiting:
                        raise
                    server.execute("; ".join(waiting.pop(missing[1])), database=self.name)


def without_database(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that name no database; DB_SCHEMA is in it, too."""
    given = ("DATABASE_URL", "DB_", "PG")
    return {key: value for key, value in environment.items() if key == "DB_SCHEMA" or not key.startswith(given)}


def check_settings() -> None:
    """Let the runner check the settings and the database's revision, with its own messages; then read .env."""
    alembic("history", "--indicate-current", env={"MIGRATION_WAIT_SECONDS": "10"} | os.environ)
    if not any(name == "DATABASE_URL" or name.startswith("DB_") for name in os.environ):
        load_dotenv(ROOT / ".env", interpolate=False)


def alembic(*arguments: str, what: str = "", env: Mapping[str, str]) -> None:
    """Run it, or raise RuntimeError with the runner's own line."""
    try:
        run([BIN / "alembic", *arguments], cwd=ROOT, env=env)
    except RuntimeError as error:
        reason = re.search("^FAILED: (.*)", str(error), re.M)
        raise RuntimeError(what + (reason[1] if reason else str(error))) from None


def printable(text: str) -> str:
    """On one line, whatever a name contains."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
