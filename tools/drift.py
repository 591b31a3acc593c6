"""`make drift`: what differs between a database and what the revisions up to its own make of an empty PostgreSQL.

Both are read by one query on the catalogs (drift.sql), in which PostgreSQL itself names and defines each object. Unlike
pg_dump, this needs no privilege on tables and no client as new as the server, and leaves no text to parse; Alembic's
compare_metadata sees no check constraint, view, function, trigger or privilege.

Roles, schemas that the revisions use but do not create, and the migrating role's default privileges are the operator's:
they are copied from the database first (drift_setup.sql).
Not compared: owners, the order of columns, storage and statistics settings, versions of extensions, casts, and more
than the existence of operators, collations, text search objects and publications.
Servers differ: the names of NOT NULL constraints (18) and MAINTAIN (17) are ignored, and views are printed again by the
embedded server; but 13 and older print EXTRACT, SUBSTRING and AT TIME ZONE as functions, which shows as a difference.
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
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import psycopg2
import psycopg2.errors
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
    schema: str | None
    root_name: str | None
    root: str
    definition: str | None
    comment: str | None
    privileges: list[list[str]]  # privilege, grantee, option

    @property
    def is_root(self) -> bool:
        return self.identity == self.root


Objects = dict[tuple[str, str], Object]


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
    defaults = {"connect_timeout": 5, "fallback_application_name": "hcm-drift", "client_encoding": "utf8"}
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
    """The database, and what is read from it."""

    def __init__(self) -> None:
        self.table = os.environ.get("ALEMBIC_VERSION_TABLE", "alembic_version")
        self.revisions: list[str] = []
        self.setup: dict[str | None, list[str]] = {None: []}  # statements by schema, and those without one
        with reading(database_url()) as query:
            path, zone, schemas, found = query(ROLE, table=self.table)[0]
            query(SESSION)
            self.name, self.owner, self.version, place = query(DATABASE, found=found)[0]
            schema = os.environ.get("DB_SCHEMA") or place or schemas[0]
            self.schemas = {schema, *schemas}  # in which the revisions create what they do not qualify
            self.options = " ".join(
                "-c " + re.sub(r"([\\\s])", r"\\\1", setting) for setting in (f"search_path={path}", f"TimeZone={zone}")
            )
            for table, owner in query(VERSION_TABLE, schema=schema, table=self.table):
                self.owner = owner
                self.revisions = [row[0] for row in query(f"SELECT version_num FROM {table} ORDER BY 1")]  # noqa: S608
            for place, statement in query(SETUP.read_text(), owner=self.owner):
                self.setup.setdefault(place, []).append(statement)
            self.objects = self.read_objects(query)

    def read_objects(self, query: Query) -> Objects:
        """Without Alembic's and the runner's own tables, and what EXCLUDE matches."""
        own = (self.table, f"{self.table}_history")
        patterns = [
            re.escape(word).replace(r"\*", ".*").replace(r"\?", ".") for word in os.environ.get("EXCLUDE", "").split()
        ]
        query(SESSION)
        rows = query(OBJECTS.read_text(), exclude=f"^({'|'.join(patterns)})$" if patterns else None)
        return {
            (row.kind, row.identity): row
            for row in map(Object._make, rows)
            if not (row.root_name in own and row.schema in self.schemas)
        }

    def upgrade(self, server: Postgres) -> None:
        """Run the revisions on this server, as the migrating role."""
        name, owner = ('"' + text.replace('"', '""') + '"' for text in (self.name, self.owner))
        if self.name != "postgres":
            server.execute(f"CREATE DATABASE {name}")
        waiting = dict(self.setup)
        setup = [*waiting.pop(None), f"ALTER ROLE {owner} SUPERUSER LOGIN PASSWORD '{server.password}'"]
        setup += ["DROP SCHEMA public", f"ALTER DATABASE {name} OWNER TO {owner}"]
        for schema in {"public"} | self.schemas:
            setup += waiting.pop(schema, [])
        server.execute("; ".join(setup), database=self.name)
        ours = {"DB_HOST": "127.0.0.1", "DB_PORT": str(server.port), "DB_NAME": self.name, "DB_USER": self.owner}
        ours |= {"DB_PASSWORD": server.password, "PGOPTIONS": self.options}
        given = ("DATABASE_URL", "DB_", "PG")
        others = {key: value for key, value in os.environ.items() if key == "DB_SCHEMA" or not key.startswith(given)}
        for revision in self.revisions:
            while True:
                try:
                    alembic("upgrade", revision, what="on an empty PostgreSQL: ", env=others | ours)
                    break
                except RuntimeError as error:
                    # Which schemas the operator has created, only the revisions show: by not creating them.
                    missing = re.search('schema "(.*?)" does not exist', str(error))
                    if not missing or missing[1] not in waiting:
                        raise
                    server.execute("; ".join(waiting.pop(missing[1])), database=self.name)

    def differences(self, server: Postgres) -> list[str]:
        """From what the revisions made on this server."""
        with reading(server.url.set(database=self.name)) as query:
            expected, found = self.read_objects(query), dict(self.objects)
        for key in expected.keys() & found.keys():
            old, new = expected[key], found[key]
            if self.version < 17_00_00:
                expected[key] = old._replace(privileges=[row for row in old.privileges if row[0] != "MAINTAIN"])
            if old.definition != new.definition and "view" in new.kind:
                found[key] = new._replace(definition=reprinted(new.definition or "", server, self.name))
        return list(differences(expected, found))


def reprinted(definition: str, server: Postgres, database: str) -> str:
    """The definition of a view as this server prints it: PostgreSQL 15 and older qualify each column."""
    options, mark, query = definition.partition("AS\n")
    view = f"CREATE TEMP VIEW drift AS {query} SELECT pg_get_viewdef('pg_temp.drift'::regclass)"
    with suppress(psycopg2.Error):  # it refers to what the revisions do not create
        return options + mark + str(server.execute(f"{SESSION}; {view}", database=database)[0][0])
    return definition


def alembic(*arguments: str, what: str = "", env: Mapping[str, str]) -> None:
    """Run it, or raise RuntimeError with the runner's own line."""
    try:
        run([BIN / "alembic", *arguments], cwd=ROOT, env=env)
    except RuntimeError as error:
        reason = re.search("^FAILED: (.*)", str(error), re.M)
        raise RuntimeError(what + (reason[1] if reason else str(error))) from None


