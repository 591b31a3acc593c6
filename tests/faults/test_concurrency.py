"""Ten runs at once with random kills, many times over: each revision is applied once, and nothing is left behind.

make soak                                                          1,000 rounds instead of 20
pytest tests/faults/test_concurrency.py --rounds 5 --seed 42       the faults of a round again
"""

from __future__ import annotations

import random
import re
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import pairwise

import psycopg2
import pytest
from sqlalchemy import URL

from tests.support.database import Database, fresh_database
from tests.support.programs import Program, Result
from tests.support.project import Project
from tests.support.revisions import BLOCK
from tests.support.waiting import until
from tools.postgres import dsn, execute

RUNNERS = 10
AT_ONCE = 3  # rounds; most of a round is waiting
WAIT = 60  # each run's MIGRATION_WAIT_SECONDS: none may give up

# From 002 on every stamp leaves a row, in the transaction of the revision that it belongs to.
AUDIT = '''
op.execute("""
    CREATE TABLE audit (id serial, revision text);
    CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO audit (revision) VALUES (OLD.version_num || ' to ' || NEW.version_num); RETURN NULL; END $$;
    CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON alembic_version FOR EACH ROW EXECUTE FUNCTION audit()
""")
'''
BODIES = {
    "003": 'op.execute("CREATE TABLE a AS SELECT generate_series(1, 1000) AS x")',
    "004": 'op.execute("SELECT pg_sleep(0.1)")',
    "006": "time.sleep(0.1)",
    "007": 'op.execute("ALTER TABLE a ADD COLUMN y int")\nop.execute("UPDATE a SET y = x")',
    "009": 'op.execute("LOCK TABLE hcm_report_metadata")\nop.execute("SELECT pg_sleep(0.05)")',
    "010": 'op.execute("ALTER TABLE hcm_report_metadata ADD COLUMN status text")',
}
# These stand alone in their revisions, as the rules of a safe revision say.
INDEXES = {
    "005": 'op.execute("CREATE INDEX CONCURRENTLY a_x ON a (x)")',
    "008": 'op.execute("CREATE UNIQUE INDEX CONCURRENTLY a_y ON a (y)")',
}
HEAD = 12
NUMBERS = [f"{number:03}" for number in range(1, HEAD + 1)]
# What the audit table has when each revision was applied once, in order.
ONCE = [
    row
    for before, number in pairwise(NUMBERS[1:])
    for row in ([] if number in INDEXES else [number]) + [f"{before} to {number}"]
]

KILLS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
FAULTS = [*(number.name for number in KILLS), "pg_terminate_backend", "pg_cancel_backend"]
# How a run may end that was struck; the signal's own number where it came before our handler was set.
ENDS = {"SIGKILL": {-9}, "SIGTERM": {143, -15}, "SIGINT": {130, -2, 1}}


