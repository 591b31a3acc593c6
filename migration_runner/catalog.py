"""Queries on PostgreSQL's catalog: the version table and its owner, INVALID indexes, sessions.

Each query runs with search_path = pg_catalog, or names that schema itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import psycopg2

from migration_runner.sql import REINDEX_SUFFIX, IndexBuild

if TYPE_CHECKING:
    from collections.abc import Sequence

    from migration_runner.database import RawConnection, Row


class Queryable(Protocol):
    """A connection that runs the runner's own queries."""

    def query(self, statement: str, *parameters: object) -> Sequence[Row]: ...


# The roles that the role trusts anyway: itself, the roles granted to it, the database's owner, superusers. A superuser
# is a member of every role, so membership is read from the catalog, not from pg_has_role().
TRUSTED = """
    WITH RECURSIVE granted AS (
        SELECT oid FROM pg_roles WHERE rolname = session_user OR rolname = current_user
        UNION SELECT m.roleid FROM pg_auth_members m JOIN granted g ON m.member = g.oid
    ), trusted AS (
        SELECT oid FROM granted
        UNION SELECT datdba FROM pg_database WHERE datname = current_database()
        UNION SELECT oid FROM pg_roles WHERE rolsuper OR rolname = 'pg_database_owner'
    )
"""


@dataclass(frozen=True)
class ResolvedSearchPath:
    """What the role's search_path resolves to; names, or None."""

    role: str
    current_schema: str | None
    schema_owner: str | None  # None if the role trusts it
    table_schema: str | None  # of an existing version table
    schemas: tuple[str, ...]  # of the path, those that exist and that the role may use


def resolve_search_path(connection: Queryable, search_path: str, version_table: str) -> ResolvedSearchPath:
    """Resolve names as a revision would; outside a transaction, so that the path is set for one query alone."""
    role, schema, schemas, found = connection.query(
        "SELECT set_config('search_path', %s, true);"
        " SELECT current_user::pg_catalog.text, pg_catalog.current_schema()::pg_catalog.text,"
        " pg_catalog.current_schemas(false)::pg_catalog.text[],"
        " pg_catalog.to_regclass(pg_catalog.quote_ident(%s::pg_catalog.text))::pg_catalog.oid",
        search_path,
        version_table,
    )[0]
    ((owner, table_schema),) = connection.query(
        TRUSTED
        + """
        SELECT (SELECT nspowner::regrole::text FROM pg_namespace
                WHERE nspname = %s::name AND nspowner NOT IN (SELECT oid FROM trusted)),
               (SELECT n.nspname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %s)
        """,
        schema,
        found,
    )
    return ResolvedSearchPath(role, schema, owner, table_schema, tuple(schemas))


def untrusted_creators(connection: Queryable, schemas: Sequence[str]) -> list[str]:
    """`public (PUBLIC, report)`: the schemas in which untrusted roles may create objects."""
    rows = connection.query(
        TRUSTED
        + """
        SELECT n.nspname::text, array_to_string(array_agg(DISTINCT coalesce(r.rolname, 'PUBLIC')), ', ')
        FROM pg_namespace n
        CROSS JOIN LATERAL (
            SELECT grantee FROM aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner)))
            WHERE privilege_type = 'CREATE'
            UNION SELECT n.nspowner
        ) a
        LEFT JOIN pg_roles r ON r.oid = a.grantee
        WHERE n.nspname = ANY (%s::name[]) AND a.grantee NOT IN (SELECT oid FROM trusted)
        GROUP BY 1 ORDER BY 1
        """,
        list(schemas),
    )
    return [f"{schema} ({roles})" for schema, roles in rows]


