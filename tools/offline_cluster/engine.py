"""A container engine of our own, for Debian 12 or newer as root, where no engine runs or it can pull no image.

The engine is Debian's Docker, extracted into the cache: nothing is installed. It runs in network, mount and process
namespaces of its own, with its own /run, bridges and packet filter rules. So it stands beside a user's Docker, and
when its first process ends, the kernel removes all of it. A cable (veth pair) connects it to the machine: `address()`.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tools import debian
from tools.paths import CACHE
from tools.steps import UnavailableError, cached, run

FOLDER = CACHE / "engine"
VETH = f"hcm-{hashlib.sha256(bytes(FOLDER)).hexdigest()[:8]}"
# Debian 12's Docker 20.10 cannot run privileged containers without CAP_SYS_RESOURCE; Debian 13's can, also on 12.
PACKAGES = ["docker.io/trixie", "docker-cli/trixie", "iptables", "iproute2", "mmdebstrap"]


def check() -> None:
    """Raise UnavailableError when an engine cannot be made here; the message says what is missing."""
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)', Path("/etc/os-release").read_text(), re.M))
    missing = []
    if os.geteuid() != 0:
        missing.append("root")
    if release.get("ID") != "debian" or int(release.get("VERSION_ID") or 0) < 12:
        missing.append("Debian 12 or newer")
    if not debian.KEYRING.exists() or not shutil.which("apt-get"):
        missing.append("apt-get with Debian's keyring")
    if missing:
        raise UnavailableError(f"an engine of our own needs {', '.join(missing)}")


def environment() -> dict[str, str]:
    """What docker, kind and the engine's own programs need in their environment to use this engine and no other."""
    root = _programs()
    path = [root / "usr/local/bin", root / "usr/sbin", root / "usr/bin", os.environ["PATH"], "/usr/sbin", "/sbin"]
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("DOCKER_", "KIND_", "KUBECONFIG"))}
    return keep | {
        "PATH": ":".join(map(str, path)),
        "DOCKER_HOST": f"unix://{FOLDER}/docker.sock",
        "DOCKER_CONFIG": str(FOLDER / "docker-config"),
        "DOCKER_BUILDKIT": "0",
        "KIND_EXPERIMENTAL_PROVIDER": "docker",
    }


def docker(*arguments: str | Path, what: str = "", expected: str = "", **options) -> str:
    """Run a docker command on this engine, return its standard output."""
    return run(["docker", *arguments], what, expected, env=environment(), **options)


def address() -> str:
    """The engine's IPv4 address on the cable: what containers publish is reached there, from this machine only."""
    return (FOLDER / "address").read_text()


def running() -> bool:
    pid = _pid()
    return bool(pid) and subprocess.run(["docker", "version"], env=environment(), capture_output=True).returncode == 0


def start() -> None:
    """Start the engine, if it does not run. It runs until stop()."""
    if running():
        return
    stop()
    env = environment()
    libraries = next(_programs().glob("usr/lib/*-linux-gnu"))
    env |= {"LD_LIBRARY_PATH": str(libraries), "XTABLES_LIBDIR": str(libraries / "xtables")}
    cable, pool = _free_network()
    host, inside = map(str, cable.hosts())
    # cgroupfs: on a machine with systemd, Docker would ask it to manage processes of another PID namespace.
    dockerd = (
        f"dockerd --data-root {FOLDER}/data --host unix://{FOLDER}/docker.sock --bridge none --ipv6=false"
        f" --default-address-pool base={pool},size=24 --exec-opt native.cgroupdriver=cgroupfs"
        f" --cgroup-parent /hcm-db-migrations"
    )
    script = f"mount -t tmpfs tmpfs /run && ip link set lo up && exec tini -s -- {dockerd}"
    namespaces = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "engine.log").open("w") as log:
        outer = subprocess.Popen(
            [*namespaces, "sh", "-c", script],
            env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + 30
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    while not (first := children.read_text().split() if outer.poll() is None else []) and time.monotonic() < deadline:
        time.sleep(0.01)
    if first:
        (FOLDER / "pid").write_text(first[0])
        (FOLDER / "address").write_text(inside)
        for command in (
            f"ip link add {VETH} type veth peer name uplink netns {first[0]}",
            f"ip address add {host}/30 dev {VETH}",
            f"ip link set {VETH} up",
            f"nsenter --target {first[0]} --net ip address add {inside}/30 dev uplink",
            f"nsenter --target {first[0]} --net ip link set uplink up",
        ):
            run(command.split(), env=env)
        while outer.poll() is None and time.monotonic() < deadline:
            if running():
                return
            time.sleep(0.1)
    stop()
    last = "\n".join((FOLDER / "engine.log").read_text().splitlines()[-5:])
    raise UnavailableError(f"the engine of our own does not start:\n{last}")


def stop() -> None:
    """Stop the engine and everything in it. Its images stay in the cache."""
    pid = _pid()
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        if pid and _pid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + seconds
            while _pid() and time.monotonic() < deadline:
                time.sleep(0.05)
    if (FOLDER / "address").exists():
        with contextlib.suppress(RuntimeError):  # the kernel takes its time, and the next engine's has the same name
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
    """Download PACKAGES and what they need beyond this system with apt, and extract them."""
    suite = debian.codename()
    debian.extract(
        partial,
        PACKAGES,
        "downloading Docker from Debian's packages into the cache",
        sources="".join(sorted({debian.sources(suite), debian.sources("trixie")})),
        preferences="Package: *\nPin: release n=trixie*\nPin-Priority: 100\n" * (suite != "trixie"),
    )
    links = partial / "usr/local/bin"
    links.mkdir(parents=True, exist_ok=True)
    for name in ("iptables", "ip6tables"):
        (links / name).symlink_to("../../sbin/xtables-nft-multi")


def _free_network() -> tuple[ipaddress.IPv4Network, ipaddress.IPv4Network]:
    """Two networks that no route of this machine touches: four addresses for the cable, and a pool for bridges."""
    routes = run(["ip", "-4", "route", "show", "table", "all"], env=environment())
    taken = [ipaddress.ip_network(word, strict=False) for word in re.findall(r"\b\d+\.\d+\.\d+\.\d+(?:/\d+)?", routes)]
    for number in range(201, 250):
        network = ipaddress.ip_network(f"10.{number}.0.0/16")
        if not any(network.overlaps(other) for other in taken if other.prefixlen):
            pool, rest = network.subnets()
            return next(rest.subnets(new_prefix=30)), pool
    raise UnavailableError("every network from 10.201.0.0/16 to 10.249.0.0/16 is in use on this machine")


def _pid() -> int | None:
    """The engine's first process, as this machine counts, if it lives and is ours."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((FOLDER / "pid").read_text())
        if f"{FOLDER}/docker.sock".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None
