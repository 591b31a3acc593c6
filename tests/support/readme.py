"""The code blocks of both READMEs, of docs/gitops.md and of docs/fleets.md.

A test cuts out the block that it runs, so the block cannot change without the test.

tests/project/test_readmes.py fails for a block that no test cuts out, unless its source gives the reason, on the line
above it: `<!-- not run by a test: <reason> -->`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from markdown_it import MarkdownIt

from tools.paths import CHART, ROOT

README, CHART_README = ROOT / "README.md", CHART / "README.md"
GITOPS, FLEETS = ROOT / "docs/gitops.md", ROOT / "docs/fleets.md"


@dataclass(frozen=True)
class Block:
    """A fenced or indented code block, with the line that it starts at, and the reason why no test runs it."""

    text: str
    line: int
    reason: str = ""


@functools.cache
def blocks(document: str) -> list[Block]:
    found, reason = [], ""
    for token in MarkdownIt().parse(document):
        if token.type in ("fence", "code_block"):
            found.append(Block(token.content, (token.map or [0])[0] + 1, reason))
        comment = re.fullmatch(r"<!-- not run by a test: (.+) -->\s*", token.content)
        reason = comment[1] if comment and token.type == "html_block" else ""
    return found


def root_block(part: str) -> str:
    """The one block of README.md that contains `part`, a literal."""
    return _cut(README.read_text(), part)


def chart_block(part: str) -> str:
    """The one block of the chart's README.md that contains `part`, a literal."""
    return _cut(CHART_README.read_text(), part)


def gitops_block(part: str) -> str:
    """The one block of docs/gitops.md that contains `part`, a literal."""
    return _cut(GITOPS.read_text(), part)


def fleets_block(part: str) -> str:
    """The one block of docs/fleets.md that contains `part`, a literal."""
    return _cut(FLEETS.read_text(), part)


def chart_command(part: str) -> str:
    """The one `kubectl create` in a sentence or table of the chart's README.md that contains `part`."""
    commands: list[str] = re.findall(r"`(kubectl create [^`]+)`", CHART_README.read_text())
    return _only(commands, part)


def _cut(document: str, part: str) -> str:
    return _only([block.text for block in blocks(document)], part)


def _only(texts: list[str], part: str) -> str:
    found = [text for text in texts if part in text]
    assert len(found) == 1, f"{len(found)} contain {part!r}"
    return found[0]
