"""The settings of a run: DATABASE_URL, else the DB_* variables, else .env at the repository root."""

from __future__ import annotations

import logging
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import psycopg2.extensions
from alembic.util import CommandError
from dotenv import load_dotenv
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

log = logging.getLogger("migration_runner")

SEE_ENV_EXAMPLE = "see .env.example"


@dataclass(frozen=True)
class Origin:
    """Where the revisions are from, as far as known; without credentials."""

    repository: str | None = None
    ref: str | None = None
    commit: str | None = None

    @classmethod
    def from_environment(cls) -> Origin:
        """Read the Job's variables."""
        repository, ref, commit = (_readable(os.environ.get(name)) for name in ("GIT_REPO", "GIT_REF", "GIT_COMMIT"))
        # A token may be the user, the password, or a part of the query.
        repository = re.sub(r"(?<=//)[^/]*@|[?#].*", "", repository or "")
        return cls(None if re.search(":[^@]*@", repository) else repository or None, ref, commit)


@dataclass(frozen=True)
class Settings:
    """The settings; `url` never goes into Alembic's Config, whose interpolation would print it."""

    url: URL
    schema: str | None
    version_table: str
    wait_seconds: float
    hides_user: bool = False  # the user of DATABASE_URL may be a token; DB_USER is not
    origin: Origin = Origin()
    position_file: Path | None = None  # for `<revision before> -> <revision after>`

    @property
    def target(self) -> str:
        """`database unifieddevdb at db:5432 as postgres`: the only parts of a URL that a message may quote."""
        url = self.url
        host = url.host or _text(url.query.get("host"))
        address = _text(url.query.get("hostaddr")) or os.environ.get("PGHOSTADDR")
        # For libpq, a service file's port takes precedence over PGPORT, and only libpq reads that file.
        port = url.port or (None if os.environ.get("PGSERVICE") else os.environ.get("PGPORT") or 5432)
        user = "" if self.hides_user else f" as {url.username}"
        return (
            f"database {url.database} at {host}{f' [{address}]' if address else ''}{f':{port}' if port else ''}{user}"
        )

    def without_user(self, message: str) -> str:
        """The server's message without the user, if that may be a token."""
        user = self.url.username
        return (
            message.replace(f'"{user}"', '"..."')
            if self.hides_user and user not in (None, self.url.database)
            else message
        )


def load(env_file: Path | None = None) -> Settings:
    """Return the settings, or raise CommandError with one line that names the variable and what to set."""
    _read_env_file(env_file)
    for name, value in os.environ.items():
        # Python decodes bytes that are not UTF-8 to these characters.
        if _is_ours(name) and re.search("[\udc80-\udcff]", value):
            raise CommandError(f"{name} is not UTF-8; set it as UTF-8, {SEE_ENV_EXAMPLE}")
    given = "DATABASE_URL" in os.environ
    return Settings(
        url=_url_from_database_url() if given else _url_from_parts(),
        hides_user=given,
        schema=_identifier("DB_SCHEMA", 63),
        # The name of its primary key is the table's with _pkc appended.
        version_table=_identifier("ALEMBIC_VERSION_TABLE", 59) or "alembic_version",
        wait_seconds=_wait_seconds(),
        origin=Origin.from_environment(),
        position_file=Path(file) if (file := os.environ.get("POSITION_FILE")) else None,
    )


def uses_defaults() -> bool:
    """Whether neither a variable nor .env, once it has been read, names the database."""
    return not any(map(_is_ours, os.environ))


def _read_env_file(path: Path | None) -> None:
    if path is None or not path.is_file():
        return
    set_already = sorted(filter(_is_ours, os.environ))
    if set_already:
        log.info("ignoring .env because %s is set", set_already[0])
        return
    try:
        load_dotenv(path, interpolate=False)  # a password may contain ${...}
    except UnicodeDecodeError:
        raise CommandError(f".env is not UTF-8; write it as UTF-8, {SEE_ENV_EXAMPLE}") from None
    except (OSError, ValueError) as error:
        raise CommandError(f".env cannot be read: {error}; fix it, {SEE_ENV_EXAMPLE}") from None
    log.info("settings read from .env")


def _is_ours(name: str) -> bool:
    return name == "DATABASE_URL" or name.startswith("DB_")


