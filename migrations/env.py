"""Alembic's entry point for every command; migration_runner/ does the work."""

import logging.config

from alembic import context

import migration_runner


def run_migrations_offline() -> None:
    """`--sql`: write the plan."""
    migration_runner.run_offline()


def run_migrations_online() -> None:
    """Run the command on the database that the environment names."""
    migration_runner.run_online()


if context.config.config_file_name is not None:
    logging.config.fileConfig(context.config.config_file_name, disable_existing_loggers=False)
if context.is_offline_mode():
    run_migrations_offline()
else:
    run_migrations_online()
