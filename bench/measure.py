"""What the questions share: a command's seconds and peak memory, medians, the machine, Markdown."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.network import is_listening
from tools.steps import run, wait_until

LIMIT = 300.0  # seconds of one run; then it is killed
SLOW = 60.0  # seconds; a run that took longer is not repeated

# Starts the command, and prints its seconds, the peak of its largest process in KiB, and its exit status. It is a small
# process, because a child's peak is at least its parent's memory at the fork.
LAUNCHER = """
import os, sys, time
start = time.monotonic()
actions = [(os.POSIX_SPAWN_DUP2, 2, 1)]
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=actions)
_, status, usage = os.wait4(child, 0)
print(time.monotonic() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class Sample:
    """One run: wall time in seconds, and the peak resident memory of its largest process in MiB."""

    seconds: float
    mib: float


class Results:
    """The samples by competitor and case."""

    def __init__(self) -> None:
        self.samples: dict[tuple[str, str], list[Sample]] = defaultdict(list)
        self.failed: dict[tuple[str, str], str] = {}  # the reason

    def seconds(self, name: str, case: str) -> float | None:
        """The median; None if it was not measured."""
        samples = self.samples.get((name, case))
        return statistics.median(sample.seconds for sample in samples) if samples else None

    def peak(self, name: str) -> str:
        """`68 MiB`; a dash if nothing was measured."""
        return f"{self.mib(name):.0f} MiB" if self.mib(name) else "-"

    def mib(self, name: str) -> float:
        """The peak of all the cases of a competitor: the median of each, and of these the largest; 0 without any."""
        samples = [samples for (of, _), samples in self.samples.items() if of == name]
        return max((statistics.median(sample.mib for sample in each) for each in samples), default=0)

    def is_finished(self, name: str, case: str) -> bool:
        """Whether a run is not to be repeated: it failed, or is slow."""
        samples = self.samples.get((name, case), [])
        return (name, case) in self.failed or any(sample.seconds > SLOW for sample in samples)

    def cell(self, name: str, case: str, reference: str) -> str:
        """`0.43 s, 0.91`: the median, and its ratio to that of the competitor `reference`."""
        if reason := self.failed.get((name, case)):
            return reason
        median, of = self.seconds(name, case), self.seconds(reference, case)
        if median is None:
            return "-"
        once = " (once)" if median > SLOW and len(self.samples[name, case]) == 1 else ""
        ratio = f", {ratio_text(median / of)}" if of and name != reference else ""
        return f"{seconds_text(median)}{ratio}{once}"

    def behind(self, name: str, others: Iterable[str], cases: Sequence[str]) -> str:
        """A list, by case, of those of `others` that take less time or memory than `name`, and their ratio to it."""
        if not self.mib(name):
            return ""
        found = []
        for case in (*cases, "peak"):
            values = {of: self.mib(of) if case == "peak" else self.seconds(of, case) for of in (name, *others)}
            ratios = {of: value / (values[name] or 1) for of, value in values.items() if value and values[name]}
            lower = [f"{of} {ratio_text(ratio)}" for of, ratio in ratios.items() if round(ratio, 2) < 1]
            found += [f"- {case}: {', '.join(lower)}\n"] if lower else []
        return f"Behind:\n\n{''.join(found)}" if found else "Nowhere behind.\n"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.{3 if seconds < 0.1 else 2 if seconds < 10 else 1}f} s"


def ratio_text(ratio: float) -> str:
    return f"{ratio:.{3 if ratio < 0.1 else 2 if ratio < 10 else 0}f}"


def alternate(names: Sequence[str], number: int) -> Sequence[str]:
    """The order of the competitors in round `number`: every other one is reversed, so that none is always the first."""
    return names if number % 2 == 0 else names[::-1]


def timed(command: Sequence[str | Path], cwd: Path, env: Mapping[str, str]) -> Sample:
    """Run a command. Raises RuntimeError with the end of its output if it fails, TimeoutError after LIMIT."""
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, *map(str, command)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            launcher, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, cwd=cwd, env=env,
            start_new_session=True,
        )  # fmt: skip
        try:
            line, _ = process.communicate(timeout=LIMIT)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"{command[0]} took over {LIMIT:.0f} s") from None
            raise
        seconds, kib, status = line.split() or (b"0", b"0", b"1")
        if int(status):
            log.seek(0)
            end = log.read().decode(errors="replace")[-3000:]
            raise RuntimeError(f"{' '.join(map(str, command))[:300]}: exit status {int(status)}\n{end}")
    return Sample(float(seconds), int(kib) / 1024)


@contextlib.contextmanager
def server(command: Sequence[str | Path], port: int) -> Iterator[None]:
    """A server that runs meanwhile on a port of loopback, with everything that it starts."""
    null = subprocess.DEVNULL
    process = subprocess.Popen([*map(str, command)], stdin=null, stdout=null, stderr=null, start_new_session=True)
    try:
        wait_until(lambda: is_listening(port), 10, f"{command[0]} to listen")
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a dash in a cell is a case that a competitor does not have."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine() -> str:
    """The processor, its cores, the memory, the system: no name of the machine."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = platform.freedesktop_os_release()["PRETTY_NAME"]
    return (
        f"{cpu[1] if cpu else platform.machine()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB; {system}, "
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, "
        f"{run(['git', '--version']).strip()}"
    )
