"""Where the database is: DATABASE_URL, else the DB_* variables, else .env at the repository root."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from alembic.util import CommandError
from dotenv import load_dotenv
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

log = logging.getLogger(__name__)

ENV_FILE = Path(__file__).parent.parent / ".env"
READ = "see .env.example"


@dataclass(frozen=True)
class Settings:
    """What a run needs to know; `url` never goes into Alembic's Config, whose interpolation would print it."""

    url: URL
    schema: str | None
    version_table: str
    wait_seconds: float


def load() -> Settings:
    """Return the settings, or raise CommandError with one line that names the variable and the cure."""
    _read_env_file()
    for name, value in os.environ.items():
        # Python hides bytes that are no UTF-8 in these characters.
        if _is_ours(name) and re.search("[\udc80-\udcff]", value):
            raise CommandError(f"{name} is not UTF-8; set it as UTF-8, {READ}")
    return Settings(
        url=_url_from_database_url() if os.environ.get("DATABASE_URL") else _url_from_parts(),
        schema=_identifier("DB_SCHEMA"),
        version_table=_identifier("ALEMBIC_VERSION_TABLE") or "alembic_version",
        wait_seconds=_wait_seconds(),
    )


def _read_env_file() -> None:
    if not ENV_FILE.is_file():
        return
    set_already = sorted(filter(_is_ours, os.environ))
    if set_already:
        log.info(".env is not read: the environment has %s", set_already[0])
        return
    try:
        load_dotenv(ENV_FILE, interpolate=False)  # a password may contain ${...}
    except UnicodeDecodeError:
        raise CommandError(f".env is not UTF-8; write it as UTF-8, {READ}") from None
    log.info("settings read from .env")


def _is_ours(name: str) -> bool:
    return name == "DATABASE_URL" or name.startswith("DB_")


def _url_from_database_url() -> URL:
    # No message quotes a part of the URL: a password that is not percent-encoded runs over into any of them.
    write = f"write postgresql://user:password@host:5432/database and percent-encode the user and the password, {READ}"
    try:
        url = make_url(os.environ["DATABASE_URL"])
    except (ArgumentError, ValueError):
        raise CommandError(f"DATABASE_URL cannot be read; {write}") from None
    if url.drivername not in ("postgres", "postgresql", "postgresql+psycopg2"):
        raise CommandError(f"DATABASE_URL does not begin with postgresql://; {write}")
    if os.environ["DATABASE_URL"].count("@") > 1:
        raise CommandError(f"DATABASE_URL has an @ too many; {write} (@ is %40)")
    for name in sorted({"password", "sslpassword"} & set(url.query)):  # Alembic prints the query
        raise CommandError(f"DATABASE_URL has {name} in its query, which logs would show; {write}")
    if not url.host and "host" not in url.query:
        raise CommandError(f"DATABASE_URL has no host; {write}")
    if not url.database:
        raise CommandError(f"DATABASE_URL has no database; {write}")
    if url.port is not None and not 1 <= url.port <= 65535:
        raise CommandError(f"DATABASE_URL has no port from 1 to 65535; {write}")
    # SQLAlchemy decodes user and password only. Without a driver, its version 2.1 would take psycopg 3.
    return url.set(drivername="postgresql+psycopg2", database=unquote(url.database))


def _url_from_parts() -> URL:
    host = _not_empty("DB_HOST", "localhost")
    if host.count(":") == 1:
        raise CommandError(
            f"DB_HOST is '{host}', a host with a port; set DB_HOST to the host alone and DB_PORT to the port, {READ}"
        )
    return URL.create(
        "postgresql+psycopg2",
        host=host,
        port=_port("DB_PORT", "5432"),
        database=_not_empty("DB_NAME", "unifieddevdb"),
        username=_not_empty("DB_USER", "postgres"),
        password=os.environ.get("DB_PASSWORD", "postgres") or None,  # empty: as libpq finds it (PGPASSFILE, peer)
    )


def _not_empty(name: str, default: str) -> str:
    value = os.environ.get(name, default)
    if not value:
        raise CommandError(f"{name} is ''; set it, or unset it for the default '{default}', {READ}")
    if value != value.strip():  # a Secret made with `echo` ends with a newline
        raise CommandError(f"{name} is {value!r}, with white space around it; take that away, {READ}")
    return value


def _port(name: str, default: str) -> int:
    value = os.environ.get(name, default)
    if not (re.fullmatch("[0-9]{1,5}", value) and 1 <= int(value) <= 65535):
        raise CommandError(f"{name} is '{value}'; set a number from 1 to 65535, {READ}")
    return int(value)


def _identifier(name: str) -> str | None:
    value = os.environ.get(name)
    if value is not None and not 1 <= len(value.encode()) <= 63:
        raise CommandError(f"{name} is '{value}'; set a name of 1 to 63 bytes, or unset it, {READ}")
    return value


def _wait_seconds() -> float:
    value = os.environ.get("MIGRATION_WAIT_SECONDS", "90")
    if not (re.fullmatch("[0-9]{1,5}", value) and int(value) <= 86400):
        raise CommandError(
            f"MIGRATION_WAIT_SECONDS is '{value}'; set a whole number of seconds from 0 to 86400, {READ}"
        )
    return float(value)
