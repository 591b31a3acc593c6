"""An env.py without this project's runner that ends in a traceback: the log's last line is one line with the reason."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest

from tests.support.chart import Helm, one
from tests.support.database import Database
from tests.support.pod_scripts import CREDENTIALS, Volume
from tests.support.programs import Result, run
from tests.support.revisions import edit
from tests.support.waiting import AT_ONCE
from tools.paths import BIN

FIRST = """
from alembic import op
import sqlalchemy as sa

revision, down_revision = "001", None

def upgrade():
    op.create_table("report", sa.Column("id", sa.Integer), sa.Column("name", sa.String(9)))
    op.create_index("report_number", "report", ["number"])
"""


@pytest.mark.fault(
    "Code and settings",
    fault="A revision fails in a project with its own `env.py`, which ends in a traceback",
    sees="`FAILED: alembic upgrade head: sqlalchemy.exc.ProgrammingError: (psycopg2.errors.UndefinedColumn) column ..."
    " does not exist (exit status 1)`, exit 1, in the log of each attempt",
    state="As the `env.py` left it: with Alembic's own template, rolled back",
    do="Fix the revision, push, deploy again; for one line instead of a traceback, add"
    " [this project's runner](../charts/hcm-db-migrations/README.md#with-an-envpy-of-your-own)",
)
def test_a_failed_revision_with_alembics_own_env_py_ends_with_its_reason(
    volume: Volume, container: Callable, shell: str, database: Database
) -> None:
    folder = volume.clone()
    run([BIN / "alembic", "init", "migrations"], cwd=folder, check=True)
    url = database.url.set(drivername="postgresql+psycopg2").render_as_string(hide_password=False)
    config = f'config = context.config\nconfig.set_main_option("sqlalchemy.url", {url.replace("%", "%%")!r})\n'
    edit(folder / "migrations" / "env.py", "config = context.config\n", config)
    (folder / "migrations/versions/001.py").write_text(FIRST)
    volume.program("alembic", f'exec {BIN}/alembic "$@"')
    result = volume.run(container(), shell, **CREDENTIALS)
    assert (result.returncode, database.relations) == (1, []), result.text
    assert result.lines[-1] == (
        "FAILED: alembic upgrade head: sqlalchemy.exc.ProgrammingError: (psycopg2.errors.UndefinedColumn) column"
        ' "number" does not exist (exit status 1)'
    )
    assert result.text.count("FAILED") == 1
    result.line("INFO  [alembic.runtime.migration] Running upgrade  -> 001")
    assert "[SQL: CREATE INDEX report_number ON report (number)]" in result.lines


@pytest.mark.parametrize(
    ("script", "exception"),
    [
        ("raise KeyError('DB_URL')", "KeyError: 'DB_URL'"),
        ("raise ValueError", "ValueError"),
        ("raise ValueError('a\\n  b\\nc')", "ValueError: a"),
        ("raise ValueError('\\n\\tb\\nc')", "ValueError: b"),
        ("raise ValueError('1 error for A:\\n  b')", "ValueError: 1 error for A: b"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("exec('x = (')", "SyntaxError: '(' was never closed"),
        ("try:\n    1 / 0\nexcept Exception:\n    raise RuntimeError('FAILED: b')", "RuntimeError: FAILED: b"),
        ("raise ExceptionGroup('two', [ValueError('a')])", "ExceptionGroup: two (1 sub-exception)"),
    ],
)
def test_the_last_line_has_the_exception_itself(
    volume: Volume, container: Callable, shell: str, script: str, exception: str
) -> None:
    if "ExceptionGroup" in script and sys.version_info < (3, 11):
        script = f"class ExceptionGroup(Exception): __module__ = 'builtins'\nraise ExceptionGroup({exception[16:]!r})"
    volume.clone("alembic.ini")
    volume.program("alembic", f"exec {sys.executable} - <<'EOF'\nimport sys\n{script}\nEOF")
    result = volume.run(container(), shell, **CREDENTIALS)
    assert (result.returncode, result.lines[-1]) == (1, f"FAILED: alembic upgrade head: {exception} (exit status 1)")
    assert result.text.count("\nFAILED: ") == 1


@pytest.mark.parametrize(
    ("end", "status", "last"),
    [
        ("print('FAILED: why'); sys.exit(1)", 1, "FAILED: why"),
        ("print('  FAILED: why'); sys.exit(1)", 1, "  FAILED: why"),
        ("print('why'); sys.exit(3)", 3, "why"),
        ("", 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_an_exception_that_env_py_handles_is_not_the_reason(
    volume: Volume, container: Callable, shell: str, end: str, status: int, last: str
) -> None:
    volume.clone("alembic.ini")
    script = f"import sys, traceback\ntry:\n    1 / 0\nexcept Exception:\n    traceback.print_exc()\n{end}"
    volume.program("alembic", f"exec {sys.executable} - <<'EOF'\n{script}\nEOF")
    result = volume.run(container(), shell, **CREDENTIALS)
    assert (result.returncode, result.lines[-1]) == (status, last), result.text


def test_helm_test_ends_with_the_exception_too(volume: Volume, helm4: Helm, shell: str) -> None:
    (of,) = one(helm4.render({"requirements": ""}), "Pod")["spec"]["containers"]
    volume.clone("alembic.ini")
    (volume.folder / "main.py").write_text("print('(head)')\nraise OSError('no route')\n")
    volume.program("alembic", f'exec {sys.executable} "$HOME/main.py"')
    result = volume.run(of, shell, **CREDENTIALS)
    assert (result.returncode, result.lines[-1]) == (1, "FAILED: alembic current: OSError: no route (exit status 1)")


def test_the_log_is_printed_while_alembic_runs(volume: Volume, container: Callable, shell: str) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", 'echo begins; printf "a line without its end"; exec sleep 60')
    program = volume.start(container(), shell, **CREDENTIALS)
    program.prints("begins\na line without its end", AT_ONCE)
    assert program.stop().returncode == 143


def test_a_process_that_alembic_leaves_running_does_not_delay_the_end(
    volume: Volume, container: Callable, shell: str
) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", 'sleep 60 &\necho "$!" >"$HOME/left"; echo done; exit 3')
    start = time.monotonic()
    result = volume.run(container(), shell, **CREDENTIALS)
    assert (result.returncode, result.lines[-1]) == (3, "done")
    assert time.monotonic() - start < AT_ONCE


def test_a_large_log_is_complete(volume: Volume, container: Callable, shell: str) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", "seq 300000")
    result: Result = volume.run(container(), shell, **CREDENTIALS)
    assert (result.returncode, result.lines[1:]) == (0, [str(number) for number in range(1, 300001)])
