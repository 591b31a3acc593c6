"""The statements of a plan (`--sql`) that do in psql what the runner does in a run; the server resolves the names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from migration_runner import catalog, checksum, record, revisions, sql
from migration_runner.session import LOCK_TIMEOUT
from migration_runner.settings import Settings

# A prepared statement adds the rows. It exists only if the record can be written; RESET ALL in a revision keeps it.
RECORD = "migration_runner record"
# After an autocommit_block, of the last transaction.
DURATION = "pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) pg_catalog.transaction_timestamp()"
# The last row of each revision has its checksum; $1 has the code's, with file name and SHA-256.
CHANGED = f"""SELECT revision FROM (SELECT DISTINCT ON (revision) * FROM %s ORDER BY revision, {record.NEWEST_FIRST}) r
  WHERE direction <> 'downgrade' AND starts_with(checksum, '{checksum.VERSION}') AND checksum <> ($1 -> revision ->> 0)
  AND (file, file_sha256) IS DISTINCT FROM ($1 -> revision ->> 1, $1 -> revision ->> 2) ORDER BY applied_at LIMIT 1"""


class PlanSQL:
    """The statements for one version table."""

    def __init__(self, settings: Settings, quote: Callable[[str], str]) -> None:
        self.version_table = settings.version_table
        self.table = ".".join(quote(name) for name in (settings.schema, settings.version_table) if name)
        self.search_path = quote(settings.schema) if settings.schema else "DEFAULT"
        found = (
            "(SELECT n.nspname::pg_catalog.text FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n"
            " ON n.oid OPERATOR(pg_catalog.=) c.relnamespace WHERE c.oid OPERATOR(pg_catalog.=)"
            f" pg_catalog.to_regclass({text(self.table)})::pg_catalog.oid)"
        )
        self.schema = text(settings.schema) if settings.schema else f"coalesce({found}, pg_catalog.current_schema())"
        self.history = text(record.table_name(settings.version_table))

    @property
    def settings(self) -> list[str]:
        """What each revision starts with, as Session.defaults; which names an older server lacks is not known here."""
        return [
            "SET SESSION AUTHORIZATION DEFAULT;",
            "RESET ROLE;",
            f"SET search_path = {self.search_path};",
            f"SET lock_timeout = '{LOCK_TIMEOUT}';",
            "SET statement_timeout = 0;",
            "SET idle_in_transaction_session_timeout = 0;",
        ]

    @property
    def lock(self) -> str:
        """The run's lock, under the same key."""
        name = f"pg_catalog.concat({self.schema}, {text('.' + self.version_table)})"
        digest = f"pg_catalog.sha256(pg_catalog.convert_to({name}, 'UTF8'))"
        hexadecimal = f"pg_catalog.encode(pg_catalog.substr({digest}, 1, 8), 'hex')"
        key = f"pg_catalog.concat('x', {hexadecimal})::pg_catalog.bit(64)::pg_catalog.int8"
        return block(f"NOT pg_catalog.pg_try_advisory_lock(\n  {key})", "another migration is running")

    def position(self, heads: Iterable[str]) -> str:
        """The check that the database is there."""
        there = ", ".join(map(text, sorted(heads)))
        found = f'ARRAY(SELECT version_num::pg_catalog.text COLLATE "C" FROM {self.table} ORDER BY 1)'
        differs = f"{found} OPERATOR(pg_catalog.<>) ARRAY[{there}]::pg_catalog.text[]"
        at = ", ".join(sorted(heads)) or "base"
        return block(differs, f"the database is not at {at}, where this plan starts")

    def open_record(self, applied: Iterable[str], writer: record.Writer) -> str:
        """As Record: find or create it, and refuse a database that has another revision under the name of one."""
        files = [writer.file(revisions.get(writer.script, name)) for name in sorted(applied)]
        contents = {file.revision: [file.checksum, file.name, file.sha256] for file in files}
        before, after = writer.insert("%s", ["$1, $2, $3, $4, $5"], DURATION).split("%s", 1)
        return f"""DO $plan$ DECLARE
  path pg_catalog.text := pg_catalog.current_setting('search_path');
  home pg_catalog.text := {self.schema};
  history pg_catalog.text := {self.history};
  found pg_catalog.text;
  reason pg_catalog.text;
  changed pg_catalog.text;
BEGIN
  PERFORM pg_catalog.set_config('search_path', 'pg_catalog', true);
  BEGIN
    IF to_regclass(format('%I.%I', home, history)) IS NULL THEN
      EXECUTE format({literal(record.create_sql("%I.%I"))}, home, history);
    END IF;
    SELECT t.name, CASE
      WHEN t.problem IS NOT NULL THEN t.problem
      WHEN t.owner_problem IS NOT NULL THEN t.owner_problem
      WHEN NOT t.columns @> {literal(record.TYPES_JSON)} THEN {literal(record.OTHER_COLUMNS)}
      WHEN NOT (has_table_privilege(t.oid, 'SELECT') AND has_table_privilege(t.oid, 'INSERT'))
        THEN {literal(record.NOT_GRANTED)}
    END INTO found, reason FROM ({catalog.TABLES.strip()}
      WHERE n.nspname = home AND c.relname = history) t;
  EXCEPTION WHEN OTHERS THEN
    reason := concat('cannot be created: ', sqlerrm);
  END;
  IF reason IS NOT NULL THEN
    RAISE WARNING 'nothing is recorded: %.% %', home, history, reason;
  ELSE
    EXECUTE format({literal(CHANGED)}, found) INTO changed USING {literal(json.dumps(contents))}::jsonb;
    IF changed IS NOT NULL THEN
      RAISE EXCEPTION 'revision % was changed after it was applied: ''alembic upgrade head'' names both files', changed;
    END IF;
    EXECUTE concat('PREPARE "{RECORD}" AS {before}', found, {literal(after)});
  END IF;
  PERFORM set_config('search_path', path, true);
END $plan$;"""


