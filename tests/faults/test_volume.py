"""A full pod volume: pip in the migrate container's script, on a small disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.chart import Helm, migrate
from tests.support.fault_injection import root_only, small_disk
from tests.support.pod_scripts import CODE, CREDENTIALS, README, Volume, make_wheel, wheels_in


@pytest.mark.fault(
    "Process and pod",
    fault="The pod's volume fills up while pip installs",
    sees="`No space left on device`, then `FAILED: pip could not install requirements.txt ...`, exit 1",
    state="The database is not contacted",
    do="Free disk space on the node, or use an image with pre-installed dependencies; deploy again",
)
@root_only
def test_a_full_volume_while_pip_installs_is_reported(helm4: Helm, volume: Volume, tmp_path: Path) -> None:
    folder = volume.clone("alembic.ini")
    (folder / "requirements.txt").write_text("large\n")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "large", {"large.py": "x = 1\n" * 1_000_000})
    with small_disk(volume, "size=1m") as inside:
        result = volume.run(migrate(helm4.render()), "sh", inside, **CREDENTIALS, **wheels_in(wheels))
    assert (result.returncode, result.text.startswith(CODE)) == (1, True), result
    assert "No space left on device" in result.text
    assert result.lines[-1] == (
        "FAILED: pip could not install requirements.txt (exit status 1, reason above): for a mirror, proxy or"
        f' private CA set "extraEnv" ({README}, "Requirements")'
    )


@pytest.mark.fault(
    "Process and pod",
    fault="The pod's volume has no free inode when Alembic starts",
    sees="`No space left on device`, then `FAILED: no file can be created in the pod's volume (reason above): ...`,"
    " exit 1",
    state="The database is not contacted",
    do="Follow the message, deploy again",
)
@root_only
def test_a_volume_without_a_free_inode_is_reported(helm4: Helm, volume: Volume) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", "echo not reached")
    inodes = len(list((volume.folder / "git").rglob("*"))) + 2
    with small_disk(volume, f"nr_inodes={inodes}") as inside:
        result = volume.run(migrate(helm4.render({"requirements": ""})), "sh", inside, **CREDENTIALS)
    assert (result.returncode, result.text.startswith(CODE)) == (1, True), result
    assert "No space left on device" in result.text
    assert result.lines[-1] == (
        "FAILED: no file can be created in the pod's volume (reason above): free disk space on the node, or make the"
        f' repository smaller ({README}, "Git access")'
    )