# The relations of these names in a schema, for the runner's tables. `problem` is the reason to use none of it, or NULL:
# reading or writing it runs its dependents, and the functions, operators and types that they use, whose owners must all
# be trusted. System objects have no entry in pg_depend. `owner_problem` is a reason to write nothing into it; a reader
# that may only read does not trust the migrating role, which owns it.
TABLES = (
    TRUSTED
    + """
    SELECT c.oid, c.relname::text, quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS name, c.relhastriggers,
        CASE
            WHEN c.relkind <> 'r' THEN concat('is a ', CASE c.relkind
                WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table'
                WHEN 'p' THEN 'partitioned table' WHEN 'S' THEN 'sequence' ELSE 'relation' END,
                ', not an ordinary table')
            WHEN row_security_active(c.oid) THEN 'has row-level security, which applies to the role'
            WHEN code.what IS NOT NULL THEN concat('runs the ', code.what, ', which is owned by ', code.owner)
        END AS problem,
        CASE WHEN c.relowner NOT IN (SELECT oid FROM trusted)
            THEN concat('is owned by ', c.relowner::regrole, ': connect as that role, or grant it to this one')
            END AS owner_problem,
        (SELECT jsonb_object_agg(attname, format_type(atttypid, atttypmod)) FROM pg_attribute
         WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS columns
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN LATERAL (
        WITH dependents AS (
            SELECT classid, objid FROM pg_depend WHERE refclassid = 'pg_class'::regclass AND refobjid = c.oid
            UNION SELECT 'pg_class'::regclass, c.oid
        ), used AS (
            SELECT d.refclassid AS classid, d.refobjid AS objid
            FROM pg_depend d JOIN dependents USING (classid, objid)
        ), owned AS (
            SELECT 'function ' || p.oid::regprocedure::text AS what, p.proowner AS owner
            FROM pg_proc p WHERE p.oid IN (SELECT objid FROM used WHERE classid = 'pg_proc'::regclass)
            UNION ALL
            SELECT 'function ' || p.oid::regprocedure::text, p.proowner
            FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid WHERE t.tgrelid = c.oid AND NOT t.tgisinternal
            UNION ALL
            SELECT 'operator ' || o.oid::regoperator::text, o.oprowner
            FROM pg_operator o WHERE o.oid IN (SELECT objid FROM used WHERE classid = 'pg_operator'::regclass)
            UNION ALL
            SELECT 'type ' || t.oid::regtype::text, t.typowner
            FROM pg_type t WHERE t.oid IN (SELECT objid FROM used WHERE classid = 'pg_type'::regclass)
        )
        SELECT what, owner::regrole AS owner FROM owned WHERE owner NOT IN (SELECT oid FROM trusted) LIMIT 1
    ) code ON true
"""
)


@dataclass(frozen=True)
class Table:
    """One of the runner's own tables; `name` is quoted, with its schema."""

    name: str
    has_triggers: bool
    problem: str | None  # the reason to use none of it
    columns: dict[str, str]  # name and type
    can_read: bool
    can_write: bool

    def max_length(self, column: str) -> int | None:
        """In characters; None: unlimited."""
        length = re.search(r"\((\d+)\)", self.columns[column])
        return int(length[1]) if length else None


def tables(raw: RawConnection, schema: str, *names: str, writes: bool) -> dict[str, Table]:
    """Inspect those of the runner's tables that exist, before anything reads or writes them; by their names."""
    rows = raw.query(
        "SELECT relname, name, relhastriggers, coalesce(problem, CASE WHEN %s THEN owner_problem END),"
        " coalesce(columns, '{}'), has_table_privilege(oid, 'SELECT'),"
        f" has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT') FROM ({TABLES}"
        " WHERE n.nspname = %s::name AND c.relname = ANY (%s::name[])) found",
        writes,
        schema,
        list(names),
    )
    return {str(name): Table(*row) for name, *row in rows}


def version_table_problem(raw: RawConnection, table: Table) -> str | None:
    """The reason to refuse the version table, whose rows are read for it."""
    if table.problem:
        return table.problem
    column = table.columns.get("version_num")
    if column is None or not re.match(r"(character varying|text|character)(\(|$)", column):
        has = f"has a version_num of type {column}" if column else "has no column version_num"
        return f"{has}, so it is not Alembic's"
    ((null, twice),) = raw.query(
        f"SELECT EXISTS (SELECT FROM {table.name} WHERE version_num IS NULL),"
        f" EXISTS (SELECT FROM {table.name} GROUP BY version_num HAVING count(*) > 1)"
    )
    if null:
        return f"has a row without a revision: DELETE FROM {table.name} WHERE version_num IS NULL"
    if twice:
        return (
            f"has a duplicate revision: DELETE FROM {table.name} a USING {table.name} b"
            " WHERE a.version_num = b.version_num AND a.ctid > b.ctid"
        )
    return None


