"""How long do 1 to 10,000 revisions take: from an empty database, with nothing to do, and without a change?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.measure import LIMIT, Results, alternate, table, timed
from bench.peers import CASES, TOOLS, Tool
from tools.paths import CACHE, ROOT
from tools.postgres import Postgres, dsn
from tools.steps import log

TABLES = "SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relname ~ '^t[0-9]+$'"


def measure(tools: dict[str, Tool], revisions: int, rounds: int) -> Results:
    """The samples of the tools that are installed, by tool and case; each round has its own databases."""
    results = Results()
    with tempfile.TemporaryDirectory(prefix="hcm-bench-") as folder, Postgres() as server:
        for name, tool in tools.items():
            tool.write(Path(folder, name), revisions)
        for number in range(rounds):
            for name in alternate([*tools], number):
                _round(tools[name], name, Path(folder, name), server, revisions, results)
            log(f"revisions, {revisions:,}: round {number + 1} of {rounds}")
    return results


def _round(tool: Tool, name: str, project: Path, server: Postgres, revisions: int, results: Results) -> None:
    """Run each case of a tool once: on a new database or, if that is slow, on that of the round before."""
    database = f"bench_{name}".replace("-", "_")
    url = dsn(server.url.set(database=database)) + "?sslmode=disable"
    # In a Job, nothing of the project is compiled in advance either.
    env = os.environ | {"DATABASE_URL": url, "PYTHONDONTWRITEBYTECODE": "1", **tool.environment}
    for case, command in tool.cases():
        if results.is_finished(name, case):
            continue
        if case == "from empty":
            server.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")
            server.execute(f"CREATE DATABASE {database}")
        try:
            sample = timed([word.replace("{url}", url) for word in command], project, env)
            results.samples[name, case].append(sample)
            ((tables,),) = server.execute(TABLES, database=database)
            if tables != revisions:
                raise RuntimeError(f"{name}: {tables} tables after {case}, not {revisions}")
        except (RuntimeError, TimeoutError) as error:
            log(str(error))
            reason = f"over {LIMIT:.0f} s" if isinstance(error, TimeoutError) else "failed"
            # The other cases need the database that the first one makes.
            for other, _ in tool.cases() if case == "from empty" else [(case, command)]:
                results.failed[name, other] = reason


def section(counts: Sequence[int], rounds: int, names: Sequence[str]) -> str:
    """The tables, one for each number of revisions."""
    installed: dict[str, Tool] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            installed[name] = TOOLS[name]()
        except (RuntimeError, OSError) as error:
            missing[name] = "".join(str(error).splitlines()[:1]).replace(str(CACHE), "<cache>").replace(str(ROOT), ".")
    text = ""
    for count in counts:
        results = measure(installed, count, rounds)
        rows = [
            [
                f"{name} {tool.version}".rstrip(),
                *(results.cell(name, case, "ours") for case in CASES),
                results.peak(name),
            ]
            for name, tool in installed.items()
        ]
        title = "1 revision" if count == 1 else f"{count:,} revisions"
        text += f"### {title}\n\n{table(['Tool', *CASES, 'peak'], rows)}\n{results.behind('ours', installed, CASES)}\n"
    return text + "".join(f"`{name}` was not measured: {reason}.\n\n" for name, reason in missing.items())
