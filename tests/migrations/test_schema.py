"""The schema that the revisions create, read from PostgreSQL's catalog."""

import ast
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from pytest_alembic.config import Config as RunnerConfig
from pytest_alembic.tests import test_single_head_revision, test_up_down_consistency, test_upgrade
from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import NullPool

from tests.support.database import Database
from tests.support.project import Project
from tools.paths import ROOT
from tools.postgres import dsn

# pytest-alembic's tests; the fourth compares with models, and this project has none.
__all__ = ["test_single_head_revision", "test_up_down_consistency", "test_upgrade"]

SCRIPTS = ScriptDirectory.from_config(Config(ROOT / "alembic.ini"))
REVISIONS = [pytest.param(script.module, id=script.revision) for script in SCRIPTS.walk_revisions()]

COLUMNS = """
    SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid),
           col_description(a.attrelid, a.attnum)
    FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = 'hcm_report_metadata'::regclass AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""
INDEXES = "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'hcm_report_metadata' ORDER BY 1"


@pytest.fixture
def alembic_config(database: Database, monkeypatch: pytest.MonkeyPatch) -> RunnerConfig:
    """For pytest-alembic: the project's Config; env.py reads the database from the environment."""
    monkeypatch.setenv("DATABASE_URL", dsn(database.url))
    return RunnerConfig(alembic_config=Config(ROOT / "alembic.ini"))


@pytest.fixture
def alembic_engine(database: Database) -> Engine:
    """For pytest-alembic."""
    return create_engine(database.url.set(drivername="postgresql+psycopg2"), poolclass=NullPool)


def test_001_creates_the_table_and_its_indexes(project: Project, database: Database) -> None:
    assert project.alembic("upgrade", "001").returncode == 0
    assert database.execute(COLUMNS) == [
        ("id", "integer", True, "nextval('hcm_report_metadata_id_seq'::regclass)", "Primary key"),
        ("dag_run_id", "character varying(255)", True, None, "Airflow DAG run ID"),
        ("dag_name", "character varying(100)", True, None, "DAG name"),
        ("campaign_number", "character varying(100)", True, None, "Campaign identifier"),
        ("report_name", "character varying(100)", True, None, "Report type"),
        ("trigger_frequency", "character varying(50)", True, None, "Daily, Weekly or Monthly"),
        ("trigger_date", "timestamp without time zone", True, None, "When the report was triggered"),
        ("filestore_id", "character varying(255)", True, None, "UUID from filestore"),
        ("tenant_id", "character varying(50)", False, None, "Tenant identifier"),
        ("created_at", "timestamp without time zone", True, "now()", "Record creation time"),
    ]
    table = "public.hcm_report_metadata USING btree"
    assert database.execute(INDEXES) == [
        ("hcm_report_metadata_pkey", f"CREATE UNIQUE INDEX hcm_report_metadata_pkey ON {table} (id)"),
        ("idx_hcm_report_campaign", f"CREATE INDEX idx_hcm_report_campaign ON {table} (campaign_number)"),
        (
            "idx_hcm_report_campaign_report_freq",
            f"CREATE INDEX idx_hcm_report_campaign_report_freq ON {table}"
            " (campaign_number, report_name, trigger_frequency)",
        ),
        ("idx_hcm_report_frequency", f"CREATE INDEX idx_hcm_report_frequency ON {table} (trigger_frequency)"),
        ("idx_hcm_report_name", f"CREATE INDEX idx_hcm_report_name ON {table} (report_name)"),
        ("idx_hcm_report_trigger_date", f"CREATE INDEX idx_hcm_report_trigger_date ON {table} (trigger_date)"),
    ]
    constraints = "SELECT conname, contype::text FROM pg_constraint WHERE conrelid = %s::regclass AND contype <> 'n'"
    assert database.execute(constraints, "hcm_report_metadata") == [("hcm_report_metadata_pkey", "p")]
    owned = "SELECT pg_get_serial_sequence('hcm_report_metadata', 'id')"
    assert database.scalar(owned) == "public.hcm_report_metadata_id_seq"


def test_a_downgrade_leaves_nothing_and_another_upgrade_creates_the_same_schema(
    project: Project, database: Database
) -> None:
    assert project.alembic("upgrade", "head").returncode == 0
    once = database.dump()
    assert "CREATE TABLE public.hcm_report_metadata" in once
    assert project.alembic("downgrade", "base").returncode == 0
    assert database.relations == []
    assert database.at == []
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
    assert database.execute(tables) == [("alembic_version",), ("alembic_version_history",)]
    assert project.alembic("upgrade", "head").returncode == 0
    assert database.dump() == once


def test_there_is_exactly_one_head() -> None:
    assert len(SCRIPTS.get_heads()) == 1


def _steps(source: str) -> dict[str, list[ast.stmt]]:
    """The statements of upgrade() and downgrade(), without docstrings, `...` and `pass`."""

    def is_step(statement: ast.stmt) -> bool:
        constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        return not (constant or isinstance(statement, ast.Pass))

    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: [*filter(is_step, node.body)] for node in functions if node.name in ("upgrade", "downgrade")}


def _block_is_alone(steps: list[ast.stmt]) -> bool:
    """An error after an `autocommit_block` would not roll back what the block has committed."""
    has_block = any("autocommit_block" in ast.unparse(step) for step in steps)
    return not has_block or (len(steps) == 1 and isinstance(steps[0], ast.With))


@pytest.mark.parametrize("module", REVISIONS)
def test_a_revision_has_an_upgrade_and_a_downgrade_that_do_something(module) -> None:
    steps = _steps(Path(module.__file__).read_text(encoding="utf-8"))
    assert {name for name, found in steps.items() if found} == {"upgrade", "downgrade"}


@pytest.mark.parametrize("module", REVISIONS)
def test_an_autocommit_block_is_alone_in_its_revision(module) -> None:
    steps = _steps(Path(module.__file__).read_text(encoding="utf-8"))
    assert all(map(_block_is_alone, steps.values()))


BLOCK = "with op.get_context().autocommit_block():\n        op.execute('a')"


@pytest.mark.parametrize(
    ("body", "alone"),
    [
        (BLOCK, True),
        (f"'''Why.'''\n    {BLOCK}", True),
        (f"{BLOCK}\n    op.execute('b')", False),
        (f"op.execute('b')\n    {BLOCK}", False),
    ],
)
def test_an_autocommit_block_next_to_other_statements_is_found(body: str, alone: bool) -> None:
    assert _block_is_alone(_steps(f"def upgrade():\n    {body}\n")["upgrade"]) is alone


@pytest.mark.parametrize("module", REVISIONS)
def test_a_revision_imports_nothing_of_this_project(module) -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported}.isdisjoint({"migrations", "migration_runner", "tools", "tests"})
    assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
