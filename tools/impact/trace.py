"""What each statement of a revision does on the server: the locks that it takes, what it rewrites, reads and builds.

SQLAlchemy's events say when a statement starts and ends, and everything else is asked of the server. Its tables may be
empty: which lock a statement takes, and whether it reads or rewrites a table, does not depend on the rows.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg2.extensions
from psycopg2.extensions import TRANSACTION_STATUS_IDLE
from sqlalchemy import Engine, event

from tools.postgres import Postgres, dsn
from tools.target import printable

# The server logs each plan, also of what a function or a DO block runs.
SETTINGS = {
    "session_preload_libraries": "auto_explain",
    "auto_explain.log_min_duration": "0",
    "auto_explain.log_nested_statements": "on",
    "auto_explain.log_verbose": "on",  # with the schemas
    "auto_explain.log_format": "json",
    "log_line_prefix": "%p ",
    "enable_seqscan": "off",  # without rows, the planner would read a table completely although it has an index
    "enable_bitmapscan": "off",  # of an index, this plan does not show which table it is of
    "autovacuum": "off",  # of a table that was never analyzed, the planner assumes ten pages of rows
}
# A plan that finds at least this fraction of a table's rows finds many: so does one of a range or a join, for which the
# planner assumes it, and not one of an equality.
MANY = 0.2

# From the weakest.
MODES = (
    "AccessShareLock",
    "RowShareLock",
    "RowExclusiveLock",
    "ShareUpdateExclusiveLock",
    "ShareLock",
    "ShareRowExclusiveLock",
    "ExclusiveLock",
    "AccessExclusiveLock",
)

RELATIONS = """SELECT c.oid, n.nspname::text, c.relname::text, c.relkind::text, c.relfilenode, i.indrelid,
    EXISTS (SELECT FROM pg_catalog.pg_inherits h WHERE h.inhparent = c.oid)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_index i ON i.indexrelid = c.oid
WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND c.relkind IN ('r', 'p', 'm', 'v', 'f', 'i', 'I')
ORDER BY 2, 3"""
# What VACUUM or ANALYZE of an earlier revision has found: no rows.
FORGET = """UPDATE pg_catalog.pg_class SET reltuples = -1, relpages = 0 WHERE reltuples >= 0 AND relkind IN ('r', 'm')
AND relnamespace <> 'pg_catalog'::regnamespace"""
SCANS = "SELECT relid, seq_scan, coalesce(idx_scan, 0) FROM pg_catalog.{}"
LOCKS = """SELECT pid, relation, mode, granted FROM pg_catalog.pg_locks
WHERE locktype = 'relation' AND pid <> pg_catalog.pg_backend_pid()"""
TRANSACTION = """SELECT l.virtualtransaction, s.setting::int / 1000.0
FROM pg_catalog.pg_locks l, pg_catalog.pg_settings s
WHERE l.pid = pg_catalog.pg_backend_pid() AND s.name = 'lock_timeout' LIMIT 1"""


class Relation(NamedTuple):
    """A table, view or index."""

    oid: int
    schema: str
    name: str
    kind: str  # pg_class.relkind
    file: int
    table: int | None  # of an index
    has_children: bool  # partitions, or tables that inherit from it
    size: str = ""  # in the database that the revisions are for

    @property
    def is_index(self) -> bool:
        return self.table is not None

    @property
    def qualified_name(self) -> str:
        return printable(self.name if self.schema == "public" else f"{self.schema}.{self.name}")

    @property
    def quoted_name(self) -> str:
        """For a statement."""
        return ".".join('"' + part.replace('"', '""') + '"' for part in (self.schema, self.name))

    def __str__(self) -> str:
        return f"{self.qualified_name} ({self.size})" if self.size else self.qualified_name


Relations = dict[int, Relation]
Node = dict[str, Any]  # of a plan
UNSEEN = "(sent past SQLAlchemy)"


Locks = dict[int, str]  # by relation: the strongest


class Moment(NamedTuple):
    """The state of a session and its database, between two statements."""

    relations: Relations
    scans: dict[int, tuple[int, int]]  # by relation: sequential, and by an index
    locks: Locks  # of the session
    held: Locks  # of all sessions


@dataclass
class Statement:
    """A statement that ended, and what it did to relations that existed before the revision, by their oids."""

    text: str  # as the revision has it
    sent: str  # with the values of its parameters
    tag: str  # the server's, such as ALTER TABLE
    transaction: str | None = None  # the server's name of it; None: the statement is one
    lock_timeout: float = 0  # seconds; 0: none
    locks: Locks = field(default_factory=dict)  # newly taken
    held: Locks = field(default_factory=dict)  # by any session of the revision, when it ended
    rewritten: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    scanned: list[int] = field(default_factory=list)  # read completely
    indexed: dict[str, int] = field(default_factory=dict)  # new indexes, and their tables
    changed: dict[int, bool] = field(default_factory=dict)  # of which it may change or lock many rows: whether limited

    @property
    def has_effect(self) -> bool:
        """Not a query on catalogs or a setting, as SQLAlchemy and Alembic have them."""
        return bool(self.locks or self.scanned) or not self.tag.startswith(("SELECT", "SHOW", "SET"))


class Tracer:
    """Traces what is run through SQLAlchemy in this process on this server, whose settings must include SETTINGS."""

    def __init__(
        self, server: Postgres, database: str, version_table: str, sizes: Mapping[tuple[str, str], object]
    ) -> None:
        self.address, self.sizes = dsn(server.url.set(database=database)), sizes
        self.own = (version_table, f"{version_table}_history")
        self.version_statement = (
            rf'(CREATE TABLE|INSERT INTO|UPDATE|DELETE FROM)\s+([\w"]+\.)?"?{re.escape(version_table)}\b'
        )
        self.side = psycopg2.connect(self.address)
        self.side.autocommit = True
        self.log = (server.folder / "log").open(encoding="utf-8", errors="replace")

    @contextmanager
    def tracing(self) -> Iterator[list[Statement]]:
        """Yield a list, to which each statement is added when it ends."""
        self.statements: list[Statement] = []
        query(self.side, FORGET)
        self.relations = _relations(self.side)
        self.existing = {
            oid: relation._replace(size=str(self.sizes.get((relation.schema, relation.name), "")))
            for oid, relation in self.relations.items()
            if relation.name not in self.own
        }
        self.transactions: dict[int, tuple[str, Moment]] = {}  # by pid: the last statement's
        self.rehearsed: Statement | None = None
        self.obstacle: Obstacle | None = None
        self.log.read()
        listeners: dict[str, Callable[..., None]] = {
            "before_cursor_execute": self._before,
            "after_cursor_execute": self._after,
            "handle_error": self._failed,
            "commit": lambda connection: self._add_unseen(connection.connection.dbapi_connection),
        }
        for name, function in listeners.items():
            event.listen(Engine, name, function)
        try:
            yield self.statements
        finally:
            for name, function in listeners.items():
                event.remove(Engine, name, function)
            self._failed()

    def _before(self, _c: object, cursor: Any, text: str, parameters: Any, _context: object, many: bool) -> None:
        raw = cursor.connection
        self.rehearsed = None
        if _commits_each(raw):
            self.rehearsed = self._rehearse(raw, text, (parameters[0] if many else parameters) or None)
            if self.rehearsed is None:
                self.obstacle = Obstacle(self.address, raw.info.backend_pid, self.existing)
            self.log.read()
        else:
            self._add_unseen(raw)
        self.before = self._moment(raw)

    def _rehearse(self, raw: Any, text: str, parameters: Any) -> Statement | None:
        """What it does in a transaction, in which it can be observed; None if it cannot run in one."""
        query(raw, "BEGIN")
        try:
            before = self._moment(raw)
            with _cursor(raw) as cursor:
                cursor.execute(text, parameters)
                statement = self._statement(cursor, text, bool(parameters), before)
                statement.transaction = None
                return statement
        except psycopg2.Error:
            return None
        finally:
            query(raw, "ROLLBACK")

    def _after(self, _c: object, cursor: Any, text: str, parameters: Any, *_: object) -> None:
        statement = self.rehearsed or self._statement(cursor, text, bool(parameters), self.before)
        self.log.read()  # the same plans again
        if self.obstacle:
            seen, self.obstacle = self.obstacle.end(), None
            statement.locks = {oid: mode for oid, mode in seen.items() if oid in self.existing}
            statement.held, statement.transaction = strongest([*statement.held.items(), *statement.locks.items()]), None
        if statement.has_effect and not re.match(self.version_statement, text.lstrip()):
            self.statements.append(statement)

    def _failed(self, *_: object) -> None:
        if self.obstacle:
            self.obstacle.end()
            self.obstacle = None

    def _add_unseen(self, raw: Any) -> None:
        """Add what was done since the last statement: with a cursor of the driver's, such as COPY."""
        ((transaction, _),) = query(raw, TRANSACTION)
        last, before = self.transactions.get(raw.info.backend_pid, ("", None))
        if before is None or last != transaction:
            before = self._moment(raw)._replace(relations=self.relations, locks={})
        made = self._difference(raw, Statement(UNSEEN, "", ""), before)
        if made.locks or made.scanned or made.rewritten or made.indexed:
            self.statements.append(made)

    def _statement(self, cursor: Any, text: str, has_parameters: bool, before: Moment) -> Statement:
        sent = bytes(cursor.query or b"").decode(errors="replace")
        made = Statement(text if has_parameters else sent, sent, cursor.statusmessage or "")
        return self._difference(cursor.connection, made, before)

    def _difference(self, raw: Any, made: Statement, before: Moment) -> Statement:
        """Add what the server says has changed since then."""
        plans = self._plans(raw.info.backend_pid)
        after = self._moment(raw)
        ((transaction, made.lock_timeout),) = query(raw, TRANSACTION)
        made.transaction = transaction
        self.transactions[raw.info.backend_pid], self.relations = (transaction, after), after.relations
        for oid, relation in self.existing.items():
            then, now = before.relations.get(oid), after.relations.get(oid)
            if not relation.is_index:
                if oid in after.held:
                    made.held[oid] = after.held[oid]
                if _is_stronger(after.locks.get(oid), before.locks.get(oid)):
                    made.locks[oid] = after.locks[oid]
            if made.tag == "TRUNCATE TABLE":  # which replaces the files, however large they are
                if then and now and then.file != now.file and not relation.is_index:
                    made.truncated.append(oid)
                continue
            if then and now and then.file != now.file:
                made.rewritten.append(oid)
            (rows, by_index), (rows_before, by_index_before) = (x.scans.get(oid, (0, 0)) for x in (after, before))
            # A new foreign key may be checked with an index on the whole table.
            if rows > rows_before or (by_index > by_index_before and made.tag == "ALTER TABLE"):
                made.scanned.append(oid)
        self._add_indexes(made, before.relations, after.relations)
        self._add_planned(raw, made, plans, before.relations)
        made.scanned.sort(key=[*self.existing].index)
        return made

    def _add_indexes(self, made: Statement, before: Relations, after: Relations) -> None:
        """A changed type replaces an index by another one of the same name, which may even have the old one's file."""
        files = {relation.file for relation in before.values()}
        old = {(relation.schema, relation.name): oid for oid, relation in before.items() if oid not in after}
        for oid, relation in after.items():
            if relation.table not in self.existing or oid in before or relation.file in files:
                continue
            if (replaced := old.get((relation.schema, relation.name))) in self.existing:
                made.rewritten.append(replaced)
            else:
                made.indexed[printable(relation.name)] = relation.table

    def _add_planned(self, raw: Any, made: Statement, plans: list[Node], before: Relations) -> None:
        oids = {(relation.schema, relation.name): oid for oid, relation in before.items() if oid in self.existing}

        def find(node: Node) -> int | None:
            return oids.get((node.get("Schema", ""), node.get("Relation Name", "")))

        for node, is_below_limit in (found for plan in plans for found in _nodes(plan)):
            if reads_all(node) and (oid := find(node)) and oid not in made.scanned:
                made.scanned.append(oid)
            if not _changes(node):
                continue
            below = [child for child, _ in _nodes(node)][1:]
            inserts, locks = node.get("Operation") == "Insert", node["Node Type"] == "LockRows"
            named = below if locks else node.get("Target Tables", [node])
            targets = {oid for target in named if (oid := find(target))}
            many = any(reads_all(child) and (inserts or find(child) in targets) for child in below)
            if not many and not inserts:
                many = below[0]["Plan Rows"] >= MANY * sum(_rows(raw, before[oid]) for oid in targets)
            is_limited = is_below_limit or any(_is_limited(child, below) for child in node.get("Plans", ()))
            for oid in sorted(targets, key=[*self.existing].index) if many else ():
                made.changed[oid] = is_limited and made.changed.get(oid, True)

    def _plans(self, pid: int) -> list[Node]:
        """Of what a session has run since the last call."""
        entries = re.split(r"^(?=\d+ [A-Z]+: )", self.log.read(), flags=re.M)
        found = (entry.partition("  plan:\n") for entry in entries if entry.startswith(f"{pid} "))
        return [json.loads(re.sub("^\t", "", plan, flags=re.M))["Plan"] for _, _, plan in found if plan]

    def _moment(self, raw: Any) -> Moment:
        if _commits_each(raw):
            query(raw, "SELECT pg_catalog.pg_stat_force_next_flush()")
            scans = query(self.side, SCANS.format("pg_stat_user_tables"))
        else:
            scans = query(raw, SCANS.format("pg_stat_xact_user_tables"))
        locks = query(self.side, LOCKS)
        own = strongest((oid, mode) for pid, oid, mode, _ in locks if pid == raw.info.backend_pid)
        held = strongest((oid, mode) for _, oid, mode, is_granted in locks if is_granted)
        return Moment(_relations(raw), {oid: tuple(counts) for oid, *counts in scans}, own, held)


