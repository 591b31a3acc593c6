"""Loopback ports for temporary servers, connections to them, and the settings for other connections."""

import os
import socket

# Where a message about a proxy or an index refers to.
SETTINGS = 'docs/machines.md, "Behind a proxy, or with mirrors"'


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 on which nothing is listening."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def bypass_proxy(*hosts: str) -> None:
    """Have this process, and those that it starts, connect to these hosts directly, also where a proxy is set."""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(dict.fromkeys([*filter(None, os.environ.get(name, "").split(",")), *hosts]))


def is_listening(port: int) -> bool:
    """Whether a connection to a TCP port of 127.0.0.1 succeeds."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
