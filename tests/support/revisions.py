"""Revision files, and what the revisions of the tests do."""

from pathlib import Path

# Each audited revision inserts its number here: a revision that ran twice has two rows, one that was rolled back none.
AUDIT = 'op.execute("CREATE TABLE audit (revision text)")'
FILE = "20251202_143000_{}_add.py"
SLEEP = 'op.execute("SELECT pg_sleep(60)")'
BUILD = 'op.execute("CREATE INDEX CONCURRENTLY slow ON audit (revision)")'
TABLE = 'op.execute("CREATE TABLE a (x int)")\n'
BLOCK = "with op.get_context().autocommit_block():\n    "
FIRST = "20251201_120000_001_create_hcm_report_metadata.py"


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
