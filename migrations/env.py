"""What happens between `alembic upgrade head` and the database. Alembic runs this file for every command.

settings.py says where the database is, revisions.py checks the files, session.py connects and locks, run.py runs.
"""

import logging.config

from alembic import context

from migrations import revisions, run, settings

config = context.config
assert config.config_file_name is not None
logging.config.fileConfig(config.config_file_name, disable_existing_loggers=False)
# Alembic prints a failure on standard output, too; once is enough, unless that is where the SQL goes.
logging.getLogger("alembic.util.messaging").disabled = not context.is_offline_mode()

options = config.cmd_opts  # None where a program calls alembic.command
command = options.cmd[0].__name__ if options else ""

revisions.check(context.script)
if command in ("revision", "merge") or (command in ("history", "show") and not revisions.asks_current(options)):
    context.configure(dialect_name="postgresql", as_sql=True, process_revision_directives=revisions.next_number)
    context.run_migrations()
else:
    if command == "current":
        destination = "head"  # of two, it would call either one the head
    elif command == "stamp":
        destination = options.revisions[0]
    else:
        destination = getattr(options, "revision", None)
    revisions.check_runnable(context.script, destination)
    if context.is_offline_mode():
        run.offline(context, settings.load())
    else:
        run.Run(context, settings.load(), read_only=command in ("current", "history", "show"))()
