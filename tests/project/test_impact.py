"""`make impact` says of each pending revision what it locks, rewrites and reads, and whether that is safe."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from tests.support.canary import PASSWORD
from tests.support.database import Database
from tests.support.documents import block
from tests.support.git import Colleague, git
from tests.support.programs import Result, run
from tests.support.project import Project, copy, copy_parts
from tests.support.revisions import BLOCK
from tests.support.waiting import until
from tools.paths import BIN, ROOT
from tools.postgres import UNPRIVILEGED, Postgres, dsn, programs

TABLES = """
CREATE TABLE campaign (id bigint PRIMARY KEY, name text, day date, n int NOT NULL DEFAULT 0);
CREATE TABLE visit (id bigint PRIMARY KEY, campaign bigint, note varchar(20), at timestamp, code varchar(9));
CREATE INDEX visit_note ON visit (note, code);
CREATE TABLE event (id bigint, day date) PARTITION BY RANGE (day);
CREATE TABLE event_2020 (id bigint, day date);
CREATE TABLE event_2021 (id bigint, day date NOT NULL CHECK (day >= '2021-01-01' AND day < '2022-01-01'));
CREATE TABLE event_2022 PARTITION OF event FOR VALUES FROM ('2022-01-01') TO ('2023-01-01');
CREATE TYPE state AS ENUM ('new');
CREATE VIEW named AS SELECT id, name FROM campaign;
CREATE MATERIALIZED VIEW total AS SELECT count(*) AS n FROM visit;
CREATE TABLE log (id int, x int) PARTITION BY HASH (id);
CREATE TABLE contact (id int, kind text COLLATE "C", span int4range);
CREATE INDEX ON contact (kind);
CREATE TABLE ring (id int) PARTITION BY RANGE (id);
CREATE TABLE ring_1 PARTITION OF ring FOR VALUES FROM (0) TO (10);
CREATE TABLE ring_rest PARTITION OF ring DEFAULT;
CREATE DOMAIN positive AS int;
CREATE TABLE paid (amount positive);
CREATE SEQUENCE ticket;
CREATE VIEW open AS SELECT id FROM visit;
GRANT SELECT ON open TO pg_monitor;
CREATE FUNCTION thrice() RETURNS int LANGUAGE sql AS 'SELECT 3';
CREATE FUNCTION twice(a int) RETURNS int LANGUAGE sql AS 'SELECT $1 * 2';
"""
UNSTOPPABLE = """DO $$ BEGIN
    LOOP
        BEGIN
            PERFORM pg_sleep(60);
        EXCEPTION WHEN query_canceled THEN NULL;
        END;
    END LOOP;
