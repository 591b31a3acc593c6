"""`make drift`: what differs between a database and what the revisions up to its own make of an empty PostgreSQL.

Both are read by one query on the catalogs (drift.sql), in which PostgreSQL itself names and defines each object. Unlike
pg_dump, that needs no privilege on tables and locks none, and works with every server since version 12; Alembic's
compare_metadata sees no check constraint, view, function, trigger or privilege.

Roles, the schemas `public` and of the version table, and the migrating role's default privileges are the operator's:
they are copied from the database before the revisions run (drift_setup.sql).
Not compared: owners, the order of columns, storage and statistics settings, versions of extensions, casts, and more
than the existence of aggregates, operators, collations, text search objects and publications.
"""

from __future__ import annotations

import difflib
import os
import re
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import psycopg2
from dotenv import load_dotenv
from sqlalchemy import URL, make_url

from tools.paths import BIN, ROOT
from tools.postgres import Postgres
from tools.steps import run

OBJECTS = Path(__file__).with_suffix(".sql")
SETUP = OBJECTS.with_name("drift_setup.sql")
LONGEST = 20  # lines of a definition's diff

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


class Object(NamedTuple):
    """A row of drift.sql; `root` is the table, or other object, that it belongs to."""

    kind: str
    identity: str
    name: str | None
    schema: str | None
    root_name: str | None
    root: str
    definition: str | None
    comment: str | None
    privileges: list[list[str]]  # privilege, grantee, option

    def matches(self, pattern: str) -> bool:
        names = (self.schema, self.root_name, f"{self.schema}.{self.root_name}", self.name, self.identity)
        return any(name is not None and fnmatchcase(name, pattern) for name in names)


Objects = dict[tuple[str, str], Object]


@dataclass(frozen=True)
class Target:
    """The database, and what was read from it."""

    name: str
    version: int
    owner: str  # of the version table: the migrating role
    revisions: list[str]
    options: str  # the session's, for another server
    setup: dict[str | None, list[str]]  # what revisions rely on: statements by schema; None: in no schema
    objects: Objects


def target_url() -> URL:
    """DATABASE_URL, else DB_*, which the runner has checked: with the defaults of migration_runner/settings.py."""
    get = os.environ.get
    if given := get("DATABASE_URL"):
        url = make_url(given)
        return url.set(drivername="postgresql+psycopg2", database=unquote(url.database or ""))
    password = get("DB_PASSWORD", None if get("PGPASSWORD") or get("PGPASSFILE") else "postgres")
    host, port = get("DB_HOST", "localhost").strip("[]"), int(get("DB_PORT", "5432"))
    user, database = get("DB_USER", "postgres"), get("DB_NAME", "unifieddevdb")
    return URL.create("postgresql+psycopg2", user, password or None, host, port, database)


@contextmanager
def reading(url: URL) -> Iterator[Query]:
    """A function that queries one snapshot of the database, and cannot write."""
    _, options = url.set(drivername="postgresql+psycopg2").get_dialect()().create_connect_args(url)
    connection = psycopg2.connect(**{"connect_timeout": 5, "fallback_application_name": "hcm-drift", **options})
    try:
        connection.set_session(isolation_level="REPEATABLE READ", readonly=True)
        with connection.cursor() as cursor:

            def query(statement: str, **parameters: object) -> list[tuple[Any, ...]]:
                cursor.execute(statement, parameters or None)
                return cursor.fetchall() if cursor.description else []

            yield query
    finally:
        connection.close()


