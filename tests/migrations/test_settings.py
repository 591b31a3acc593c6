"""DATABASE_URL, DB_*, .env, PG*: their precedence, what is refused, and what is never printed."""

import os

import pytest

from tests.support.canary import CANARY, PASSWORD
from tests.support.database import Database, env_file, parts
from tests.support.messages import URL_FORMAT, target_and_user
from tests.support.project import Project
from tools.postgres import dsn

CLOSED = {"MIGRATION_WAIT_SECONDS": "0", "DATABASE_URL": None}


def logged(database: Database) -> str:
    """The test's database, as the first line of the log names it."""
    return f"{target_and_user(database)}, schema public, PostgreSQL "


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_database_url_takes_precedence_over_the_parts(project: Project, database: Database, scheme: str) -> None:
    url = dsn(database.url.set(drivername=scheme))
    result = project.alembic("upgrade", "head", DATABASE_URL=url, DB_HOST="nowhere.invalid", DB_PORT="x", DB_NAME="")
    assert (result.returncode, database.at) == (0, ["001"]), result
    assert result.lines[0].startswith(f"HH:MM:SS INFO {logged(database)}")


def test_the_parts_name_the_database(project: Project, database: Database) -> None:
    result = project.alembic("upgrade", "head", **parts(database.url))
    assert (result.returncode, database.at) == (0, ["001"]), result
    assert result.lines[0].startswith(f"HH:MM:SS INFO {logged(database)}")


def test_the_parts_have_defaults(offline_project: Project) -> None:
    # Port 1: never the developer's own PostgreSQL.
    result = offline_project.alembic("current", **CLOSED, DB_PORT="1")
    assert result.returncode == 1
    assert result.failure.startswith(
        "could not connect to database unifieddevdb at localhost:1 as postgres within 0 s: "
    )


def test_a_run_without_settings_says_that_it_uses_the_defaults(offline_project: Project) -> None:
    # An error of libpq before it connects: never the developer's own PostgreSQL.
    result = offline_project.alembic("current", **CLOSED, PGSSLMODE="sometimes")
    line = "neither DATABASE_URL nor a DB_* variable is set: using the defaults, see .env.example"
    assert result.stderr.splitlines()[0].endswith(f" INFO {line}")
    assert result.failure.startswith("cannot connect to database unifieddevdb at localhost:5432 as postgres: ")


@pytest.mark.parametrize(
    "password", [PASSWORD, CANARY + "%%(x)s %41", CANARY + "'; DROP", f" {CANARY} ", CANARY + "\\'\""], ids=ascii
)
@pytest.mark.parametrize("form", ["DATABASE_URL", "DB_PASSWORD"])
def test_any_password_is_accepted(project: Project, database: Database, password: str, form: str) -> None:
    quoted = password.replace("'", "''")
    database.execute(f"ALTER ROLE {database.role} PASSWORD '{quoted}'")
    variables = parts(database.url) | {"DB_PASSWORD": password}
    if form == "DATABASE_URL":
        variables = {"DATABASE_URL": dsn(database.url.set(password=password))}
    result = project.alembic("current", **variables)
    assert result.returncode == 0, result


def test_env_file_is_read_and_logged(project: Project, database: Database) -> None:
    (project.folder / ".env").write_text(env_file(database))
    result = project.alembic("upgrade", "head", DATABASE_URL=None)
    assert (result.returncode, database.at) == (0, ["001"]), result
    assert result.lines[0] == "HH:MM:SS INFO settings read from .env"


@pytest.mark.parametrize("name", ["DB_HOST", "DB_SCHEMA", "DATABASE_URL"])
def test_env_file_is_ignored_if_the_environment_has_a_setting(offline_project: Project, name: str) -> None:
    (offline_project.folder / ".env").write_text("DB_HOST=from-the-file\n")
    value = {"DATABASE_URL": "postgresql://me@127.0.0.1:1/x"}.get(name, "127.0.0.1")
    result = offline_project.alembic("upgrade", "head", "--sql", **{"DATABASE_URL": None, name: value})
    assert result.returncode == 0
    assert result.stderr == f"HH:MM:SS INFO ignoring .env because {name} is set\n"


