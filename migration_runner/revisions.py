"""The revision files: the checks before a database is contacted, which are applied, and the next one's number."""

from __future__ import annotations

import inspect
import re
import traceback
import types
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alembic.operations import MigrationScript
from alembic.runtime.migration import MigrationContext
from alembic.script import Script, ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError, to_tuple

from migration_runner import remote
from migration_runner.checksum import sources_kept
from migration_runner.errors import describe

SEE_DOCS = "see docs/troubleshooting.md"


def validate(script: ScriptDirectory, read: Mapping[str, bytes] | None = None) -> None:
    """Load all revision files, once for the whole command, or raise CommandError naming the file and the fix.

    `read` has the sources of those that were read already, by path.

    Alembic itself only warns of two files with one revision id, and drops one of them; it follows a symlink, and
    ignores the revision if the target is not a .py file.
    """
    for path in _paths(script):
        if path.is_symlink() and (path.suffix == ".py" or path.is_dir()):
            raise CommandError(f"{path.name} is a symlink; commit the file itself, {SEE_DOCS}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Revision .* is present more than once")
            warnings.filterwarnings("error", message="Revision .* is not present")
            warnings.filterwarnings("error", message="File .* loaded twice")
            with sources_kept(read or {}):
                script.get_heads()
    except UserWarning as warning:
        raise CommandError(f"{_explain_warning(script, str(warning))}, {SEE_DOCS}") from None
    except RevisionError as error:
        file = _file_with_wrong_id(script)
        raise CommandError(
            f"{file}; rename it, {SEE_DOCS}"
            if file
            else f"{error}; fix the 'down_revision' of one of them, {SEE_DOCS}"  # such as a cycle
        ) from None
    except CommandError as error:
        name = re.search(r"from filename (.*?\.py)", str(error))  # Alembic's hint is for files of its version 0.1
        raise CommandError(
            f"{name[1]} has no 'revision'; fix or delete the file, {SEE_DOCS}" if name else str(error)
        ) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise revision_error(script, error) from error


def validate_runnable(script: ScriptDirectory, destination: Iterable[str]) -> None:
    """Refuse what Alembic would report as success, or only after connecting."""
    if not script.get_heads():
        raise CommandError(
            f"no revisions found in {' and '.join(map(str, _locations(script)))}; nothing to do, treated as an error:"
            " check the branch and the path of the checkout (in the chart: 'git.branch' and 'git.path')"
        )
    for revision in script.walk_revisions():
        for name in ("upgrade", "downgrade"):
            if not _takes_no_argument(getattr(revision.module, name, None)):
                raise CommandError(f"{Path(revision.path).name} has no {name}(); fix the file, {SEE_DOCS}")
    for target in destination:
        if target.startswith("head") and target != "heads":
            validate_one_head(script)
        elif target.isalnum() and target not in ("heads", "base"):
            try:
                script.get_revision(target)
            except CommandError:
                raise CommandError(f"{_explain_no_match(script, target)}; 'alembic history' lists them") from None


def _explain_no_match(script: ScriptDirectory, target: str) -> str:
    names = (revision.revision for revision in script.walk_revisions())
    same = sorted(name for name in names if len(name) > 3 and name.startswith(target))  # as Alembic matches
    return f"{target} is ambiguous: {', '.join(same)}" if same else f"there is no revision {target}"


def validate_one_head(script: ScriptDirectory) -> None:
    """Refuse `head` as a destination if there are several."""
    heads = script.get_heads()
    if len(heads) > 1:
        files = " and ".join(f"{head} ({_file(script, head)})" for head in sorted(heads))
        raise CommandError(
            f"there are {len(heads)} heads: {files}; set the 'down_revision' of one to the other, {SEE_DOCS}"
        )


def assign_revision_id(context: MigrationContext, _heads: object, directives: list[MigrationScript]) -> None:
    """Give a new revision the number after the highest one: 002 after 001, 100 after 099, 1000 after 999.

    Alembic calls this as its `process_revision_directives` hook.
    """
    config, script = context.config, context.script
    assert config is not None and script is not None
    if getattr(config.cmd_opts, "head", None) in (None, "head"):
        validate_one_head(script)
    if not getattr(config.cmd_opts, "rev_id", None):
        names = [revision.revision for revision in script.walk_revisions()]
        highest = max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)
        directives[0].rev_id = f"{highest + 1:03}"
        validate_new_id(script, directives[0].rev_id)


def validate_new_id(script: ScriptDirectory, rev_id: str) -> None:
    """Refuse an id for a new file that another one has, here or on the remote's branch."""
    for revision in script.walk_revisions():
        if revision.revision == rev_id:
            raise CommandError(f"revision {rev_id} already exists: {Path(revision.path).name}; choose another --rev-id")
    if not re.fullmatch(r"\w[\w.]*", rev_id):  # it becomes part of the file name
        raise CommandError(f"--rev-id is '{rev_id}'; use letters, digits, _ and . only")
    if found := remote.find(rev_id, _locations(script), script.recursive_version_locations):
        name, branch = found
        raise CommandError(
            f"revision {rev_id} already exists on {branch}: {name}; merge {branch} or rebase onto it first, or choose"
            " another --rev-id"
        )


def applied(script: ScriptDirectory, heads: Iterable[str]) -> set[str]:
    """The revisions that a database at `heads` has: these, their ancestors, and what those depend on."""
    found: set[str] = set()
    waiting = list(heads)
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            revision = get(script, name)
            waiting += _parents(revision)
            waiting += [get(script, label).revision for label in to_tuple(revision.dependencies, default=())]
    return found