class Drift:
    """One comparison."""

    def __init__(self, exclude: list[str]) -> None:
        self.exclude = exclude
        self.table, self.schema = (
            os.environ.get("ALEMBIC_VERSION_TABLE", "alembic_version"),
            os.environ.get("DB_SCHEMA"),
        )
        self.schemas: set[str] = set()  # in which the revisions create what they do not qualify

    def read_target(self) -> Target:
        with reading(target_url()) as query:
            search_path, time_zone, schemas, found = query(ROLE, table=self.table)[0]
            query(SESSION)
            name, owner, version, place = query(DATABASE, found=found)[0]
            schema = self.schema or place or schemas[0]
            self.schemas = {schema, *schemas}
            revisions = []
            for table, owner in query(VERSION_TABLE, schema=schema, table=self.table):  # noqa: B007
                revisions = [row[0] for row in query(f"SELECT version_num FROM {table} ORDER BY 1")]  # noqa: S608
            setup: dict[str | None, list[str]] = {None: []}
            for place, statement in query(SETUP.read_text(), owner=owner):
                setup.setdefault(place, []).append(statement)
            settings = {"search_path": search_path, "TimeZone": time_zone}.items()
            options = " ".join("-c " + re.sub(r"([\\\s])", r"\\\1", f"{name}={value}") for name, value in settings)
            return Target(name, version, owner, revisions, options, setup, self.read_objects(query))

    def read_objects(self, query: Query) -> Objects:
        """Without Alembic's and the runner's own tables, and what EXCLUDE matches."""
        own = (self.table, f"{self.table}_history")
        return {
            (row.kind, row.identity): row
            for row in map(Object._make, query(OBJECTS.read_text()))
            if not (row.root_name in own and row.schema in self.schemas) and not any(map(row.matches, self.exclude))
        }

    def compare(self, server: Postgres, target: Target) -> list[str]:
        """The differences from what the revisions make of an empty database on this server."""
        self.upgrade(server, target)
        with reading(server.url.set(database=target.name)) as query:
            query(SESSION)
            expected = self.read_objects(query)
        found = dict(target.objects)
        for key in expected.keys() & found.keys():
            old, new = expected[key], found[key]
            if target.version < 17_00_00:
                expected[key] = old._replace(privileges=[row for row in old.privileges if row[0] != "MAINTAIN"])
            if old.definition != new.definition and "view" in new.kind:
                found[key] = new._replace(definition=reprinted(server, target.name, new.definition or ""))
        return list(differences(expected, found))

    def upgrade(self, server: Postgres, target: Target) -> None:
        name, owner = ('"' + text.replace('"', '""') + '"' for text in (target.name, target.owner))
        if target.name != "postgres":
            server.execute(f"CREATE DATABASE {name}")
        missing = dict(target.setup)
        setup = [f"DROP SCHEMA public; ALTER DATABASE {name} OWNER TO {owner}"]
        setup += [f"ALTER ROLE {owner} SUPERUSER LOGIN PASSWORD '{server.password}'"]
        for schema in (None, "public", *self.schemas):
            setup = [*missing.pop(schema, []), *setup] if schema is None else [*setup, *missing.pop(schema, [])]
        server.execute("; ".join(setup), database=target.name)
        database = {
            "DB_HOST": "127.0.0.1",
            "DB_PORT": str(server.port),
            "DB_NAME": target.name,
            "DB_USER": target.owner,
        }
        database |= {"DB_PASSWORD": server.password, "PGOPTIONS": target.options}
        given = ("DATABASE_URL", "DB_", "PG")
        others = {key: value for key, value in os.environ.items() if key == "DB_SCHEMA" or not key.startswith(given)}
        for revision in target.revisions:
            while True:
                try:
                    alembic("upgrade", revision, what="on an empty PostgreSQL, ", env=others | database)
                    break
                except RuntimeError as error:
                    # A schema that the operator has created: which these are, only the revisions know.
                    schema = re.search('schema "(.*?)" does not exist', str(error))
                    if not schema or schema[1] not in missing:
                        raise
                    server.execute("; ".join(missing.pop(schema[1])), database=target.name)


def reprinted(server: Postgres, database: str, definition: str) -> str:
    """The definition of a view as this server prints it: PostgreSQL 15 and older qualify each column."""
    options, mark, query = definition.partition("AS\n")
    print_view = f"CREATE TEMP VIEW drift AS {query} SELECT pg_get_viewdef('pg_temp.drift'::regclass)"
    with suppress(psycopg2.Error):  # it refers to what the revisions do not create
        return options + mark + str(server.execute(f"{SESSION}; {print_view}", database=database)[0][0])
    return definition


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