class Round:
    """One database, ten runs at once, faults from a plan that the seed decides."""

    def __init__(self, database: Database, project: Project, seed: str) -> None:
        self.database, self.project = database, project
        self.random = random.Random(seed)  # noqa: S311
        self.runs: dict[str, Program] = {}
        self.struck: dict[str, list[str]] = {}  # what struck each run
        self.admin = psycopg2.connect(dsn(database.admin))
        self.admin.autocommit = True

    def query(self, statement: str, *parameters: object) -> list[tuple]:
        with self.admin.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchall()

    def start(self) -> Program:
        name = f"runner-{len(self.runs)}"
        environment = {"DATABASE_URL": dsn(self.database.url), "MIGRATION_WAIT_SECONDS": str(WAIT), "PGAPPNAME": name}
        self.runs[name] = self.project.fork("upgrade", "head", **environment)
        self.struck[name] = []
        return self.runs[name]

    def alive(self) -> list[str]:
        return [name for name, run in self.runs.items() if run.running]

    def migrating(self) -> list[str]:
        """The run that holds the lock, if it lives: faults strike there more often than among those who wait."""
        held = "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory'"
        names = {name for (name,) in self.query(f"{held} AND datname = current_database()")}
        return [name for name in self.alive() if name in names]

    def strike(self) -> str | None:
        victims = (self.random.random() < 0.7 and self.migrating()) or self.alive()
        if not victims:
            return None
        victim, fault = self.random.choice(victims), self.random.choice(FAULTS)
        self.struck[victim].append(fault)
        if fault.startswith("SIG"):
            self.runs[victim].process.send_signal(signal.Signals[fault])
        else:
            ended = "FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()"
            self.query(f"SELECT {fault}(pid) {ended}", victim)
        return fault

    def run(self) -> Counter[str]:
        """Run the round and return how many faults of each kind struck."""
        faults: Counter[str] = Counter()
        for _ in range(RUNNERS):
            self.start()
        for _ in range(self.random.randint(2, 12)):
            time.sleep(self.random.uniform(0, 0.15))
            if fault := self.strike():
                faults[fault] += 1
                if fault in ENDS and self.random.random() < 0.5:  # as a Job starts another pod
                    self.start()
        for name, run in self.runs.items():
            self.check_end(run.wait(WAIT + 30), self.struck[name])
        self.finish(faults)
        self.check_state()
        return faults

    def check_end(self, result: Result, struck: list[str]) -> None:
        text, code = result.text, result.returncode
        allowed = {0}.union(*(ENDS.get(fault, set()) for fault in struck))
        if code in allowed and code not in (143, 130):
            return
        failures = [line for line in result.lines if line.startswith("FAILED: ")]
        assert len(failures) == 1, (code, struck, text)
        # psycopg2 prints, and swallows, what is raised while it decodes the server's words; the run ends all the same.
        assert text.count("Traceback") == text.count("\nmigration_runner.errors.Interrupted\nFAILED: "), text
        # A run that was not struck may meet an index that one that was struck has left.
        left = re.search(r"revision 00[58] .*(already exists|INVALID|outside its|cancel|closed|terminat)", failures[0])
        cancelled = "pg_cancel_backend" in struck and "cancel" in failures[0]
        assert code in allowed or (code == 255 and (left or cancelled)), (code, struck, text)

    def finish(self, faults: Counter[str]) -> None:
        """The next run reaches the head, after what its message asks for, as a person would do it."""
        for _ in range(4):
            result = self.start().wait(WAIT)
            if result.returncode == 0:
                return
            faults["an index had to be dropped"] += 1
            # INVALID: the message has the statement. Valid, but not recorded before the run was killed: README.md.
            index = re.search(r"DROP INDEX CONCURRENTLY (\S+?);", result.failure)
            index = index or re.search('relation "(.*?)" already', result.failure)
            assert index, result
            execute(self.database.url, f"DROP INDEX CONCURRENTLY {index[1]}")
        raise AssertionError(result)

    def check_state(self) -> None:
        left = "SELECT application_name, state, query FROM pg_stat_activity WHERE application_name LIKE 'runner-%%'"
        until(lambda: not self.query(f"{left} AND datname = current_database()"), 10)
        facts = {
            "audit": [row for (row,) in self.query("SELECT revision FROM audit ORDER BY id")],
            "alembic_version": self.query("SELECT version_num FROM alembic_version"),
            "indexes": self.query("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"),
            "locks": self.query(
                "SELECT * FROM pg_locks WHERE locktype = 'advisory'"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            ),
        }
        audit = ["001 to 002", *ONCE]
        assert facts == {"audit": audit, "alembic_version": [(NUMBERS[-1],)], "indexes": [], "locks": []}


def play(server: URL, project: Project, seed: str) -> Counter[str]:
    with fresh_database(server) as database:
        this = Round(database, project, seed)
        try:
            return this.run()
        except BaseException as error:
            outputs = "".join(
                f"\n--- {name} {this.struck[name]} ended {run.process.poll()}\n{run.output}"
                for name, run in this.runs.items()
            )
            raise AssertionError(f"round {seed}: {error!r}{outputs}") from error
        finally:
            for name in this.alive():
                this.runs[name].kill()
            this.admin.close()


@pytest.mark.fault(
    "Concurrency",
    fault="Ten runs at once, killed at random (SIGKILL, SIGTERM, SIGINT, `pg_terminate_backend`, "
    "`pg_cancel_backend`), many times over",
    sees="Each run: one line, or nothing after SIGKILL",
    state="Each revision applied once, one row in the version table; no lock, no session, no INVALID index after "
    "the next run",
    do="Deploy again; an index that a killed run left is named with its cure",
)
@pytest.mark.timeout(0)  # it has its own bounds
@pytest.mark.disruptive  # ten processes at once would make others' limits in time too short
def test_ten_runs_at_once_with_random_kills_apply_each_revision_once(
    server: URL, offline_project: Project, pytestconfig: pytest.Config
) -> None:
    offline_project.add("002", AUDIT)
    for number in NUMBERS[2:]:
        if number in INDEXES:
            offline_project.add(number, BLOCK + INDEXES[number])
        else:
            statement = f"INSERT INTO audit (revision) VALUES ('{number}')"
            offline_project.add(number, f'op.execute("{statement}")\n{BODIES.get(number, "")}')
    rounds, seed = pytestconfig.getoption("rounds"), pytestconfig.getoption("seed") or random.randrange(10**6)  # noqa: S311
    print(f"{rounds} rounds of {RUNNERS} runs, --seed {seed}", file=sys.stderr, flush=True)
    faults: Counter[str] = Counter()
    start = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        played = [pool.submit(play, server, offline_project, f"{seed}/{n}") for n in range(rounds)]
        try:
            for done, future in enumerate(as_completed(played, timeout=120 + 30 * rounds), 1):
                faults += future.result()
                if done % 10 == 0 or done == rounds:
                    kinds = ", ".join(f"{count} {fault}" for fault, count in sorted(faults.items()))
                    print(f"{time.monotonic() - start:5.0f} s  {done} rounds: {kinds}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    assert sum(faults.values()) >= rounds
