"""The code blocks of the project's documents.

A test cuts out the block that it runs, so the block cannot change without the test. It may move to another document.

tests/project/test_code_blocks.py fails for a block that no test cuts out, unless the line above it gives the reason:
`<!-- not run by a test: <reason> -->`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from tools.paths import CHART, ROOT

CHART_README = CHART / "README.md"
# Not those without commands, nor what a test reports.
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    CHART_README,
    ROOT / "tools/offline_cluster/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


@dataclass(frozen=True)
class Block:
    """A fenced or indented code block, with the line that it starts at, and the reason why no test runs it."""

    text: str
    line: int
    reason: str = ""


def blocks(document: str) -> list[Block]:
    """The blocks of a document's text, without diagrams."""
    found, reason = [], ""
    for token in MarkdownIt().parse(document):
        if token.type in ("fence", "code_block") and token.info != "mermaid":
            found.append(Block(token.content, (token.map or [0])[0] + 1, reason))
        comment = re.fullmatch(r"<!-- not run by a test: (.+) -->\s*", token.content)
        reason = comment[1] if comment and token.type == "html_block" else ""
    return found


@functools.cache
def all_blocks() -> dict[Path, list[Block]]:
    return {path: blocks(path.read_text()) for path in DOCUMENTS}


def block(part: str) -> str:
    """The one block of all documents that contains `part`, a literal."""
    return _only([each.text for found in all_blocks().values() for each in found], part)


def chart_command(part: str) -> str:
    """The one `kubectl create` in a sentence or table of the chart's README.md that contains `part`."""
    commands: list[str] = re.findall(r"`(kubectl create [^`]+)`", CHART_README.read_text())
    return _only(commands, part)


def _only(texts: list[str], part: str) -> str:
    found = [text for text in texts if part in text]
    assert len(found) == 1, f"{len(found)} contain {part!r}"
    return found[0]