def branch_heads(script: ScriptDirectory, heads: Iterable[str]) -> set[Script]:
    """What `alembic current` shows; as ScriptDirectory.get_all_current, in linear instead of quadratic time."""
    found = {name: get(script, name) for name in applied(script, heads)}
    for revision in list(found.values()):
        for parent in _parents(revision):
            found.pop(parent, None)
    return set(found.values())


def code_heads(script: ScriptDirectory) -> list[str]:
    """The heads, without those that another one depends on, which have no row in the version table."""
    heads = sorted(script.get_heads())
    if len(heads) == 1:
        return heads
    return [head for head in heads if not any(head in applied(script, [other]) for other in heads if other != head)]


def superseded(script: ScriptDirectory, heads: tuple[str, ...]) -> str | None:
    """A row of the version table that another one supersedes, if any."""
    for head in heads if len(heads) > 1 else ():
        if any(head in applied(script, _parents(get(script, other))) for other in heads if other != head):
            return head
    return None


def revision_error(script: ScriptDirectory, error: BaseException) -> CommandError:
    """The exception for an error in a revision file."""
    where = error_location(error, script)
    what = f"{where}: {describe(error)}" if where else _explain_error(script, error)
    return CommandError(f"{what}; fix the file, {SEE_DOCS}")


def error_location(error: BaseException, script: ScriptDirectory) -> str | None:
    """The revision file and line that an exception came from, as `x.py, line 3`."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}"
    locations = [location.resolve() for location in _locations(script)]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if any(location in Path(frame.filename).resolve().parents for location in locations):
            return f"{Path(frame.filename).name}, line {frame.lineno}"
    return None


def get(script: ScriptDirectory, name: str) -> Script:
    """The revision of that name, which exists."""
    revision = script.get_revision(name)
    assert revision is not None
    return revision


def _parents(revision: Script) -> tuple[str, ...]:
    return to_tuple(revision.down_revision, default=())


def _file(script: ScriptDirectory, name: str) -> str:
    return Path(get(script, name).path).name


def _locations(script: ScriptDirectory) -> list[Path]:
    """The folders of revisions; `ScriptDirectory.versions` is only one."""
    return [Path(location) for location in script._version_locations]


def _paths(script: ScriptDirectory) -> Iterator[Path]:
    for location in _locations(script):
        yield from sorted(location.rglob("*") if script.recursive_version_locations else location.glob("*.py"))


def _takes_no_argument(function: Any) -> bool:
    if isinstance(function, types.FunctionType):  # nearly always; inspect.signature is 20 times slower
        code = function.__code__
        if code.co_argcount == code.co_kwonlyargcount == 0 and not hasattr(function, "__wrapped__"):
            return True
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True


def _file_with_wrong_id(script: ScriptDirectory) -> str | None:
    for path in _paths(script):
        source = path.read_text(encoding="utf-8", errors="replace") if path.suffix == ".py" else ""
        name = remote.ID.search(source)
        if name and (wrong := sorted(set(name[2]) & set("-:@+"))):
            return f"{path.name} has the revision id '{name[2]}', and an id must not contain {' or '.join(wrong)}"
    return None


def _explain_error(script: ScriptDirectory, error: BaseException) -> str:
    """The file at fault if the exception names none: it is not Python (UTF-16), or an id has the wrong type."""
    known: set[str] = set()
    wanted: list[tuple[str, str]] = []
    for path in _paths(script):
        if path.suffix != ".py":
            continue
        try:
            fields = _fields(path)
        except (SyntaxError, ValueError):  # ValueError, too: Python 3.11 and older
            return f"{path.name}: {describe(error)}"
        if not isinstance(fields.get("revision"), str):
            return f"{path.name} has a 'revision' that is not a string"
        for name in ("down_revision", "depends_on", "branch_labels"):
            values = to_tuple(fields.get(name), default=())
            if not all(isinstance(value, str) for value in values):
                return f"{path.name} has a '{name}' that is not a string"
            known |= set(values) if name == "branch_labels" else set()
            wanted += [(path.name, value) for value in values] if name == "depends_on" else []
        known.add(fields["revision"])
    for file, name in wanted:
        if name not in known:
            return f"{file} has the 'depends_on' {name}, which does not exist"
    return f"{' and '.join(map(str, _locations(script)))}: {describe(error)}"


def _fields(path: Path) -> dict[str, Any]:
    """The file's assignments, whether or not it is a revision."""
    fields: dict[str, Any] = {}
    exec(compile(path.read_bytes(), path, "exec"), fields)  # noqa: S102  the same file was just run by Alembic
    return fields


def _explain_warning(script: ScriptDirectory, warning: str) -> str:
    """Alembic's warning, with the files; reads them again, in a failing run only."""
    files: dict[str, list[str]] = defaultdict(list)
    followers: dict[str, list[str]] = defaultdict(list)
    for path in _paths(script):
        fields = _fields(path) if path.suffix == ".py" else {}
        if "revision" in fields:
            files[fields["revision"]].append(path.name)
            for parent in to_tuple(fields.get("down_revision"), default=()):
                followers[parent].append(path.name)
    for number, names in files.items():
        if len(names) > 1:
            return (
                f"revision {number} is claimed by {' and '.join(names)}, and an environment that has applied one never"
                " applies the other; give the one that no environment has applied the next free number and the other"
                " one as its 'down_revision'"
            )
    for parent, names in followers.items():
        if parent not in files:
            return (
                f"{' and '.join(names)} references down_revision {parent}, which does not exist; add the missing file,"
                " or name the one that it follows"
            )
    return warning