def test_an_env_file_that_is_not_utf_8_is_one_clear_line(offline_project: Project) -> None:
    (offline_project.folder / ".env").write_bytes("DB_PASSWORD=für\n".encode("latin-1"))
    result = offline_project.alembic("current", DATABASE_URL=None)
    assert (result.returncode, result.failure) == (255, ".env is not UTF-8; write it as UTF-8, see .env.example")


@pytest.mark.parametrize("folder", ["..", "migrations"])
def test_env_file_is_read_only_at_the_root(offline_project: Project, folder: str) -> None:
    (offline_project.folder / folder / ".env").write_text("DB_HOST=from-the-file\n")
    arguments = ("-c", str(offline_project.folder / "alembic.ini"), "upgrade", "head", "--sql")
    result = offline_project.start(*arguments, cwd=offline_project.folder / folder, DATABASE_URL=None).wait()
    assert (result.returncode, result.stderr) == (0, "")


def test_a_password_in_the_env_file_may_look_like_a_variable(offline_project: Project) -> None:
    (offline_project.folder / ".env").write_text(
        "DB_HOST=127.0.0.1\nDB_PORT=1\nDB_NAME=${HOME}\nMIGRATION_WAIT_SECONDS=0\n"
    )
    result = offline_project.alembic("current", DATABASE_URL=None)
    assert result.failure.startswith("could not connect to database ${HOME} at 127.0.0.1:1 as postgres within 0 s: ")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://u:{}@h/db", f"DATABASE_URL does not begin with postgresql://; {URL_FORMAT}"),
        ("postgresql+psycopg://u:{}@h/db", f"DATABASE_URL does not begin with postgresql://; {URL_FORMAT}"),
        ("postgresql+asyncpg://u:{}@h/db", f"DATABASE_URL does not begin with postgresql://; {URL_FORMAT}"),
        ("postgresql://u:{}@h", f"DATABASE_URL has no database; {URL_FORMAT}"),
        ("postgresql://u:{}@h/", f"DATABASE_URL has no database; {URL_FORMAT}"),
        ("postgresql://u:{}@/db", f"DATABASE_URL has no host; {URL_FORMAT}"),
        ("postgresql:///db", f"DATABASE_URL has no host; {URL_FORMAT}"),
        ("postgresql://u:{}@h:0/db", f"DATABASE_URL has a port outside 1 to 65535; {URL_FORMAT}"),
        ("postgresql://u:{}@h:65536/db", f"DATABASE_URL has a port outside 1 to 65535; {URL_FORMAT}"),
        ("postgresql://u:{}@h:five/db", f"DATABASE_URL is not a valid URL; {URL_FORMAT}"),
        (
            "postgresql://u@h/db?password={}",
            f"DATABASE_URL has password in its query, which logs would show; {URL_FORMAT}",
        ),
        (
            "postgresql://u@h/db?sslpassword={}",
            f"DATABASE_URL has sslpassword in its query, which logs would show; {URL_FORMAT}",
        ),
        ("postgresql://u:a@b/c?{}@h/db", f"DATABASE_URL contains more than one @; {URL_FORMAT} (@ is %40)"),
        ("postgresql://u:{}@x@h/db", f"DATABASE_URL contains more than one @; {URL_FORMAT} (@ is %40)"),
        ("postgresql://u:a@b/{}@h/db", f"DATABASE_URL contains more than one @; {URL_FORMAT} (@ is %40)"),
        ("{}", f"DATABASE_URL is not a valid URL; {URL_FORMAT}"),
        ("host=h password={}", f"DATABASE_URL is not a valid URL; {URL_FORMAT}"),
        ("jdbc:postgresql://u:{}@h/db", f"DATABASE_URL is a JDBC URL; {URL_FORMAT}"),
        ("jdbc:postgresql://h/db?user=u&password={}", f"DATABASE_URL is a JDBC URL; {URL_FORMAT}"),
        *[
            (url, f"DATABASE_URL has one of @ : ; & = or whitespace after the host; {URL_FORMAT}")
            for url in (
                "postgresql://te/am:{}@h:1/db",
                "postgresql://h:1/db;password={}",
                "postgresql://h:1/db&user=u&password={}",
                "postgresql://h:1/db password={}",
            )
        ],
        (
            "postgresql://u@h/db?s3cr3t{}=x",
            f"DATABASE_URL has the invalid connection option in its query; {URL_FORMAT}",
        ),
    ],
)
def test_an_invalid_database_url_is_one_clear_line(offline_project: Project, url: str, message: str) -> None:
    result = offline_project.alembic("upgrade", "head", DATABASE_URL=url.format(CANARY))
    assert (result.returncode, result.failure) == (255, message)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DB_PORT": "five"}, "DB_PORT is 'five'; set a number from 1 to 65535, see .env.example"),
        ({"DB_PORT": "0"}, "DB_PORT is '0'; set a number from 1 to 65535, see .env.example"),
        ({"DB_PORT": "65536"}, "DB_PORT is '65536'; set a number from 1 to 65535, see .env.example"),
        ({"DB_PORT": "9" * 5000}, f"DB_PORT is '{'9' * 5000}'; set a number from 1 to 65535, see .env.example"),
        ({"DB_PORT": ""}, "DB_PORT is ''; set a number from 1 to 65535, see .env.example"),
        (
            {"DB_PORT": "tcp://10.0.0.1:5432"},
            "DB_PORT is 'tcp://10.0.0.1:5432'; set a number from 1 to 65535, see .env.example",
        ),
        ({"DATABASE_URL": ""}, "DATABASE_URL is ''; set it, or unset it for the DB_* variables, see .env.example"),
        ({"DB_HOST": ""}, "DB_HOST is ''; set it, or unset it for the default 'localhost', see .env.example"),
        (
            {"DB_HOST": "db\n"},
            "DB_HOST is 'db\\n', with leading or trailing whitespace; remove it, see .env.example",
        ),
        (
            {"DB_USER": " me"},
            "DB_USER is ' me', with leading or trailing whitespace; remove it, see .env.example",
        ),
        ({"DB_NAME": ""}, "DB_NAME is ''; set it, or unset it for the default 'unifieddevdb', see .env.example"),
        (
            {"DB_HOST": "db:5432"},
            "DB_HOST is 'db:5432', which contains a port; set DB_HOST to the host alone and DB_PORT to the port,"
            " see .env.example",
        ),
        (
            {"DB_HOST": "jdbc:postgresql://db:5432/x"},
            "DB_HOST is 'jdbc:postgresql://...', a URL; set DB_HOST to the host alone, see .env.example",
        ),
        (
            {"DB_HOST": "[::1]:5432"},
            "DB_HOST is '[::1]:5432', which contains a port; set DB_HOST to the host alone and DB_PORT to the port,"
            " see .env.example",
        ),
        (
            {"DB_HOST": "postgresql://u@db/x"},
            "DB_HOST is 'postgresql://...', a URL; set DB_HOST to the host alone, see .env.example",
        ),
        ({"DB_SCHEMA": ""}, "DB_SCHEMA is ''; set a name of 1 to 63 bytes, or unset it, see .env.example"),
        (
            {"ALEMBIC_VERSION_TABLE": "ä" * 32},
            f"ALEMBIC_VERSION_TABLE is '{'ä' * 32}'; set a name of 1 to 59 bytes, or unset it, see .env.example",
        ),
        (
            {"MIGRATION_WAIT_SECONDS": "2m"},
            "MIGRATION_WAIT_SECONDS is '2m'; set a whole number of seconds from 0 to 86400, see .env.example",
        ),
        (
            {"MIGRATION_WAIT_SECONDS": "86401"},
            "MIGRATION_WAIT_SECONDS is '86401'; set a whole number of seconds from 0 to 86400, see .env.example",
        ),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, dict) else "",
)
def test_an_invalid_setting_is_one_clear_line(offline_project: Project, variables: dict, message: str) -> None:
    result = offline_project.alembic("upgrade", "head", **{"DATABASE_URL": None, "DB_PASSWORD": CANARY} | variables)
    assert (result.returncode, result.failure) == (255, message)


def test_a_password_that_is_not_utf_8_is_one_clear_line(offline_project: Project) -> None:
    password = os.fsdecode(b"\xff" + CANARY.encode())
    result = offline_project.alembic("upgrade", "head", DATABASE_URL=None, DB_PASSWORD=password)
    assert (result.returncode, result.failure) == (255, "DB_PASSWORD is not UTF-8; set it as UTF-8, see .env.example")
