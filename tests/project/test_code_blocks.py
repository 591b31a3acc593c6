"""Every code block of the project's documents is run by a test, or its source says why not."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support.documents import Block, all_blocks, block, blocks
from tools.paths import ROOT


def _parts(source: str) -> Iterator[str]:
    """The part that each call of `block` cuts out; it must be a literal."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == block.__name__:
            yield ast.literal_eval(node.args[0])


def _problems(found: dict[str, list[Block]], parts: list[str]) -> list[str]:
    """What is wrong with the blocks of each document, for these parts."""
    texts = [each.text for listed in found.values() for each in listed]
    counts = {part: sum(part in text for text in texts) for part in parts}
    problems = [f"{count} blocks contain {part!r}" for part, count in counts.items() if count != 1]
    for name, listed in found.items():
        for each in listed:
            used = any(part in each.text for part in parts)
            if used == bool(each.reason):
                what = "marked as not run, but a test does" if used else "run by no test"
                problems.append(f"{name}:{each.line}: {what}")
    return problems


def test_every_block_is_run_by_a_test_or_says_why_not() -> None:
    parts = [part for path in (ROOT / "tests").rglob("*.py") for part in _parts(path.read_text())]
    found = {str(path.relative_to(ROOT)): listed for path, listed in all_blocks().items()}
    assert _problems(found, parts) == []


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
    parts = list(_parts('def test_x(): run(block("make used")); run(block("also-used")); other("indented")'))
    assert parts == ["make used", "also-used"]
    assert _problems({"x.md": blocks(DOCUMENT)}, [*parts, "make", "gone"]) == [
        "2 blocks contain 'make'",
        "0 blocks contain 'gone'",
        "x.md:8: run by no test",
        "x.md:14: run by no test",
        "x.md:23: marked as not run, but a test does",
        "x.md:26: run by no test",
    ]


def test_a_part_that_is_no_literal_is_refused() -> None:
    with pytest.raises(ValueError, match="malformed"):
        list(_parts("block(part)"))
