"""`alembic` as a process that costs a fork instead of a second of imports: the tests start thousands of them."""

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
# Only packages: each process imports the project's own modules from its own folder. pytest, as it is the main module.
_forks.set_forkserver_preload(
    ["pytest", "alembic.command", "dotenv", "sqlalchemy.dialects.postgresql.psycopg2", __name__]
)


# Starting a process asks after all others, and of two threads that ask after one, only the first gets its answer.
_asking = threading.Lock()


class AlembicProcess:
    """`alembic` in `folder`: a real process with its own environment, output and signals. Used as subprocess.Popen is.

    `streams` are the files of standard output and standard error.
    """

    def __init__(
        self, folder: Path, streams: tuple[Path, Path], environment: Mapping[str, str], arguments: Sequence[str]
    ) -> None:
        options = (folder, streams, dict(environment), list(arguments))
        self._process = _forks.Process(target=_main, args=options, daemon=True)
        with _asking:
            self._process.start()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def poll(self) -> int | None:
        """None while it runs, minus the signal's number if a signal ended it."""
        with _asking:
            return self._process.exitcode

    def send_signal(self, sig: int) -> None:
        with _asking:
            if self._process.exitcode is None:
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
