"""Whether a revision is safe while the application runs, by what it does to tables that existed before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tools.impact.trace import Locks, Relations, Statement, blocks, query
from tools.target import printable

NAMES = Path(__file__).with_name("names.sql")
COLUMNS = """SELECT i.identity, c.oid, a.attnum, t.identity, format_type(a.atttypid, NULL), y.typcategory::text,
    a.attnotnull, a.atthasdef OR a.attidentity <> ''
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_type y ON y.oid = a.atttypid,
    pg_identify_object('pg_class'::regclass, a.attrelid, a.attnum) i,
    pg_identify_object('pg_class'::regclass, a.attrelid, 0) t
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND i.schema !~ '^pg_' AND i.schema <> 'information_schema'
    AND a.attnum > 0 AND NOT a.attisdropped"""

BLOCK = "inside `with op.get_context().autocommit_block():`, in a dedicated revision"
BATCHES = f"change rows in batches, each in its own transaction: {BLOCK}"
CONCURRENTLY = (
    f"build it with postgresql_concurrently=True {BLOCK}; a unique or primary key then uses it: ADD CONSTRAINT ..."
    " USING INDEX; an EXCLUDE constraint cannot be added this way: a maintenance window"
)
PARTITIONED = (
    "CREATE INDEX ON ONLY the parent, then postgresql_concurrently=True for each partition, then ALTER INDEX ... ATTACH"
    " PARTITION; before ATTACH PARTITION: the same indexes on the partition"
)
NEW_COLUMN = (
    "add a nullable column, fill it in batches in a dedicated revision, release an application that uses it, and drop"
    " the old one later; for a volatile default: ADD COLUMN without it, then SET DEFAULT"
)
# Of other statements that rewrite a table or an index, by their tags.
REWRITE = {
    "REFRESH MATERIALIZED VIEW": "REFRESH MATERIALIZED VIEW CONCURRENTLY, which needs a unique index on the view",
    "REINDEX": f"REINDEX ... CONCURRENTLY {BLOCK}",
    "CLUSTER": "do this in a maintenance window, not in a revision",
    "VACUUM": "do this in a maintenance window, not in a revision",
}
NOT_VALID = (
    "a foreign key or CHECK: add it as NOT VALID, and VALIDATE it in the next revision, which blocks only DDL; NOT"
    " NULL: first a CHECK (... IS NOT NULL) in that way, then SET NOT NULL reads nothing; ATTACH PARTITION: first a"
    " CHECK of its bounds in that way, and on a default partition one that excludes them"
)
# Of other statements that read a table, by their tags.
READ = {
    "CREATE TABLE": "first a CHECK on the default partition that excludes the new bounds: NOT VALID, then VALIDATE",
    "ALTER DOMAIN": "a CHECK on each table that has the domain: NOT VALID, then VALIDATE",
}
LOCK_TIMEOUT = "keep the run's lock_timeout, or set one of at most 10 s: while it waits, all others wait behind it"
LATER = (
    "release an application that no longer uses it, and remove it in a later revision; instead of a rename: add the"
    " new one, fill it, switch"
)
DEFAULT = "make it nullable, or give it a constant default"
SEPARATE = "do this in a dedicated revision, before or after what takes the lock"


class Finding(NamedTuple):
    """Why a revision is not safe, and the safe way."""

    why: str
    advice: str


class Column(NamedTuple):
    """A column of a table, by its identity."""

    oid: int  # of the table
    number: int
    table: str
    type: str  # without its length
    category: str  # pg_type.typcategory; D: date and time
    is_required: bool
    has_default: bool

    @property
    def key(self) -> tuple[int, int]:
        """What stays the same when it is renamed."""
        return self.oid, self.number


class Schema(NamedTuple):
    """What an application may use."""

    names: dict[tuple[str, str], list[str]]  # type and identity: what it belongs to
    columns: dict[str, Column]

    @classmethod
    def read(cls, connection: Any) -> Schema:
        """Read it, as other sessions see it."""
        columns = {name: Column(*values) for name, *values in query(connection, COLUMNS)}
        return cls({(kind, name): roots for kind, name, roots in query(connection, NAMES.read_text())}, columns)


def judge(existing: Relations, statements: list[Statement], before: Schema, after: Schema) -> list[Finding]:
    """The reasons why the revision is not safe; none if it is."""
    return list(dict.fromkeys([*_blocking(existing, statements, before, after), *_incompatible(before, after)]))


def _blocking(existing: Relations, statements: list[Statement], before: Schema, after: Schema) -> Iterator[Finding]:
    """What takes longer with more rows, while a lock, or changed rows, block the application."""
    required = {column.oid for column in _new_required(before, after).values()}
    for number, statement in enumerate(statements, 1):
        this = f"statement {number}"
        if statement.truncated:
            yield Finding(f"{this} deletes all rows of {names(existing, statement.truncated)}", LATER)
        for oid, is_limited in statement.changed.items():
            if statement.transaction is not None or not is_limited:
                why = f"{this} may change or lock many rows of {existing[oid]} in one transaction: they stay locked"
                yield Finding(f"{why} until its end", BATCHES)
        blocked = _blocked(existing, statement.locks)
        if blocked and not 0 < statement.lock_timeout <= 10:
            limit = f"up to {statement.lock_timeout:.0f} s" if statement.lock_timeout else "without a limit"
            yield Finding(f"{this} waits for its locks {limit}", LOCK_TIMEOUT)
        if not (meanwhile := _blocked(existing, statement.held)):
            continue
        if statement.rewritten:
            why = f"{this} rewrites {rewritten(existing, statement.rewritten)}, {meanwhile}"
            yield Finding(why, REWRITE.get(statement.tag, NEW_COLUMN))
        if statement.indexed:
            built = ", ".join(f"{index} on {existing[table]}" for index, table in statement.indexed.items())
            is_partitioned = any(existing[oid].kind == "p" for oid in statement.locks)
            yield Finding(f"{this} builds index {built}, {meanwhile}", PARTITIONED if is_partitioned else CONCURRENTLY)
        scanned = [oid for oid in statement.scanned if oid not in statement.indexed.values()]
        if scanned and not statement.rewritten:
            advice = READ.get(statement.tag, SEPARATE)
            if statement.tag == "ALTER TABLE" and blocked:
                advice = DEFAULT if required.intersection(scanned) else NOT_VALID
            yield Finding(f"{this} reads all of {names(existing, scanned)}, {meanwhile}", advice)


def hidden(existing: Relations, statements: list[Statement]) -> str:
    """Why it cannot be said what the statements do; nothing if it can."""
    for statement in statements:
        for oid, mode in statement.locks.items():
            changes = blocks(mode) != "DDL" or statement.tag.startswith(("UPDATE", "DELETE", "MERGE"))
            if existing[oid].kind == "p" and not existing[oid].has_children and changes:
                return f"no revision creates a partition of {existing[oid]}, so what is done to them does not show"
    return ""


def _blocked(existing: Relations, locks: Locks) -> str:
    """`while reads and writes of a, and writes to b, are blocked`; nothing if none are."""
    reads = [existing[oid].qualified_name for oid, mode in locks.items() if "reads" in blocks(mode)]
    writes = [
        existing[oid].qualified_name
        for oid, mode in locks.items()
        if blocks(mode).startswith("writes") and existing[oid].kind != "m"  # only REFRESH writes to it
    ]
    parts = [f"reads and writes of {', '.join(reads)}"] if reads else []
    parts += [f"writes to {', '.join(writes)}"] if writes else []
    return f"while {' and '.join(parts)} are blocked" if parts else ""


def _incompatible(before: Schema, after: Schema) -> Iterator[Finding]:
    """What the running release of the application may use, and the next revision no longer has."""
    gone = before.names.keys() - after.names.keys()
    removed = {name for _, name in gone}
    for kind, name in sorted(gone):
        if removed.isdisjoint(before.names[kind, name]):
            yield Finding(f"{kind} {printable(name)} is removed or renamed", LATER)
    for name in _new_required(before, after):
        why = f"column {printable(name)} is NOT NULL and has no default: the revision fails if the table has rows, else"
        yield Finding(f"{why} an INSERT that does not set it", DEFAULT)
    tables = {column.oid for column in after.columns.values()}
    keys = {column.key for column in after.columns.values()}
    for name, column in after.columns.items():
        if (old := before.columns.get(name)) is None:
            continue
        if old.oid not in tables:
            why = f"table {printable(old.table)} is dropped and created again: what is not copied is lost"
            yield Finding(f"{why}, and so are its privileges", LATER)
        elif old.key not in keys:
            yield Finding(f"column {printable(name)} is dropped and created again, without its contents", LATER)
        elif old.category != column.category or (old.type != column.type and column.category == "D"):
            yield Finding(f"column {printable(name)} changes its type from {old.type} to {column.type}", NEW_COLUMN)
        elif column.is_required and old.has_default and not column.has_default:
            why = f"column {printable(name)} is NOT NULL and loses its default: an INSERT that does not set it fails"
            yield Finding(why, LATER)


def _new_required(before: Schema, after: Schema) -> dict[str, Column]:
    """The new columns of existing tables that each INSERT must set, by their names."""
    tables = {column.oid for column in before.columns.values()}
    keys = {column.key for column in before.columns.values()}
    return {
        name: column
        for name, column in after.columns.items()
        if column.oid in tables and column.key not in keys and column.is_required and not column.has_default
    }


def names(relations: Relations, oids: Iterable[int]) -> str:
    """`a, b (1.2 M rows, 340 MB)`."""
    return ", ".join(str(relations[oid]) for oid in oids)


def rewritten(relations: Relations, oids: Iterable[int]) -> str:
    """`a (1.2 M rows, 340 MB) and its 6 indexes`; of indexes alone, their names."""
    tables = {oid: 0 for oid in oids if not relations[oid].is_index}
    alone = []
    for oid in oids:
        if (table := relations[oid].table) in tables:
            tables[table] += 1
        elif oid not in tables:
            alone.append(oid)
    parts = [
        str(relations[oid]) + (f" and its {'index' if count == 1 else f'{count} indexes'}" if count else "")
        for oid, count in tables.items()
    ]
    if alone:
        parts.append(f"{'index' if len(alone) == 1 else 'indexes'} {names(relations, alone)}")
    return ", ".join(parts)
