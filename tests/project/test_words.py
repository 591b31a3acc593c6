"""The repository uses the terms of CONTRIBUTING's table, and none that it replaces."""

import re
import subprocess
from collections.abc import Iterator

from tools.paths import ROOT

CONTRIBUTING, TABLE = (ROOT / "CONTRIBUTING.md").read_text().split("| We write | not |\n")
# Other people's text, and what is never edited after a release.
EXEMPT = re.compile(r".*\.sum|.*requirements[\w-]*\.txt|LICENSE|migrations/versions/.*")


def _rules() -> dict[str, str]:
    rows = [row.strip("| ").split(" | ") for row in TABLE.splitlines()[1:]]
    return {old: term for term, terms in rows for old in terms.split(", ")}


def _texts() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if name == "CONTRIBUTING.md":
            yield name, CONTRIBUTING
        elif not EXEMPT.fullmatch(name) and (ROOT / name).is_file():
            text = (ROOT / name).read_text()
            yield name, re.split(r"\n## \[\d", text)[0] if name == "CHANGELOG.md" else text


def test_every_file_uses_the_terms_of_the_glossary() -> None:
    rules = _rules()
    # A phrase may be wrapped, also in a comment, or be a part of a test's name.
    phrases = "|".join(r"[\s#_]+".join(map(re.escape, old.split())) for old in rules)
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: '{old}'; write: {rules[old.lower()]}"
        for name, text in _texts()
        for match in re.finditer(rf"(?<![^\W_])(?:{phrases})(?![^\W_])", text, re.I)
        for old in [re.sub(r"[\s#_]+", " ", match[0])]
    ]
    assert not found, "\n".join(found)