def differences(expected: Objects, found: Objects) -> Iterator[str]:
    """The lines to print, by object; privileges last."""
    roots = [
        {row.root: row.kind for row in objects.values() if row.identity == row.root} for objects in (expected, found)
    ]
    grants: list[str] = []
    both = {key: (expected.get(key), found.get(key)) for key in expected | found}
    for (kind, identity), (old, new) in sorted(both.items(), key=lambda item: _order(item[1])):
        row = old or new
        assert row is not None
        if identity != row.root and roots[0].get(row.root) != roots[1].get(row.root):
            continue  # a part of what is added or missing
        name = f"{kind} {identity}"
        if old and new:
            yield from _changed(name, old.definition, new.definition)
            yield from _changed(f"comment on {name}", _quoted(old.comment), _quoted(new.comment))
            grants += _grants(f"{kind.upper()} {identity}", old.privileges, new.privileges)
        elif row.definition is not None:
            yield from _changed(name, old and old.definition, new and new.definition)
    yield from sorted(grants)


def _quoted(comment: str | None) -> str | None:
    return None if comment is None else f"'{printable(comment)}'"


def _order(pair: tuple[Object | None, Object | None]) -> tuple[object, ...]:
    row = pair[0] or pair[1]
    assert row is not None
    return row.root, row.identity != row.root, row.kind, row.identity


def _changed(name: str, old: str | None, new: str | None) -> Iterator[str]:
    """`old` is the revisions', `new` the database's."""
    if old == new:
        return
    if old is None or new is None:
        what, text = ("missing", old) if new is None else ("added", new)
        yield printable(f"{what:9}{name}{f': {text}' if text and len(text.splitlines()) == 1 else ''}")
    elif max(len(old.splitlines()), len(new.splitlines())) <= 1:
        yield printable(f"changed  {name}: {old or 'nothing'} -> {new or 'nothing'}")
    else:
        yield printable(f"changed  {name}:")
        diff = list(difflib.unified_diff(old.splitlines(), new.splitlines(), n=1, lineterm=""))[2:]
        yield from (f"         {printable(line)}" for line in diff[:LONGEST])
        if len(diff) > LONGEST:
            yield f"         ... {len(diff) - LONGEST} more lines"


def _grants(name: str, old: list[list[str]], new: list[list[str]]) -> Iterator[str]:
    for what, these, others in (("added", new, old), ("missing", old, new)):
        granted = defaultdict(list)
        for privilege, grantee, option in these:
            if [privilege, grantee, option] not in others:
                granted[grantee, option].append(privilege)
        for (grantee, option), privileges in granted.items():
            yield printable(f"{what:9}GRANT {', '.join(sorted(privileges))} ON {name} TO {grantee}{option}")


def main() -> int:
    drift = Drift(os.environ.get("EXCLUDE", "").split())
    # The runner checks the settings and the database's revision, with its own messages.
    alembic("history", "--indicate-current", env={"MIGRATION_WAIT_SECONDS": "10"} | os.environ)
    if not any(name == "DATABASE_URL" or name.startswith("DB_") for name in os.environ):
        load_dotenv(ROOT / ".env", interpolate=False)
        drift = Drift(drift.exclude)
    target = drift.read_target()
    at = f"database {target.name} at {', '.join(target.revisions) or 'base'}"
    with Postgres() as server:
        lines = drift.compare(server, target)
    if not lines:
        print(printable(f"{at}: no difference from what its revisions make"))
        return 0
    print(printable(f"{at} differs from what its revisions make"))
    print("added: only in the database; missing: only in the revisions; changed: revisions -> database")
    print("\n".join(lines))
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server is stopped
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; everything that was started is stopped", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, psycopg2.Error, UnicodeDecodeError) as error:
        print(f"FAILED: {printable(str(error).strip())}", file=sys.stderr)
        sys.exit(2)
