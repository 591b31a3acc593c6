"""Long steps: one at a time, with progress on standard error, and no partial results; waiting with a timeout."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar

from tools.paths import CACHE

T = TypeVar("T")


class UnavailableError(RuntimeError):
    """Something that this machine lacks. The message says what, and how to fix it."""


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def interrupt_on_signals() -> None:
    """Have SIGTERM raise KeyboardInterrupt, so that what was started is stopped; and SIGINT even in a script's
    background job, in which the shell has it ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock `name` of the cache. Another process that needs it waits, and says so.

    Raises UnavailableError, with the fix, if the cache is not writable.
    """
    path = CACHE / "locks" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UnavailableError(
            f"the cache {CACHE} is not writable ({error.strerror}): set XDG_CACHE_HOME to a folder that is"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for lock: {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached(result: Path, create: Callable[[Path], None]) -> Path:
    """Return `result`, a file or folder of the cache. If it is missing, `create(partial)` writes it under another name,
    so that an interrupted step leaves no partial result.
    """
    if not result.exists():
        with locked("-".join(result.relative_to(CACHE).parts)):
            if not result.exists():
                result.parent.mkdir(parents=True, exist_ok=True)
                partial = result.with_name(result.name + ".partial")
                remove(partial)
                create(partial)
                partial.rename(result)
    return result


def wait_until(
    condition: Callable[[], T | None], seconds: float, what: str, *, ignore: tuple[type[Exception], ...] = ()
) -> T:
    """Poll `condition` until its result is true, and return that result. Exceptions in `ignore` count as not true yet.

    Raises TimeoutError after `seconds`: it names `what` was waited for, and the last ignored exception.
    """
    deadline, pause = time.monotonic() + seconds, 0.02
    while True:
        reason = ""
        try:
            if result := condition():
                return result
        except ignore as error:
            reason = f": {error}"
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError(f"timed out after {seconds:g} s waiting for {what}{reason}")
        time.sleep(min(pause, remaining))
        pause = min(pause * 1.5, 0.25)


def run(
    command: Sequence[str | Path],
    what: str = "",
    expected: str = "",
    *,
    input: str | None = None,
    stdin: IO[bytes] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stream: bool = False,
    stop: threading.Event | None = None,
) -> str:
    """Run `command` and return its standard output; its standard input is the text `input` or the file `stdin`.

    With `what`, the step is announced with its `expected` duration, and its progress is logged every 10 s.
    With `stream`, the output is not captured but goes where this process's output goes. If the event `stop` is set, the
    command and everything that it started are terminated, and KeyboardInterrupt is raised.
    Raises RuntimeError with the end of the output if the command fails. An interrupt terminates the command as well.
    """
    if what:
        log(f"{what}{f' (usually {expected})' if expected else ''}")
    start = last_logged = time.monotonic()
    source = subprocess.PIPE if input else stdin or subprocess.DEVNULL
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        arguments = list(map(str, command))
        stdout, stderr = (None, None) if stream else (out, err)
        with subprocess.Popen(
            arguments, stdin=source, stdout=stdout, stderr=stderr, cwd=cwd, env=env, start_new_session=bool(stop)
        ) as process:
            try:
                if input and process.stdin:
                    process.stdin.write(input.encode())
                    process.stdin.close()
                while process.poll() is None:
                    if stop and stop.is_set():
                        raise KeyboardInterrupt
                    time.sleep(0.02)
                    if what and time.monotonic() - last_logged > 10:
                        last_logged = time.monotonic()
                        log(f"  {last_logged - start:4.0f} s  {_last_line(err) or _last_line(out)}")
            except BaseException:
                if stop:
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait()
                else:
                    process.terminate()
                raise
        out.seek(0)
        output = out.read().decode(errors="replace")
        if process.returncode:
            err.seek(0)
            last = "\n".join((output + err.read().decode(errors="replace")).splitlines()[-25:])
            raise RuntimeError(f"{what or ' '.join(arguments)[:300]}: exit code {process.returncode}\n{last}")
    if what and last_logged != start:
        log(f"  {time.monotonic() - start:4.0f} s  done")
    return output


def _last_line(file: IO[bytes]) -> str:
    """The last line that a running command wrote, at most 100 characters. pread leaves the file's position alone."""
    size = os.fstat(file.fileno()).st_size
    lines = os.pread(file.fileno(), 400, max(0, size - 400)).decode(errors="replace").strip().splitlines()
    return lines[-1][:100] if lines else ""
