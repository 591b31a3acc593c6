"""Errors: their meaning, whether they are transient, and their message without data or secrets."""

from __future__ import annotations

import os
import re
import traceback

import psycopg2
from sqlalchemy.exc import DBAPIError, InterfaceError, PendingRollbackError, SQLAlchemyError, StatementError


class Interrupted(BaseException):
    """SIGTERM or SIGINT arrived; not an Exception, so that no revision catches it by accident."""


class RetriesExhausted(SystemExit):
    """The retry budget is used up: one line on standard error and exit code 1, after which the Job is retried."""

    def __init__(self, line: str) -> None:
        super().__init__(f"FAILED: {line}")


class OwnTransaction(Exception):
    """A revision committed or rolled back the transaction that is the runner's."""


class LockLost(Exception):
    """A revision released the migration lock, and another run has acquired it."""


class Incomplete(Exception):
    """A revision finished, but an index that it built is INVALID."""


# Transient: 40001 and 40P01 (serialization failure, deadlock), 53000 to 533xx (resources, except 53400, a configured
# limit), 55P03 (lock not available), 57P01, 57P02, 57P03 and 57P05 (a server that is shutting down or starting, an
# idle session).
TRANSIENT_SQLSTATES = re.compile("40|53[0-3]|55P03|57P0[1235]")

# For these, the time before the error was the revision's own work, and does not count as waiting.
WORK_BEFORE_ERROR = re.compile("40|55P03")

CREATED = "created manually, or by a run that was killed before the revision was stamped: see docs/troubleshooting.md"
HINTS = {
    "25006": "on a standby, set DB_HOST to the primary; otherwise, reset default_transaction_read_only",
    "25P02": "an earlier statement failed and the revision caught its error; use op.get_bind().begin_nested()",
    "42501": "grant what is missing, see 'Minimum privileges' in docs/operations.md",
    "42P07": CREATED,
    "42701": CREATED,
    "42710": CREATED,
    "53100": "the server's disk is full: free disk space",
    "57014": "it was cancelled on the server",
}

# On connect the driver gives no SQLSTATE, so the text decides. For these a retry is known to help ...
TRANSIENT_CONNECT_ERRORS = re.compile(
    "|".join(
        [
            # libpq: not listening, temporarily not resolvable, disconnected
            "connection refused",
            "timeout expired",
            "timed out",
            "no route to host",
            "(network|host) is (unreachable|down)",
            "connection reset",
            "broken pipe",
            "software caused connection abort",
            "could not translate host name",
            "is the server running",
            "server closed the connection unexpectedly",
            "could not (receive data from|send data to) server",
            "eof detected",
            "unexpected eof",
            "ssl connection has been closed unexpectedly",
            "expected authentication request from server",
            "cannot assign requested address",
            # the server: starting, stopping, in recovery, full
            "the database system is ",
            "terminating connection",
            "canceling authentication due to timeout",
            "too many (clients|connections)",
            "remaining connection slots are reserved",
            "could not fork new process",
            # failover, reported by target_session_attrs or by a pooler
            "server is (not )?in hot standby mode",
            "session is (not )?read-only",
            "no more connections allowed",
            "server login has been failing",
            "query_wait_timeout|client_login_timeout",
            "server conn(ection)? crashed",
            "connect failed",
            "pgbouncer cannot connect to server",
            "no working server connection",
            "all backend nodes are down",
        ]
    ),
    re.I,
)

# ... and for these the fix is known. Anything else also fails at once, with the server's or libpq's message.
PERMANENT_CONNECT_ERRORS = {
    "authentication failed": "check DB_USER and DB_PASSWORD",  # password, SASL, PAM, LDAP ...
    "no password supplied": "set DB_PASSWORD",
    "is not permitted to log in": "grant LOGIN to the role, or change DB_USER",
    "private key file": "set the key's mode to 0600, or to 0640 if root owns it (in the chart: 'defaultMode: 0440'"
    " of the volume)",
    "channel binding": "set PGCHANNELBINDING=prefer, or enable scram-sha-256 and TLS on the server",
    "certificate": "set PGSSLROOTCERT to the CA's file, and the host to a name in the certificate",
    "definition of service": "check PGSERVICE and PGSERVICEFILE",
    "service file": "check PGSERVICE and PGSERVICEFILE",
    "does not exist": "create it, or change DB_NAME or DB_USER",
    "no such database": "add it to the pooler, or change DB_NAME",
    "no such user": "add it to the pooler, or change DB_USER",
    "not currently accepting connections": "allow them with ALTER DATABASE",
    "permission denied": "grant CONNECT on the database to the role",
    "no encryption": "set PGSSLMODE=require, or allow it in pg_hba.conf",
    "pg_hba.conf": "allow this client, role and database in pg_hba.conf",
    "server does not support SSL": "set another PGSSLMODE, or turn TLS on in the server",
    "authentication method requirement": "check PGREQUIREAUTH",
    "GSSAPI": "set another PGGSSENCMODE",
    "received invalid response": "the server there is not PostgreSQL: check DB_HOST and DB_PORT, or the proxy",
    "invalid": "check the DB_* and PG* variables",
}


