"""The record of what was applied: a table beside the version table, with a row for each step, in its transaction."""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from datetime import datetime, timezone

import alembic
import psycopg2
from alembic.runtime.migration import MigrationStep, RevisionStep, StampStep
from alembic.script import Script, ScriptDirectory
from psycopg2.extensions import QuotedString

from migration_runner import catalog, checksum, revisions
from migration_runner.checksum import RevisionFile
from migration_runner.database import RawConnection, Row
from migration_runner.errors import describe, is_transient, printable, server_message
from migration_runner.settings import Origin

VERSION = "0.2.0"  # of this package

SAVEPOINT = '"migration_runner record"'  # before a statement that may be refused
SEE_DOCS = "see 'The record of what was applied' in docs/operations.md"

# Each column's type, and what CREATE TABLE adds to it.
COLUMNS = {
    "id": ("bigint", "GENERATED ALWAYS AS IDENTITY"),
    "revision": ("text", "NOT NULL"),
    "direction": ("text", "NOT NULL"),  # upgrade, downgrade, stamp
    "applied_at": ("timestamp with time zone", "NOT NULL DEFAULT pg_catalog.clock_timestamp()"),
    "applied_by": ("text", "NOT NULL"),  # run, plan
    "duration": ("interval", ""),
    "role": ("text", "NOT NULL DEFAULT session_user"),
    "host": ("text", ""),  # of a run: in a cluster, the pod
    "repository": ("text", ""),
    "ref": ("text", ""),
    "commit": ("text", ""),
    "file": ("text", ""),
    "file_sha256": ("text", ""),
    "checksum": ("text", ""),  # of what the revision does: checksum.py
    "runner": ("text", ""),  # version
    "alembic": ("text", ""),  # version
}
TYPES = {name: type_ for name, (type_, _) in COLUMNS.items()}
TYPES_JSON = json.dumps(TYPES)
OTHER_COLUMNS = "is another table: its columns differ"
NOT_GRANTED = "may not be read and written by the role"
READ_ONLY = "25006"


def table_name(version_table: str) -> str:
    """The table's name; as the server, it cuts one off at 63 bytes."""
    return f"{version_table}_history".encode()[:63].decode(errors="ignore")


def create_sql(table: str) -> str:
    """The statement that creates the table; `table` is quoted."""
    columns = ", ".join(f"{name} {' '.join(parts)}".rstrip() for name, parts in COLUMNS.items())
    # Not the id alone: after a logical replication, the sequence may start again.
    return f"CREATE TABLE {table} ({columns}, PRIMARY KEY (applied_at, id))"


NEWEST_FIRST = "applied_at DESC, id DESC"


@dataclass(frozen=True)
class Entry:
    """What is shown and compared of a row."""

    id: int
    revision: str  # of a stamp to nothing, `base`
    direction: str
    applied_by: str
    applied_at: datetime
    seconds: float | None
    role: str
    host: str | None
    repository: str | None
    ref: str | None
    commit: str | None
    file: str | None
    file_sha256: str | None
    checksum: str | None

    @property
    def at(self) -> str:
        """When, in UTC, by the server's clock."""
        return self.applied_at.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")

    @property
    def summary(self) -> str:
        """`2026-11-26 17:20:03 UTC: upgrade 002 by app, commit 1aca7e1`."""
        commit = f", commit {self.commit}" if self.commit else ""
        return printable(f"{self.at}: {self.direction} {self.revision} by {self.role}{commit}")

    @property
    def lines(self) -> str:
        """What `alembic current --verbose` adds to the revision."""
        did = {"upgrade": "Applied", "downgrade": "Undone", "stamp": "Stamped"}.get(self.direction, self.direction)
        seconds = f" in {self.seconds:.2f} s" if self.seconds is not None else ""
        host = f" on {self.host}" if self.host else " with a plan" if self.applied_by == "plan" else ""
        code = ", ".join(
            f"{name} {value}".lstrip()
            for name, value in (("", self.repository), ("ref", self.ref), ("commit", self.commit))
            if value
        )
        lines = [f"{did}: {self.at}{seconds}, by {self.role}{host}"] + ([f"From: {code}"] if code else [])
        return "\n".join(map(printable, lines))


