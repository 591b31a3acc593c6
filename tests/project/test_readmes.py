"""Every code block of both READMEs, docs/gitops.md and docs/fleets.md is run by a test, or its source says why not."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support.readme import (
    CHART_README,
    FLEETS,
    GITOPS,
    README,
    blocks,
    chart_block,
    fleets_block,
    gitops_block,
    root_block,
)
from tools.paths import ROOT

CUT = {
    root_block.__name__: README,
    chart_block.__name__: CHART_README,
    gitops_block.__name__: GITOPS,
    fleets_block.__name__: FLEETS,
}


def _cut_out(source: str) -> Iterator[tuple[str, str]]:
    """(function, part) of each call that cuts out a block; the part must be a literal."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CUT:
            yield node.func.id, ast.literal_eval(node.args[0])


def _problems(document: str, parts: list[str]) -> list[str]:
    counts = {part: sum(part in block.text for block in blocks(document)) for part in parts}
    found = [f"{count} blocks contain {part!r}" for part, count in counts.items() if count != 1]
    for block in blocks(document):
        used = any(part in block.text for part in parts)
        if used == bool(block.reason):
            found.append(f"{block.line}: " + ("marked as not run, but a test does" if used else "run by no test"))
    return found


@pytest.mark.parametrize("function", CUT)
def test_every_block_is_run_by_a_test_or_says_why_not(function: str) -> None:
    sources = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    parts = [part for source in sources for name, part in _cut_out(source) if name == function]
    assert _problems(CUT[function].read_text(), parts) == []


DOCUMENT = """
```bash
make used
```

1. A list:

   ```yaml
   unused: yes
   ```

A paragraph:

    indented: unused

<!-- not run by a test: it deletes everything -->
```bash
rm -r
```

<!-- not run by a test: no longer true -->

    make also-used

<!-- another comment -->
```
a drawing
```
"""


def test_a_block_that_no_test_runs_is_reported() -> None:
    source = 'def test_x(): run(root_block("make used")); run(root_block("also-used")); chart_block("indented")'
    parts = [part for name, part in _cut_out(source) if name == "root_block"]
    assert parts == ["make used", "also-used"]
    assert _problems(DOCUMENT, [*parts, "make", "gone"]) == [
        "2 blocks contain 'make'",
        "0 blocks contain 'gone'",
        "8: run by no test",
        "14: run by no test",
        "23: marked as not run, but a test does",
        "26: run by no test",
    ]


def test_a_part_that_is_no_literal_is_refused() -> None:
    with pytest.raises(ValueError, match="malformed"):
        list(_cut_out("root_block(part)"))