def sqlstate(error: BaseException) -> str | None:
    """The server's five-character code, or None if the connection broke."""
    code = getattr(getattr(error, "orig", error), "pgcode", None)
    return code if isinstance(code, str) else None


def is_transient(error: BaseException, *, connection_lost: bool) -> bool:
    """Whether a statement's error is transient; without an SQLSTATE, only if the connection is lost."""
    if not isinstance(error, DBAPIError | psycopg2.Error):
        return False
    state = sqlstate(error)
    if state == "XX000":  # two concurrent GRANT or ANALYZE
        return "tuple concurrently updated" in str(error)
    if state and not state.startswith("08"):  # a function may raise 08 for its own connection
        return bool(TRANSIENT_SQLSTATES.match(state))
    # InterfaceError: not a broken connection; a revision closed it, or uses a closed one.
    return connection_lost and not isinstance(error, InterfaceError | psycopg2.InterfaceError)


def root_cause(error: BaseException) -> BaseException:
    """The error that broke the connection, hidden by a later one on leaving the transaction or autocommit_block."""
    hides = (PendingRollbackError, InterfaceError, psycopg2.InterfaceError)
    while isinstance(error, hides) and isinstance(error.__context__, Exception):
        error = error.__context__
    return error


def describe(error: BaseException) -> str:
    """Any exception as one line, without statement, literals or rows."""
    if isinstance(error, StatementError) and not isinstance(error, DBAPIError):
        name = re.search(r"bind parameter '(.*?)'", str(error.orig))
        if name:
            return unbound_parameter(name[1])
        return describe(error.orig) if error.orig else type(error).__name__
    state = sqlstate(error)
    if isinstance(error, DBAPIError | psycopg2.Error) and (state or not isinstance(error, psycopg2.ProgrammingError)):
        hint = in_given_settings(HINTS.get(state or "", ""))
        return server_message(error) + (f" ({hint})" if hint else "")
    lines = traceback.format_exception_only(type(error), error)  # notes follow, a syntax error's text precedes
    line = " ".join(lines[-1 if isinstance(error, SyntaxError) else 0].split())
    quotes = isinstance(error, SQLAlchemyError | ValueError | psycopg2.Error)  # they quote their input
    return _unquoted(line) if quotes and not isinstance(error, UnicodeError) else line


def in_given_settings(hint: str) -> str:
    """The hint, which names DB_* variables, in terms of DATABASE_URL if that is set."""
    if not os.environ.get("DATABASE_URL"):
        return hint
    hint = re.sub("(.*DB_[A-Z]+)", r"\1 in DATABASE_URL", hint.replace("the DB_* and", "DATABASE_URL and the"))
    return re.sub("DB_([A-Z]+)", lambda found: f"the {found[1].lower()}", hint.replace("DB_NAME", "the database"))


def unbound_parameter(name: str) -> str:
    """The message for `:name` in the text of a statement."""
    return (
        f"SQLAlchemy reads ':{name}' in the statement as a bind parameter without a value; write a backslash before"
        " a colon that is a part of the SQL (\\:)"
    )


def server_message(error: BaseException) -> str:
    """The server's or libpq's message, without the statement and without data."""
    if isinstance(error, UnicodeDecodeError):  # the message of a server with another encoding
        return _one_line(error.object.decode(errors="replace"))
    original = getattr(error, "orig", None) or error
    diag = getattr(original, "diag", None)
    state = sqlstate(error) or ""
    primary = getattr(diag, "message_primary", None)
    if diag is None or not primary:
        return _one_line(str(original))
    if state[:2] in ("22", "23"):  # the data is in the detail and, for class 22, in quotes of any language
        if str(getattr(diag, "source_file", "")).startswith("pl"):  # RAISE: its text may be anything
            return f"an error of class {state}, raised by a function"
        return _one_line(re.sub(r":\s.*", ': "..."', _unquoted(primary), flags=re.S) if state[:2] == "22" else primary)
    if state == "42601":  # it quotes the statement
        position = getattr(diag, "statement_position", None)
        return _one_line(_unquoted(primary)) + (f" (character {position})" if position else "")
    raised = str(diag.source_file or "").startswith("pl")  # its detail may be data
    parts = (primary,) if raised else (primary, diag.message_detail, diag.message_hint)
    first, *others = [_one_line(part) for part in parts if part]
    return first + "".join(f" ({other})" for other in others)


def printable(text: str) -> str:
    """The text with line ends and other control characters escaped, so that it cannot forge a line of the log."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# Quotation marks of all of PostgreSQL's languages: ' " ` and those of Unicode.
QUOTES = "\"'`\u00ab\u00bb\u2018-\u201f\u2039\u203a\u300a-\u300f"


def _unquoted(message: str) -> str:
    return re.sub(f"[{QUOTES}].*[{QUOTES}]", '"..."', message, flags=re.S)


def _one_line(message: str) -> str:
    return " ".join(message.split()).rstrip(".")
