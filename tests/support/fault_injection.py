"""A plugin: fault injection with a dedicated toxiproxy, PgBouncer, network and mount namespaces."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL

from tests.support.database import Database
from tests.support.packages import debian_program
from tests.support.pod_scripts import Volume
from tests.support.programs import start
from tests.support.waiting import until
from tools import binaries
from tools.network import free_port, is_listening
from tools.postgres import UNPRIVILEGED
from tools.steps import UnavailableError

root_only = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"),
    reason="requires root and ip (mounts, network namespaces): run as root, and install ip (Debian: iproute2)",
)


@contextmanager
def namespace(kind: str, script: str = "true") -> Iterator[list[str]]:
    """Yield the command that enters a new namespace (`mount` or `net`), in which `script` ran; the kernel cleans up."""
    holder = start(["unshare", f"--{kind}", "sh", "-ec", f"{script}; echo ready; exec sleep infinity"])
    try:
        until(lambda: "ready" in holder.stdout or not holder.running)
        assert holder.running, holder.output
        yield ["nsenter", f"--{kind}=/proc/{holder.process.pid}/ns/{'mnt' if kind == 'mount' else kind}"]
    finally:
        holder.kill()


@contextmanager
def small_disk(volume: Volume, options: str) -> Iterator[list[str]]:
    """Make a tmpfs the pod's volume, with a copy of the checkout; yield the prefix of the runs on it."""
    disk = volume.workspace = volume.folder / "disk"
    disk.mkdir()
    checkout = volume.folder / "git"
    copy = f"; cp -a {checkout} {disk}" if checkout.exists() else ""
    with namespace("mount", f"mount -t tmpfs -o {options} tmpfs {disk}{copy}") as enter:
        yield [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(disk)]


class Proxy:
    """A TCP proxy in front of the server, whose connections can be cut, slowed down or stalled."""

    def __init__(self, api: str, upstream: str) -> None:
        self.api = api
        listen = self._post("", {"name": "postgres", "listen": "127.0.0.1:0", "upstream": upstream})["listen"]
        self.port = int(listen.rsplit(":", 1)[1])

    def toxic(self, kind: str, **attributes: int) -> None:
        """Add a toxic in both directions: `latency` with latency in ms; `timeout` 0 drops all data."""
        for stream in ("upstream", "downstream"):
            toxic = {"name": f"{kind}-{stream}", "type": kind, "stream": stream, "attributes": attributes}
            self._post("/postgres/toxics", toxic)

    def cut(self) -> None:
        """Close all connections and refuse new ones."""
        self._post("/postgres", {"enabled": False})

    def restore(self) -> None:
        self._post("/postgres", {"enabled": True})

    def reset(self) -> None:
        """Remove all toxics and enable the proxy."""
        request = urllib.request.Request(f"{self.api}/reset", method="POST")  # noqa: S310
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.api}/proxies{path}", json.dumps(body).encode())  # noqa: S310
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
            content: dict[str, Any] = json.load(response)
            return content


@pytest.fixture
def proxy(server: URL) -> Iterator[Proxy]:
    """toxiproxy between the test's runs and the server."""
    try:
        program = binaries.find_or_build("toxiproxy")
    except UnavailableError as error:
        pytest.skip(f"toxiproxy: {error}")
    port = free_port()
    api = f"http://127.0.0.1:{port}"
    server_process = start([program, "-host", "127.0.0.1", "-port", str(port)])
    try:
        until(lambda: is_listening(port))
        yield Proxy(api, f"{server.host}:{server.port or 5432}")
    finally:
        server_process.kill()


@contextmanager
def pgbouncer(database: Database, mode: str) -> Iterator[URL]:
    """PgBouncer in front of the test's database, in pool mode `session` or `transaction`; yields the URL through it."""
    program, environment = debian_program("pgbouncer")
    as_root = os.geteuid() == 0
    folder, port, url = Path(tempfile.mkdtemp(prefix="hcm-pgbouncer-")), free_port(), database.url
    password = str(url.password).replace('"', '""')
    (folder / "users").write_text(f'"{database.role}" "{password}"\n')
    (folder / "ini").write_text(f"""[databases]
{database.name} = host={url.host} port={url.port or 5432}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = users
pool_mode = {mode}
""")
    (folder / "program").symlink_to(program)
    if as_root:  # it refuses to run as root, and only root may be able to read root's cache
        library = environment.get("LD_LIBRARY_PATH")
        if library:
            shutil.copytree(library, folder / "lib")
            environment = {"LD_LIBRARY_PATH": str(folder / "lib")}
        (folder / "program").unlink()
        shutil.copy(program, folder / "program")
        for path in [folder, *folder.rglob("*")]:
            shutil.chown(path, UNPRIVILEGED)
    command: list[str | Path] = [folder / "program", "ini"]
    if as_root:
        group = pwd.getpwnam(UNPRIVILEGED).pw_gid
        command = ["setpriv", f"--reuid={UNPRIVILEGED}", f"--regid={group}", "--clear-groups", *command]
    pooler = start(command, cwd=folder, env={"PATH": os.environ["PATH"], **environment})
    try:
        until(lambda: is_listening(port) or not pooler.running)
        assert pooler.running, pooler.output
        yield url.set(port=port)
    finally:
        pooler.kill()
        shutil.rmtree(folder)