def record_row(row: str) -> str:
    """Add a row, if the record can be written."""
    prepared = f"SELECT FROM pg_catalog.pg_prepared_statements WHERE name OPERATOR(pg_catalog.=) {text(RECORD)}"
    execute = literal(f'EXECUTE "{RECORD}" ({row})')
    return f"""DO $plan$ BEGIN IF EXISTS ({prepared}) THEN
  EXECUTE {execute};
END IF; EXCEPTION WHEN OTHERS THEN RAISE WARNING 'a step is not recorded: %', sqlerrm; END $plan$;"""


def index(build: sql.IndexBuild, name: str) -> str | None:
    """The run's check of an index build."""
    if build.index is None or (build.table is None and not build.rebuilds):
        return None
    if any(
        name and name.upper().startswith("U&") for name in (build.index, build.table)
    ):  # only the parser can read it
        return None
    table = f"pg_catalog.to_regclass({text(build.table or build.index)})::pg_catalog.oid"
    if build.table is None:
        same = f"indexrelid OPERATOR(pg_catalog.=) {table}"
        table = f"(SELECT indrelid FROM pg_catalog.pg_index WHERE {same})"
    parts = f"pg_catalog.parse_ident({text(build.index)})"
    added = sql.REINDEX_SUFFIX if build.rebuilds else "$"
    found = (
        "SELECT FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) i.indexrelid"
        f"\n  WHERE NOT i.indisvalid AND i.indrelid OPERATOR(pg_catalog.=) {table}"
        f"\n  AND pg_catalog.regexp_replace(c.relname::pg_catalog.text, {text(added)}, {text('')})"
        f"\n  OPERATOR(pg_catalog.=) ({parts})[pg_catalog.array_upper({parts}, 1)]::pg_catalog.name::pg_catalog.text"
    )
    return block(
        f"EXISTS (\n  {found})",
        f"{name} is incomplete: it left an INVALID index; DROP INDEX CONCURRENTLY it, then run the rest again",
    )


def literal(text: str | None) -> str:
    """A text as SQL."""
    return "NULL" if text is None else "'" + text.replace("'", "''") + "'"


def text(text: str) -> str:
    """A literal of type text: an untyped one could match a function that another role has created."""
    return f"{literal(text)}::pg_catalog.text"


def block(condition: str, message: str) -> str:
    """A statement that fails if the condition holds."""
    raises = f"RAISE EXCEPTION USING MESSAGE = {literal(message)};"
    return f"DO $plan$ BEGIN IF {condition} THEN\n  {raises}\nEND IF; END $plan$;"
