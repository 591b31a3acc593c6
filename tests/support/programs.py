"""The one way for tests to run a program, and everything that a test observed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from tests.support.canary import assert_no_secret
from tests.support.waiting import AT_ONCE, until

# Patterns for text that varies from run to run, and their replacements in a Result.
VARYING = [
    (r"\b\d\d:\d\d:\d\d(?= [A-Z]{4,})", "HH:MM:SS"),
    (r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "YYYY-MM-DD HH:MM:SS UTC"),
    (r"\b\d+\.\d\d s\b", "N.NN s"),
    (r"\bpid \d+", "pid N"),
    (r"\b[0-9a-f]{40}\b", "<commit>"),
]


def _joined(stdout: str, stderr: str) -> str:
    return f"{stdout}\n{stderr}" if stdout and stderr and not stdout.endswith("\n") else stdout + stderr


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
        return _joined(self.stdout, self.stderr)

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


def _exists(pid: int) -> bool:
    """Whether a process has this pid; a group may outlive the process that it is named after."""
    try:
        os.getpgid(pid)
    except ProcessLookupError:
        return False
    return True


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
    leads_group: bool
    is_evidence: bool = True  # whether a fault mark may claim what it prints
    killed: bool = False  # by kill(), so its exit code says nothing

    @property
    def stdout(self) -> str:
        return self._read("stdout")

    @property
    def stderr(self) -> str:
        return self._read("stderr")

    @property
    def output(self) -> str:
        """Both streams so far, unchanged."""
        return _joined(self.stdout, self.stderr)

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

    def stop(self, number: signal.Signals = signal.SIGTERM) -> Result:
        """Send a signal; return the result. AssertionError if the program does not exit `AT_ONCE`."""
        self.process.send_signal(number)
        return self.wait(AT_ONCE)

    def kill(self) -> None:
        """Kill the program and what it started."""
        running = self.running
        self.killed = self.killed or running
        if self.leads_group and (running or not _exists(self.process.pid)):  # else the pid is another program's by now
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        elif running:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)


@dataclass(frozen=True)
class Output:
    """A text that was printed, and the exit code of what printed it if that is known."""

    text: str
    code: int | None = None


@dataclass
class Observed:
    """What a test observed: the programs that it started, and output from elsewhere, such as a pod's log."""

    programs: list[Program] = field(default_factory=list)
    elsewhere: dict[Output, None] = field(default_factory=dict)  # a log that is polled counts once

    def add(self, text: str, code: int | None = None) -> str:
        """Record a text that was printed elsewhere, and return it."""
        self.elsewhere[Output(text, code)] = None
        return text

    def kill_programs(self) -> None:
        """Kill what is still running; all of it, also if one cannot be killed."""
        with ExitStack() as stack:
            for program in self.programs:
                stack.callback(program.kill)

    def finish(self) -> list[Output]:
        """Kill what is still running, return the evidence, and reset. AssertionError if anything printed a secret."""
        programs, evidence = self.programs, list(self.elsewhere)
        try:
            self.kill_programs()
        finally:
            self.programs, self.elsewhere = [], {}
        everything = list(evidence)
        for program in programs:
            code = None if program.killed else program.process.poll()
            streams = [Output(program.stdout, code), Output(program.stderr, code)]
            everything += streams
            if program.is_evidence:
                evidence += streams
            program.folder.cleanup()
        for output in everything:
            assert_no_secret(output.text)
        return evidence


# For the current test: tests/support/suite.py resets it after each.
observed = Observed()


def output_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hcm-output-", ignore_cleanup_errors=True)


def watch(program: Program) -> Program:
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
    is_evidence: bool = True,
) -> Program:
    """Start a program in its own process group, which is killed at the end of the test.

    `one_stream` merges standard error into standard output, in order.
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
            start_new_session=True,
        )
    return watch(Program(process, folder, leads_group=True, is_evidence=is_evidence))


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
