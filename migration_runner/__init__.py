"""Runs Alembic's revisions on PostgreSQL safely: one run at a time, a transaction each, short locks, one clear line.

An Alembic project gets all of it by these lines in its env.py:

    import migration_runner

    migration_runner.run()

The database comes from the environment (settings.py); everything else is Alembic's own.
"""

from migration_runner.environment import run, run_offline, run_online

__all__ = ["run", "run_offline", "run_online"]
