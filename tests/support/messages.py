"""What several tests expect in the runner's messages."""

from tests.support.database import Database

AGAIN = (
    "run again to resume; if the Job's deadline was exceeded,"
    " raise 'job.activeDeadlineSeconds' and Helm's --timeout together"
)
KILLED = (
    "interrupted by SIGTERM; did not stop in time and was killed;"
    " the database was at revision 002 before: check with 'alembic current'; run again to resume"
)
FIX = "fix it, then retry"
RULES = "see docs/troubleshooting.md"
URL_FORMAT = (
    "write postgresql://user:password@host:5432/database and percent-encode the user and the password, see .env.example"
)


def target(database: Database) -> str:
    """The test's database as in a failure: name, host and port."""
    return target_and_user(database).rsplit(" as ", 1)[0]


def target_and_user(database: Database) -> str:
    """The test's database as in the first line of a run."""
    url = database.url
    return f"database {url.database} at {url.host}:{url.port or 5432} as {url.username}"