class Obstacle(threading.Thread):
    """Another session, in whose way the statement gets: what it holds or wants is visible while it waits.

    For what cannot run in a transaction, such as CREATE INDEX CONCURRENTLY, and has released its locks when it ends.
    """

    def __init__(self, address: str, pid: int, relations: Relations) -> None:
        super().__init__(daemon=True)
        self.pid, self.done = pid, threading.Event()
        self.seen: Locks = {}
        self.holder, self.side = psycopg2.connect(address), psycopg2.connect(address)
        self.side.autocommit = True
        for relation in relations.values():
            if relation.kind in ("r", "p"):
                query(self.holder, f"LOCK TABLE ONLY {relation.quoted_name} IN SHARE UPDATE EXCLUSIVE MODE")
        self.start()

    def run(self) -> None:
        while not self.seen and not self.done.wait(0.005):
            locks = [row for row in query(self.side, LOCKS) if row[0] == self.pid]
            if not all(is_granted for *_, is_granted in locks):
                self.seen = strongest((oid, mode) for _, oid, mode, _ in locks)
        self.holder.close()

    def end(self) -> Locks:
        """What the statement held and waited for, if it did."""
        self.done.set()
        self.join()
        self.side.close()
        return self.seen


def strongest(locks: Iterable[tuple[int, str]]) -> Locks:
    """The strongest lock on each relation."""
    found: Locks = {}
    for oid, mode in locks:
        if _is_stronger(mode, found.get(oid)):
            found[oid] = mode
    return found


