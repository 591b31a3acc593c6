"""The Job's log when it is read slowly."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.chart import Helm, migrate
from tests.support.fault_injection import root_only
from tests.support.pod_scripts import CREDENTIALS, SHELLS, Volume
from tests.support.waiting import AT_ONCE, until


@pytest.mark.fault(
    "Process and pod",
    fault="The log is read slowly (kubelet under load) while a run ends",
    sees="The whole log: its last line is `FAILED: ...`",
    state="Finished revisions are kept",
    do="Follow the message",
)
@root_only
@pytest.mark.parametrize("shell", SHELLS)
def test_the_end_of_the_log_is_not_lost_to_a_slow_reader(helm4: Helm, volume: Volume, shell: str) -> None:
    """In a PID namespace, as in a pod, everything ends with the script."""
    volume.clone("alembic.ini")
    volume.program("alembic", "seq 15000; echo FAILED: the reason; exit 255")
    pod = 'unshare --pid --fork --kill-child --mount-proc "$@" | { sleep 3; cat; }'
    result = volume.run(migrate(helm4.render({"requirements": ""})), shell, ["sh", "-c", pod, "sh"], **CREDENTIALS)
    assert result.lines[-2:] == ["15000", "FAILED: the reason"]
    assert len(result.lines) == 15002


@pytest.mark.parametrize("shell", SHELLS)
def test_a_signal_to_all_processes_ends_the_run_at_once(helm4: Helm, volume: Volume, shell: str) -> None:
    """As from a terminal, or from `docker stop` of a group: what copies the log is stopped, too."""
    volume.clone("alembic.ini")
    volume.program("alembic", 'touch "$HOME/running"; exec sleep 60')
    container = migrate(helm4.render({"requirements": ""}))
    program = volume.start(container, shell, ["setsid", "--wait"], **CREDENTIALS)
    until((volume.folder / "running").exists)
    (group,) = Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children").read_text().split()
    os.killpg(int(group), signal.SIGTERM)
    result = program.wait(AT_ONCE)
    assert result.returncode == 143, result.text
    assert result.lines[-1].startswith("stopped by SIGTERM while running alembic upgrade head; ")
