"""A private container engine, for Debian 12 or newer as root, when no engine runs or it can pull no image.

The engine is Debian's Docker, extracted into the cache: nothing is installed. It runs in dedicated network, mount and
PID namespaces, with its own /run, bridges and packet filter rules. So it does not interfere with a user's Docker, and
when its first process ends, the kernel removes all of it. A veth pair connects it to the machine: `address()`.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import platform
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import IO

from tools import debian
from tools.paths import CACHE
from tools.steps import UnavailableError, cached, run, wait_until

FOLDER = CACHE / "engine"
VETH = f"hcm-{hashlib.sha256(bytes(FOLDER)).hexdigest()[:8]}"
# Debian 12's Docker 20.10 cannot run privileged containers without CAP_SYS_RESOURCE; Debian 13's can, also on 12.
PACKAGES = ["docker.io/trixie", "docker-cli/trixie", "docker-buildx/trixie", "iptables", "iproute2", "mmdebstrap"]


def check() -> None:
    """Raise UnavailableError if the engine cannot run here; the message says what is missing."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:  # not a Linux distribution
        release = {}
    missing = []
    if os.geteuid() != 0:
        missing.append("root")
    if release.get("ID") != "debian" or int(release.get("VERSION_ID") or 0) < 12:
        missing.append("Debian 12 or newer")
    if not debian.KEYRING.exists() or not shutil.which("apt-get"):
        missing.append("apt-get with Debian's keyring")
    if missing:
        raise UnavailableError(f"a private container engine requires {', '.join(missing)}")


def environment() -> dict[str, str]:
    """The environment in which docker, kind and the engine's own programs use this engine and no other."""
    root = _programs()
    path = [root / "usr/local/bin", root / "usr/sbin", root / "usr/bin", os.environ["PATH"], "/usr/sbin", "/sbin"]
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("DOCKER_", "KIND_", "KUBECONFIG"))}
    return keep | {
        "PATH": ":".join(map(str, path)),
        "DOCKER_HOST": f"unix://{FOLDER}/docker.sock",
        "DOCKER_CONFIG": str(root / "docker-config"),
        "DOCKER_BUILDKIT": "0",
        "KIND_EXPERIMENTAL_PROVIDER": "docker",
    }


def docker(*arguments: str | Path, what: str = "", expected: str = "", stdin: IO[bytes] | None = None) -> str:
    """Run a docker command on this engine, return its standard output; see `tools.steps.run`."""
    return run(["docker", *arguments], what, expected, stdin=stdin, env=environment())


def address() -> str:
    """The engine's IPv4 address on the veth pair: containers' published ports, reachable from this machine only."""
    return (FOLDER / "address").read_text()


def running() -> bool:
    pid = _pid()
    return bool(pid) and subprocess.run(["docker", "version"], env=environment(), capture_output=True).returncode == 0


def start() -> None:
    """Start the engine, unless it is running. It runs until `stop()`."""
    if running():
        return
    stop()
    env = environment()
    libraries = next(_programs().glob("usr/lib/*-linux-gnu"))
    env |= {"LD_LIBRARY_PATH": str(libraries), "XTABLES_LIBDIR": str(libraries / "xtables")}
    veth, pool = _free_networks()
    host, inside = map(str, veth.hosts())
    # cgroupfs: on a machine with systemd, Docker would ask it to manage processes of another PID namespace.
    dockerd = (
        f"dockerd --data-root {FOLDER}/data --host unix://{FOLDER}/docker.sock --bridge none --ipv6=false"
        f" --default-address-pool base={pool},size=24 --exec-opt native.cgroupdriver=cgroupfs"
        f" --cgroup-parent /hcm-db-migrations"
    )
    script = f"mount -t tmpfs tmpfs /run && ip link set lo up && exec tini -s -- {dockerd}"
    namespaces = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "engine.log").open("w") as output:
        outer = subprocess.Popen(
            [*namespaces, "sh", "-c", script],
            env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: outer.poll() is not None or children.read_text(), 30, "the engine's first process")
        if outer.poll() is None:
            first = children.read_text().split()[0]
            (FOLDER / "pid").write_text(first)
            (FOLDER / "address").write_text(inside)
            for command in (
                f"ip link add {VETH} type veth peer name uplink netns {first}",
                f"ip address add {host}/30 dev {VETH}",
                f"ip link set {VETH} up",
                f"nsenter --target {first} --net ip address add {inside}/30 dev uplink",
                f"nsenter --target {first} --net ip link set uplink up",
            ):
                run(command.split(), env=env)
            wait_until(lambda: outer.poll() is not None or running(), 30, "the engine")
        if outer.poll() is None:
            return
    stop()
    last = "\n".join((FOLDER / "engine.log").read_text().splitlines()[-5:])
    raise UnavailableError(f"the private container engine does not start:\n{last}")


def stop() -> None:
    """Stop the engine and everything in it. Its images stay in the cache."""
    pid = _pid()
    for number in (signal.SIGTERM, signal.SIGKILL):
        if pid and _pid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: not _pid(), 10, "the engine to stop")
    if (FOLDER / "address").exists():
        with contextlib.suppress(RuntimeError):  # the kernel removes it late, and the next engine's has the same name
            run(["ip", "link", "delete", VETH], env=environment())
    for name in ("pid", "docker.sock", "address"):
        (FOLDER / name).unlink(missing_ok=True)
    for group in sorted(Path("/sys/fs/cgroup").glob("**/hcm-db-migrations/**/"), reverse=True):
        with contextlib.suppress(OSError):
            group.rmdir()


def _programs() -> Path:
    """The folder where the engine's Debian packages are extracted."""
    digest = hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:12]
    return cached(CACHE / f"engine-programs-{digest}", _extract_packages)


def _extract_packages(partial: Path) -> None:
    """Download PACKAGES, and those dependencies that this system lacks, with apt and extract them."""
    suite = debian.codename()
    debian.extract(
        partial,
        PACKAGES,
        "downloading Docker from Debian's packages into the cache",
        sources="".join(sorted({debian.sources_list(suite), debian.sources_list("trixie")})),
        preferences="Package: *\nPin: release n=trixie*\nPin-Priority: 100\n" * (suite != "trixie"),
    )
    (partial / "docker-config").mkdir()
    (partial / "docker-config/cli-plugins").symlink_to("../usr/libexec/docker/cli-plugins")  # buildx
    links = partial / "usr/local/bin"
    links.mkdir(parents=True, exist_ok=True)
    for name in ("iptables", "ip6tables"):
        (links / name).symlink_to("../../sbin/xtables-nft-multi")


def _free_networks() -> tuple[ipaddress.IPv4Network, ipaddress.IPv4Network]:
    """Two networks that no route of this machine overlaps: four addresses for the veth pair, and a pool for bridges."""
    routes = run(["ip", "-4", "route", "show", "table", "all"], env=environment())
    found = re.findall(r"\b\d+\.\d+\.\d+\.\d+(?:/\d+)?", routes)
    taken = [ipaddress.IPv4Network(address, strict=False) for address in found]
    for number in range(201, 250):
        network = ipaddress.IPv4Network(f"10.{number}.0.0/16")
        if not any(network.overlaps(other) for other in taken if other.prefixlen):
            pool, rest = network.subnets()
            return next(rest.subnets(new_prefix=30)), pool
    raise UnavailableError("every network from 10.201.0.0/16 to 10.249.0.0/16 is in use on this machine")


def _pid() -> int | None:
    """The pid of the engine's first process, as this machine sees it, if it is alive and is this engine's."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((FOLDER / "pid").read_text())
        if f"{FOLDER}/docker.sock".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None
