"""Servers of a test, on the loopback interface, and certificates for TLS."""

import shutil
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.programs import run


def certificate(path: Path, subject: str, *extensions: str) -> Path:
    """Make a self-signed certificate, with its key beside it as .key; the test is skipped without openssl."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is missing: install it (Debian: apt-get install openssl)")
    new = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={subject}"
    options = [word for extension in extensions for word in ("-addext", extension)]
    run([*new.split(), *options, "-keyout", path.with_suffix(".key"), "-out", path], check=True)
    return path


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[None]:
    """Run a server in a thread until the block ends."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
