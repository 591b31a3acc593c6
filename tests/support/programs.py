"""The one way for tests to run a program, and everything that a test observed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from tests.support.canary import assert_no_secret
from tests.support.waiting import until

# Patterns for text that varies from run to run, and their replacements in a Result.
VARYING = [
    (r"\b\d\d:\d\d:\d\d(?= [A-Z]{4,})", "HH:MM:SS"),
    (r"\b\d+\.\d\d s\b", "N.NN s"),
    (r"\bpid \d+", "pid N"),
    (r"\b[0-9a-f]{40}\b", "<commit>"),
]


def normalize(text: str) -> str:
    for pattern, replacement in VARYING:
        text = re.sub(pattern, replacement, text)
    return text


@dataclass(frozen=True)
class Result:
    """Exit code and output of a program; the VARYING parts are replaced."""

    returncode: int
    stdout: str = ""
    stderr: str = ""

    @property
    def text(self) -> str:
        return self.stdout + self.stderr

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def failure(self) -> str:
        """The last line of a failed run, without `FAILED: `; there must be exactly one."""
        lines = [line for line in self.lines if line.startswith("FAILED: ")]
        assert len(lines) == 1, self
        assert "Traceback" not in self.text, self.text
        return lines[0].removeprefix("FAILED: ")

    def line(self, *parts: str, times: int = 1) -> None:
        """Assert that a line contains all of these parts; with `times`, that many lines."""
        found = [line for line in self.lines if all(part in line for part in parts)]
        assert len(found) == times, f"{len(found)} lines with {parts}:\n{self.text}"


class Process(Protocol):
    """The interface that subprocess.Popen and AlembicProcess share."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...


@dataclass
class Program:
    """A started program; its output goes to files, so it never blocks on a reader."""

    process: Process
    folder: tempfile.TemporaryDirectory[str]  # of stdout and stderr
    leads_group: bool = False

    @property
    def stdout(self) -> str:
        return self._read("stdout")

    @property
    def stderr(self) -> str:
        return self._read("stderr")

    @property
    def output(self) -> str:
        """Both streams so far, unchanged."""
        return self.stdout + self.stderr

    def _read(self, stream: str) -> str:
        path = Path(self.folder.name, stream)
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def prints(self, text: str, seconds: float = 60) -> None:
        """Wait until the output contains this text."""
        until(lambda: text in self.output, seconds)

    def wait(self, seconds: float = 120, *, verbatim: bool = False) -> Result:
        """Wait for the program to exit. AssertionError on timeout, or if a secret was printed.

        With `verbatim`, the VARYING parts are kept.
        """
        try:
            returncode = self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still running after {seconds:.0f} s: {self.output}") from error
        assert_no_secret(self.output)
        shown = str if verbatim else normalize
        return Result(returncode, shown(self.stdout), shown(self.stderr))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[Result, float]:
        """Send a signal; return the result and the seconds until the program exited."""
        start = time.monotonic()
        self.process.send_signal(number)
        return self.wait(), time.monotonic() - start

    def kill(self) -> None:
        """Kill the program, or its process group if it leads one."""
        if self.leads_group:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        elif self.running:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)


@dataclass
class Observed:
    """What a test observed: its programs, and texts and exit codes from elsewhere, such as a pod's log."""

    programs: list[Program] = field(default_factory=list)
    texts: dict[str, None] = field(default_factory=dict)  # a log that is polled counts once
    codes: set[int] = field(default_factory=set)

    def add(self, text: str) -> str:
        """Record a text that was printed elsewhere, and return it."""
        self.texts[text] = None
        return text

    def finish(self) -> tuple[list[str], set[int]]:
        """Kill what still runs, return all texts and exit codes, and reset."""
        programs, texts, codes = self.programs, list(self.texts), self.codes
        self.programs, self.texts, self.codes = [], {}, set()
        for program in programs:
            program.kill()
            texts.append(program.output)
            codes.add(program.process.wait(0))
            program.folder.cleanup()
        for text in texts:
            assert_no_secret(text)
        return texts, codes


# For the current test: tests/support/suite.py resets it after each.
observed = Observed()


def output_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hcm-output-", ignore_cleanup_errors=True)


def watch(process: Process, folder: tempfile.TemporaryDirectory[str], leads_group: bool = False) -> Program:
    program = Program(process, folder, leads_group)
    observed.programs.append(program)
    return program


def start(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    stdout: IO[str] | None = None,
    one_stream: bool = False,
    new_group: bool = False,
) -> Program:
    """Start a program.

    `one_stream` merges standard error into standard output, in order; with `new_group` it leads a process group, which
    is killed at the end of the test.
    """
    folder = output_folder()
    with (
        Path(folder.name, "stdout").open("wb") as out,
        Path(folder.name, "stderr").open("wb") as err,
        tempfile.TemporaryFile() as source,
    ):
        source.write(stdin.encode())
        source.seek(0)
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=source,
            stdout=stdout or out,
            stderr=subprocess.STDOUT if one_stream else err,
            start_new_session=new_group,
        )
    return watch(process, folder, new_group)


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    stdout: IO[str] | None = None,
    one_stream: bool = False,
    verbatim: bool = False,
    check: bool = False,
    seconds: float = 120,
) -> Result:
    """Run a program until it exits; with `check`, AssertionError unless its exit code is 0."""
    program = start(command, cwd=cwd, env=env, stdin=stdin, stdout=stdout, one_stream=one_stream)
    result = program.wait(seconds, verbatim=verbatim)
    assert not check or result.returncode == 0, result.text
    return result
