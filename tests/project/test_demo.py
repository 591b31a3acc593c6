"""`make demo` does what the README says, and leaves nothing behind, even if it is interrupted."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.paths import ROOT


@pytest.fixture
def folder() -> Iterator[Path]:
    """A path that is short enough for a Unix socket, and readable for PostgreSQL's user, as /tmp is."""
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def _demo(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tools.demo"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_demo_upgrades_and_downgrades(folder: Path) -> None:
    demo = _demo(folder)
    output, _ = demo.communicate(timeout=120)
    assert demo.returncode == 0, output
    facts = re.findall(r"INFO (?:at|now at) (.*)", output)
    assert facts == [
        "base (the head is 001); to do: 1 (001 create_hcm_report_metadata)",
        "001 (head)",
        "001 (head): nothing to do",
        "001 (the head is 002); to do: 1 (002 add_status_column)",
        "002 (head)",
        "002 (head); to do: 1 (002 add_status_column)",
        "001 (the head is 002)",
    ]
    assert re.findall(r'"(idx_\w+)" btree', output) == [
        "idx_hcm_report_campaign",
        "idx_hcm_report_campaign_report_freq",
        "idx_hcm_report_frequency",
        "idx_hcm_report_name",
        "idx_hcm_report_trigger_date",
    ]
    assert list(folder.iterdir()) == []


def test_an_interrupted_demo_leaves_nothing_behind(folder: Path) -> None:
    demo = _demo(folder)
    assert demo.stdout is not None
    for line in demo.stdout:
        if "$ migrate.sh" in line:
            break
    assert list(folder.iterdir()) != []
    demo.send_signal(signal.SIGINT)
    rest, _ = demo.communicate(timeout=30)
    assert rest.endswith("interrupted; everything that was started is stopped\n")
    assert list(folder.iterdir()) == []
