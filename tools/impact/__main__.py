"""`make impact`: what revisions do to the tables of a running application, before they are applied anywhere.

On the embedded PostgreSQL the revisions before are applied, then each revision with a tracer (trace.py). REVISIONS
names one, or a range such as 002:head; else it is what the database of DATABASE_URL has not applied, or what this
branch adds to BASE, by default the remote's default branch. That database is only read (live.py).
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import alembic.command
import psycopg2
from alembic.config import Config
from alembic.script import Script, ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError

from tools import checkout, target
from tools.impact import live
from tools.impact.report import LIMITS, Report, markdown, terminal
from tools.impact.trace import SETTINGS, Statement, Tracer
from tools.impact.verdict import Schema, hidden, judge
from tools.paths import BIN, ROOT
from tools.postgres import Postgres, dsn
from tools.steps import UnavailableError, interrupt_on_signals, log
from tools.target import Target, printable

# The run sets these limits itself.
LINT_EXCLUDED = ("require-lock-timeout", "require-statement-timeout", "prefer-robust-stmts")


def select(script: ScriptDirectory, applied: list[str] | None) -> list[Script]:
    """The revisions to trace, in order; `applied` is what the database has, if there is one."""
    if given := os.environ.get("REVISIONS"):
        lower, colon, upper = given.rpartition(":")
        try:
            if not colon:
                return list(filter(None, script.get_revisions(given)))
            return list(reversed(list(script.iterate_revisions(upper or "heads", lower or "base"))))
        except (RevisionError, CommandError) as error:
            raise RuntimeError(f"REVISIONS is '{given}': {error}; 'alembic history' lists the revisions") from None
    if len(heads := script.get_heads()) > 1:
        raise RuntimeError(
            f"there are {len(heads)} heads ({', '.join(sorted(heads))}), and a run refuses that: set the"
            " 'down_revision' of one to the other, see docs/troubleshooting.md"
        )
    if applied is not None:
        return list(reversed(list(script.iterate_revisions("heads", tuple(applied) or "base"))))
    try:
        checkout.commit(ROOT)
    except UnavailableError as error:
        raise UnavailableError(f"{error}; or set REVISIONS to a range, such as 002:head") from None
    base = os.environ.get("BASE") or _git("rev-parse", "--abbrev-ref", "origin/HEAD") or "origin/main"
    start = _git("merge-base", "HEAD", base)
    if not start:
        raise RuntimeError(
            f"git finds no merge base of HEAD and {base}: fetch it, set BASE to the branch to compare with, or set"
            " REVISIONS to a range, such as 002:head"
        )
    new = _git("diff", "-z", "--name-only", "--no-renames", "--diff-filter=A", start, "--", ".").split("\0")
    new += _git("ls-files", "-z", "--others", "--exclude-standard", "--full-name", "--", ".").split("\0")
    top = Path(_git("rev-parse", "--show-toplevel"))
    paths = {(top / name).resolve() for name in new if name}
    return [revision for revision in reversed(list(script.walk_revisions())) if Path(revision.path).resolve() in paths]


def _git(*arguments: str) -> str:
    """What git prints, or nothing."""
    result = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    return "" if result.returncode else result.stdout.strip()


def trace(config: Config, revisions: list[Script], tracer: Tracer) -> Iterator[Report]:
    """Apply each revision in this process, up to the first one that fails."""
    for number, revision in enumerate(revisions, 1):
        report = Report(title(revision))
        log(f"{number} of {len(revisions)}: {report.title}")
        before = Schema.read(tracer.side)
        with tracer.tracing() as statements:
            try:
                alembic.command.upgrade(config, revision.revision)
            except CommandError as error:
                # Of the runner's line: not which revision, and not what is to be done about the database.
                reason = str(error).partition(" failed: ")[2].partition("; ")[0] or str(error)
                report.failure = f"it fails here: {reason}"
        report.relations, report.statements = tracer.existing, statements
        report.findings = judge(tracer.existing, statements, before, Schema.read(tracer.side))
        report.hidden = hidden(tracer.existing, statements)
        report.lint = lint(statements)
        yield report
        if report.failure:
            yield from (Report(title(later), failure=f"it follows {revision.revision}") for later in revisions[number:])
            return


def in_thread(function: Callable[[], list[Report]]) -> list[Report]:
    """Run it where a revision's runner handles no signals, so that this process does: it stops the server."""
    future: Future[list[Report]] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