@dataclass(frozen=True)
class Index:
    """An index; `name` is quoted, with its schema."""

    oid: int
    table: int
    relname: str
    name: str
    valid: bool


# An index that another session is still building is INVALID, too, and is not reported: its builder is in the progress
# view and holds this lock on the table. Only ordinary indexes: a partitioned one may be INVALID by design,
# until its parts are attached.
INDEXES = """
    SELECT c.oid, i.indrelid, c.relname::text, quote_ident(n.nspname) || '.' || quote_ident(c.relname), i.indisvalid
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE (NOT i.indisvalid OR i.indrelid = ANY (%s::oid[])) AND c.relkind = 'i' AND n.nspname <> 'pg_toast'
    AND NOT EXISTS (
        SELECT FROM pg_locks l JOIN pg_stat_progress_create_index p USING (pid)
        WHERE l.relation = i.indrelid AND l.mode = 'ShareUpdateExclusiveLock' AND l.pid <> pg_backend_pid())
    ORDER BY 4
"""


def indexes(connection: Queryable, tables: Sequence[int] = ()) -> list[Index]:
    """The INVALID indexes of the database, and all indexes of these tables."""
    return [Index(*row) for row in connection.query(INDEXES, list(tables))]


@dataclass(frozen=True)
class ResolvedBuild:
    """A CONCURRENTLY statement on an index, with its names as the server resolves them."""

    build: IndexBuild
    tables: frozenset[int] = frozenset()  # its table and the partitions; empty: a whole schema, or unresolved
    index: str | None = None  # case-folded and truncated as on the server
    existed: bool = True

    def caused(self, index: Index, invalid_before: frozenset[int]) -> bool:
        """Whether this statement left the INVALID index, and not another service on the same table."""
        new = index.oid not in invalid_before
        if self.tables and index.table not in self.tables:
            return False
        if self.index is None or len(self.tables) > 1:  # no name, or the names of the partitions' indexes
            return new
        name = re.sub(REINDEX_SUFFIX, "", index.relname) if self.build.rebuilds else index.relname
        return name == self.index


def resolve(raw: RawConnection, build: IndexBuild) -> ResolvedBuild:
    """Have the server resolve the names, with the search_path that the statement will have; outside a transaction."""
    try:
        return _resolve(raw, build)
    except (psycopg2.ProgrammingError, psycopg2.DataError):  # a name that only the parser can read, such as U&"\0061"
        return ResolvedBuild(build)


def _resolve(raw: RawConnection, build: IndexBuild) -> ResolvedBuild:
    if build.table is None:
        rows = raw.query(
            "SELECT i.indrelid, c.relname::pg_catalog.text FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c"
            " ON c.oid OPERATOR(pg_catalog.=) i.indexrelid"
            " WHERE c.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass(%s::pg_catalog.text)::pg_catalog.oid",
            build.index,
        )
        return ResolvedBuild(build, _with_partitions(raw, rows[0][0]), rows[0][1]) if rows else ResolvedBuild(build)
    (table,) = raw.query("SELECT pg_catalog.to_regclass(%s::pg_catalog.text)::pg_catalog.oid", build.table)[0]
    if build.index is None:
        return ResolvedBuild(build, _with_partitions(raw, table))
    index, existed = raw.query(
        "SELECT s.name::pg_catalog.text, EXISTS (SELECT FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c"
        " ON c.oid OPERATOR(pg_catalog.=) i.indexrelid WHERE i.indrelid OPERATOR(pg_catalog.=) %s::pg_catalog.oid"
        " AND c.relname OPERATOR(pg_catalog.=) s.name)"
        " FROM (SELECT ((pg_catalog.parse_ident(%s::pg_catalog.text))[1])::pg_catalog.name AS name) s",
        table,
        build.index,
    )[0]
    return ResolvedBuild(build, frozenset([table] if table else []), index, existed)


