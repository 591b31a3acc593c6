"""The order of the revisions, read without running their files: a run that has nothing to do needs no more.

A file is read if it is written as the template writes it, so that running it gives no other answer. Any other is run.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from alembic.script import ScriptDirectory
from alembic.util import load_python_file, to_tuple

from migration_runner.checksum import sources_kept

# What stands at the beginning of a line, outside a string, is only this: docstrings, imports, the assignments, and
# functions without decorators and defaults. Only these run on import, and none of them changes what is assigned. \r and
# \f are not matched where they would begin another line for Python.
_END = r"[ \t]*(?:\#[^\r\n]*)?\r?\n"
_TYPE = r"(?::[ ][\w., |\[\]]+)?[ ]=[ ]"
_ID = r"""(?:"[\w.]+"|'[\w.]+')"""
_PLAIN = re.compile(
    rf'''
    (?!(?:[^\n]*\n)?[^\n]*coding[:=](?![ ]*utf-8\b))
    (?:
        """(?:[^"\\]|\\.|"(?!""))*"""{_END}
        | (?:from|import)[ ][\w., ]+{_END}
        | {_END}
    )*
    revision{_TYPE}({_ID}){_END}
    (?:{_END})*
    down_revision{_TYPE}(None|{_ID}|\((?:{_ID},[ ]?)+{_ID}?\)){_END}
    (?:(?:branch_labels|depends_on){_TYPE}None{_END}|{_END})*
    (?:
        def[ ]\w+\([\w., :|\[\]]*\)(?:[ ]->[ ][\w., |\[\]]+)?:[^\r\n\f]*\r?\n
        | [ \t][^\r\n\f]*\r?\n
        | (?:\#[^\r\n]*)?\r?\n
    )*
    ''',
    re.VERBOSE | re.DOTALL,
)


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
                header = _read(source) or _run(entry.path, source)
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


def _read(source: bytes) -> tuple[str, tuple[str, ...]] | None:
    """The file's `revision` and `down_revision`, or None."""
    try:
        found = _PLAIN.fullmatch(source.decode() + "\n")
    except UnicodeDecodeError:
        return None
    if not found:
        return None
    revision, parents = found.groups()
    return revision[1:-1], () if parents == "None" else tuple(re.findall(r"[\w.]+", parents))


def _run(path: str, source: bytes) -> tuple[str, tuple[str, ...]] | None:
    """The same, of any file."""
    try:
        with warnings.catch_warnings(), sources_kept({path: source}):
            warnings.simplefilter("ignore")
            module = load_python_file(*os.path.split(path))
        revision, parents = module.revision, to_tuple(module.down_revision, default=())
    except KeyboardInterrupt:
        raise
    except BaseException:  # reported when Alembic loads the file
        return None
    plain = all(isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in (revision, *parents))
    more = getattr(module, "branch_labels", None) or getattr(module, "depends_on", None)
    return (revision, tuple(parents)) if plain and not more else None