def title(revision: Script) -> str:
    """`002 add a status column (20251202_143000_002_add_a_status_column.py)`."""
    return printable(f"{revision.revision} {revision.doc} ({Path(revision.path).name})")


def lint(statements: Sequence[Statement]) -> list[str]:
    """What squawk says of them, as `statement 2: rule: message`."""
    sql, starts, transaction = "", [], None
    for statement in statements:
        if statement.transaction != transaction:
            sql += "COMMIT;\n" * bool(transaction) + "BEGIN;\n" * bool(statement.transaction)
            transaction = statement.transaction
        starts.append(sql.count("\n"))
        sql += statement.sent.rstrip("; \n") + "\n;\n"  # it may end in a comment
    command: list[str | Path] = [BIN / "squawk", "--reporter=Json", "--pg-version=15", "--stdin-filepath=revision.sql"]
    command.append(f"--exclude={','.join(LINT_EXCLUDED)}")
    sql += "COMMIT;\n" * bool(transaction)
    result = subprocess.run(command, input=sql, capture_output=True, text=True, check=False)
    if result.returncode and not result.stdout:
        raise RuntimeError(f"squawk: {result.stderr.strip()}")
    numbers: dict[str, list[int]] = defaultdict(list)
    for found in json.loads(result.stdout or "[]"):
        number = bisect_right(starts, found["line"])
        numbers[f"{found['rule_name']}: {' '.join(found['message'].split())}"].append(number)
    more = {text: f" and {len(of) - 1} more" if len(of) > 1 else "" for text, of in numbers.items()}
    return [f"statement {of[0]}{more[text]}: {text}" for text, of in numbers.items()]


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """With these variables and no others."""
    given = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(given)


def main() -> None:
    config = Config(ROOT / "alembic.ini")
    script = ScriptDirectory.from_config(config)
    database, sizes = None, live.Sizes()
    if os.environ.get("DATABASE_URL"):
        target.check_settings()
        with target.reading(target.database_url()) as query:
            database = Target(query)
            sizes = live.read_sizes(query, database.owner)
    else:
        target.alembic("history", env=os.environ)
    revisions = select(script, database.revisions if database else None)
    if not revisions:
        print("no revisions to trace; REVISIONS=002:head names others")
        return
    chosen = {revision.revision for revision in revisions}
    before = sorted({parent for revision in revisions for parent in revision._all_down_revisions} - chosen)
    with Postgres(**SETTINGS) as server:
        ours = int(server.execute("SHOW server_version_num")[0][0]) // 10000
        if database:
            database.upgrade(server, before)
            variables = database.environment(server)
        else:
            variables = target.without_database(os.environ) | {"DATABASE_URL": dsn(server.url)}
            variables.pop("DB_SCHEMA", None)
            for revision in before:
                target.alembic("upgrade", revision, what="on an empty PostgreSQL: ", env=variables)
        table = os.environ.get("ALEMBIC_VERSION_TABLE", "alembic_version")
        with environment(variables):
            logging.disable()  # the run's own lines
            tracer = Tracer(server, database.name if database else "postgres", table, sizes)
            reports = in_thread(lambda: list(trace(config, revisions, tracer)))
    notes = [LIMITS]
    if database:
        tables = {(table.schema, table.name) for report in reports for table in report.concerned}
        with target.reading(target.database_url()) as query:
            concerned = {table: size for table, size in sizes.items() if table in tables}
            lines = live.describe(query, database.owner, concerned, database.schemas)
            version = f"PostgreSQL {database.version // 10000}; traced on {ours}"
            notes += [f"database {database.name}: {line}" for line in [version, *lines]]
    terminal(reports, notes)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(markdown(reports, notes))


if __name__ == "__main__":
    interrupt_on_signals()
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; everything that was started is stopped", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, OSError, ValueError, CommandError, psycopg2.Error) as error:
        print(f"FAILED: {printable(str(error).strip())}", file=sys.stderr)
        sys.exit(2)
