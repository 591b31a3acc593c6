"""The linters, as tests: one way to run them, the same for continuous integration and developers."""

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from tests.support.programs import run
from tools.paths import BIN, ROOT

# Rules of squawk that apply to no revision, and why.
EXCLUDED = {
    "require-statement-timeout": "a migration's limit is the Job's deadline; the run sets statement_timeout to 0",
}
# Released revisions are never edited. 001 has the column types of the table that HCM Reports was built on.
BEFORE_THE_RULES = {
    "001": ["prefer-bigint-over-int", "prefer-identity", "prefer-text-field", "prefer-timestamp-tz"],
}


def _revisions() -> list[str]:
    script = ScriptDirectory.from_config(Config(ROOT / "alembic.ini"))
    return [revision.revision for revision in script.walk_revisions()]


def _passes(program: str, *arguments: str, stdin: str = "") -> None:
    run([BIN / program, *arguments], cwd=ROOT, stdin=stdin, check=True, seconds=500)


def test_python_passes_the_linter() -> None:
    _passes("ruff", "check")


def test_python_is_formatted() -> None:
    _passes("ruff", "format", "--check")


def test_python_passes_the_type_checker() -> None:
    _passes("mypy")


def test_yaml_passes_the_linter() -> None:
    _passes("yamllint", "--strict", ".")


@pytest.mark.parametrize("revision", _revisions())
def test_the_sql_of_a_revision_passes_the_linter(revision: str) -> None:
    script = ScriptDirectory.from_config(Config(ROOT / "alembic.ini"))
    before = script.get_revision(revision).down_revision
    step = f"{before}:{revision}" if before else revision
    command = [BIN / "alembic", "upgrade", step, "--sql"]
    sql = run(command, cwd=ROOT, env={"DB_HOST": "localhost"}, verbatim=True, check=True).stdout
    assert "CREATE TABLE IF NOT EXISTS alembic_version" in sql or before
    excluded = ",".join([*EXCLUDED, *BEFORE_THE_RULES.get(revision, [])])
    _passes("squawk", "--pg-version", "15", "--exclude", excluded, "--stdin-filepath", f"{revision}.sql", stdin=sql)
