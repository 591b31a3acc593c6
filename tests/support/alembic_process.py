"""`alembic` as a forked process, without a second of imports: the tests start thousands of them."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import alembic.config

_forks = multiprocessing.get_context("forkserver")
# Only packages: each process imports the project's own modules from its own folder. pytest, because it is the main
# module.
_forks.set_forkserver_preload(
    ["pytest", "alembic.command", "dotenv", "sqlalchemy.dialects.postgresql.psycopg2", __name__]
)


# Starting a process polls all others, and of two threads that poll the same process only the first gets its exit code.
_polling = threading.Lock()


class AlembicProcess:
    """`alembic` in `folder`: a real process with its own environment, output and signals. Used like subprocess.Popen.

    `streams` are the files of standard output and standard error.
    """

    def __init__(
        self, folder: Path, streams: tuple[Path, Path], environment: Mapping[str, str], arguments: Sequence[str]
    ) -> None:
        parameters = (folder, streams, dict(environment), list(arguments))
        self._process = _forks.Process(target=_main, args=parameters, daemon=True)
        self._returncode: int | None = None
        with _polling:
            self._process.start()
            assert self._process.pid is not None
            self.pid = self._process.pid

    def poll(self) -> int | None:
        """None while it runs, minus the signal's number if a signal ended it."""
        with _polling:
            if self._returncode is None and (code := self._process.exitcode) is not None:
                self._returncode = code
                self._process.close()  # two descriptors each, of thousands of processes
        return self._returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, sig)

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 0)
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("alembic", timeout)
            time.sleep(0.02)
        return code


def _main(folder: Path, streams: tuple[Path, Path], environment: dict[str, str], arguments: list[str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for path, stream in zip(streams, (sys.stdout, sys.stderr), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream.fileno())
    alembic.config.main(argv=arguments, prog="alembic")
