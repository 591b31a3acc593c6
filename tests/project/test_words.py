"""The repository uses the terms of the table in CONTRIBUTING.md, and none that the table replaces."""

import re
from collections.abc import Iterator

from tests.support.programs import run
from tools.paths import ROOT

CONTRIBUTING, TABLE = (ROOT / "CONTRIBUTING.md").read_text().split("| We write | not |\n")
# Third-party text, and files that are never edited after a release.
EXEMPT = re.compile(r".*\.sum|.*requirements[\w-]*\.txt|LICENSE|migrations/versions/.*")


def _rules() -> dict[str, str]:
    rows = [row.strip("| ").split(" | ") for row in TABLE.splitlines()[1:]]
    return {old: term for term, terms in rows for old in terms.split(", ")}


def _texts() -> Iterator[tuple[str, str]]:
    listed = run(["git", "ls-files"], cwd=ROOT, verbatim=True, check=True).stdout
    for name in listed.splitlines():
        if name == "CONTRIBUTING.md":
            yield name, CONTRIBUTING
        elif not EXEMPT.fullmatch(name) and (ROOT / name).is_file():
            text = (ROOT / name).read_text()
            yield name, re.split(r"\n## \[\d", text)[0] if name == "CHANGELOG.md" else text


def test_every_file_uses_the_terms_of_the_glossary() -> None:
    rules = _rules()
    # A phrase may be wrapped, even in a comment, or be part of a test's name.
    phrases = "|".join(r"[\s#_]+".join(map(re.escape, old.split())) for old in rules)
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: '{old}'; write: {rules[old.lower()]}"
        for name, text in _texts()
        for match in re.finditer(rf"(?<![^\W_])(?:{phrases})(?![^\W_])", text, re.I)
        for old in [re.sub(r"[\s#_]+", " ", match[0])]
    ]
    assert not found, "\n".join(found)
