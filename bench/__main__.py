"""Answer the three questions of docs/benchmarks.md, or some of them.

python -m bench --write           all, into the page (make bench)
python -m bench revisions --revisions 1000 --only ours,stock,goose
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
from collections.abc import Callable

from bench import chart, deploy, revisions
from bench.measure import machine
from bench.peers import TOOLS
from tools.paths import ROOT
from tools.steps import run

PAGE = ROOT / "docs/benchmarks.md"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", nargs="*", help="deploy, revisions, chart (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each case (default: %(default)s)")
    parser.add_argument("--revisions", default="1,100,1000,10000", help="how many (default: %(default)s)")
    parser.add_argument("--only", default=",".join(TOOLS), help="the tools that run them (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}, too")
    arguments = parser.parse_args()
    counts, names = [int(count) for count in arguments.revisions.split(",")], arguments.only.split(",")
    sections: dict[str, Callable[[], str]] = {
        "deploy": lambda: deploy.section(arguments.rounds),
        "revisions": lambda: revisions.section(counts, arguments.rounds, names),
        "chart": lambda: chart.section(arguments.rounds),
    }
    if unknown := set(arguments.question) - set(sections) | set(names) - set(TOOLS):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    commit = run(["git", "describe", "--always", "--dirty"], cwd=ROOT).strip()
    for question in arguments.question or sections:
        when = f"{datetime.date.today()}, commit {commit}, {arguments.rounds} rounds"
        text = (
            f"{when}, load average before: {os.getloadavg()[0]:.1f};\n{machine()}.\n\n{sections[question]().rstrip()}\n"
        )
        print(text, flush=True)
        if arguments.write:
            before, begin, rest = PAGE.read_text().partition(f"<!-- {question}: begin -->\n")
            _, end, after = rest.partition(f"<!-- {question}: end -->")
            PAGE.write_text(f"{before}{begin}{text}{end}{after}")


if __name__ == "__main__":
    main()