END $$"""
GOLDEN = Path(__file__).with_name("impact.golden.md")
CTE = (
    "WITH batch AS (SELECT id FROM visit WHERE c IS NULL LIMIT 100 FOR UPDATE SKIP LOCKED)"
    " UPDATE visit SET b = 1 FROM batch WHERE visit.id = batch.id"
)
CTID = "DELETE FROM visit WHERE ctid = ANY (ARRAY(SELECT ctid FROM visit WHERE c IS NULL LIMIT 100))"
OTHER = """op.execute('ALTER TABLE campaign ADD q int')
with op.get_bind().engine.connect() as other:
    other.exec_driver_sql('CREATE INDEX ON contact (id)')
    other.rollback()"""
BATCH = "UPDATE visit SET c = NULL WHERE id IN (SELECT id FROM visit WHERE c IS NOT NULL LIMIT 1000)"


# What it does, whether it is safe, and its SQL; or Python, which has `op.`.
CASES = [
    ("add a column", "yes", "ALTER TABLE visit ADD a text"),
    ("add a column with a constant default", "yes", "ALTER TABLE visit ADD b int NOT NULL DEFAULT 0"),
    ("add a column with a volatile default", "NO", "ALTER TABLE visit ADD c uuid DEFAULT gen_random_uuid()"),
    ("add a NOT NULL column without a default", "NO", "ALTER TABLE visit ADD d int NOT NULL"),
    ("NOT NULL", "NO", "ALTER TABLE visit ALTER a SET NOT NULL"),
    (
        "NOT NULL as CHECK, NOT VALID",
        "yes",
        "ALTER TABLE visit ADD CONSTRAINT day_set CHECK (note IS NOT NULL) NOT VALID",
    ),
    ("validate", "yes", "ALTER TABLE visit VALIDATE CONSTRAINT day_set"),
    ("NOT NULL after CHECK", "yes", "ALTER TABLE visit ALTER note SET NOT NULL"),
    ("type change that rewrites", "NO", "ALTER TABLE campaign ALTER n TYPE bigint"),
    ("type change that does not", "yes", "ALTER TABLE visit ALTER code TYPE varchar(40)"),
    ("type change of meaning", "NO", "ALTER TABLE visit ALTER at TYPE timestamptz USING at AT TIME ZONE 'UTC'"),
    ("index", "NO", "CREATE INDEX visit_campaign ON visit (campaign)"),
    ("index concurrently", "yes", BLOCK + "op.execute('CREATE INDEX CONCURRENTLY visit_at ON visit (at)')"),
    ("index of a new table", "yes", "CREATE TABLE fresh (id int); CREATE INDEX ON fresh (id)"),
    ("drop an index", "yes", "DROP INDEX visit_campaign"),
    ("unique", "NO", "ALTER TABLE visit ADD CONSTRAINT x UNIQUE (campaign, at)"),
    ("foreign key", "NO", "ALTER TABLE visit ADD CONSTRAINT of FOREIGN KEY (campaign) REFERENCES campaign"),
    (
        "foreign key, NOT VALID",
        "yes",
        "ALTER TABLE visit ADD CONSTRAINT of2 FOREIGN KEY (campaign) REFERENCES campaign NOT VALID",
    ),
    ("validate a foreign key", "yes", "ALTER TABLE visit VALIDATE CONSTRAINT of2"),
    ("rename a column", "NO", "ALTER TABLE campaign RENAME n TO number"),
    ("rename a table", "NO", "ALTER TABLE event_2021 RENAME TO events_2021"),
    ("drop a column", "NO", "ALTER TABLE visit DROP a"),
    ("drop a table", "NO", "DROP TABLE fresh"),
    ("enum value", "yes", "ALTER TYPE state ADD VALUE 'done'"),
    ("rename an enum value", "NO", "ALTER TYPE state RENAME VALUE 'done' TO 'over'"),
    ("update", "NO", "UPDATE visit SET note = upper(note)"),
    ("update by key", "yes", "UPDATE visit SET note = 'x' WHERE id = 7"),
    ("batches", "yes", BLOCK + f"while op.get_bind().exec_driver_sql({BATCH!r}).rowcount:\n        pass"),
    ("update in an autocommit block", "NO", BLOCK + "op.execute('UPDATE visit SET c = NULL')"),
    (
        "add a column and fill it",
        "NO",
        "op.execute('ALTER TABLE visit ADD e int')\nop.execute('UPDATE visit SET e = 0')",
    ),
    (
        "attach a partition",
        "NO",
        "ALTER TABLE event ATTACH PARTITION event_2020 FOR VALUES FROM ('2020-01-01') TO ('2021-01-01')",
    ),
    (
        "attach a checked partition",
        "yes",
        "ALTER TABLE event ATTACH PARTITION events_2021 FOR VALUES FROM ('2021-01-01') TO ('2022-01-01')",
    ),
    ("detach a partition", "NO", "ALTER TABLE event DETACH PARTITION event_2022"),
    ("truncate", "NO", "TRUNCATE visit"),
    ("replace a view", "yes", "CREATE OR REPLACE VIEW named AS SELECT id, name, day FROM campaign"),
    ("drop a function", "NO", "DROP FUNCTION twice(int)"),
    ("refresh", "NO", "REFRESH MATERIALIZED VIEW total"),
    ("reindex", "NO", "REINDEX TABLE visit"),
    ("lock, then work elsewhere", "NO", "op.execute('LOCK TABLE campaign')\nop.execute('CREATE INDEX y ON visit (d)')"),
    (
        "two hundred rows",
        "yes",
        "for number in range(200):\n    op.execute('INSERT INTO campaign (id) VALUES (0) ON CONFLICT DO NOTHING')",
    ),
    ("drop a default", "NO", "ALTER TABLE campaign ALTER number DROP DEFAULT"),
    (
        "drop and add again",
        "NO",
        "op.execute('ALTER TABLE campaign DROP name CASCADE')\nop.execute('ALTER TABLE campaign ADD name text')",
    ),
    ("in a function", "NO", "DO $$ BEGIN UPDATE visit SET note = 'x'; ALTER TABLE visit ALTER d TYPE bigint; END $$"),
    ("update by a range", "NO", "UPDATE visit SET b = 1 WHERE id > 0"),
    ("update from another table", "NO", "UPDATE visit SET b = c.number FROM campaign c WHERE c.id = visit.campaign"),
    ("delete by age", "NO", "DELETE FROM visit WHERE at < '2024-01-01'"),
    ("merge", "NO", "MERGE INTO visit v USING campaign c ON c.id = v.id WHEN MATCHED THEN UPDATE SET b = 1"),
    (
        "insert or update",
        "NO",
        "INSERT INTO campaign (id, number) SELECT id, 1 FROM visit ON CONFLICT (id) DO UPDATE SET number = 1",
    ),
    (
        "insert or update one row",
        "yes",
        "INSERT INTO campaign (id, number) VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET number = 1",
    ),
    ("lock all rows", "NO", "SELECT id FROM visit FOR UPDATE"),
    ("batch with a CTE", "yes", BLOCK + f"op.execute({CTE!r})"),
    ("batch by ctid", "yes", BLOCK + f"op.execute({CTID!r})"),
    ("limit of a value", "NO", BLOCK + "op.execute('UPDATE visit SET b = (SELECT number FROM campaign LIMIT 1)')"),
    ("no partition to see", "unknown", "ALTER TABLE log ALTER x TYPE bigint"),
    ("past SQLAlchemy", "NO", "op.get_bind().connection.cursor().execute('CREATE INDEX z ON visit (b)')"),
    ("with other messages", "NO", "SET LOCAL client_min_messages = warning; UPDATE visit SET b = 1"),
    (
        "read under a lock",
        "NO",
        "op.execute('ALTER TABLE campaign ADD w int')\nop.execute('CREATE TABLE total_2 AS SELECT id, "
        "count(*) FROM visit GROUP BY id')",
    ),
    ("lock of another session", "NO", OTHER),
    ("without lock_timeout", "NO", "SET LOCAL lock_timeout = 0; ALTER TABLE visit ADD f int"),
    ("drop a sequence", "NO", "DROP SEQUENCE ticket"),
    ("drop a unique constraint", "NO", "ALTER TABLE visit DROP CONSTRAINT x"),
    (
        "create a view again",
        "NO",
        "op.execute('DROP VIEW open')\nop.execute('CREATE VIEW open AS SELECT id FROM visit')",
    ),
    ("revoke", "NO", "REVOKE EXECUTE ON FUNCTION thrice FROM PUBLIC"),
    (
        "refresh concurrently",
        "yes",
        "op.execute('CREATE UNIQUE INDEX ON total (n)')\n"
        + BLOCK
        + "op.execute('REFRESH MATERIALIZED VIEW CONCURRENTLY total')",
    ),
    ("truncate a new table", "yes", "CREATE TABLE scratch (id int); TRUNCATE scratch"),
    ("index of a partitioned table", "NO", "CREATE INDEX ON ring (id)"),
    (
        "attach beside a default partition",
        "NO",
        "CREATE TABLE ring_2 (id int); ALTER TABLE ring ATTACH PARTITION ring_2 FOR VALUES FROM (10) TO (20)",
    ),
    ("partition beside a default one", "NO", "CREATE TABLE ring_3 PARTITION OF ring FOR VALUES FROM (20) TO (30)"),
    ("collation", "NO", 'ALTER TABLE contact ALTER kind TYPE text COLLATE "POSIX"'),
    ("exclude", "NO", "ALTER TABLE contact ADD EXCLUDE USING gist (span WITH &&)"),
    ("check of a domain", "NO", "ALTER DOMAIN positive ADD CHECK (VALUE > 0)"),
    (
        "hostile names",
        "NO",
        "op.execute('CREATE TABLE \"a|b`<b>\\n@x\" (id int)')\nop.execute('ALTER TABLE visit RENAME f TO \"$x$&lt;\"')",
    ),
    ("two hundred tables", "yes", "for number in range(200):\n    op.execute(f'CREATE TABLE t{number} (id int)')"),
    ("needs rows", "unknown", "op.get_bind().exec_driver_sql('SELECT id FROM campaign WHERE id = 5').one()"),
    ("after a failure", "unknown", "SELECT 1"),
]


def impact(project: Project, **environment: str | None) -> Result:
    return project.start("-m", "tools.impact", program=BIN / "python", **environment).wait(300, verbatim=True)


def literal(markdown: str) -> str:
    """The text that it shows."""
    return re.sub(r"\\(.)", r"\1", markdown.replace("<br>", "; "))


def sections(markdown: str) -> list[str]:
    """Of each revision."""
    return re.split("^### ", markdown, flags=re.M)[1:]


def test_each_revision_is_judged(tmp_path: Path) -> None:
    copy(tmp_path, "tools")
    summary = tmp_path / "summary.md"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "GITHUB_STEP_SUMMARY": str(summary)}
    project = Project(tmp_path, environment)
    project.add("002", f"op.execute({TABLES!r})")
    for number, (name, _, upgrade) in enumerate(CASES, 3):
        body = upgrade if "op." in upgrade else f"op.execute({upgrade!r})"
        project.add(f"{number:03}", body, name=name)
    result = impact(project, REVISIONS="002:head")
    assert result.returncode == 0, result.text
    report = summary.read_text()
    verdicts = re.findall(r"^### \d+ (.*?) \(.*\n\nSafe while the application runs: \*\*(\w+)", report, re.M)
    assert [(literal(name), verdict) for name, verdict in verdicts] == [(name, verdict) for name, verdict, _ in CASES]
    assert report == GOLDEN.read_text(), f"read what has changed; if it is right: cp {summary} {GOLDEN}"


def traced(result: Result) -> list[str]:
    """The revisions, from the lines of progress."""
    assert result.returncode == 0, result.text
    return re.findall(r"^\d+ of \d+: (\d+) ", result.text, re.M)


@pytest.fixture
def clone(offline_project: Project) -> Project:
    """With the tools and what `make` needs, without a database."""
    copy_parts(offline_project.folder, "tools", "Makefile", "requirements-dev.txt")
    os.utime(offline_project.folder / "requirements-dev.txt", (0, 0))  # older than .venv
    (offline_project.folder / ".venv").symlink_to(ROOT / ".venv")
    del offline_project.environment["DATABASE_URL"]
    return offline_project


def test_the_revisions_are_those_that_the_branch_adds(clone: Project) -> None:
    def documented(command: str, **environment: str) -> list[str]:
        return traced(clone.start("-ec", command, program=Path("/bin/bash"), **environment).wait())

    clone.add("002")
    colleague = Colleague.of(clone.folder)
    assert impact(clone).stdout == "no revisions to trace; REVISIONS=002:head names others\n"
    clone.add("003")
    git(clone.folder, "add", "--all")
    git(clone.folder, "commit", "--quiet", "--message=test")
    clone.add("004", name="größe")  # not committed
    colleague.push("release")
    colleague.push()
    first, second, third = block("make impact  ").splitlines()
    assert documented(first) == documented(second) == ["003", "004"]
    assert documented(third) == ["002"]
    job = yaml.safe_load((ROOT / ".github/workflows/test.yaml").read_text())["jobs"]["fast"]
    (step,) = [step for step in job["steps"] if step.get("if") == "github.event_name == 'pull_request'"]
    summary = clone.folder / "summary.md"
    assert documented(step["run"], GITHUB_BASE_REF="release", GITHUB_STEP_SUMMARY=str(summary)) == ["003", "004"]
    assert [section[:3] for section in sections(summary.read_text())] == ["003", "004"]


def test_without_a_commit_or_a_branch_to_compare_with_the_line_names_what_to_set(clone: Project) -> None:
    reason = "not a git repository (or any of the parent directories): .git"
    assert impact(clone).failure == (
        f"{clone.folder} has no commit HEAD ({reason}): this needs a clone that you own, not an unpacked archive; or"
        " set REVISIONS to a range, such as 002:head"
    )
    git(clone.folder, "init", "--quiet")
    git(clone.folder, "commit", "--quiet", "--allow-empty", "--message=test")
    assert impact(clone).failure == (
        "git finds no merge base of HEAD and origin/main: fetch it, set BASE to the branch to compare with, or set"
        " REVISIONS to a range, such as 002:head"
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"REVISIONS": "007"}, "REVISIONS is '007': Can't locate revision identified by '007'"),
        ({"REVISIONS": "002:001"}, "REVISIONS is '002:001': Revision 002 is not an ancestor of revision 001"),
        ({"DATABASE_URL": "postgresql://127.0.0.1:1/x"}, "could not connect to database x at 127.0.0.1:1 "),
    ],
)
def test_what_cannot_be_traced_is_one_line(clone: Project, environment: dict[str, str], message: str) -> None:
    clone.add("002")
    result = impact(clone, MIGRATION_WAIT_SECONDS="1", **environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"FAILED: {message}")
    assert result.stderr.count("\n") == 1


def test_two_heads_are_refused_as_by_a_run(clone: Project) -> None:
    for name in ("002", "003"):
        clone.add(name, "pass", down="001")
    result = impact(clone)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith(
        "FAILED: there are 2 heads (002, 003), and a run refuses that: set the 'down_revision' of one to the other, see"
        " docs/troubleshooting.md\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_trace_leaves_nothing_behind(
    clone: Project, server_folder: Path, number: signal.Signals
) -> None:
    """Even if the statement cannot be cancelled, which the revision's runner would wait for."""
    clone.add("002", f"op.execute({UNSTOPPABLE!r})")
    program = clone.start("-m", "tools.impact", program=BIN / "python", TMPDIR=str(server_folder), REVISIONS="002")
    until(lambda: "1 of 1: 002" in program.output, 60)
    result = program.stop(number)
    assert result.returncode == 130
    # libpq may print that the server ended.
    assert result.text.splitlines()[-1] == "interrupted; everything that was started is stopped"
    assert list(server_folder.iterdir()) == []


