"""`make drift`: what differs between a database and what the revisions up to its own make of an empty PostgreSQL.

Both are read by one query on the catalogs (drift.sql), in which PostgreSQL itself names and defines each object. Unlike
pg_dump, this needs no privilege on tables and no client as new as the server, and leaves no text to parse; Alembic's
compare_metadata sees no check constraint, view, function, trigger or privilege.

Not compared: owners, the order of columns, storage and statistics settings, versions of extensions, casts, and more
than the existence of operators, collations, text search objects and publications.
Servers differ: the names of NOT NULL constraints (18) and MAINTAIN (17) are ignored, and views are printed again by the
embedded server; but 13 and older print EXTRACT, SUBSTRING and AT TIME ZONE as functions, which shows as a difference.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psycopg2
import psycopg2.errors

from tools.postgres import Postgres
from tools.steps import interrupt_on_signals
from tools.target import SESSION, Query, Target, check_settings, database_url, printable, reading

OBJECTS = Path(__file__).with_suffix(".sql")
LONGEST = 20  # lines of a definition's diff


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


def read_objects(target: Target, query: Query) -> Objects:
    """Without Alembic's and the runner's own tables, and what EXCLUDE matches."""
    own = (target.version_table, f"{target.version_table}_history")
    patterns = [
        re.escape(word).replace(r"\*", ".*").replace(r"\?", ".") for word in os.environ.get("EXCLUDE", "").split()
    ]
    query(SESSION)
    rows = query(OBJECTS.read_text(), exclude=f"^({'|'.join(patterns)})$" if patterns else None)
    return {
        (row.kind, row.identity): row
        for row in map(Object._make, rows)
        if not (row.root_name in own and row.schema in target.schemas)
    }


def compare(target: Target, found: Objects, server: Postgres) -> list[str]:
    """What differs between the target's objects and what the revisions made on this server."""
    with reading(server.url.set(database=target.name)) as query:
        expected, found = read_objects(target, query), dict(found)
    for key in expected.keys() & found.keys():
        old, new = expected[key], found[key]
        if target.version < 17_00_00:
            expected[key] = old._replace(privileges=[row for row in old.privileges if row[0] != "MAINTAIN"])
        if old.definition != new.definition and "view" in new.kind:
            found[key] = new._replace(definition=reprinted(new.definition or "", server, target.name))
    return list(differences(expected, found))


def reprinted(definition: str, server: Postgres, database: str) -> str:
    """The definition of a view as this server prints it: PostgreSQL 15 and older qualify each column."""
    options, mark, query = definition.partition("AS\n")
    view = f"CREATE TEMP VIEW drift AS {query} SELECT pg_get_viewdef('pg_temp.drift'::regclass)"
    with suppress(psycopg2.Error):  # it refers to what the revisions do not create
        return options + mark + str(server.execute(f"{SESSION}; {view}", database=database)[0][0])
    return definition


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


def main() -> int:
    check_settings()
    with reading(database_url()) as query:
        target = Target(query)
        found = read_objects(target, query)
    with Postgres() as server:
        target.upgrade(server, target.revisions)
        lines = compare(target, found, server)
    at = printable(f"database {target.name} at {', '.join(target.revisions) or 'base'}")
    if not lines:
        print(f"{at}: no difference from what its revisions make")
        return 0
    print(f"{at} differs from what its revisions make")
    print("added: only in the database; missing: only in the revisions; changed: revisions -> database")
    print("\n".join(lines))
    return 1


if __name__ == "__main__":
    interrupt_on_signals()
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
