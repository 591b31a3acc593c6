"""Compare the runner with stock Alembic, on the same revisions and the same server: ratios of medians, in one run.

    make bench                # 1,000 revisions, nine rounds
    make bench REVISIONS=10000

Stock is the output of `alembic init`, with a transaction for each revision. Unrecorded is the runner in a database
where a view has the name of its record, so that it writes none. They alternate, and nothing is compiled in advance, as
in a Job.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

from tools.paths import ROOT
from tools.postgres import Postgres, dsn

ALEMBIC = Path(sys.executable).with_name("alembic")
REVISION = '''"""add"""

from alembic import op

revision = "{number:05}"
down_revision = {down}


def upgrade() -> None:
    op.execute("CREATE TABLE t{number} (id int)")


def downgrade() -> None:
    op.execute("DROP TABLE t{number}")
'''


def create_projects(folder: Path, revisions: int) -> dict[str, Path]:
    """Create the projects `runner`, also as `unrecorded`, and `stock`, whose same revisions each create a table."""
    runner, stock = folder / "runner", folder / "stock"
    (runner / "migrations/versions").mkdir(parents=True)
    copytree(ROOT / "migration_runner", runner / "migration_runner", ignore=ignore_patterns("__pycache__"))
    for name in ("alembic.ini", "migrations/env.py", "migrations/script.py.mako"):
        copy(ROOT / name, runner / name)
    stock.mkdir()
    subprocess.run([ALEMBIC, "init", "migrations"], cwd=stock, check=True, capture_output=True)
    env = stock / "migrations/env.py"
    text = env.read_text()
    for before, after in (
        ("config = context.config\n", "config = context.config\nimport os\n"),
        ("config.get_section(config.config_ini_section, {})", '{"sqlalchemy.url": os.environ["DATABASE_URL"]}'),
        ("connection=connection,", "connection=connection, transaction_per_migration=True,"),
    ):
        assert before in text, f"the env.py of alembic init is not as expected: {before!r} is missing"
        text = text.replace(before, after)
    env.write_text(text)
    for number in range(1, revisions + 1):
        source = REVISION.format(number=number, down=repr(f"{number - 1:05}") if number > 1 else None)
        for project in (runner, stock):
            (project / f"migrations/versions/20260101_000000_{number:05}_add.py").write_text(source)
    return {"runner": runner, "stock": stock, "unrecorded": runner}


def measure(revisions: int, rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds by project and case: from empty, no-op, current."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, Postgres() as server:
        projects = create_projects(Path(folder), revisions)
        for number in range(rounds):
            for name in sorted(projects, reverse=number % 2 == 1):
                database = f"{name}{number}"
                server.execute(f"CREATE DATABASE {database}")
                if name == "unrecorded":
                    server.execute("CREATE VIEW alembic_version_history AS SELECT", database=database)
                url = server.url.set(database=database, drivername="postgresql")
                environment = os.environ | {"DATABASE_URL": dsn(url), "PYTHONDONTWRITEBYTECODE": "1"}
                for case, command in (
                    ("from empty", ("upgrade", "head")),
                    ("no-op", ("upgrade", "head")),
                    ("current", ("current",)),
                ):
                    start = time.monotonic()
                    subprocess.run(
                        [ALEMBIC, *command], cwd=projects[name], env=environment, check=True, capture_output=True
                    )
                    seconds[name, case].append(time.monotonic() - start)
                server.execute(f"DROP DATABASE {database}")
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return {key: statistics.median(values) for key, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revisions", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    median = measure(arguments.revisions, arguments.rounds)
    for case in ("from empty", "no-op", "current"):
        runner, stock = median["runner", case], median["stock", case]
        print(
            f"{case:10}  runner {runner:6.2f} s  stock {stock:6.2f} s  ratio {runner / stock:.3f}"
            f"  the record's part {runner / median['unrecorded', case] - 1:.3f}"
        )
    print(f"current against no-op, runner: {median['runner', 'current'] / median['runner', 'no-op']:.3f}")


if __name__ == "__main__":
    main()
