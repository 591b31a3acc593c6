"""The revision files: what is checked before a database is contacted, and the number of the next one."""

from __future__ import annotations

import inspect
import re
import traceback
import warnings
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

from alembic.operations import MigrationScript
from alembic.runtime.migration import MigrationContext
from alembic.script import Script, ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError, to_tuple

RULES = "see 'Adding a migration' in README.md"


def check(script: ScriptDirectory) -> None:
    """Load all revision files, once for the whole command, or raise CommandError naming the file and the cure.

    Alembic itself only warns of two files with one revision id, and drops one of them; a link it follows, and where
    that leads to no .py file, it passes over the revision.
    """
    for path in Path(script.versions).glob("*.py"):
        if path.is_symlink():
            raise CommandError(f"{path.name} is a symlink; commit the file itself, {RULES}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Revision .* is present more than once")
            warnings.filterwarnings("error", message="Revision .* is not present")
            script.get_heads()
    except UserWarning as warning:
        raise CommandError(f"{_mismatch(script, str(warning))}, {RULES}") from None
    except RevisionError as error:  # such as a circle
        raise CommandError(f"{error}; mend the 'down_revision' of one of them, {RULES}") from None
    except CommandError as error:
        name = re.search(r"from filename (.*?\.py)", str(error))  # Alembic's cure is for files of its version 0.1
        raise CommandError(
            f"{name[1]} has no 'revision'; mend or delete the file, {RULES}" if name else str(error)
        ) from None
    except (Exception, SystemExit) as error:
        raise broken(script, error) from error


def check_runnable(script: ScriptDirectory, destination: str | None) -> None:
    """Refuse what Alembic would take for success or would find out only after connecting."""
    if not script.get_heads():
        raise CommandError(
            f"no revisions found in {script.versions}; nothing was done: check the branch and the path of the checkout"
            " (in the chart: 'git.branch' and 'git.path')"
        )
    for revision in script.walk_revisions():
        if len(revision.revision) > 32:
            raise CommandError(f"revision {revision.revision} has more than 32 characters; shorten it, {RULES}")
        for name in ("upgrade", "downgrade"):
            try:
                inspect.signature(getattr(revision.module, name, None)).bind()
            except TypeError:
                raise CommandError(f"{Path(revision.path).name} has no {name}(); mend the file, {RULES}") from None
    check_one_head(script, destination)
    if destination and destination.isalnum() and destination not in ("head", "heads", "base"):
        try:
            script.get_revision(destination)
        except CommandError:
            raise CommandError(f"there is no revision {destination}; 'alembic history' lists them") from None


def check_one_head(script: ScriptDirectory, destination: str | None) -> None:
    """Refuse `head` as a destination where there are several."""
    heads = script.get_heads()
    if len(heads) > 1 and destination is not None and destination.startswith("head") and destination != "heads":
        files = " and ".join(f"{head} ({Path(script.get_revision(head).path).name})" for head in sorted(heads))
        raise CommandError(
            f"there are {len(heads)} heads: {files}; make one revise the other by its 'down_revision', {RULES}"
        )


def next_number(context: MigrationContext, heads: tuple[str, ...], directives: list[MigrationScript]) -> None:
    """Give a new revision the number after the highest one: 002 after 001, 100 after 099, 1000 after 999.

    Alembic calls this as its `process_revision_directives` hook.
    """
    config, script = context.config, context.script
    assert config is not None and script is not None
    check_one_head(script, getattr(config.cmd_opts, "head", None) or "head")
    wanted = getattr(config.cmd_opts, "rev_id", None)
    existing = {revision.revision: revision for revision in script.walk_revisions()}
    if wanted in existing:
        raise CommandError(f"revision {wanted} exists: {Path(existing[wanted].path).name}; choose another --rev-id")
    if wanted and not re.fullmatch(r"\w[\w.]*", wanted):  # it becomes a part of the file's name
        raise CommandError(f"--rev-id is '{wanted}'; use letters, digits, _ and . only")
    if not wanted:
        highest = max((int(number) for number in existing if number.isascii() and number.isdigit()), default=0)
        directives[0].rev_id = f"{highest + 1:03}"


def asks_current(options: Namespace) -> bool:
    """Whether `history` or `show` was asked for the database's revision: `-i`, `-r current:`, `show current`."""
    words = vars(options)
    return bool(words.get("indicate_current")) or "current" in f"{words.get('rev_range')} {words.get('rev')}"


def broken(script: ScriptDirectory, error: BaseException) -> CommandError:
    """What to raise for an error in a revision file."""
    where = place(error, Path(script.versions)) or _unreadable(script)
    return CommandError(f"{where}: {describe(error)}; mend the file, {RULES}")


def describe(error: BaseException) -> str:
    """One line: `SyntaxError: invalid syntax (x.py, line 3)`."""
    return " ".join("".join(traceback.format_exception_only(type(error), error)[-1:]).split())


def place(error: BaseException, versions: Path) -> str | None:
    """The revision file and line that an exception came from, as `x.py, line 3`."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).resolve().parent == versions.resolve():
            return f"{Path(frame.filename).name}, line {frame.lineno}"
    return None


def _unreadable(script: ScriptDirectory) -> str:
    """The file that is no Python at all, such as one in UTF-16, which no error names; reads them again."""
    for path in sorted(Path(script.versions).glob("*.py")):
        try:
            compile(path.read_bytes(), path, "exec")
        except (SyntaxError, ValueError):  # ValueError, too: Python 3.11 and older
            return path.name
    return script.versions


def _mismatch(script: ScriptDirectory, warning: str) -> str:
    """What Alembic warned of, with the files; reads them again, as only a failing run does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [Script._from_path(script, path) for path in sorted(Path(script.versions).glob("*.py"))]
    files: dict[str, list[str]] = defaultdict(list)
    followers: dict[str, list[str]] = defaultdict(list)
    for revision in filter(None, found):
        files[revision.revision].append(Path(revision.path).name)
        for parent in to_tuple(revision.down_revision, default=()):
            followers[parent].append(Path(revision.path).name)
    for number, names in files.items():
        if len(names) > 1:
            return (
                f"revision {number} is claimed by {' and '.join(names)}; give the later one the next free number"
                " and the earlier one as its 'down_revision'"
            )
    for parent, names in followers.items():
        if parent not in files:
            return (
                f"{' and '.join(names)} has the 'down_revision' {parent}, which no file has; add the missing file, or"
                " name the one that it follows"
            )
    return warning
