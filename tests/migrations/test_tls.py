"""TLS to the database. The embedded server has none, so a proxy terminates it, as a cloud provider's does."""

import re
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL

from tests.support.database import Database, parts
from tests.support.messages import URL_FORMAT
from tests.support.project import Project
from tests.support.servers import certificate
from tools.postgres import dsn


class Tls:
    """A TLS-terminating proxy with a certificate for localhost: accepts PostgreSQL's SSLRequest, then forwards."""

    def __init__(self, folder: Path, server: URL) -> None:
        self.server = server
        for name in ("right", "wrong"):
            certificate(folder / f"{name}.crt", "localhost", "subjectAltName=DNS:localhost")
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "right.crt", folder / "right.key")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.encrypted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            client.recv(8)  # SSLRequest
            client.sendall(b"S")
            client = self.context.wrap_socket(client, server_side=True)
            upstream = socket.create_connection((self.server.host, self.server.port or 5432))
        except OSError:
            return
        self.encrypted += 1
        back = threading.Thread(target=self._forward, args=(upstream, client), daemon=True)
        back.start()
        self._forward(client, upstream)

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass
        finally:
            target.close()


@pytest.fixture
def tls(tmp_path: Path, server: URL) -> Iterator[Tls]:
    proxy = Tls(tmp_path, server)
    yield proxy
    proxy.listener.close()


@pytest.mark.parametrize("form", ["query", "PG variables"])
def test_a_server_with_the_right_certificate_is_trusted(
    project: Project, database: Database, tls: Tls, tmp_path: Path, form: str
) -> None:
    url = database.url.set(host="localhost", port=tls.port)
    query = {"sslmode": "verify-full", "sslrootcert": str(tmp_path / "right.crt")}
    if form == "query":
        variables = {"DATABASE_URL": dsn(url.update_query_dict(query))}
    else:
        variables = parts(database.url) | {"DB_HOST": "localhost", "DB_PORT": str(tls.port)}
        variables |= {f"PG{name.upper()}": value for name, value in query.items()}
    result = project.alembic("upgrade", "head", **variables)
    assert (result.returncode, database.at, tls.encrypted > 0) == (0, ["001"], True), result
    assert re.search(r", PostgreSQL \S+.*, TLSv1\.3$", result.lines[0])


@pytest.mark.fault(
    "Network",
    fault="The server's certificate is not trusted, or is for another host",
    sees="`cannot connect to database ...: ... certificate ...; set PGSSLROOTCERT to the CA's file, and the host to"
    " a name in the certificate`, at once, exit 255",
    state="Nothing was changed",
    do="Follow the message",
)
@pytest.mark.parametrize(
    ("host", "ca", "message"),
    [
        ("localhost", "wrong.crt", "SSL error: certificate verify failed"),
        ("127.0.0.1", "right.crt", 'does not match host name "127.0.0.1"'),
        ("localhost", "none.crt", 'none.crt" does not exist'),
    ],
    ids=["wrong CA", "wrong host", "no CA file"],
)
def test_a_server_with_a_wrong_certificate_is_refused_at_once(
    project: Project, database: Database, tls: Tls, tmp_path: Path, host: str, ca: str, message: str
) -> None:
    url = database.url.set(host=host, port=tls.port)
    query = {"sslmode": "verify-full", "sslrootcert": str(tmp_path / ca)}
    result = project.alembic("upgrade", "head", DATABASE_URL=dsn(url.update_query_dict(query)))
    assert (result.returncode, database.relations) == (255, [])
    assert result.failure.startswith(f"cannot connect to database {database.name} at {host}:{tls.port}: ")
    assert message in result.failure
    assert result.failure.endswith("; set PGSSLROOTCERT to the CA's file, and the host to a name in the certificate")


def test_a_server_without_tls_is_refused_at_once_if_tls_is_required(
    project: Project, request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("--postgres-url"):
        pytest.skip("the external server may have TLS: run without --postgres-url")
    result = project.alembic("upgrade", "head", PGSSLMODE="require")
    assert result.returncode == 255
    assert result.failure.endswith(
        "server does not support SSL, but SSL was required; set another PGSSLMODE, or turn TLS on in the server"
    )


def test_a_misspelled_option_in_the_url_is_refused_at_once(project: Project, database: Database) -> None:
    url = database.url.update_query_dict({"sslmod": "require"})
    result = project.alembic("upgrade", "head", DATABASE_URL=dsn(url))
    assert result.returncode == 255
    assert result.failure == f'DATABASE_URL has the invalid connection option "sslmod" in its query; {URL_FORMAT}'


@pytest.mark.fault(
    "Network",
    fault="libpq rejects the client key because of its mode (as in a Secret volume)",
    sees="`cannot connect to database ...: ... has group or world access; ...; set the key's mode to 0600, or to 0640"
    " if root owns it (in the chart: 'defaultMode: 0440' of the volume)`, at once, exit 255",
    state="Nothing was changed",
    do="Follow the message",
)
def test_a_client_key_that_libpq_rejects_fails_at_once(
    project: Project, database: Database, tls: Tls, tmp_path: Path
) -> None:
    """The files of a Secret volume have mode 0644 by default."""
    certificate(tmp_path / "client.crt", "app")
    query = {"sslmode": "require", "sslcert": str(tmp_path / "client.crt"), "sslkey": str(tmp_path / "client.key")}
    url = database.url.set(host="localhost", port=tls.port).update_query_dict(query)
    (tmp_path / "client.key").chmod(0o644)
    refused = project.alembic("current", DATABASE_URL=dsn(url))
    assert refused.returncode == 255
    assert "has group or world access" in refused.failure
    assert refused.failure.endswith(
        "; set the key's mode to 0600, or to 0640 if root owns it (in the chart: 'defaultMode: 0440' of the volume)"
    )
    (tmp_path / "client.key").chmod(0o600)
    assert project.alembic("current", DATABASE_URL=dsn(url)).returncode == 0