@pytest.fixture
def project(project: Project) -> Project:
    """With the tools, and a database at 001 that has 1.2 million rows, as far as its statistics say."""
    copy_parts(project.folder, "tools")
    assert project.alembic("upgrade", "head").returncode == 0
    return project


def filled(database: Database) -> None:
    """As after ANALYZE of a large table."""
    database.execute("UPDATE pg_class SET reltuples = 1200000, relpages = 43520 WHERE relname = 'hcm_report_metadata'")


def test_the_report_has_the_sizes_of_a_database(project: Project, database: Database) -> None:
    filled(database)
    project.add(
        "002", "op.create_index('idx_hcm_report_tenant', 'hcm_report_metadata', ['tenant_id'])", name="index_by_tenant"
    )
    before = database.dump()
    with database.session() as cursor:
        # What wants a lock on the table would wait until this ends.
        cursor.execute("LOCK TABLE hcm_report_metadata IN ACCESS EXCLUSIVE MODE; SELECT pg_backend_pid()")
        pid = cursor.fetchone()[0]
        result = impact(project)
        assert result.returncode == 0, result.text
        assert block("safe while the application runs: NO") in re.sub(" +$", "", result.stdout, flags=re.M)
        assert f"not visible to {database.role}: other roles' transactions, and how far standbys" in result.stdout
        database.execute(f"GRANT pg_read_all_stats TO {database.role}")
        result = impact(project)
        assert re.search(
            rf"oldest open transaction: pid {pid}, report as postgres, idle in transaction, for \d+ s;", result.stdout
        )
        assert "not visible" not in result.stdout
    assert f"database {database.name}: table public.hcm_report_metadata: 1.2 M rows, 340 MB" in result.stdout
    assert re.search(rf"database {database.name}: PostgreSQL \d+; traced on \d+\n", result.stdout)
    assert re.search(r"free connection slots: \d+; a run needs up to 3\n", result.stdout)
    assert database.dump() == before
    assert database.at == ["001"]


