"""Write the generated files. `make docs` runs this; a test fails if the result differs from the committed files.

From the chart's values.yaml: the table in its README.md, the descriptions in values.schema.json, which editors show,
and files/defaults.json, because a template cannot read values.yaml. From the tests marked `fault`:
the tables of docs/troubleshooting.md. From the revisions: docs/schema.md.

    python -m tools.docs              write them
    python -m tools.docs --check      only name the files that differ
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import checkout
from tools.paths import CHART, ROOT
from tools.postgres import Postgres, dsn
from tools.steps import interrupt_on_signals, run

TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
SCHEMA = ROOT / "docs" / "schema.md"
# The groups of faults, in the order of docs/troubleshooting.md.
GROUPS = [
    "Database",
    "Network",
    "Process and pod",
    "Concurrency",
    "Partial work",
    "Rolling back",
    "Supply chain",
    "Code and settings",
]
# What is between these comments is generated.
VALUES = re.compile(
    r"(?<=<!-- values: begin \(written by `make docs` from values.yaml\) -->\n).*(?=<!-- values: end -->)", re.S
)
FAULTS = re.compile(
    r"(?<=<!-- faults: begin \(written by `make docs` from the tests\) -->\n).*(?=<!-- faults: end -->)", re.S
)


def documented(values: Path = CHART / "values.yaml") -> list[tuple[str, object, str]]:
    """Return (dotted key, default, prose) of every value with a `# --` comment, in the order of the file.

    Raises ValueError for a value that has no such comment, and whose parents have none.
    """
    text = values.read_text()
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, default: dict[str, Any], path: str) -> Iterator[tuple[str, object, str]]:
        for key, value in node.value:
            name = f"{path}{key.value}"
            if prose := _comment_above(lines, key.start_mark.line):
                yield name, default[key.value], prose
            elif isinstance(value, yaml.MappingNode) and value.value:
                yield from walk(value, default[key.value], f"{name}.")
            else:
                raise ValueError(f'"{name}" in {values.name} has no comment: put "# -- <what it is for>" above it')

    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{values.name} has no values")
    return list(walk(root, yaml.safe_load(text), ""))


def _comment_above(lines: list[str], line: int) -> str:
    """The `# --` comment that ends directly above `line`, as one line of prose; "" if there is none."""
    prose: list[str] = []
    for text in reversed(lines[:line]):
        if not (comment := re.fullmatch(r"\s*# (-- )?(.*)", text)):
            break
        prose.insert(0, comment[2])
        if comment[1]:
            return " ".join(prose)
    return ""


def generated() -> dict[Path, str]:
    """Return what each generated file should contain: {path: text}."""
    rows = ["| Value | Default | What it is |", "|---|---|---|"]
    rows += [f"| `{name}` | `{json.dumps(default)}` | {prose} |" for name, default, prose in documented()]
    readme, table = CHART / "README.md", "\n".join(rows) + "\n"
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = CHART / "values.schema.json"
    return {
        readme: VALUES.sub(lambda _: table, readme.read_text()),
        schema: _formatted(_described(json.loads(schema.read_text()))) + "\n",
        CHART / "files" / "defaults.json": json.dumps(defaults, indent=2) + "\n",
    }


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, with every value's prose as its description. Raises KeyError for a value that it does not know."""
    for name, _, prose in documented():
        *parents, key = name.split(".")
        of = schema["definitions"]["values"]
        for parent in parents:
            of = of["properties"][parent]
        of["properties"][key] = {"description": prose.replace("`", "'")} | {
            keyword: value for keyword, value in of["properties"][key].items() if keyword != "description"
        }
    return schema


def _formatted(value: Any, indent: str = "", before: int = 0) -> str:
    """JSON with each object and array in one line if that is at most 120 columns wide, `before` of which are used."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or not value or len(indent) + before + len(line) < 120:
        return line
    inner = f"{indent}  "
    if isinstance(value, list):
        items, ends = [_formatted(item, inner) for item in value], "[]"
    else:
        keys = [f"{json.dumps(key)}: " for key in value]
        items = [key + _formatted(item, inner, len(key)) for key, item in zip(keys, value.values(), strict=True)]
        ends = "{}"
    separator = f",\n{inner}"
    return f"{ends[0]}\n{inner}{separator.join(items)}\n{indent}{ends[1]}"


class _Collected:
    """A pytest plugin that keeps the collected tests."""

    items: list[pytest.Item]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def troubleshooting() -> str:
    """Return docs/troubleshooting.md: a table for each group, a row for each mark `fault` of a test.

    It collects the tests in this process, so a test calls it in another one. Raises RuntimeError if that fails.
    """
    collected, output = _Collected(), io.StringIO()
    with contextlib.redirect_stdout(output):
        arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", str(ROOT / "tests")]
        code = pytest.main(arguments, plugins=[collected])
    if code != pytest.ExitCode.OK:
        raise RuntimeError("\n".join(output.getvalue().splitlines()[-25:]))
    tables: dict[str, dict[str, None]] = {group: {} for group in GROUPS}  # one row, however many parameters
    for item in sorted(collected.items, key=lambda item: item.location[:2]):
        path, name = item.path.relative_to(ROOT), item.name.split("[")[0]
        for mark in reversed(list(item.iter_markers("fault"))):
            cells = [mark.kwargs[key].replace("|", "\\|") for key in ("sees", "fault", "state", "do")]
            row = " | ".join([*cells, f"[{path.stem}::{name}](../{path})"])
            tables[mark.args[0]][f"| {row} |"] = None
    lines: list[str] = []
    for group, rows in tables.items():
        if rows:
            head = "| Symptom | Fault | Resulting state | Action | Test |"
            lines += [f"## {group}", "", head, "|---|---|---|---|---|", *rows, ""]
    return FAULTS.sub(lambda _: "\n".join(lines), TROUBLESHOOTING.read_text())


def schema() -> str:
    """Return docs/schema.md: what the revisions make of an empty database. Raises RuntimeError if one fails."""
    with Postgres() as server:
        # Another process imports the runner, and no setting of this one changes what the revisions do.
        return run([sys.executable, "-m", "tools.schema"], cwd=ROOT, env={"DATABASE_URL": dsn(server.url)})


def main(arguments: list[str]) -> str | None:
    checkout.commit(ROOT)  # the tests, which are collected, read git's list of files
    texts = {**generated(), SCHEMA: schema(), TROUBLESHOOTING: troubleshooting()}
    differing = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if arguments == ["--check"]:
        names = ", ".join(str(path.relative_to(ROOT)) for path in differing)
        return f"{names}: differ from the generated text; run `make docs` and commit" if differing else None
    for path in differing:
        path.parent.mkdir(exist_ok=True)
        path.write_text(texts[path])
    return None


if __name__ == "__main__":
    interrupt_on_signals()
    try:
        sys.exit(main(sys.argv[1:]))
    except RuntimeError as error:
        sys.exit(f"FAILED: {error}")
