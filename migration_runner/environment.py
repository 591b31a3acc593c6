"""What env.py calls: `run()`, or the two functions that Alembic users expect there."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from alembic import context
from alembic.util import CommandError

from migration_runner import headers, revisions, settings
from migration_runner.command import Command, Needs
from migration_runner.runner import Runner

log = logging.getLogger("migration_runner")


def run() -> None:
    """Run Alembic's command, with or without a database."""
    if context.is_offline_mode():
        run_offline()
    else:
        run_online()


def run_online() -> None:
    """Run the command on the database that the environment names, with at most one failure line."""
    _set_up_logging()
    command = Command.from_context()
    # At the head, nothing will run, so the files are loaded only if the database is elsewhere.
    found = headers.read(command.script) if command.targets_head else None
    if not (found or _check(command)):
        return
    try:
        wanted = settings.load(_env_file(command))
    except CommandError:
        if found:
            _check(command)  # a broken file is reported first
        raise
    if settings.uses_defaults():
        log.info("neither DATABASE_URL nor a DB_* variable is set: using the defaults, %s", settings.SEE_ENV_EXAMPLE)
    Runner(command, wanted, found).run()


def run_offline() -> None:
    """Write the SQL of `--sql`, all or nothing; a failure goes to standard error, as standard output is the plan."""
    _set_up_logging()
    try:
        command = Command.from_context()
        if _check(command):
            from migration_runner import plan  # saves 15 ms: a Job has no compiled files

            plan.write(command, settings.load(_env_file(command)))
    except CommandError as error:
        if context.config.cmd_opts is None:  # called by a program, not the command line
            raise
        print(f"FAILED: {error}", file=sys.stderr)
        raise SystemExit(255) from error


def _check(command: Command) -> bool:
    """Load and check the revision files; False if the command needs no database, and is done."""
    revisions.validate(command.script)
    if command.needs is not Needs.NOTHING:
        revisions.validate_runnable(command.script, command.destination)
        return True
    if rev_id := getattr(command.environment.config.cmd_opts, "rev_id", None):  # of `revision`, or `merge`
        revisions.validate_new_id(command.script, rev_id)
    context.configure(dialect_name="postgresql", as_sql=True, process_revision_directives=revisions.assign_revision_id)
    context.run_migrations()
    return False


def _env_file(command: Command) -> Path | None:
    """`.env` beside alembic.ini."""
    ini = command.environment.config.config_file_name
    return Path(ini).resolve().parent / ".env" if ini else None


def _set_up_logging() -> None:
    """Show the run's log whatever the project's alembic.ini says, and hide Alembic's second copy of a failure."""
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    if not logging.getLogger().handlers and not log.handlers:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    # A signal during the closing of a connection would be logged with its traceback; the run reports it in one line.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    options = context.config.cmd_opts
    if options is not None and not getattr(options, "quiet", False):
        logging.getLogger("alembic.util.messaging").disabled = True
