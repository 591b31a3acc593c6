"""Input of any kind, made by hypothesis: it works as it is, or ends in one clear line, and no secret is shown."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable

import pytest
from alembic.util import CommandError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from migration_runner import database as databases
from migration_runner import settings as of_the_run
from tests.support.canary import CANARY
from tests.support.database import Database, parts
from tests.support.project import Project
from tests.support.revisions import FIRST, RULES
from tools.postgres import dsn

# An environment variable holds no NUL; a lone surrogate is no character.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60)

often = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., of_the_run.Settings]:
    """`settings.load()` with these variables and no others."""
    for name in [name for name in os.environ if name == "DATABASE_URL" or name.startswith(("DB_", "PG"))]:
        monkeypatch.delenv(name)

    def load(**variables: str | None) -> of_the_run.Settings:
        with monkeypatch.context() as here:
            for name, value in variables.items():
                if value is not None:
                    here.setenv(name, value)
            return of_the_run.load()

    return load


@pytest.mark.fault(
    "Code and settings",
    fault="A password in any Unicode",
    sees="It arrives, in DB_PASSWORD as it is and in DATABASE_URL percent-encoded; it is never printed",
    state="All done",
    do="Nothing",
)
def test_any_password_opens_the_database(load: Callable, database: Database) -> None:
    @settings(often, max_examples=60)
    @given(TEXT.filter(bool))
    @example("\u00a0\u1680\u3000 \u00ad")
    @example("a\u0340\u06dd\ufdd0")
    def check(password: str) -> None:
        password = password[:1] + CANARY + password[1:]
        quoted = password.replace("'", "''")
        database.execute(f"ALTER ROLE {database.role} PASSWORD '{quoted}'")
        url = dsn(database.url.set(password=password))
        for variables in (parts(database) | {"DB_PASSWORD": password}, {"DATABASE_URL": url}):
            loaded = load(**variables)
            assert CANARY not in f"{loaded!r} {loaded.target}"
            with databases.Database(loaded).connect() as connection:
                assert connection.scalar(text("SELECT current_user")) == database.role

    check()


@pytest.mark.fault(
    "Code and settings",
    fault="DB_HOST, DB_PORT, DB_NAME or DB_USER is anything",
    sees="It is taken as it is, or one line names the variable and what to set",
    state="The database is not contacted",
    do="What the line says",
)
def test_any_part_is_taken_as_it_is_or_refused_by_name(load: Callable) -> None:
    names = {"DB_HOST": "host", "DB_PORT": "port", "DB_NAME": "database", "DB_USER": "username"}

    @settings(often, max_examples=300)
    @given(st.fixed_dictionaries({}, optional={name: st.one_of(TEXT, st.integers().map(str)) for name in names}))
    def check(variables: dict[str, str]) -> None:
        try:
            url = load(**variables, DB_PASSWORD=CANARY).url
        except CommandError as error:
            assert re.fullmatch(r"(DB_HOST|DB_PORT|DB_NAME|DB_USER) is .+, see \.env\.example", str(error), re.S)
            assert CANARY not in str(error)
        else:
            assert {name: str(getattr(url, names[name])) for name in variables} == variables

    check()


@pytest.mark.fault(
    "Code and settings",
    fault="DATABASE_URL is anything",
    sees="It is read as SQLAlchemy documents it, or one line says how to write it and quotes none of it",
    state="The database is not contacted",
    do="What the line says",
)
def test_any_database_url_is_read_or_refused_without_being_shown(load: Callable) -> None:
    scheme = st.sampled_from(["", "postgres://", "postgresql://", "postgresql+psycopg2://", "mysql://", "//"])
    inner = st.one_of(TEXT, st.text("%@/:?#[]&=+ a1", max_size=20))

    @settings(often, max_examples=500)
    @given(scheme, inner, inner, inner)
    def check(begin: str, before: str, user: str, after: str) -> None:
        value = f"{begin}{before}{user}:{CANARY}{after}"
        try:
            url = load(DATABASE_URL=value).url
        except CommandError as error:
            assert str(error).startswith("DATABASE_URL ")
            assert CANARY not in str(error)
        else:
            assert url.drivername == "postgresql+psycopg2"
            assert url.database
            assert url.host or url.query["host"]

    check()


@pytest.mark.fault(
    "Code and settings",
    fault="The message of `alembic revision -m` is anything",
    sees="A file that loads, in its folder, with the message in its docstring",
    state="One new file",
    do="Nothing",
)
def test_any_message_makes_one_file_that_loads(offline_project: Project) -> None:
    before = set(offline_project.versions.iterdir())

    @settings(often, max_examples=60)
    @given(st.one_of(TEXT, st.text("\"'\\$`{}%<>#!/.\n\r\t\v\f\x85\u2028 a", max_size=300)))
    def check(message: str) -> None:
        result = offline_project.alembic("revision", f"--message={message}")
        assert result.returncode == 0, result
        made = set(offline_project.versions.glob("*.py")) - before
        try:
            (path,) = made
            assert re.fullmatch(r"\d{8}_\d{6}_002_\w*\.py", path.name)
            tree = ast.parse(path.read_bytes())
            # Python reads each end of a line as \n.
            assert (ast.get_docstring(tree, clean=False) or "").startswith(re.sub("\r\n?", "\n", message))
        finally:
            for path in made:
                path.unlink()

    check()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 12\n" % (b"0" * 64)


@pytest.mark.fault(
    "Code and settings",
    fault="A revision file with other line ends, a byte order mark, lost or changed bytes, or a Git LFS pointer",
    sees="It runs as it is, or one line names the file and what is wrong with it, exit 255",
    state="Finished revisions stay",
    do="Mend the file, push, deploy again",
)
def test_any_content_of_a_revision_file_runs_or_is_refused_by_name(offline_project: Project) -> None:
    path = offline_project.add("002", 'op.execute("CREATE TABLE größe ()")')
    content = path.read_bytes()
    place = st.integers(0, len(content))
    changed = st.one_of(
        st.sampled_from([content.replace(b"\n", b"\r\n"), content.replace(b"\n", b"\r"), LFS, b""]),
        place.map(lambda at: content[:at]),
        st.tuples(place, place).map(lambda cut: content[: min(cut)] + content[max(cut) :]),
        st.tuples(place, st.binary(max_size=3)).map(lambda new: content[: new[0]] + new[1] + content[new[0] :]),
        st.sampled_from(["utf-16", "utf-32", "latin-1", "utf-8-sig"]).map(lambda code: content.decode().encode(code)),
    )

    @settings(often, max_examples=100)
    @given(changed)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        result = offline_project.alembic("upgrade", "head", "--sql")
        assert "Traceback" not in result.text, result
        if result.returncode == 0:
            assert "FAILED" not in result.text
            assert "COMMIT;" in result.stdout
        else:
            assert result.returncode == 255
            assert path.name in result.failure or "002" in result.failure

    check()


def test_no_content_of_a_revision_file_leaves_half_of_it_in_the_database(project: Project, database: Database) -> None:
    path = project.add("002", 'op.execute("CREATE TABLE one ()")\n    op.execute("CREATE TABLE two ()")')
    content = path.read_bytes()
    place = st.integers(0, len(content))

    @settings(often, max_examples=25)
    @given(place, st.integers(0, 40))
    def check(at: int, length: int) -> None:
        path.write_bytes(content[:at] + content[at + length :])
        database.execute(f"DROP SCHEMA public CASCADE; CREATE SCHEMA public AUTHORIZATION {database.role}")
        result = project.alembic("upgrade", "head")
        created = {name for name in database.relations if "hcm" not in name}
        assert created == set() or result.returncode == 0, result

    check()


@pytest.mark.fault(
    "Code and settings",
    fault="A revision file is a symlink, which may lead to what was not cloned or out of the repository",
    sees="`<file> is a symlink; commit the file itself, ...`, exit 255",
    state="The database is not contacted",
    do="What the line says",
)
@pytest.mark.parametrize("target", ["../../../gone.py", "/etc/passwd", "20251202_143000_002_away.py", "..", FIRST])
def test_a_symlink_is_refused_by_name(offline_project: Project, target: str) -> None:
    path = offline_project.versions / "20251202_143000_002_away.py"
    path.symlink_to(target)
    result = offline_project.alembic("upgrade", "head")
    assert (result.returncode, result.failure) == (
        255,
        f"{path.name} is a symlink; commit the file itself, {RULES}",
    )
