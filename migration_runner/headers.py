"""The order of the revisions, read without running their files: a run that has nothing to do needs no more.

A file that is written as the template writes it is matched by an expression; of another one, the syntax tree shows
whether running it could give another answer.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from alembic.script import ScriptDirectory
from alembic.util import to_tuple

# What stands at the beginning of a line, outside a string, is only this: docstrings, imports, the assignments, and
# upgrade() and downgrade() without decorators and defaults. Only these run on import, and none of them changes what is
# assigned. \r and \f are not matched where they would begin another line for Python.
_END = r"[ \t]*(?:\#[^\r\n]*)?\r?\n"
_TYPE = r"(?::[ ][\w., |\[\]]+)?[ ]=[ ]"
_ID = r"""(?:"[\w.]+"|'[\w.]+')"""
_PLAIN = re.compile(
    rf'''
    (?!(?:[^\n]*\n)?[^\n]*coding[:=](?![ ]*utf-8\b))
    (?:
        """(?:[^"\\]|\\.|"(?!""))*"""{_END}
        | (?:from|import)[ ](?![^\n]*\b(?:revision|down_revision|branch_labels|depends_on)\b)[\w., ]+{_END}
        | {_END}
    )*
    revision{_TYPE}({_ID}){_END}
    (?:{_END})*
    down_revision{_TYPE}(None|{_ID}|\((?:{_ID},[ ]?)+{_ID}?\)){_END}
    (?:(?:branch_labels|depends_on){_TYPE}None{_END}|{_END})*
    (?:
        def[ ](?:upgrade|downgrade)\([\w., :|\[\]]*\)(?:[ ]->[ ][\w., |\[\]]+)?:[^\r\n\f]*\r?\n
        | [ \t][^\r\n\f]*\r?\n
        | (?:\#[^\r\n]*)?\r?\n
    )*
    ''',
    re.VERBOSE | re.DOTALL,
)

FIELDS = ("revision", "down_revision", "branch_labels", "depends_on")
# By these, names can be bound that do not stand in the file; `*` is that of an import.
DYNAMIC = {"*", "eval", "exec", "compile", "getattr", "setattr", "delattr", "__setattr__", "__import__", "importlib"}
DYNAMIC |= {"globals", "locals", "vars", "modules", "builtins", "__builtins__", "__dict__", "f_globals", "f_locals"}


@dataclass(frozen=True)
class Headers:
    """Revisions with one head, without labels and dependencies."""

    head: str
    files: Mapping[str, tuple[str, str]]  # by revision: the file's name, and its sha256 as sha256sum prints it
    sources: Mapping[str, bytes]  # by path, as Alembic resolves it


def read(script: ScriptDirectory) -> Headers | None:
    """None if it takes all of Alembic to understand the files, or to say what is wrong with them."""
    files: dict[str, tuple[str, str]] = {}
    parents: dict[str, tuple[str, ...]] = {}
    sources: dict[str, bytes] = {}
    if script.sourceless or script.recursive_version_locations or len(script._version_locations) != 1:
        return None
    try:
        with os.scandir(os.path.realpath(script._version_locations[0])) as entries:
            for entry in entries:
                if not entry.name.endswith(".py"):
                    continue
                if not entry.is_file(follow_symlinks=False):
                    return None
                if entry.name.startswith(("__init__", ".#")):  # as in Alembic
                    continue
                with open(entry.path, "rb", buffering=0) as file:  # noqa: PTH123  half the time
                    sources[entry.path] = source = file.read()
                header = _match(source) or _parse(source)
                if header is None or header[0] in files:
                    return None
                revision, parents[revision] = header
                files[revision] = (entry.name, hashlib.sha256(source).hexdigest())
        TopologicalSorter(parents).prepare()
    except (OSError, CycleError):
        return None
    followed = {parent for names in parents.values() for parent in names}
    heads = files.keys() - followed
    return Headers(heads.pop(), files, sources) if len(heads) == 1 and followed <= files.keys() else None


def _match(source: bytes) -> tuple[str, tuple[str, ...]] | None:
    """The file's `revision` and `down_revision`, or None."""
    try:
        found = _PLAIN.fullmatch(source.decode() + "\n")
    except UnicodeDecodeError:
        return None
    if not found:
        return None
    revision, parents = found.groups()
    return revision[1:-1], () if parents == "None" else tuple(re.findall(r"[\w.]+", parents))


def _parse(source: bytes) -> tuple[str, tuple[str, ...]] | None:
    """The same, of a file that assigns literals once, at the top level, and changes its names in no other way."""
    found: dict[str, object] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        for node in tree.body:
            match node:
                case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
                    if name in FIELDS:
                        found[name] = ast.literal_eval(value)
    except Exception:  # of many kinds; what is wrong is reported when Alembic loads the file
        return None
    names = Counter(name for node in ast.walk(tree) for name in _names(node))
    if names.keys() & DYNAMIC or any(names[field] != (field in found) for field in FIELDS):
        return None
    if found.get("branch_labels") or found.get("depends_on") or "down_revision" not in found:
        return None
    revision, parents = found.get("revision"), to_tuple(found.get("down_revision"), default=())
    plain = all(isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in (revision, *parents))
    return (str(revision), tuple(parents)) if plain else None


def _names(node: ast.AST) -> Iterable[str]:
    """What a node may bind, or use to bind, in any scope."""
    if isinstance(node, ast.Name):
        return [node.id] if not isinstance(node.ctx, ast.Load) or node.id in DYNAMIC else []
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.alias):
        return [node.asname or node.name.split(".")[0]]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Global | ast.Nonlocal):
        return node.names
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
        return [node.name] if node.name else []
    return [node.rest] if isinstance(node, ast.MatchMapping) and node.rest else []
