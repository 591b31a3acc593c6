"""What a database says of itself before revisions are applied to it: sizes, blocking sessions, and privileges.

The queries read catalogs and statistics only, and take no lock on a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tools.target import Query

# With partitions, indexes and TOAST. The bytes are those of the last VACUUM or ANALYZE: to measure, a table is locked.
SIZES = """WITH RECURSIVE part (root, oid) AS (
    SELECT c.oid, c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'm') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
    UNION ALL
    SELECT root, inhrelid FROM pg_inherits JOIN part ON oid = inhparent
)
SELECT n.nspname::text, r.relname::text, pg_get_userbyid(r.relowner)::text,
    pg_has_role(%(migrating)s::name, r.relowner, 'USAGE'),
    sum(coalesce(nullif(pg_stat_get_live_tuples(c.oid), 0), greatest(c.reltuples, 0)))::bigint,
    bool_and(c.reltuples >= 0 OR c.relkind = 'p'),
    (sum(c.relpages + coalesce(t.relpages, 0) + i.pages) * current_setting('block_size')::int)::bigint
FROM part JOIN pg_class c USING (oid) LEFT JOIN pg_class t ON t.oid = c.reltoastrelid
JOIN pg_class r ON r.oid = root JOIN pg_namespace n ON n.oid = r.relnamespace
CROSS JOIN LATERAL (
    SELECT coalesce(sum(relpages), 0) FROM pg_index JOIN pg_class x ON x.oid = indexrelid WHERE indrelid = c.oid
) i (pages)
GROUP BY 1, 2, 3, r.relowner"""
ROLE = """SELECT current_user::text, pg_is_in_recovery(), pg_has_role('pg_read_all_stats', 'USAGE'),
    array(SELECT s FROM unnest(%(schemas)s::text[]) s JOIN pg_namespace ON nspname = s
        WHERE NOT has_schema_privilege(%(migrating)s::name, pg_namespace.oid, 'CREATE'))"""
# Of the migrating role's, the database's and the server's limit, the lowest decides; standbys have other slots.
SLOTS = """SELECT least(
    current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', true), '0')::int
        - count(*) FILTER (WHERE usesysid IS NOT NULL),
    CASE WHEN d.datconnlimit >= 0 THEN d.datconnlimit - count(*) FILTER (WHERE a.datid = d.oid) END,
    CASE WHEN r.rolconnlimit >= 0 THEN r.rolconnlimit - count(*) FILTER (WHERE a.usesysid = r.oid) END)
FROM pg_stat_activity a, pg_database d, pg_roles r
WHERE d.datname = current_database() AND r.rolname = %(migrating)s
    AND a.pid NOT IN (SELECT pid FROM pg_stat_replication) AND a.backend_type <> 'parallel worker'
GROUP BY d.datconnlimit, r.rolconnlimit"""
OLDEST = """SELECT
    format('pid %s, %s as %s, %s', pid, coalesce(nullif(application_name, ''), 'no name'), usename, state),
    extract(epoch FROM clock_timestamp() - xact_start)::float
FROM pg_stat_activity
WHERE xact_start IS NOT NULL AND datname = current_database() AND pid <> pg_backend_pid()
UNION ALL
SELECT format('prepared transaction %s of %s', gid, owner), extract(epoch FROM clock_timestamp() - prepared)::float
FROM pg_prepared_xacts WHERE database = current_database()
ORDER BY 2 DESC LIMIT 1"""
STANDBYS = """SELECT count(*), count(*) FILTER (WHERE replay_lsn IS NULL),
    max(pg_wal_lsn_diff(
        CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END, replay_lsn
    ))::bigint,
    max(extract(epoch FROM replay_lag))::float
FROM pg_stat_replication"""


class Size(NamedTuple):
    """A table with its partitions, indexes and TOAST."""

    owner: str
    is_migrated: bool  # whether the role that migrates has its owner's privileges
    rows: int  # estimated
    is_measured: bool
    bytes: int

    def __str__(self) -> str:
        rows = _scaled(self.rows, 1000, ("", " k", " M", " G")) + " rows"
        return f"{rows}, {_bytes(self.bytes) if self.is_measured else 'size unknown: never analyzed'}"


Sizes = dict[tuple[str, str], Size]  # by schema and name


def read_sizes(query: Query, migrating: str) -> Sizes:
    """The sizes of all tables."""
    return {(row[0], row[1]): Size(*row[2:]) for row in query(SIZES, migrating=migrating)}


def describe(query: Query, migrating: str, concerned: Sizes, schemas: Iterable[str]) -> Iterator[str]:
    """What may delay or prevent changes of these tables, a line each; the last one is what this role cannot see.

    `migrating` is the role that runs the revisions, and may be another one.
    """
    used = {*schemas, *(schema for schema, _ in concerned)}
    ((role, is_standby, sees_all, closed),) = query(ROLE, schemas=sorted(used), migrating=migrating)
    if is_standby:
        yield "the server is a standby, on which nothing can be migrated: its primary may differ"
    for (schema, name), size in concerned.items():
        yield f"table {schema}.{name}: {size}"
        if not size.is_migrated:
            yield f"role {migrating} cannot alter or index {schema}.{name}, whose owner is {size.owner}"
    for schema in closed:
        yield f"role {migrating} may not CREATE in schema {schema}"
    ((free,),) = query(SLOTS, migrating=migrating)
    yield f"free connection slots: {free}; a run needs up to 3"
    for who, seconds in query(OLDEST):
        yield f"oldest open transaction: {who}, for {seconds:.0f} s; a concurrent index build waits for its end"
    ((count, hidden, lag, delay),) = query(STANDBYS)
    if count > hidden:
        yield f"standbys: {count}; the last one is {_bytes(lag or 0)} and {delay or 0:.0f} s behind"
    if not sees_all:
        yield (
            f"not visible to {role}: other roles' transactions, and how far standbys are behind; GRANT"
            " pg_read_all_stats shows them"
        )


def _bytes(number: int) -> str:
    return _scaled(number, 1024, (" B", " kB", " MB", " GB", " TB"))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    """`340 MB`, `1.2 M`."""
    number, step = float(number), 0
    while number >= base and step < len(units) - 1:
        number, step = number / base, step + 1
    return f"{number:.1f}".removesuffix(".0") + units[step] if number < 10 else f"{number:.0f}{units[step]}"