def _with_partitions(raw: RawConnection, table: int | None) -> frozenset[int]:
    if table is None:
        return frozenset()
    rows = raw.query("SELECT relid::pg_catalog.oid FROM pg_catalog.pg_partition_tree(%s::pg_catalog.oid)", table)
    return frozenset([table, *(relation for (relation,) in rows)])


SESSION_DESCRIPTION = (
    "'pid ' || a.pid || ', ' || coalesce(nullif(a.application_name, ''), 'unnamed')"
    " || ' as ' || coalesce(a.usename, '?') || coalesce(' from ' || host(a.client_addr), '')"
)


def lock_holder(connection: Queryable, key: int) -> str | None:
    """The session that holds the advisory lock: `pid 71, hcm-db-migrations as app from 10.0.0.7`."""
    rows = connection.query(
        f"SELECT {SESSION_DESCRIPTION} FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
        " WHERE l.locktype = 'advisory' AND l.granted"
        " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        " AND l.objsubid = 1 AND (l.classid::bigint << 32 | l.objid::bigint) = %s",
        key,
    )
    return str(rows[0][0]) if rows else None


def blockers(connection: Queryable, pid: int) -> list[str]:
    """The sessions that block this one."""
    query = f"SELECT {SESSION_DESCRIPTION} FROM pg_stat_activity a WHERE pid = ANY (pg_blocking_pids(%s)) ORDER BY pid"
    return [str(name) for (name,) in connection.query(query, pid)]


def waiters(connection: Queryable, pid: int) -> list[tuple[int, str]]:
    """The sessions that wait for this one: pids and descriptions."""
    rows = connection.query(
        f"SELECT a.pid, {SESSION_DESCRIPTION} FROM pg_stat_activity a"
        " WHERE a.pid IN (SELECT pid FROM pg_locks WHERE NOT granted) AND %s = ANY (pg_blocking_pids(a.pid))"
        " ORDER BY 1",
        pid,
    )
    return [(int(other), str(name)) for other, name in rows]


# Each view's columns for phase, done and total.
PROGRESS = {
    "create_index": ("phase", "coalesce(nullif(blocks_done, 0), tuples_done)",
                     "coalesce(nullif(blocks_total, 0), tuples_total)"),
    "cluster": ("phase", "heap_blks_scanned", "heap_blks_total"),
    "vacuum": ("phase", "heap_blks_scanned", "heap_blks_total"),
    "analyze": ("phase", "sample_blks_scanned", "sample_blks_total"),
    "copy": ("command", "bytes_processed", "bytes_total"),
}  # fmt: skip


@dataclass(frozen=True)
class Activity:
    """What a session is doing now."""

    statement: str | None  # None: no statement is running
    waits_for: str | None  # `Lock: relation`
    progress: str | None  # `building index: scanning table, 40 %`


def activity(connection: Queryable, pid: int) -> Activity:
    """The session's current statement and its progress."""
    rows = connection.query(
        "SELECT state, query, wait_event_type, wait_event FROM pg_stat_activity WHERE pid = %s", pid
    )
    if not rows or rows[0][0] != "active":
        return Activity(None, None, None)
    _, query, wait_type, wait = rows[0]
    waits_for = f"{wait_type}: {wait}" if wait_type in ("Lock", "IO", "LWLock") else None
    for view, (phase, done, total) in PROGRESS.items():
        name = f"pg_stat_progress_{view}"
        if not connection.query("SELECT to_regclass(%s) IS NOT NULL", name)[0][0]:
            continue
        found = connection.query(f"SELECT {phase}, {done}, {total} FROM {name} WHERE pid = %s", pid)
        if found:
            what, so_far, whole = found[0]
            return Activity(query, waits_for, f"{what}, {100 * so_far // whole} %" if whole else str(what))
    return Activity(query, waits_for, None)


def transaction_status(connection: Queryable, transaction_id: int) -> str | None:
    """The transaction's status: committed, aborted, in progress; None if it is too old to be known."""
    status = connection.query("SELECT txid_status(%s)", transaction_id)[0][0]
    return str(status) if status else None
