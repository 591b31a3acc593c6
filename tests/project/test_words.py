"""The repository uses the terms of the table in CONTRIBUTING.md, and none that the table replaces."""

import re
from collections.abc import Iterator

from tests.support.git import git
from tools.paths import ROOT

CONTRIBUTING, TABLE = (ROOT / "CONTRIBUTING.md").read_text().split("| We write | not |\n")
# Third-party text, and files that are never edited after a release.
BETWEEN = r"[\s#_*>\"'-]+"
EXEMPT = re.compile(r".*\.sum|.*requirements[\w-]*\.txt|LICENSE|migrations/versions/.*")


def _rules() -> dict[str, str]:
    rows = [row.strip("| ").split(" | ") for row in TABLE.splitlines()[1:]]
    return {old: term for term, terms in rows for old in terms.split(", ")}


def _texts() -> Iterator[tuple[str, str]]:
    """(name, its name and text) of every file that git tracks or would track."""
    for name in git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name == "CONTRIBUTING.md":
            yield name, CONTRIBUTING
        elif not EXEMPT.fullmatch(name) and (ROOT / name).is_file():
            text = (ROOT / name).read_text()
            yield name, name + "\n" + (re.split(r"\n## \[\d", text)[0] if name == "CHANGELOG.md" else text)


def test_every_file_uses_the_terms_of_the_glossary() -> None:
    rules = _rules()
    # A phrase may be wrapped, even in a comment or a string, or be part of a test's name.
    phrases = "|".join(rf"{BETWEEN}".join(map(re.escape, re.split("[ -]", old))) for old in rules)
    found = [
        f"{name}:{text.count(chr(10), 0, match.start())}: '{match[0]}'; write: {term}"
        for name, text in _texts()
        for match in re.finditer(rf"(?<![^\W_])(?:{phrases})(?![^\W_])", text, re.I)
        for old in [re.sub(BETWEEN, " ", match[0]).lower()]
        for term in [next(term for rule, term in rules.items() if rule.replace("-", " ") == old)]
    ]
    assert not found, "\n".join(found)
