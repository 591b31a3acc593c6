"""Loopback ports for temporary servers."""

import socket


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 on which nothing is listening."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    """Whether a connection to a TCP port of 127.0.0.1 succeeds."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
