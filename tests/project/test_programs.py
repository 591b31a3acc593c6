"""The tests' own programs end with their test, and nothing else does."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from types import SimpleNamespace

from tests.support.programs import start
from tests.support.waiting import until


def test_what_a_program_left_running_ends_with_it(tmp_path: Path) -> None:
    program = start(["sh", "-c", f"sleep 60 & echo $! >{tmp_path}/pid"])
    assert program.wait().returncode == 0
    child = Path("/proc", (tmp_path / "pid").read_text().strip())
    assert child.exists()
    program.kill()
    until(lambda: not child.exists(), 10)


def test_a_process_with_the_pid_of_a_program_that_ended_is_not_killed() -> None:
    """The kernel reuses pids: with the default of 32,768, within minutes of this suite."""
    ended, other = start(["true"]), start(["sleep", "60"])
    ended.wait()
    process = SimpleNamespace(pid=other.process.pid, poll=ended.process.poll, wait=ended.process.wait)
    dataclasses.replace(ended, process=process).kill()
    assert other.stop().returncode == -signal.SIGTERM
