"""A minimal SQL tokenizer: it distinguishes comments, literals, names and words.

What a statement did is read from the server; this module only classifies it: its verb and object for the log, and
whether it builds an index concurrently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Token(NamedTuple):
    kind: str  # word, name (quoted), literal, symbol
    text: str


_TOKEN = re.compile(
    r"""
    (?P<space>\s+|--[^\n]*)
  | (?P<comment>/\*)
  | (?P<literal>[eE]'(?:[^'\\]|\\.|'')*(?:'|\Z) | (?:[bBxXnN]|[uU]&)?'(?:[^']|'')*(?:'|\Z) | \d[\w.]*
      | \$\$.*?(?:\$\$|\Z) | \$(?P<tag>[^\W\d]\w*)\$.*?(?:\$(?P=tag)\$|\Z))
  | (?P<name>(?:[uU]&)?"(?:[^"]|"")*(?:"|\Z))
  | (?P<word>[^\W\d][\w$]*)
  | (?P<symbol>.)
    """,
    re.X | re.S,
)


def tokens(statement: str) -> Iterator[Token]:
    """The statement's tokens without whitespace and comments, which nest in PostgreSQL."""
    position = 0
    while match := _TOKEN.match(statement, position):
        position = match.end()
        if match["comment"]:
            position = _end_of_comment(statement, position)
        elif not match["space"]:
            kind = next(kind for kind in ("literal", "name", "word", "symbol") if match[kind] is not None)
            yield Token(kind, match[0])


def _end_of_comment(statement: str, position: int) -> int:
    depth = 1
    for mark in re.compile(r"/\*|\*/").finditer(statement, position):
        depth += 1 if mark[0] == "/*" else -1
        if depth == 0:
            return mark.end()
    return len(statement)


# After these words come values, columns or another statement.
_ENDS = frozenset(
    ["VALUES", "SET", "AS", "WHERE", "USING", "ADD", "IS", "PASSWORD", "ENCRYPTED", "WITH", "LIKE", "RETURNING"]
)


# The part of a statement that is read for a summary.
LONGEST = 2_000


def summarize(statement: str) -> str:
    """Verb and object, as `CREATE INDEX CONCURRENTLY a_x ON a`: no literal, no value, no comment.

    Of a script, up to four statements.
    """
    summaries: list[str] = [""]
    ended = False
    for token in tokens(statement[:LONGEST]):
        if token.text == ";":
            if summaries[-1]:
                summaries.append("")
            if len(summaries) > 4:
                summaries[-1] = "..."
                break
            ended = False
        elif not ended:
            part = summaries[-1]
            names = token.kind in ("word", "name")
            if token.text == "." and part:
                summaries[-1] += "."
            elif names and not (part and token.text.upper() in _ENDS) and len(part) < 120:
                summaries[-1] += token.text if not part or part.endswith(".") else f" {token.text}"
            else:
                ended = True
    return "; ".join(filter(None, summaries))


@dataclass(frozen=True)
class IndexBuild:
    """A statement that builds, rebuilds or drops an index concurrently; names unresolved, as written."""

    index: str | None
    table: str | None
    rebuilds: bool = False  # REINDEX


# What REINDEX CONCURRENTLY appends to the names of the new index and of the replaced one.
REINDEX_SUFFIX = r"_cc(new|old)\d*$"


class _Reader:
    def __init__(self, statement: str) -> None:
        self.tokens = tokens(statement)
        self.next()

    def next(self) -> str:
        """Advance; return the token that was current."""
        before = getattr(self, "text", "")
        token = next(self.tokens, Token("end", ""))
        self.kind, self.text = token
        return before

    def takes(self, *words: str) -> bool:
        """Skip these words if they come next; all of them must match."""
        for word in words:
            if self.kind != "word" or self.text.upper() != word:
                return False
            self.next()
        return True

    def name(self) -> str | None:
        """A name as written, schema included."""
        if self.kind not in ("word", "name"):
            return None
        name = self.next()
        while self.text == ".":
            self.next()
            name += f".{self.next()}"
        return name


def index_build(statement: str) -> IndexBuild | None:
    """What the statement builds, rebuilds or drops CONCURRENTLY; None for any other statement."""
    read = _Reader(statement)
    while read.text == ";":
        read.next()
    if read.takes("CREATE"):
        read.takes("UNIQUE")
        if not (read.takes("INDEX") and read.takes("CONCURRENTLY")):
            return None
        read.takes("IF", "NOT", "EXISTS")
        name = None if read.kind == "word" and read.text.upper() == "ON" else read.name()
        read.takes("ON")
        read.takes("ONLY")
        return IndexBuild(name, read.name())
    if read.takes("DROP"):
        if not (read.takes("INDEX") and read.takes("CONCURRENTLY")):
            return None
        read.takes("IF", "EXISTS")
        return IndexBuild(read.name(), None)
    if not read.takes("REINDEX"):
        return None
    concurrently = False
    if read.text == "(":
        while read.text not in (")", ""):
            if read.takes("CONCURRENTLY"):
                concurrently = read.text.upper() not in ("FALSE", "OFF", "0")
            else:
                read.next()
        read.next()
    kind = read.next().upper()
    concurrently |= read.takes("CONCURRENTLY")
    if not concurrently:
        return None
    name = read.name()
    return IndexBuild(name if kind == "INDEX" else None, name if kind == "TABLE" else None, rebuilds=True)


def sets_lock_timeout(statement: str) -> bool:
    """Whether the statement is `SET lock_timeout`."""
    read = _Reader(statement)
    if not read.takes("SET"):
        return False
    if not read.takes("SESSION"):
        read.takes("LOCAL")
    return read.takes("LOCK_TIMEOUT")


_ATOMIC = frozenset(
    ["CREATE", "ALTER", "DROP", "INSERT", "UPDATE", "DELETE", "MERGE", "SELECT", "WITH", "TRUNCATE", "COMMENT", "GRANT",
     "REVOKE", "REFRESH", "SET", "COPY", "LOCK", "VALUES", "TABLE", "SHOW", "EXPLAIN", "ANALYZE"]
)  # fmt: skip


def is_atomic(statement: str) -> bool:
    """Whether it does all or nothing outside a transaction; DO, CALL, REINDEX and others may commit only a part."""
    first = next((token.text.upper() for token in tokens(statement) if token.kind == "word"), "")
    return first in _ATOMIC and not is_script(statement) and not detaches(statement)


def detaches(statement: str) -> bool:
    """Whether it is ALTER TABLE ... DETACH PARTITION ... CONCURRENTLY, which waits for all transactions, too."""
    read = _Reader(statement)
    if not (read.takes("ALTER") and read.takes("TABLE")):
        return False
    words = [token.text.upper() for token in tokens(statement[:LONGEST]) if token.kind == "word"]
    return words[-1:] == ["CONCURRENTLY"] and "DETACH" in words


def is_script(statement: str) -> bool:
    """Whether it is several statements: one transaction if the runner sends them, separate ones in psql."""
    ended = False
    for token in tokens(statement):
        if ended and token.text != ";":
            return True
        ended |= token.text == ";"
    return False
