"""The benchmarks run, and their page has a row for all that they measure. No test depends on a duration."""

from __future__ import annotations

import sys

import pytest

from bench import chart, deploy
from bench.peers import CASES, TOOLS
from tests.support.programs import run
from tools.paths import ROOT
from tools.steps import UnavailableError


def _rows(text: str) -> dict[str, list[str]]:
    """The rows of Markdown's tables: {first cell: the others}."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    return {row[0]: row[1:] for row in rows}


def _part(name: str) -> str:
    """What `make bench` wrote last for a question."""
    page = (ROOT / "docs/benchmarks.md").read_text()
    return page.partition(f"<!-- {name}: begin -->\n")[2].partition(f"<!-- {name}: end -->")[0]


def test_every_case_of_the_revisions_is_measured() -> None:
    """Each command succeeds, and makes the tables; other tools than these need the network."""
    names = ["ours", "stock", "psql"]
    options = ["--revisions", "2", "--rounds", "1", "--only", ",".join(names)]
    command = [sys.executable, "-m", "bench", "revisions", *options]
    rows = _rows(run(command, cwd=ROOT, check=True, verbatim=True, seconds=300).stdout)
    assert [row.split()[0] for row in rows] == ["Tool", "---", *names]
    for row, cells in rows.items():
        if row.startswith(("ours", "stock")):
            assert all(cell[0].isdigit() for cell in cells) and len(cells) == len(CASES) + 1, row


def test_a_deployment_is_measured_from_the_clone_on() -> None:
    """It applies its revision, and receives only the folder with the revisions."""
    way = "ours, pre-installed"
    try:
        results, received = deploy.measure(rounds=1, size=0.01, ways=[way])
    except UnavailableError as error:
        pytest.skip(str(error))
    assert all(results.seconds(way, stage) for stage in deploy.STAGES)
    assert received[way] < 1 < deploy.HISTORY * 0.01 / 1e6


def test_every_chart_is_rendered() -> None:
    results = chart.render(rounds=1)
    assert {name for name, _ in results.samples} >= {"ours", "an empty chart", "`helm create`"}


def test_an_unknown_tool_is_refused() -> None:
    refused = run([sys.executable, "-m", "bench", "revisions", "--only", "ours,flyway"], cwd=ROOT)
    assert refused.returncode == 2 and "there is no flyway" in refused.stderr


def test_the_page_has_a_row_for_each_way_and_each_stage() -> None:
    assert set(_rows(_part("deploy"))) >= set(deploy.WAYS)
    assert set(_rows(_part("chart"))) >= {"ours", *(stage for stage, _ in chart.STAGES), "total"}


@pytest.mark.parametrize("count", ["1 revision", "100 revisions", "1,000 revisions", "10,000 revisions"])
def test_the_page_has_a_row_for_each_tool(count: str) -> None:
    rows = _rows(_part("revisions").partition(f"### {count}\n")[2].partition("###")[0])
    assert {row.split()[0] for row in rows} >= set(TOOLS)
