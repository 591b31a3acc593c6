"""The documents: commands, revision and SQL as they are written; `make migrate` on a real database."""

import os
import re
import shutil

from tests.support.canary import PASSWORD
from tests.support.database import Database, env_file
from tests.support.documents import block
from tests.support.programs import Result, run
from tests.support.project import Project, head
from tests.support.revisions import edit
from tools.paths import BIN, ROOT
from tools.postgres import dsn, execute, programs


def _statements(text: str, database: Database) -> list[str]:
    """The statements of a block, with the test's database and role names that are free."""
    names = {"unifieddevdb": database.name, "hcm_migrations": f"m{database.name}", "hcm_app": f"a{database.name}"}
    for name, replacement in names.items():
        text = text.replace(name, replacement)
    return [statement.strip() for statement in text.split(";") if statement.strip()]


def test_the_minimum_privileges_are_sufficient_for_migrations_and_application(
    project: Project, database: Database
) -> None:
    migrations, application = f"m{database.name}", f"a{database.name}"
    database.execute(f"ALTER DATABASE {database.name} OWNER TO CURRENT_USER")
    database.execute(f"CREATE ROLE {application} LOGIN PASSWORD 'unused'")
    try:
        for sql in (block("CREATE ROLE hcm_migrations"), block("ALTER DEFAULT PRIVILEGES")):
            for statement in _statements(sql, database):
                database.execute(statement)
        database.execute(f"ALTER ROLE {migrations} PASSWORD 'unused'")
        url = database.url.set(username=migrations, password="unused")  # noqa: S106
        assert project.alembic("upgrade", "head", DATABASE_URL=dsn(url)).returncode == 0
        assert database.execute("SELECT tableowner FROM pg_tables WHERE tablename = 'hcm_report_metadata'") == [
            (migrations,)
        ]
        privileges = (
            "SELECT has_table_privilege(%s, 'hcm_report_metadata', %s), has_sequence_privilege(%s, %s, 'USAGE')"
        )
        sequence = "hcm_report_metadata_id_seq"
        assert database.execute(privileges, application, "SELECT, INSERT", application, sequence) == [(True, True)]
        for statement in _statements(block("FROM hcm_app"), database):
            database.execute(statement)
        for table in ("alembic_version", "alembic_version_history"):
            may = "SELECT has_table_privilege(%s, %s, 'SELECT, INSERT, UPDATE, DELETE')"
            assert not database.scalar(may, application, table)
        sequence = "alembic_version_history_id_seq"
        assert not database.scalar("SELECT has_sequence_privilege(%s, %s, 'USAGE')", application, sequence)
        assert project.alembic("downgrade", "base", DATABASE_URL=dsn(url)).returncode == 0
    finally:
        for role in (migrations, application):
            database.execute(f"DROP OWNED BY {role}")
            database.execute(f"DROP ROLE {role}")


def test_make_migrate_migrates_the_database_of_database_url(database: Database) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DB_", "PG"))}
    run(["make", "migrate"], cwd=ROOT, env=environment | {"DATABASE_URL": dsn(database.url)}, check=True)
    assert database.at == [head()]
    assert "hcm_report_metadata" in database.relations


def _shell(project: Project, script: str) -> Result:
    """Run a block in the project, with the development environment's `alembic`."""
    path = {"PATH": f"{BIN}:{project.environment['PATH']}"}
    return run(["sh", "-ec", script], cwd=project.folder, env=project.environment | path, check=True)


