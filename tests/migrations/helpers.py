"""An empty database with an ordinary role, a copy of the project to add revisions to, and what its commands print."""

from __future__ import annotations

import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg2
from sqlalchemy import URL

from tests.conftest import CANARY
from tests.support.alembic_process import Runner
from tools.postgres import dsn, execute, programs

ALEMBIC = Path(sys.executable).with_name("alembic")

# With all that has to be escaped.
PASSWORD = CANARY + "%@/: #'\"\\${X}%41ä€&?="


@dataclass
class Result:
    """What a command printed, with its times replaced: `HH:MM:SS`, `N.NN s`, `pid N`."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        """Standard error, line by line."""
        return self.stderr.splitlines()

    @property
    def failure(self) -> str:
        """The one line that ends a failed run, without `FAILED: `."""
        lines = [line for line in (self.stdout + self.stderr).splitlines() if line.startswith("FAILED: ")]
        assert len(lines) == 1, self
        assert "Traceback" not in self.stderr, self.stderr
        return lines[0].removeprefix("FAILED: ")


def normalize(text: str) -> str:
    text = re.sub(r"^\d\d:\d\d:\d\d ", "HH:MM:SS ", text, flags=re.M)
    text = re.sub(r"\d+\.\d\d s", "N.NN s", text)
    return re.sub(r"pid \d+", "pid N", text)


def result(returncode: int, output: Path) -> Result:
    """What is in the folder `output` of a command that ended."""
    stdout, stderr = ((output / name).read_text() for name in ("stdout", "stderr"))
    assert CANARY not in stdout + stderr, stdout + stderr
    return Result(returncode, normalize(stdout), normalize(stderr))


@dataclass
class Database:
    """An empty database, and an ordinary role that owns it."""

    admin: URL  # the superuser's, to this database
    url: URL  # the role's
    name: str
    role: str

    def execute(self, statement: str, *parameters: object) -> list[tuple]:
        """As superuser."""
        return execute(self.admin, statement, *parameters)

    def scalar(self, statement: str, *parameters: object) -> Any:
        return self.execute(statement, *parameters)[0][0]

    @property
    def at(self) -> list[str]:
        """The revisions in the version table."""
        return [version for (version,) in self.execute("SELECT version_num FROM alembic_version")]

    @property
    def relations(self) -> list[str]:
        """Everything that a revision made in public: tables, indexes, sequences."""
        query = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
        return [name for (name,) in self.execute(query) if not name.startswith("alembic_version")]

    @contextmanager
    def session(self) -> Iterator[Any]:
        """A psycopg2 cursor in a transaction of its own, as superuser; rolled back at the end."""
        connection = psycopg2.connect(dsn(self.admin), application_name="report")
        try:
            yield connection.cursor()
        finally:
            connection.close()

    def dump(self) -> str:
        return self._program("pg_dump", "--schema-only", "--restrict-key=test")

    def psql(self, script: str) -> None:
        """Run a script as the role, stopping at its first error."""
        self._program("psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", input=script)

    def _program(self, program: str, *arguments: str, **options: Any) -> str:
        url = self.url  # in the environment, as the process list is for everyone to read
        environment = {"PGHOST": url.host, "PGPORT": str(url.port or 5432), "PGDATABASE": self.name}
        environment |= {"PGUSER": self.role, "PGPASSWORD": PASSWORD}
        done = subprocess.run(
            [programs() / program, *arguments], env=environment, capture_output=True, text=True, **options
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def activity(self) -> list[str]:
        """What the runs' own sessions do now: `active: SELECT pg_sleep(60)`; one that still starts has no state yet."""
        query = (
            "SELECT concat_ws(': ', state, query) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'hcm-db-migrations' AND backend_type = %s"
        )
        return [row for (row,) in self.execute(query, "client backend")]


