"""What is shown of each revision: on a terminal, and the same as Markdown."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tools.impact.trace import Relation, Relations, Statement, blocks
from tools.impact.verdict import Finding, names, rewritten
from tools.markdown import cells, head, prose
from tools.target import printable

LIMITS = (
    "An empty database does not show how many rows a statement reads or changes, how long one takes that reads no"
    " table, whether existing rows or the application's violate a constraint, what a loop over rows runs, which"
    " queries need an index, whom row-level security hides rows from, or who relies on the old definition of a view or"
    " function."
)
COLUMNS = ("", "Statement", "New locks on existing tables", "Held", "Takes longer with more rows")
LONGEST = 120  # characters of a statement


@dataclass
class Report:
    """A revision, and what it does."""

    title: str
    relations: Relations = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    lint: list[str] = field(default_factory=list)
    failure: str = ""
    hidden: str = ""  # why not all of it can be seen

    @property
    def verdict(self) -> str:
        if self.findings and not self.failure:
            return "NO"
        unknown = self.failure or self.hidden
        return f"unknown: {unknown}" if unknown else "yes"

    @property
    def concerned(self) -> list[Relation]:
        """The tables that existed before, and are locked."""
        return [self.relations[oid] for statement in self.statements for oid in statement.locks]

    def rows(self) -> list[tuple[str, ...]]:
        """The rows of its table, in the order of COLUMNS; the same again, and what takes no lock, shares one."""
        rows: list[tuple[str, ...]] = []
        first = 1
        for number, statement in enumerate(self.statements, 1):
            text, locks, held, work = self._row(number, statement)
            same = bool(rows) and rows[-1][2:] == (locks, held, work)
            if same and statement.text == self.statements[number - 2].text:
                rows[-1] = (f"{first}-{number}", *rows[-1][1:])
            elif same and locks == "none" and not work:
                shown = rows[-1][1].partition("\n")[0]
                rows[-1] = (f"{first}-{number}", f"{shown}\nand {number - first} more without locks", *rows[-1][2:])
            else:
                first = number
                rows.append((str(number), text, locks, held, work))
        return rows

    def _row(self, number: int, statement: Statement) -> tuple[str, ...]:
        text = printable(" ".join(statement.text.split()))
        locks = [
            f"{self.relations[oid].qualified_name}: {mode.removesuffix('Lock')} (blocks {blocks(mode)})"
            for oid, mode in statement.locks.items()
        ]
        held = "during the statement"
        if statement.transaction is not None:
            held = "to the transaction's end"
            if later := sum(other.transaction == statement.transaction for other in self.statements[number:]):
                held += f", after {later} more statement{'s' * (later > 1)}"
        work = [f"rewrites {rewritten(self.relations, statement.rewritten)}"] if statement.rewritten else []
        if scanned := [oid for oid in statement.scanned if oid not in statement.rewritten]:
            work.append(f"reads all of {names(self.relations, scanned)}")
        work += [
            f"builds index {index} on {self.relations[table]}"
            for index, table in statement.indexed.items()
            if table not in statement.rewritten
        ]
        if statement.changed:
            changed = ", ".join(self.relations[oid].qualified_name for oid in statement.changed)
            work.append(f"changes or locks rows of {changed}")
        return (
            text[:LONGEST] + "..." * (len(text) > LONGEST),
            "\n".join(locks) or "none",
            held if locks else "",
            "\n".join(work),
        )


def terminal(reports: list[Report], notes: list[str]) -> None:
    """Print the reports on a terminal, or into a pipe."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for report in reports:
        style = "bold red" if report.verdict != "yes" else "bold green"
        console.print(Text(f"\n{report.title}", style="bold"))
        console.print(Text("safe while the application runs: ").append(report.verdict, style=style))
        for finding in report.findings:
            console.print(indented(finding.why, 2, console))
            console.print(indented(f"-> {finding.advice}", 4, console))
        if rows := report.rows():
            table = Table(*COLUMNS, show_lines=True)
            for row in rows:
                table.add_row(*map(Text, row))
            console.print(table)
        for line in report.lint:
            console.print(indented(f"squawk: {line}", 2, console))
    console.print()
    for note in notes:
        console.print(indented(printable(note), 0, console))


def indented(text: str, columns: int, console: Console) -> Text:
    """Wrapped lines that begin after so many spaces."""
    indent = " " * columns
    width = console.width
    return Text(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False))


def markdown(reports: list[Report], notes: list[str]) -> str:
    """The same as Markdown."""
    lines = ["## Impact of the revisions"]
    for report in reports:
        lines += ["", f"### {prose(report.title)}", ""]
        lines += [f"Safe while the application runs: **{prose(report.verdict)}**", ""]
        lines += [f"- {prose(finding.why)}<br>→ {prose(finding.advice)}" for finding in report.findings]
        if rows := report.rows():
            lines += [*head(*COLUMNS), *(cells(*map(prose, row)) for row in rows), ""]
        lines += [f"- squawk: {prose(line)}" for line in report.lint]
    return "\n".join([*lines, "", *(f"{prose(note)}\n" for note in notes)]) + "\n"
