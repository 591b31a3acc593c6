"""What the server shows of the runs, and what a test does to them there."""

import re

from tests.support.database import Database
from tests.support.programs import Result
from tests.support.waiting import until


def audit(database: Database) -> list[str]:
    return [revision for (revision,) in database.execute("SELECT revision FROM audit ORDER BY 1")]


def sleeping(database: Database, statement: str = "pg_sleep") -> bool:
    """Whether a run is executing a statement that contains this text."""
    return any(row.startswith("active: ") and statement in row for row in database.activity())


def building(database: Database) -> bool:
    """Whether a concurrent index build waits for other transactions."""
    return bool(database.scalar("SELECT count(*) > 0 FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting%'"))


def terminate(database: Database) -> None:
    """Terminate the session of the run that sleeps."""
    database.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'")


def follow(result: Result, database: Database) -> None:
    """Run the statement that the message shows."""
    statements = re.findall(r"drop with: (.*?); the database is at", result.failure)
    assert len(statements) == 1, result.failure
    database.execute(statements[0])


def idle(database: Database) -> None:
    """Wait, for seconds, until no session of a run remains on the server, and so no lock."""
    until(lambda: database.activity() == [], 6)