def test_the_example_of_a_migration_can_be_created_applied_and_undone(project: Project, database: Database) -> None:
    before = set(project.files())
    _shell(project, block("alembic revision -m").replace(".venv/bin/activate", str(BIN / "activate")))
    (name,) = set(project.files()) - before
    assert re.fullmatch(r"\d{8}_\d{6}_002_add_status_column\.py", name)
    path = project.versions / name
    edit(path, path.read_text().partition("def upgrade() -> None:\n")[2], "")
    edit(path, "def upgrade() -> None:\n", block('op.add_column("hcm_report_metadata"'))
    for command in (["format", "--check"], ["check"]):
        run([BIN / "ruff", *command, "--config", ROOT / "pyproject.toml", path], check=True)
    columns = (
        "SELECT count(*) FROM pg_attribute WHERE attrelid = 'hcm_report_metadata'::regclass AND attname = 'status'"
    )
    for command, at, count in (("upgrade head", "002", 1), ("downgrade -1", "001", 0), ("upgrade head", "002", 1)):
        assert project.alembic(*command.split()).returncode == 0
        assert (database.at, database.scalar(columns)) == ([at], count)


def test_the_sql_plan_can_be_applied_with_psql(project: Project, database: Database) -> None:
    assert project.alembic("upgrade", "001").returncode == 0
    project.add("002", 'op.execute("CREATE TABLE planned ()")')
    _shell(project, block("> plan.sql").splitlines()[0])
    assert database.at == ["001"]
    url = database.url
    names = {"<host>": str(url.host), "unifieddevdb": database.name, "hcm_migrations": database.role}
    command = block("psql --no-psqlrc")
    for name, replacement in names.items():
        command = command.replace(name, replacement)
    login = {"PGPORT": str(url.port or 5432), "PGPASSWORD": PASSWORD}
    environment = {"PATH": f"{programs()}:{os.environ['PATH']}", **login}
    run(["sh", "-ec", command], cwd=project.folder, env=environment, check=True)
    assert (database.at, "planned" in database.relations) == (["002"], True)


def test_a_new_environment_migrates_the_database_of_its_dotenv_file(project: Project, database: Database) -> None:
    shutil.copy(ROOT / "requirements.txt", project.folder)
    (project.folder / ".env.example").write_text(env_file(database))  # the settings to enter
    del project.environment["DATABASE_URL"]
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    shell = run(["bash", "-ec", block("python3 -m venv venv")], cwd=project.folder, env=project.environment | pip)
    assert (shell.returncode, database.at) == (0, ["001"]), shell.text
    shell.line("INFO settings read from .env")


def test_the_record_is_read_as_the_readme_says(project: Project, database: Database) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    shown = _shell(project, block("alembic current --verbose"))
    names = [line.partition(":")[0] for line in block("Applied: ").splitlines()]
    assert [name for name in names if f"\n{name}: " in f"\n{shown.stdout}"] == names[:-1] == names[:4]  # not From
    reader = f"r{database.name}"
    database.execute(f"CREATE ROLE {reader} LOGIN PASSWORD 'unused'")
    try:
        for statement in _statements(block("TO hcm_readonly").replace("hcm_readonly", reader), database):
            database.execute(statement)
        url = database.url.set(username=reader, password="unused")  # noqa: S106
        ((at, *row),) = execute(url, block("ORDER BY id DESC"))
        assert row[:2] == ["upgrade", "001"]
        panel = block("$__timeFilter").replace(  # as Grafana does
            "$__timeFilter(applied_at)", "applied_at BETWEEN '2020-01-01T00:00:00Z' AND '2100-01-01T00:00:00Z'"
        )
        ((time, direction, revision, seconds, *_),) = execute(url, panel)
        assert (time, direction, revision, 0 < seconds < 60) == (at, "upgrade", "001", True)
        assert "Applied: " in project.alembic("current", "--verbose", DATABASE_URL=dsn(url)).stdout
    finally:
        database.execute(f"DROP OWNED BY {reader}; DROP ROLE {reader}")


def test_a_loop_migrates_several_schemas(project: Project, database: Database) -> None:
    schemas = ("ng_kano", "ng_lagos", "ng_oyo")
    for schema in schemas:
        database.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {database.role}")
    _shell(project, block("for schema in"))
    assert [database.scalar(f"SELECT version_num FROM {schema}.alembic_version") for schema in schemas] == ["001"] * 3
