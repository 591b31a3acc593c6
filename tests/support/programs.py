"""The one way in which tests run a program, and everything that was observed in a test."""

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

# What differs in each run, and what stands for it in a Result.
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
    """How a program ended; both its streams with the VARYING parts replaced."""

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
        """The one line that ends a failed run, without `FAILED: `."""
        lines = [line for line in self.lines if line.startswith("FAILED: ")]
        assert len(lines) == 1, self
        assert "Traceback" not in self.text, self.text
        return lines[0].removeprefix("FAILED: ")

    def line(self, *parts: str, times: int = 1) -> None:
        """Assert that a line has all of these parts, and how many lines have."""
        found = [line for line in self.lines if all(part in line for part in parts)]
        assert len(found) == times, f"{len(found)} lines with {parts}:\n{self.text}"


class Process(Protocol):
    """What subprocess.Popen and AlembicProcess have in common."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...


@dataclass
class Program:
    """A program that was started; its output goes to files, so it never waits for a reader."""

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
        """Wait until the output has this text."""
        until(lambda: text in self.output, seconds)

    def wait(self, seconds: float = 120, *, verbatim: bool = False) -> Result:
        """Wait for the end. AssertionError if that takes longer, or if a secret was printed.

        With `verbatim`, the result has the VARYING parts, too.
        """
        try:
            returncode = self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still running after {seconds:.0f} s: {self.output}") from error
        assert_no_secret(self.output)
        shown = str if verbatim else normalize
        return Result(returncode, shown(self.stdout), shown(self.stderr))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[Result, float]:
        """Send a signal; return the result, and the seconds until the end."""
        start = time.monotonic()
        self.process.send_signal(number)
        return self.wait(), time.monotonic() - start

    def kill(self) -> None:
        """Kill it, and what it started if it leads a process group."""
        if self.leads_group:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        elif self.running:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)


@dataclass
class Observed:
    """What a test has seen: programs that it started, and texts and exit codes from elsewhere, such as a pod's log."""

    programs: list[Program] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    codes: set[int] = field(default_factory=set)

    def add(self, text: str) -> str:
        """Note a text that was printed elsewhere, and return it."""
        self.texts.append(text)
        return text

    def finish(self) -> tuple[list[str], set[int]]:
        """End what still runs; return all texts and exit codes, and begin anew."""
        for program in self.programs:
            program.kill()
            assert_no_secret(program.output)
        texts = [*self.texts, *(program.output for program in self.programs)]
        codes = self.codes | {program.process.wait(0) for program in self.programs}
        for program in self.programs:
            program.folder.cleanup()
        self.programs, self.texts, self.codes = [], [], set()
        return texts, codes


# Of the test that runs now: tests/support/suite.py empties it after each.
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

    `one_stream` sends standard error to standard output, too, in the order in which it comes; `new_group` makes it lead
    a process group, which ends with the test.
    """
    folder = output_folder()
    with (
        Path(folder.name, "stdout").open("wb") as out,
        Path(folder.name, "stderr").open("wb") as err,
        tempfile.TemporaryFile() as typed,
    ):
        typed.write(stdin.encode())
        typed.seek(0)
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=typed,
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
    """Run a program to its end; with `check`, AssertionError unless its exit code is 0."""
    program = start(command, cwd=cwd, env=env, stdin=stdin, stdout=stdout, one_stream=one_stream)
    result = program.wait(seconds, verbatim=verbatim)
    assert not check or result.returncode == 0, result.text
    return result