def test_what_the_migrating_role_may_not_do(project: Project, database: Database) -> None:
    reader = f"{database.role}_reader"
    database.execute(f"ALTER DATABASE {database.name} OWNER TO CURRENT_USER")
    database.execute(f"GRANT CREATE ON SCHEMA public TO {database.role}")
    project.add("002", "op.execute('ALTER TABLE hcm_report_metadata ADD x int')")
    quoted = PASSWORD.replace("'", "''")
    grants = block("CREATE ROLE hcm_drift LOGIN").replace("unifieddevdb", database.name)
    database.execute(grants.replace("hcm_drift", reader))
    database.execute(f"ALTER ROLE {reader} PASSWORD '{quoted}'; ALTER ROLE {database.role} CONNECTION LIMIT 7")
    try:
        result = impact(project, DATABASE_URL=dsn(database.url.set(username=reader)))
        assert result.returncode == 0, result.text
        assert "may not" not in result.stdout
        assert "free connection slots: 7; a run needs up to 3" in result.stdout
        database.execute("ALTER TABLE hcm_report_metadata OWNER TO postgres")
        database.execute(f"REVOKE CREATE ON SCHEMA public FROM pg_database_owner, {database.role}")
        result = impact(project, DATABASE_URL=dsn(database.url.set(username=reader)))
        role = f"database {database.name}: role {database.role}"
        assert f"{role} cannot alter or index public.hcm_report_metadata, whose owner is postgres" in result.stdout
        assert f"{role} may not CREATE in schema public" in result.stdout
    finally:
        database.execute(f"DROP OWNED BY {reader}; DROP ROLE {reader}")