def _relations(connection: Any) -> Relations:
    return {row[0]: Relation(*row) for row in query(connection, RELATIONS)}


def _cursor(connection: Any) -> Any:
    """The driver's own, which a project's env.py may have replaced."""
    return psycopg2.extensions.connection.cursor(connection, cursor_factory=psycopg2.extensions.cursor)


def query(connection: Any, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
    with _cursor(connection) as cursor:
        cursor.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []


def _commits_each(raw: Any) -> bool:
    return bool(raw.autocommit) and raw.info.transaction_status == TRANSACTION_STATUS_IDLE


def blocks(mode: str) -> str:
    """What a lock blocks in other sessions."""
    if mode == MODES[-1]:
        return "reads, writes and DDL"
    return "DDL" if MODES.index(mode) < MODES.index("ShareLock") else "writes and DDL"


def _is_stronger(mode: str | None, other: str | None) -> bool:
    """Than AccessShareLock, too, which blocks only what removes the table."""
    return mode is not None and MODES.index(mode) > MODES.index(other or MODES[0])


def _rows(raw: Any, relation: Relation) -> float:
    """How many rows the planner assumes that a table has."""
    ((((plan,),),),) = (query(raw, f"EXPLAIN (FORMAT json) SELECT FROM ONLY {relation.quoted_name}"),)
    return float(plan["Plan"]["Plan Rows"])


def _nodes(plan: Node, *, is_below_limit: bool = False) -> Iterator[tuple[Node, bool]]:
    """The node and those below it, and whether LIMIT applies to them."""
    yield plan, is_below_limit
    for child in plan.get("Plans", ()):
        yield from _nodes(child, is_below_limit=is_below_limit or plan["Node Type"] == "Limit")


def reads_all(node: Node) -> bool:
    """Whether it reads all of a table, or of an index."""
    return node["Node Type"] in ("Seq Scan", "Index Scan", "Index Only Scan") and "Index Cond" not in node


def _changes(node: Node) -> bool:
    """Whether it changes or locks existing rows."""
    if node.get("Operation") == "Insert":
        return node.get("Conflict Resolution") == "UPDATE"
    return node["Node Type"] == "LockRows" or node.get("Operation") in ("Update", "Delete", "Merge")


def _is_limited(node: Node, others: list[Node]) -> bool:
    """Whether LIMIT applies to the rows that are found, not only to a value that is selected with it."""
    relationship, name = node.get("Parent Relationship"), node.get("Subplan Name", "").removeprefix("CTE ")
    if relationship == "SubPlan":
        return False
    if relationship == "InitPlan" and not any(
        name == other.get("CTE Name") or any(name in other.get(key, "") for key in ("TID Cond", "Index Cond"))
        for other in others
    ):
        return False
    return node["Node Type"] == "Limit" or any(_is_limited(child, others) for child in node.get("Plans", ()))
