"""The Job's log when it is read slowly."""

import pytest

from tests.support.chart import Helm, migrate
from tests.support.fault_injection import root_only
from tests.support.pod_scripts import CREDENTIALS, SHELLS, Volume


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
