"""Revisions that leave a trace in the database, and what the database says about the runs."""

import re

from tests.migrations.helpers import Database, Result, until

# Every revision of these tests writes its number here: a revision that ran twice has two rows, one that was
# rolled back has none.
AUDIT = 'op.execute("CREATE TABLE audit (revision text)")'
FILE = "20251202_143000_{}_add.py"
AGAIN = (
    "run again to resume; if the Job's deadline was exceeded, raise 'job.activeDeadlineSeconds' and Helm's --timeout"
    " together"
)
SLEEP = 'op.execute("SELECT pg_sleep(60)")'
BUILD = 'op.execute("CREATE INDEX CONCURRENTLY slow ON audit (revision)")'
BLOCK = "with op.get_context().autocommit_block():\n    "
KILLED = (
    "interrupted by SIGTERM; did not stop in time and was killed; the database was at revision 002 before: check with"
    " 'alembic current'; run again to resume"
)
FIX = "fix it, then retry"


def audited(number: str, body: str = "") -> str:
    return f"op.execute(\"INSERT INTO audit VALUES ('{number}')\")\n{body}"


def audit(database: Database) -> list[str]:
    return [revision for (revision,) in database.execute("SELECT revision FROM audit ORDER BY 1")]


def sleeping(database: Database, words: str = "pg_sleep") -> bool:
    """Whether a run's statement with these words is at work."""
    return any(row.startswith("active: ") and words in row for row in database.activity())


def building(database: Database) -> bool:
    """Whether an index that is built concurrently waits for the transactions of others."""
    return database.scalar("SELECT count(*) > 0 FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting%'")


def terminate(database: Database) -> None:
    """End the session of the run that sleeps."""
    database.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'")


def follow(result: Result, database: Database) -> None:
    """Run the statement that the message names."""
    statements = re.findall(r"drop with: (.*?); the database is at", result.failure)
    assert len(statements) == 1, result.failure
    database.execute(statements[0])


def idle(database: Database) -> None:
    """Nothing of any run is left on the server within seconds: no session, and so no lock."""
    until(lambda: database.activity() == [], 6)


def target(database: Database) -> str:
    """As a failure names the test's database: of DATABASE_URL's parts, host, port and database."""
    return place(database).rsplit(" as ", 1)[0]


def place(database: Database) -> str:
    """As the runs name the test's database."""
    url = database.url
    return f"database {url.database} at {url.host}:{url.port or 5432} as {url.username}"