def differences(expected: Objects, found: Objects) -> Iterator[str]:
    """The lines to print, by object; privileges last."""
    made, there = ({row.root: row.kind for row in side.values() if row.is_root} for side in (expected, found))
    grants: list[str] = []
    for key, row in sorted((expected | found).items(), key=lambda item: (item[1].root, not item[1].is_root, item[0])):
        old, new, name = expected.get(key), found.get(key), f"{row.kind} {row.identity}"
        if not row.is_root and made.get(row.root) != there.get(row.root):
            continue  # a part of what is added or missing
        if row.definition is not None:
            yield from difference(name, old and old.definition, new and new.definition)
        if old and new:
            yield from difference(f"comment on {name}", quoted(old.comment), quoted(new.comment))
            grants += granted("added", new, old) + granted("missing", old, new)
    yield from sorted(grants)


def difference(name: str, old: str | None, new: str | None) -> Iterator[str]:
    """`old` is the revisions', `new` the database's; None: there is none."""
    if old == new:
        return
    if old is None or new is None:
        what, text = ("missing", old) if new is None else ("added", new)
        shown = f": {text}" if text and "\n" not in text else ""
        yield printable(f"{what:9}{name}{shown}")
    elif "\n" not in old + new:
        yield printable(f"changed  {name}: {old or 'nothing'} -> {new or 'nothing'}")
    else:
        yield printable(f"changed  {name}:")
        _, _, *lines = difflib.unified_diff(old.split("\n"), new.split("\n"), n=0, lineterm="")
        lines = [f"         {printable(line)}" for line in lines if not line.startswith("@@")]
        yield from lines[:LONGEST]
        if len(lines) > LONGEST:
            yield f"         ... {len(lines) - LONGEST} more lines"


def granted(what: str, row: Object, other: Object) -> list[str]:
    """Privileges that the other one lacks, as `added    GRANT SELECT ON TABLE public.t TO reader`."""
    found = defaultdict(list)
    for privilege, grantee, option in row.privileges:
        if [privilege, grantee, option] not in other.privileges:
            found[f"{row.kind.upper()} {row.identity} TO {grantee}{option}"].append(privilege)
    return [printable(f"{what:9}GRANT {', '.join(sorted(names))} ON {rest}") for rest, names in found.items()]


def quoted(comment: str | None) -> str | None:
    return None if comment is None else f"'{printable(comment)}'"


def printable(text: str) -> str:
    """On one line, whatever a name contains."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def main() -> int:
    # The runner checks the settings and the database's revision, with its own messages.
    alembic("history", "--indicate-current", env={"MIGRATION_WAIT_SECONDS": "10"} | os.environ)
    if not any(name == "DATABASE_URL" or name.startswith("DB_") for name in os.environ):
        load_dotenv(ROOT / ".env", interpolate=False)
    target = Target()
    with Postgres() as server:
        target.upgrade(server)
        lines = target.differences(server)
    at = printable(f"database {target.name} at {', '.join(target.revisions) or 'base'}")
    if not lines:
        print(f"{at}: no difference from what its revisions make")
        return 0
    print(f"{at} differs from what its revisions make")
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
        reason = printable(str(error).strip())
        if isinstance(error, psycopg2.errors.LockNotAvailable):
            reason = f"another session has locked a table: {str(error).splitlines()[0]}; run again when it is done"
        print(f"FAILED: {reason}", file=sys.stderr)
        sys.exit(2)
