"""Revision files, revisions that leave a trace in the database, and queries about the runs."""

import re
from pathlib import Path

from tests.support.database import Database
from tests.support.programs import Result
from tests.support.waiting import until

# Each audited revision inserts its number here: a revision that ran twice has two rows, one that was rolled back none.
AUDIT = 'op.execute("CREATE TABLE audit (revision text)")'
FILE = "20251202_143000_{}_add.py"
AGAIN = (
    "run again to resume; if the Job's deadline was exceeded,"
    " raise 'job.activeDeadlineSeconds' and Helm's --timeout together"
)
SLEEP = 'op.execute("SELECT pg_sleep(60)")'
BUILD = 'op.execute("CREATE INDEX CONCURRENTLY slow ON audit (revision)")'
TABLE = 'op.execute("CREATE TABLE a (x int)")\n'
BLOCK = "with op.get_context().autocommit_block():\n    "
KILLED = (
    "interrupted by SIGTERM; did not stop in time and was killed;"
    " the database was at revision 002 before: check with 'alembic current'; run again to resume"
)
FIX = "fix it, then retry"
FIRST = "20251201_120000_001_create_hcm_report_metadata.py"
RULES = "see 'Adding a migration' in README.md"
URL_FORMAT = (
    "write postgresql://user:password@host:5432/database and percent-encode the user and the password, see .env.example"
)


def write(versions: Path, number: str, upgrade: str, downgrade: str, *, down: str | None, name: str) -> Path:
    """Write a revision whose functions have these bodies, after `down`, by default the previous number."""
    down = f"{int(number) - 1:03}" if down is None else down
    body = [
        f'"""{name}"""',
        "import signal, time",
        "from alembic import op",
        f"revision = {number!r}",
        f"down_revision = {down!r}" if down != "000" else "down_revision = None",
        "def upgrade():",
        *(f"    {line}" for line in upgrade.strip().splitlines()),
        "def downgrade():",
        *(f"    {line}" for line in downgrade.strip().splitlines()),
    ]
    path = versions / f"20251202_143000_{number}_{name}.py"
    path.write_text("\n".join(body) + "\n", encoding="utf-8")
    return path


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that the file must contain, once."""
    text = path.read_text()
    assert old in text, text
    path.write_text(text.replace(old, new, 1))


def audited(number: str, body: str = "") -> str:
    return f"op.execute(\"INSERT INTO audit VALUES ('{number}')\")\n{body}"


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


def target(database: Database) -> str:
    """The test's database as in a failure: name, host and port."""
    return target_and_user(database).rsplit(" as ", 1)[0]


def target_and_user(database: Database) -> str:
    """The test's database as in the first line of a run."""
    url = database.url
    return f"database {url.database} at {url.host}:{url.port or 5432} as {url.username}"
