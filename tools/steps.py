"""Long steps: one cache folder, one process at a time, progress on standard error, nothing half done."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.paths import CACHE


class UnavailableError(RuntimeError):
    """Something that this machine lacks. The message says what, and what to do about it."""


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock `name` of the cache. Another process that wants it waits, and says so."""
    path = CACHE / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process: {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached(result: Path, make: Callable[[Path], None]) -> Path:
    """Return `result`, a file or folder of the cache. Where it is missing, `make(partial)` makes it, aside."""
    if not result.exists():
        with locked("-".join(result.relative_to(CACHE).parts)):
            if not result.exists():
                result.parent.mkdir(parents=True, exist_ok=True)
                partial = result.with_name(result.name + ".partial")
                remove(partial)
                make(partial)
                partial.rename(result)
    return result


def run(command: list[str | Path], what: str = "", expected: str = "", **options) -> str:
    """Run `command` and return its standard output; `input` is its standard input, other
    `options` go to subprocess.Popen.

    With `what`, the step is announced with its `expected` time and tells every 10 s how far it is.
    Raises RuntimeError with the end of the output when the command fails. An interrupt ends the command, too.
    """
    if what:
        log(f"{what}{f' (usually {expected})' if expected else ''}")
    start = told = time.monotonic()
    stdin = options.pop("input", None)
    options.setdefault("stdin", subprocess.PIPE if stdin else subprocess.DEVNULL)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with subprocess.Popen([str(word) for word in command], stdout=out, stderr=err, **options) as process:
            try:
                if stdin:
                    process.stdin.write(stdin.encode())
                    process.stdin.close()
                while process.poll() is None:
                    time.sleep(0.02)
                    if what and time.monotonic() - told > 10:
                        told = time.monotonic()
                        log(f"  {told - start:4.0f} s  {_last_line(err) or _last_line(out)}")
            except BaseException:
                process.terminate()
                raise
        out.seek(0)
        output = out.read().decode(errors="replace")
        if process.returncode:
            err.seek(0)
            last = "\n".join((output + err.read().decode(errors="replace")).splitlines()[-25:])
            raise RuntimeError(f"{what or ' '.join(map(str, command))[:300]}: exit status {process.returncode}\n{last}")
    if what and told != start:
        log(f"  {time.monotonic() - start:4.0f} s  done")
    return output


def _last_line(file) -> str:
    """The last line that a running command wrote, at most 100 characters. pread leaves the file's position alone."""
    size = os.fstat(file.fileno()).st_size
    lines = os.pread(file.fileno(), 400, max(0, size - 400)).decode(errors="replace").strip().splitlines()
    return lines[-1][:100] if lines else ""
