"""The checksum of what a revision does: it ignores what does not change that, and is the same in every Python version.

It covers upgrade() and what that uses of its module: helper functions, constants, imports, and statements that run on
import. It leaves out downgrade() and what only that uses, comments, docstrings, annotations, formatting, the order of
functions and imports, and the revision's place among the others. A file that the revision reads, it does not cover.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alembic.script import Script

# A checksum that begins with another version was made by other rules, and is not comparable.
VERSION = "1:"

# Fields that depend on the Python version, or that do nothing.
_IGNORED_FIELDS = frozenset(["ctx", "kind", "type_comment", "type_params", "annotation", "returns"])
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_IMPORTS = (ast.Import, ast.ImportFrom)
_UNORDERED = (*_FUNCTIONS, ast.ClassDef, *_IMPORTS)
# What finds a name that the source does not spell out.
_DYNAMIC = frozenset(["eval", "exec", "globals", "locals", "vars"])


@contextmanager
def sources_kept() -> Iterator[None]:
    """Keep the source of each module that is loaded, with its loader, so that no file is read twice."""
    compile_source = SourceFileLoader.source_to_code

    def keep(loader: Any, data: Any, *arguments: Any, **options: Any) -> Any:
        loader.revision_source = data
        return compile_source(loader, data, *arguments, **options)

    SourceFileLoader.source_to_code = keep  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        SourceFileLoader.source_to_code = compile_source  # type: ignore[method-assign]


class RevisionFile:
    """A revision's file, as it was loaded."""

    def __init__(self, revision: Script) -> None:
        self.revision = revision.revision
        self.name = os.path.basename(revision.path)  # noqa: PTH119  a fifth of the time
        loader = getattr(revision.module, "__loader__", None)
        self.source: bytes | None = getattr(loader, "revision_source", None)  # not set if a compiled file was loaded
        if self.source is None and self.name.endswith(".py"):
            self.source = Path(revision.path).read_bytes()

    @functools.cached_property
    def sha256(self) -> str | None:
        """As sha256sum prints it; None if there is only a compiled file."""
        return hashlib.sha256(self.source).hexdigest() if self.source is not None else None

    @functools.cached_property
    def checksum(self) -> str | None:
        """Of what the revision does, and of the slug in the file's name; None if there is only a compiled file."""
        if self.source is None:
            return None
        parts = [slug(self.name, self.revision), *_UpgradePath(ast.parse(self.source)).parts()]
        return VERSION + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def slug(file_name: str, revision: str) -> str:
    """`add_status` of `20251202_143000_002_add_status.py`; of a name without the revision's id, all of it."""
    name = file_name.removesuffix(".py")
    _, found, rest = f"_{name}".partition(f"_{revision}_")  # not by an expression: each would be compiled
    return rest if found else name


class _UpgradePath:
    """The statements of a module that upgrade() needs."""

    def __init__(self, module: ast.Module) -> None:
        self.statements = [part for statement in module.body for part in _split(statement)]
        self.used = {"upgrade"}
        self.found: dict[int, str] = {}  # by position

    def parts(self) -> list[str]:
        """In canonical form: definitions and imports in any order, all else in the module's."""
        waiting = {
            number: (_bound_names(statement), _read_on_import(statement))
            for number, statement in enumerate(self.statements)
            if not _does_nothing(statement)
        }
        own: set[str] = set()
        for number, (names, _) in waiting.items():
            if names and not isinstance(self.statements[number], _IMPORTS):
                own |= names
        while True:
            reached = [
                number
                for number, (names, read) in waiting.items()
                if names is None or names & self.used or self.used & _DYNAMIC or read & own & self.used
            ]
            if not reached:
                break
            for number in reached:
                del waiting[number]
                self.found[number] = _canonical(self.statements[number], self.used)
        unordered = [n for n in self.found if isinstance(self.statements[n], _UNORDERED)]
        ordered = sorted(self.found.keys() - set(unordered))
        return sorted(self.found[n] for n in unordered) + [self.found[n] for n in ordered]


def _read_on_import(statement: ast.stmt) -> set[str]:
    """The names to which a definition passes itself, as `Table("a", metadata)`, a subclass and a decorator do."""
    runs: list[ast.AST] = []
    if isinstance(statement, _FUNCTIONS):
        runs += statement.decorator_list
    elif isinstance(statement, ast.ClassDef) or (
        isinstance(statement, ast.Assign | ast.AnnAssign)
        and not isinstance(statement.value, ast.Constant)
        and any(isinstance(node, ast.Call) for node in ast.walk(statement))
    ):
        runs.append(statement)
    return {node.id for part in runs for node in ast.walk(part) if isinstance(node, ast.Name)}


def _split(statement: ast.stmt) -> list[ast.stmt]:
    """An import of several names as several imports."""
    if isinstance(statement, ast.Import):
        return [ast.Import([name]) for name in statement.names]
    if isinstance(statement, ast.ImportFrom):
        return [ast.ImportFrom(statement.module, [name], statement.level) for name in statement.names]
    return [statement]


def _bound_names(statement: ast.stmt) -> set[str] | None:
    """The names that a definition, an import or an assignment binds; None for a statement that does something else."""
    if isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, _IMPORTS):
        name = statement.names[0]
        return None if name.name == "*" else {name.asname or name.name.split(".")[0]}
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        nodes = [node for target in targets for node in ast.walk(target)]
        if all(isinstance(node, ast.Name | ast.Tuple | ast.List | ast.Starred | ast.expr_context) for node in nodes):
            return {node.id for node in nodes if isinstance(node, ast.Name)}
    return None


def _does_nothing(node: Any) -> bool:
    """Whether it is `pass`, or a constant as a statement, such as a docstring."""
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _canonical(node: Any, used: set[str]) -> str:
    """The syntax tree as text, which `ast.dump` writes in another way in each Python version; adds names to `used`."""
    if isinstance(node, str):
        return ascii(node)
    if isinstance(node, list):
        return f"[{','.join([_canonical(item, used) for item in node if not _does_nothing(item)])}]"
    if not isinstance(node, ast.AST):
        return hex(node) if type(node) is int else repr(node)
    if isinstance(node, ast.Constant):
        return f"Constant({_canonical(node.value, used)})"
    if isinstance(node, ast.Name):
        used.add(node.id)
    if isinstance(node, ast.JoinedStr):
        node = ast.JoinedStr(_joined(node.values))
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        node = ast.Assign([node.target], node.value)
    text = type(node).__name__
    for name in node._fields:
        field = getattr(node, name, None)
        if field is not None and field != [] and name not in _IGNORED_FIELDS:
            text += f" {name}={_canonical(field, used)}"
    return f"({text})"


def _joined(values: list[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string with adjacent texts joined, and no empty one."""
    parts: list[ast.expr] = []
    for value in values:
        last = parts[-1] if parts else None
        if isinstance(value, ast.Constant) and isinstance(last, ast.Constant):
            parts[-1] = ast.Constant(str(last.value) + str(value.value))
        elif not (isinstance(value, ast.Constant) and value.value == ""):
            parts.append(value)
    return parts
