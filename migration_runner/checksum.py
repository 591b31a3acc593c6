"""The checksum of what a revision does: it ignores what does not change that, and is the same in every Python version.

It covers upgrade() and what that uses of its module: helper functions, constants, imports, and statements that run on
import. It leaves out downgrade() and what only that uses, comments, docstrings, annotations of functions and variables,
formatting, the order of functions and imports, and the revision's place among the others. Another way to write the same
counts as a change; a change of a file that the revision reads does not.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
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
_DYNAMIC = frozenset(["eval", "exec", "globals"])


@contextmanager
def sources_kept(read: Mapping[str, bytes]) -> Iterator[None]:
    """Keep the source of each module that is loaded, with its loader, so that no file is read twice.

    `read` has sources that were read already, by path.
    """
    get_code, compile_source = SourceFileLoader.get_code, SourceFileLoader.source_to_code

    def get(loader: Any, name: str) -> Any:
        source = read.get(loader.path)
        return get_code(loader, name) if source is None else loader.source_to_code(source, loader.path)

    def keep(loader: Any, data: Any, *arguments: Any, **options: Any) -> Any:
        loader.revision_source = data
        return compile_source(loader, data, *arguments, **options)

    SourceFileLoader.get_code = get  # type: ignore[assignment,method-assign]
    SourceFileLoader.source_to_code = keep  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
        SourceFileLoader.source_to_code = compile_source  # type: ignore[method-assign]


class RevisionFile:
    """A revision's file, as it was loaded."""

    def __init__(self, revision: Script) -> None:
        self.revision = revision.revision
        name = os.path.basename(revision.path)  # noqa: PTH119  a fifth of the time
        self.name = name.encode(errors="replace").decode()
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
        """Of what the revision does, and of the file's slug; None without a source, or if that is nested too deeply."""
        if self.source is None:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they were shown when Alembic read the file
                module = ast.parse(self.source)
            parts = [ascii(slug(self.name, self.revision)), *_UpgradePath(module).parts()]
        except RecursionError:
            return None
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
        bound = {n: _bound_names(part) for n, part in enumerate(self.statements) if not _does_nothing(part)}
        times = Counter(name for names in bound.values() for name in names or ())
        imports = {n for n in bound if isinstance(self.statements[n], _IMPORTS)}
        own = {name for n, names in bound.items() if n not in imports for name in names or ()}
        waiting = {n: _read_on_import(self.statements[n]) for n in bound}
        while True:
            reached = [
                n
                for n, read in waiting.items()
                if (names := bound[n]) is None or names & self.used or self.used & _DYNAMIC or read & own & self.used
            ]
            if not reached:
                break
            for n in reached:
                del waiting[n]
                self.used |= bound[n] or set()
                self.found[n] = _canonical(self.statements[n], self.used)
        unordered = {
            n
            for n in self.found
            if isinstance(self.statements[n], _UNORDERED) and {times[name] for name in bound[n] or ()} == {1}
        }
        ordered = sorted(self.found.keys() - unordered)
        return sorted(self.found[n] for n in unordered) + [self.found[n] for n in ordered]


def _read_on_import(statement: ast.stmt) -> set[str]:
    """The names to which a definition passes itself, as `Table("a", metadata)` and a subclass do."""
    if isinstance(statement, ast.ClassDef) or (
        isinstance(statement, ast.Assign | ast.AnnAssign)
        and not isinstance(statement.value, ast.Constant)
        and any(isinstance(node, ast.Call) for node in ast.walk(statement))
    ):
        return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return set()


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
        # A decorator may register what it decorates.
        return None if statement.decorator_list and statement.name != "downgrade" else {statement.name}
    if isinstance(statement, _IMPORTS):
        name = statement.names[0]
        return None if name.name == "*" else {name.asname or name.name.split(".")[0]}
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        if all(isinstance(target, ast.Name) for target in targets) and isinstance(statement.value, ast.Constant):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        nodes = [node for target in targets for node in ast.walk(target)]
        if all(isinstance(node, ast.Name | ast.Tuple | ast.List | ast.Starred | ast.expr_context) for node in nodes):
            return {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return None


def _does_nothing(node: Any) -> bool:
    """Whether it is `pass`, a constant as a statement, such as a docstring, or only for type checkers."""
    if isinstance(node, ast.If):
        test = node.test
        name = test.attr if isinstance(test, ast.Attribute) else test.id if isinstance(test, ast.Name) else ""
        return name == "TYPE_CHECKING" and not node.orelse
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _canonical(node: Any, used: set[str], *, in_class: bool = False) -> str:
    """The syntax tree as text, which `ast.dump` writes in another way in each Python version; adds names to `used`."""
    if isinstance(node, str):
        return ascii(node)
    if isinstance(node, list):
        parts = [_canonical(item, used, in_class=in_class) for item in node if not _does_nothing(item)]
        return f"[{','.join(parts)}]"
    if not isinstance(node, ast.AST):
        return hex(node) if type(node) is int else repr(node)
    if isinstance(node, ast.Constant):
        return f"Constant({_canonical(node.value, used)})"
    if isinstance(node, ast.Name):
        used.add(node.id)
    if isinstance(node, ast.JoinedStr):
        values = _joined(node.values)
        if all(isinstance(value, ast.Constant) for value in values):  # no placeholder
            return _canonical(values[0] if values else ast.Constant(""), used)
        node = ast.JoinedStr(values)
    ignored = _IGNORED_FIELDS
    if isinstance(node, ast.AnnAssign):
        if in_class:  # a dataclass and a mapped class read it
            ignored = _IGNORED_FIELDS - {"annotation"}
        elif node.value is not None:
            node = ast.Assign([node.target], node.value)
    text = type(node).__name__
    for name in node._fields:
        field = getattr(node, name, None)
        if field is not None and field != [] and name not in ignored:
            text += f" {name}={_canonical(field, used, in_class=isinstance(node, ast.ClassDef))}"
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
