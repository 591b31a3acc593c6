"""Ten concurrent runs with random kills, in many rounds: each revision is applied once, and nothing is left behind.

make soak                                                          1,000 rounds instead of 10
pytest tests/faults/test_random_kills.py --rounds 5 --seed 42       repeat the faults of an earlier run
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
CONCURRENT_ROUNDS = 3  # most of a round is waiting
WAIT = 60  # each run's MIGRATION_WAIT_SECONDS: none may time out

# From 002 on, every stamp inserts a row, in the transaction of its revision.
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
# Each is alone in its revision, as the checklist for safe migrations requires.
INDEXES = {
    "005": 'op.execute("CREATE INDEX CONCURRENTLY a_x ON a (x)")',
    "008": 'op.execute("CREATE UNIQUE INDEX CONCURRENTLY a_y ON a (y)")',
}
HEAD = 12
NUMBERS = [f"{number:03}" for number in range(1, HEAD + 1)]
# The rows of the audit table if each revision was applied once, in order.
ONCE = [
    row
    for before, number in pairwise(NUMBERS[1:])
    for row in ([] if number in INDEXES else [number]) + [f"{before} to {number}"]
]

KILLS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
FAULTS = [*(number.name for number in KILLS), "pg_terminate_backend", "pg_cancel_backend"]
# Exit codes of a run with that fault; minus the signal's number if it came before the runner set its handler.
EXIT_CODES = {"SIGKILL": {-9}, "SIGTERM": {143, -15}, "SIGINT": {130, -2, 1}}


class Round:
    """One database, ten concurrent runs, faults that the seed determines."""

    def __init__(self, database: Database, project: Project, seed: str) -> None:
        self.database, self.project = database, project
        self.random = random.Random(seed)  # noqa: S311
        self.runs: dict[str, Program] = {}
        self.injected: dict[str, list[str]] = {}  # the faults of each run
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
        self.injected[name] = []
        return self.runs[name]

    def alive(self) -> list[str]:
        return [name for name, run in self.runs.items() if run.running]

    def migrating(self) -> list[str]:
        """The run that holds the lock, if it is alive: faults hit it more often than the waiting runs."""
        held = "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory'"
        names = {name for (name,) in self.query(f"{held} AND datname = current_database()")}
        return [name for name in self.alive() if name in names]

    def inject(self) -> str | None:
        victims = (self.random.random() < 0.7 and self.migrating()) or self.alive()
        if not victims:
            return None
        victim, fault = self.random.choice(victims), self.random.choice(FAULTS)
        self.injected[victim].append(fault)
        if fault.startswith("SIG"):
            self.runs[victim].process.send_signal(signal.Signals[fault])
        else:
            sessions = "FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()"
            self.query(f"SELECT {fault}(pid) {sessions}", victim)
        return fault

    def run(self) -> Counter[str]:
        """Run the round and return the number of injected faults of each kind."""
        faults: Counter[str] = Counter()
        for _ in range(RUNNERS):
            self.start()
        for _ in range(self.random.randint(2, 12)):
            time.sleep(self.random.uniform(0, 0.15))
            if fault := self.inject():
                faults[fault] += 1
                if fault in EXIT_CODES and self.random.random() < 0.5:  # like a Job that starts another pod
                    self.start()
        for name, run in self.runs.items():
            self.check_result(run.wait(WAIT + 30), self.injected[name])
        self.finish(faults)
        self.check_state()
        return faults

    def check_result(self, result: Result, injected: list[str]) -> None:
        text, code = result.text, result.returncode
        allowed = {0}.union(*(EXIT_CODES.get(fault, set()) for fault in injected))
        if code in allowed and code not in (143, 130):
            return
        failures = [line for line in result.lines if line.startswith("FAILED: ")]
        assert len(failures) == 1, (code, injected, text)
        # psycopg2 prints and swallows an exception raised while it decodes a server message; the run ends anyway.
        assert text.count("Traceback") == text.count("\nmigration_runner.errors.Interrupted\nFAILED: "), text
        # A run without a fault may find an index that a killed run left behind.
        left = re.search(
            r"revision 00[58] .*(already exists|INVALID|outside the transaction|cancel|closed|terminat)", failures[0]
        )
        cancelled = "pg_cancel_backend" in injected and "cancel" in failures[0]
        assert code in allowed or (code == 255 and (left or cancelled)), (code, injected, text)

    def finish(self, faults: Counter[str]) -> None:
        """The next run reaches the head, after the operator has followed its message."""
        for _ in range(4):
            result = self.start().wait(WAIT)
            if result.returncode == 0:
                return
            faults["an index had to be dropped"] += 1
            # INVALID: the message has the statement. Valid, but not stamped before the run was killed: the page has it.
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
            "record": [row for (row,) in self.query("SELECT revision FROM alembic_version_history ORDER BY id")],
            "alembic_version": self.query("SELECT version_num FROM alembic_version"),
            "indexes": self.query("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"),
            "locks": self.query(
                "SELECT * FROM pg_locks WHERE locktype = 'advisory'"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            ),
        }
        audit = ["001 to 002", *ONCE]
        head = [(NUMBERS[-1],)]
        assert facts == {"audit": audit, "record": NUMBERS, "alembic_version": head, "indexes": [], "locks": []}


def run_round(server: URL, project: Project, seed: str) -> Counter[str]:
    with fresh_database(server) as database:
        this = Round(database, project, seed)
        try:
            return this.run()
        except BaseException as error:
            outputs = "".join(
                f"\n--- {name} {this.injected[name]} ended {run.process.poll()}\n{run.output}"
                for name, run in this.runs.items()
            )
            raise AssertionError(f"round {seed}: {error!r}{outputs}") from error
        finally:
            for name in this.alive():
                this.runs[name].kill()
            this.admin.close()


@pytest.mark.fault(
    "Concurrency",
    fault="Ten concurrent runs, killed at random (SIGKILL, SIGTERM, SIGINT, `pg_terminate_backend`,"
    " `pg_cancel_backend`), in many rounds",
    sees="Each run: one line, or no message after SIGKILL",
    state="Each revision applied and recorded once, one row in the version table; no lock, no session, no INVALID"
    " index after the next run",
    do="Deploy again; an index that a killed run left behind is reported with the fix",
)
@pytest.mark.timeout(0)  # the test has its own timeouts
@pytest.mark.disruptive  # ten concurrent processes would make the other tests time out
def test_ten_concurrent_runs_with_random_kills_apply_each_revision_once(
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
    with ThreadPoolExecutor(CONCURRENT_ROUNDS) as pool:
        futures = [pool.submit(run_round, server, offline_project, f"{seed}/{n}") for n in range(rounds)]
        try:
            for done, future in enumerate(as_completed(futures, timeout=120 + 30 * rounds), 1):
                faults += future.result()
                if done % 10 == 0 or done == rounds:
                    kinds = ", ".join(f"{count} {fault}" for fault, count in sorted(faults.items()))
                    print(f"{time.monotonic() - start:5.0f} s  {done} rounds: {kinds}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    assert sum(faults.values()) >= rounds
