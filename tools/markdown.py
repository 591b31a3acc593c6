"""Markdown: whatever a text contains, it is shown literally."""

from __future__ import annotations

import re

from tools.target import printable


def cells(*texts: str) -> str:
    """A row of a table, of texts that are Markdown."""
    escaped = [text.replace("|", "\\|") for text in texts]
    return f"| {' | '.join(escaped)} |"


def head(*texts: str) -> list[str]:
    """An empty line, and the head of a table."""
    return ["", cells(*texts), "|---" * len(texts) + "|"]


def prose(text: str) -> str:
    """The same text in Markdown, on one line."""
    lines = [printable(line.expandtabs(1)) for line in text.strip().splitlines()]
    text = re.sub(r"([\\`*\[\]<>~&$#])|(?<!\w)_|_(?!\w)", lambda match: f"\\{match[0]}", "\n".join(lines))
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", text).replace("\n", "<br>")


def code(text: str) -> str:
    """The same text as code in Markdown, on one line; nothing if it is empty."""
    text = printable(re.sub(r"\s*\n\s*", " ", text))
    fence, space = "`" * (longest_fence(text) + 1), " " * (text.strip(" `") != text)
    return text and f"{fence}{space}{text}{space}{fence}"


def longest_fence(text: str) -> int:
    """The number of backticks that stand together."""
    return max(map(len, re.findall("`+", text)), default=0)
