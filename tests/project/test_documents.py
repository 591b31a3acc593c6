"""The documents: every link resolves, every document is linked, and no prose is too wide for a terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.support.git import git
from tools.paths import ROOT

WIDTH = 160  # columns
MARKDOWN = [ROOT / name for name in git(ROOT, "ls-files", "*.md").splitlines() if not name.startswith("tests/")]
parametrized = pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _links(path: Path) -> list[tuple[Path, str]]:
    """(file or folder, anchor) of each link within the repository, also of pictures."""
    tokens = [
        inline for token in MarkdownIt().enable("table").parse(path.read_text()) for inline in token.children or ()
    ]
    addresses = [str(token.attrs.get("href") or token.attrs.get("src", "")) for token in tokens]
    found = [address.partition("#") for address in addresses if address and "://" not in address]
    return [((path.parent / file).resolve() if file else path, anchor) for file, _, anchor in found]


@parametrized
def test_every_link_within_the_repository_resolves(path: Path) -> None:
    for target, anchor in _links(path):
        assert target.exists(), target
        assert not anchor or anchor in _anchors(target), f"{target}#{anchor}"


def test_every_document_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    following = [ROOT / "README.md"]
    while following:
        path = following.pop()
        reached.add(path)
        following += {target for target, _ in _links(path) if target.suffix == ".md"} - reached
    assert set(MARKDOWN) - reached == set()


@parametrized
def test_no_line_of_prose_is_too_wide(path: Path) -> None:
    """A line of a table cannot be broken."""
    lines, tokens = path.read_text().splitlines(), MarkdownIt().enable("table").parse(path.read_text())
    paragraphs = [token.map for token in tokens if token.type == "paragraph_open" and token.map]
    numbers = [number for start, end in paragraphs for number in range(start, end)]
    assert [f"{path.name}:{number + 1}" for number in numbers if len(lines[number]) > WIDTH] == []


def test_every_document_and_heading_that_a_message_names_exists() -> None:
    """A run's message ends with what to read."""
    sources = "\n".join(path.read_text() for path in (ROOT / "migration_runner").glob("*.py"))
    named = re.findall(r"(?:'([A-Z][\w ]+)' in )?\b((?:docs/)?\w+\.md)", sources)
    assert {document for _, document in named} >= {"docs/troubleshooting.md", "docs/operations.md"}
    for heading, document in named:
        assert not heading or heading.lower().replace(" ", "-") in _anchors(ROOT / document), heading
