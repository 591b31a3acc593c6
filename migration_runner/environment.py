"""What env.py calls: `run()`, or the two functions that Alembic users expect there."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from alembic import context
from alembic.util import CommandError

from migration_runner import revisions, settings
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
    if command := _prepare():
        Runner(command, settings.load(_env_file(command))).run()


def run_offline() -> None:
    """Write the SQL of `--sql`, all or nothing; a failure goes to standard error, as standard output is the plan."""
    _set_up_logging()
    try:
        if command := _prepare():
            from migration_runner import plan  # saves 15 ms: a Job has no compiled files

            plan.write(command, settings.load(_env_file(command)))
    except CommandError as error:
        if context.config.cmd_opts is None:  # called by a program, not the command line
            raise
        print(f"FAILED: {error}", file=sys.stderr)
        raise SystemExit(255) from error


def _prepare() -> Command | None:
    """Check the revision files; return the command, or None if it needed no database and is done."""
    command = Command.from_context()
    revisions.validate(command.script)
    if command.needs is not Needs.NOTHING:
        revisions.validate_runnable(command.script, command.destination)
        return command
    if rev_id := getattr(command.environment.config.cmd_opts, "rev_id", None):  # of `revision`, or `merge`
        revisions.validate_new_id(command.script, rev_id)
    context.configure(dialect_name="postgresql", as_sql=True, process_revision_directives=revisions.assign_revision_id)
    context.run_migrations()
    return None


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
