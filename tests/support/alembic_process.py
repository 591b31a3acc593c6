"""`alembic` as a process that costs a fork instead of a second of imports: the tests start thousands of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
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


class Runner:
    """A run of `alembic` in `folder`; a real process with an environment, output and signals of its own.

    `errors` is where standard error goes, where that is not `output`, too.
    """

    def __init__(
        self, folder: Path, output: Path, environment: dict[str, str], *arguments: str, errors: Path | None = None
    ) -> None:
        self.output = output
        files = (output, errors or output)
        self.process = _forks.Process(target=_main, args=(folder, files, environment, arguments), daemon=True)
        with _asking:
            self.process.start()

    @property
    def returncode(self) -> int | None:
        """As subprocess has it: None while it runs, minus the signal's number where a signal ended it."""
        with _asking:
            return self.process.exitcode

    def kill(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        with _asking:
            if self.process.exitcode is None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(self.process.pid, number)

    def wait(self, seconds: float) -> str:
        """Wait for the end and return standard output and error; AssertionError where it takes longer."""
        end = time.monotonic() + seconds
        while self.returncode is None:
            assert time.monotonic() < end, f"still runs after {seconds:.0f} s: {self.text}"
            time.sleep(0.02)
        return self.text

    @property
    def text(self) -> str:
        """What it has written so far."""
        return self.output.read_text() if self.output.exists() else ""


def _main(folder: Path, files: tuple[Path, Path], environment: dict[str, str], arguments: tuple[str, ...]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for path, stream in zip(files, (sys.stdout, sys.stderr), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream.fileno())
    sys.exit(alembic.config.main(argv=list(arguments), prog="alembic"))