class Record:
    """The table in one attempt."""

    def __init__(
        self, raw: RawConnection, script: ScriptDirectory, origin: Origin, table: catalog.Table | None
    ) -> None:
        self.raw, self.script = raw, script
        self.writer = Writer(script, origin, "run", _literals(raw))
        self.table = table.name if table else None  # quoted; None if it does not exist
        self.problem = _problem(table) if table else None
        self.entries: dict[str, Entry] = {}  # each revision's last row, once read
        self.reads = table is not None and not self.problem and table.can_read
        if table and not self.problem and not table.can_write:
            self.problem = f"{table.name} {NOT_GRANTED}"
        self.writes = table is not None and not self.problem

    def read_if_unchanged(self, files: Mapping[str, tuple[str, str]]) -> bool:
        """Read the newest row, if the files are those recorded; else False, and the checksums must be compared."""
        if not self.reads:
            return True
        last = (
            'SELECT DISTINCT ON (revision COLLATE "C") revision, file, file_sha256, direction, checksum'
            f' FROM {self.table} ORDER BY revision COLLATE "C", {NEWEST_FIRST}'
        )
        compared = (
            f"SELECT json_agg(json_build_array(revision, file, file_sha256)) FROM ({last}) last"
            f" WHERE direction <> 'downgrade' AND starts_with(checksum, '{checksum.VERSION}')"
        )
        try:
            rows = self._rows("", f"ORDER BY {NEWEST_FIRST} LIMIT 1", f", ({compared})")
        except ValueError:  # reported by read()
            return False
        for *newest, recorded in rows:
            entry = Entry(*newest)
            self.entries = {entry.revision: entry}
            return all(files.get(name, (file, sha256)) == (file, sha256) for name, file, sha256 in recorded or ())
        return True

    def read(self) -> None:
        """Read the entries."""
        if self.reads:
            try:
                entries = self._entries("DISTINCT ON (revision)", f"ORDER BY revision, {NEWEST_FIRST}")
                self.entries = {entry.revision: entry for entry in entries}
            except ValueError as error:  # a date of the year 10000; another encoding, in an SQL_ASCII database
                self.problem = f"{self.table} cannot be read: {describe(error)}"
                self.writes = False

    def _entries(self, distinct: str, end: str) -> list[Entry]:
        return [Entry(*row) for row in self._rows(distinct, end)]

    def _rows(self, distinct: str, end: str, more: str = "") -> list[Row]:
        seconds = "extract(epoch FROM duration)::pg_catalog.float8"  # the driver reads not every intervalstyle
        columns = ", ".join(Entry.__dataclass_fields__).replace("seconds", seconds)
        return self.raw.query(f"SELECT {distinct} {columns}{more} FROM {self.table} {end}")

    def create(self, schema: str, name: str) -> None:
        """Create the table in the current transaction, which continues if the role may not."""
        self.table = str(self.raw.query("SELECT quote_ident(%s) || '.' || quote_ident(%s)", schema, name)[0][0])
        self.raw.query(f"SAVEPOINT {SAVEPOINT}")
        try:
            self.raw.query(create_sql(self.table))
            self.writes = True
        except psycopg2.Error as error:
            if not is_refusal(self.raw, error):
                raise
            self.raw.query(f"ROLLBACK TO SAVEPOINT {SAVEPOINT}")
            if error.pgcode != READ_ONLY:  # which the first step reports
                self.problem = f"{self.table} cannot be created: {server_message(error)}"

    def insert(self, step: MigrationStep, seconds: float) -> str:
        """The INSERT of the step's rows, for the session after the step."""
        assert self.table
        return self.writer.insert(self.table, self.writer.rows(step), f"'{seconds:.6f} s'")

    def write_purge(self) -> None:
        """Write the row of `stamp --purge base`, in the current transaction."""
        if self.writes:
            self.raw.query(self.insert(StampStep(None, None, is_upgrade=False, branch_move=True), 0))

    def read_newest(self) -> None:
        """Read the row that was written last."""
        self.entries |= {entry.revision: entry for entry in self._entries("", f"ORDER BY {NEWEST_FIRST} LIMIT 1")}

    def show(self, applied: set[str]) -> None:
        """Have Alembic's `current --verbose` and `history --verbose -i` print the rows, too."""
        for revision in self.script.walk_revisions():
            entry = self.entries.get(revision.revision)
            if entry or (revision.revision in applied and not self.problem):
                lines = entry.lines if entry else "Applied: not recorded"
                revision.cmd_format = functools.partial(_with_lines, revision.cmd_format, lines)  # type: ignore[method-assign]

    def since(self, heads: tuple[str, ...], applied: Set[str]) -> Entry | None:
        """The last row, if the database is where it says: else something else has moved it."""
        entry = max(self.entries.values(), key=lambda entry: entry.applied_at, default=None)
        if entry is None:
            return None
        undone = entry.direction == "downgrade" and entry.revision not in applied
        there = entry.direction != "downgrade" and entry.revision in (heads or ("base",))
        return entry if undone or there else None

    def changed(self, applied: set[str]) -> str | None:
        """The message for an applied revision that the code has with other contents: for the first one, if any."""
        for entry in sorted(self.entries.values(), key=lambda entry: entry.applied_at):
            if entry.revision not in applied or entry.direction == "downgrade":
                continue
            if not (entry.checksum and entry.checksum.startswith(checksum.VERSION)):
                continue
            file = self.writer.file(revisions.get(self.script, entry.revision))
            known = (file.name, file.sha256) == (entry.file, entry.file_sha256)
            if not known and file.checksum not in (None, entry.checksum):
                return self._changed_message(entry, file)
        return None

    def _changed_message(self, entry: Entry, file: RevisionFile) -> str:
        name = entry.revision
        commit = f" from commit {entry.commit}" if entry.commit else ""
        then = entry.file or "another file"
        now = f", and now {file.name} claims it" if file.name != entry.file else ", which now does something else"
        literal = self.writer.literal
        accept = f"UPDATE {self.table} SET checksum = {literal(file.checksum)} WHERE id = {entry.id}"
        return printable(
            f"revision {name} was changed after it was applied: on {entry.at}{commit} it was {then}{now};"
            f" if two files had one number, renumber the one that is not recorded here; if it was edited on purpose,"
            f" write a new revision instead or, if the database has that change, {accept}; {SEE_DOCS}"
        )