def _url_from_database_url() -> URL:
    # No message quotes a part of the URL: a password that is not percent-encoded may end up in any of them.
    write = (
        "write postgresql://user:password@host:5432/database and percent-encode the user and the password,"
        f" {SEE_ENV_EXAMPLE}"
    )
    value = os.environ["DATABASE_URL"]
    if not value:
        raise CommandError(f"DATABASE_URL is ''; set it, or unset it for the DB_* variables, {SEE_ENV_EXAMPLE}")
    if value.startswith("jdbc:"):
        raise CommandError(f"DATABASE_URL is a JDBC URL; {write}")
    try:
        url = make_url(value)
    except (ArgumentError, ValueError):
        raise CommandError(f"DATABASE_URL is not a valid URL; {write}") from None
    if url.drivername not in ("postgres", "postgresql", "postgresql+psycopg2"):
        raise CommandError(f"DATABASE_URL does not begin with postgresql://; {write}")
    if value.count("@") > 1:
        raise CommandError(f"DATABASE_URL contains more than one @; {write} (@ is %40)")
    for name in sorted({"password", "sslpassword"} & set(url.query)):  # Alembic prints the query
        raise CommandError(f"DATABASE_URL has {name} in its query, which logs would show; {write}")
    if not url.host and "host" not in url.query:
        raise CommandError(f"DATABASE_URL has no host; {write}")
    if not url.database:
        raise CommandError(f"DATABASE_URL has no database; {write}")
    if re.search(r"[@:;&=\s]", url.database) or re.search(r"[@;&=\s]", url.host or ""):
        raise CommandError(f"DATABASE_URL has one of @ : ; & = or whitespace after the host; {write}")
    if url.port is not None and not 1 <= url.port <= 65535:
        raise CommandError(f"DATABASE_URL has a port outside 1 to 65535; {write}")
    for name in url.query:
        try:
            psycopg2.extensions.make_dsn(**{name: "x"})
        except psycopg2.ProgrammingError:
            named = f' "{name}"' if re.fullmatch("[a-z_]{1,30}", name) else ""
            raise CommandError(f"DATABASE_URL has the invalid connection option{named} in its query; {write}") from None
    try:
        url.set(drivername="postgresql+psycopg2").get_dialect()().create_connect_args(url)
    except (ArgumentError, ValueError):
        raise CommandError(f"DATABASE_URL has hosts and ports in its query that do not match; {write}") from None
    # SQLAlchemy decodes user and password only. Without a driver, its version 2.1 would use psycopg 3.
    return url.set(drivername="postgresql+psycopg2", database=unquote(url.database))


def _url_from_parts() -> URL:
    host = _not_empty("DB_HOST", "localhost")
    if re.fullmatch(r"\[[0-9A-Fa-f:.%\w]+\]", host):  # an IPv6 address as URLs write it
        host = host[1:-1]
    if "//" in host or host.startswith("jdbc:"):
        raise CommandError(
            f"DB_HOST is '{host.split('//')[0]}//...', a URL; set DB_HOST to the host alone, {SEE_ENV_EXAMPLE}"
        )
    if not host.startswith("/") and re.fullmatch(r"(\[.*\]|[^:]*):[^:]*", host):
        raise CommandError(
            f"DB_HOST is '{host}', which contains a port; set DB_HOST to the host alone and DB_PORT to the port,"
            f" {SEE_ENV_EXAMPLE}"
        )
    return URL.create(
        "postgresql+psycopg2",
        host=host,
        port=_port("DB_PORT", "5432"),
        database=_not_empty("DB_NAME", "unifieddevdb"),
        username=_not_empty("DB_USER", "postgres"),
        password=_password(),
    )


def _password() -> str | None:
    """None: libpq finds it in PGPASSWORD, PGPASSFILE, peer."""
    default = None if os.environ.get("PGPASSWORD") or os.environ.get("PGPASSFILE") else "postgres"
    return os.environ.get("DB_PASSWORD", default) or None


def password_hint() -> str:
    """Other possible causes if the server rejects the password or requires one; `; ...` or empty."""
    password = os.environ.get("DB_PASSWORD", "")
    if not os.environ.get("DATABASE_URL") and password != password.strip():
        return "; DB_PASSWORD has leading or trailing whitespace (a Secret created with echo ends with a newline)"
    path = Path(os.environ.get("PGPASSFILE") or Path("~/.pgpass"))
    try:
        mode = stat.S_IMODE(path.expanduser().stat().st_mode)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home
        return f"; PGPASSFILE names {path}, which cannot be read" if os.environ.get("PGPASSFILE") else ""
    if mode & 0o077:
        return f"; libpq ignores the password file {path}, whose mode is {mode:04o}: set 0600"
    return ""


def _readable(value: str | None) -> str | None:
    """The value, or None if it is empty; bytes that are not UTF-8 become `?`."""
    return value.encode(errors="replace").decode() if value else None


def _text(value: str | tuple[str, ...] | None) -> str | None:
    return ",".join(value) if isinstance(value, tuple) else value


def _not_empty(name: str, default: str) -> str:
    value = os.environ.get(name, default)
    if not value:
        raise CommandError(f"{name} is ''; set it, or unset it for the default '{default}', {SEE_ENV_EXAMPLE}")
    if value != value.strip():  # a Secret created with `echo` ends with a newline
        raise CommandError(f"{name} is {value!r}, with leading or trailing whitespace; remove it, {SEE_ENV_EXAMPLE}")
    return value


def _port(name: str, default: str) -> int:
    value = os.environ.get(name, default)
    if not (re.fullmatch("[0-9]{1,5}", value) and 1 <= int(value) <= 65535):
        raise CommandError(f"{name} is '{value}'; set a number from 1 to 65535, {SEE_ENV_EXAMPLE}")
    return int(value)


def _identifier(name: str, longest: int) -> str | None:
    value = os.environ.get(name)
    if value is not None and not 1 <= len(value.encode()) <= longest:
        raise CommandError(f"{name} is '{value}'; set a name of 1 to {longest} bytes, or unset it, {SEE_ENV_EXAMPLE}")
    return value


def _wait_seconds() -> float:
    value = os.environ.get("MIGRATION_WAIT_SECONDS", "90")
    if not (re.fullmatch("[0-9]{1,5}", value) and int(value) <= 86400):
        raise CommandError(
            f"MIGRATION_WAIT_SECONDS is '{value}'; set a whole number of seconds from 0 to 86400, {SEE_ENV_EXAMPLE}"
        )
    return float(value)