def test_a_primary_and_its_standby(offline_project: Project, own_server: Postgres) -> None:
    copy_parts(offline_project.folder, "tools")
    with Postgres(hot_standby="on") as standby:
        standby.kill()
        shutil.rmtree(standby.data)
        command = [programs() / "pg_basebackup", "-D", standby.data, "-R", "-d", dsn(own_server.url)]
        run(command, check=True)
        run(["chown", "-R", UNPRIVILEGED, standby.data], check=True)
        standby.url = standby.url.set(password=own_server.password)
        standby.start()
        assert offline_project.alembic("upgrade", "head", DATABASE_URL=dsn(own_server.url)).returncode == 0
        until(lambda: bool(standby.execute("SELECT to_regclass('hcm_report_metadata')")[0][0]))
        offline_project.add("002", "op.execute('ALTER TABLE hcm_report_metadata ADD x int')")
        standby.execute("SELECT pg_wal_replay_pause()")
        own_server.execute("CREATE TABLE filler AS SELECT g FROM generate_series(1, 100000) g")
        result = impact(offline_project, DATABASE_URL=dsn(own_server.url))
        assert re.search(r"standbys: 1; the last one is [\d.]+ MB and \d+ s behind", result.stdout), result.text
        result = impact(offline_project, DATABASE_URL=dsn(standby.url))
        assert "the server is a standby, on which nothing can be migrated" in result.stdout, result.text