def is_refusal(raw: RawConnection, error: psycopg2.Error) -> bool:
    """Whether the server refused a statement for good, and nobody cancelled it: the migration continues without."""
    lost = bool(raw.closed)
    return not (lost or error.pgcode == "57014" or is_transient(error, connection_lost=lost))


def _with_lines(cmd_format: Callable[..., str], lines: str, verbose: bool, **options: bool) -> str:
    text = cmd_format(verbose, **options)
    return text.replace("\n\n", f"\n{lines}\n\n", 1) if verbose else text


def _problem(table: catalog.Table) -> str | None:
    """The reason to leave an existing table alone."""
    if table.problem:
        return f"{table.name} {table.problem}"
    return None if TYPES.items() <= table.columns.items() else f"{table.name} {OTHER_COLUMNS}"


class Writer:
    """Writes the statement that adds a step's rows; `literal` quotes a text as SQL."""

    def __init__(
        self, script: ScriptDirectory, origin: Origin, applied_by: str, literal: Callable[[str | None], str]
    ) -> None:
        self.script, self.literal = script, literal
        common = {
            "applied_by": applied_by,
            "host": socket.gethostname() if applied_by == "run" else None,
            "repository": origin.repository,
            "ref": origin.ref,
            "commit": origin.commit,
            "runner": VERSION,
            "alembic": alembic.__version__,
        }
        self.columns = ", ".join(["revision", "direction", "file", "file_sha256", "checksum", "duration", *common])
        self.common = ", ".join(map(literal, common.values()))
        self.files: dict[str, RevisionFile] = {}

    def prepare(self, steps: Iterable[MigrationStep]) -> None:
        """Compute the checksums, which takes a third of the time that it would between two revisions."""
        for step in steps:
            if isinstance(step, RevisionStep):
                _ = self.file(step.revision).checksum

    def file(self, revision: Script) -> RevisionFile:
        """The revision's file, read and hashed once."""
        if revision.revision not in self.files:
            self.files[revision.revision] = RevisionFile(revision)
        return self.files[revision.revision]

    def rows(self, step: MigrationStep) -> list[str]:
        """The step's rows, each without the duration and what they have in common."""
        if isinstance(step, RevisionStep):
            direction, found = "upgrade" if step.is_upgrade else "downgrade", [step.revision]
        else:
            direction, found = "stamp", [revisions.get(self.script, name) for name in step.to_revisions_no_deps]
        rows: list[tuple[str | None, ...]] = []
        for file in map(self.file, found):
            rows.append((file.revision, direction, file.name, file.sha256, file.checksum))
        return [", ".join(map(self.literal, row)) for row in rows or [("base", direction, None, None, None)]]

    def insert(self, table: str, rows: Iterable[str], duration: str) -> str:
        """The INSERT; `table` is quoted, and `duration` is an expression of type interval."""
        values = ", ".join(f"({row}, {duration}, {self.common})" for row in rows)
        return f"INSERT INTO {table} ({self.columns}) VALUES {values}"


def _literals(raw: RawConnection) -> Callable[[str | None], str]:
    """Quotes as this server reads it; a character that its encoding lacks becomes `?`."""
    codec = raw.codec

    def literal(text: str | None) -> str:
        if text is None:
            return "NULL"
        quoted = QuotedString(text.encode(codec, "replace").decode(codec))
        quoted.prepare(raw)
        return str(quoted.getquoted().decode(codec))

    return literal