def parts(database: Database) -> dict[str, str | None]:
    """The test's database, as DB_*."""
    url = database.url
    return {
        "DATABASE_URL": None,
        "DB_HOST": url.host,
        "DB_PORT": str(url.port or 5432),
        "DB_NAME": url.database,
        "DB_USER": url.username,
        "DB_PASSWORD": PASSWORD,
    }


@dataclass
class Running:
    """A command that was started."""

    process: subprocess.Popen[bytes]
    output: Path  # the folder of its stdout and stderr

    def says(self, words: str) -> None:
        """Wait until standard error has these words."""
        until(lambda: words in (self.output / "stderr").read_text())

    def wait(self) -> Result:
        self.process.wait(timeout=120)
        return result(self.process.returncode, self.output)

    def stop(self, number: signal.Signals) -> tuple[Result, float]:
        """Send a signal; return what came of it, and the seconds that it took."""
        start = time.monotonic()
        self.process.send_signal(number)
        return self.wait(), time.monotonic() - start


@dataclass
class Project:
    """A copy of alembic.ini and migrations/, and the command line in it, with an environment of its own."""

    folder: Path
    environment: dict[str, str]
    running: list[Running] = field(default_factory=list)
    commands: int = 0

    @property
    def versions(self) -> Path:
        return self.folder / "migrations" / "versions"

    def files(self) -> list[str]:
        return sorted(path.name for path in self.versions.glob("*.py"))

    def add(
        self, number: str, upgrade: str = "pass", downgrade: str = "pass", *, down: str | None = None, name: str = "add"
    ) -> Path:
        """Write a revision whose functions have these bodies, after the one with the number before."""
        down = f"{int(number) - 1:03}" if down is None else down
        path = self.versions / f"20251202_143000_{number}_{name}.py"
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
        path.write_text("\n".join(body) + "\n", encoding="utf-8")
        return path

    def _output(self) -> Path:
        """A new folder for a command's stdout and stderr."""
        self.commands += 1
        folder = self.folder.with_name(f"run-{self.commands}")
        folder.mkdir()
        return folder

    def _variables(self, changed: dict[str, str | None]) -> dict[str, str]:
        """The environment; a variable that is None is unset."""
        return {name: value for name, value in (self.environment | changed).items() if value is not None}

    def popen(
        self, *arguments: str, program: Path = ALEMBIC, cwd: Path | None = None, **environment: str | None
    ) -> Running:
        """Start `alembic`, or another program of the virtual environment."""
        output = self._output()
        with (output / "stdout").open("wb") as stdout, (output / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                [program, *arguments],
                cwd=cwd or self.folder,
                env=self._variables(environment),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        self.running.append(Running(process, output))
        return self.running[-1]

    def alembic(self, *arguments: str, **environment: str | None) -> Result:
        """Run `alembic` to its end."""
        output = self._output()
        variables = self._variables(environment)
        runner = Runner(self.folder, output / "stdout", variables, *arguments, errors=output / "stderr")
        try:
            runner.wait(120)
        finally:
            runner.kill(signal.SIGKILL)
        assert runner.returncode is not None
        return result(runner.returncode, output)


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait for a true value and return it."""
    end, pause = time.monotonic() + seconds, 0.02
    while not (value := condition()):
        assert time.monotonic() < end, f"still {value!r} after {seconds} s"
        time.sleep(pause)
        pause = min(pause * 1.2, 0.25)
    return value


@contextmanager
def fresh_database(server: URL) -> Iterator[Database]:
    name = f"test_{secrets.token_hex(6)}"
    quoted = PASSWORD.replace("'", "''")
    execute(server, f"CREATE ROLE {name} LOGIN PASSWORD '{quoted}'")
    execute(server, f"CREATE DATABASE {name} OWNER {name}")
    try:
        own = server.set(database=name)
        yield Database(own, own.set(username=name, password=PASSWORD), name, name)
    finally:
        execute(server, f"DROP DATABASE {name} WITH (FORCE)")
        execute(server, f"DROP ROLE {name}")
