"""A container engine of our own, for Debian 12 or newer as root, where no engine runs or it can pull no image.

The engine is Debian's Docker, extracted into the cache: nothing is installed. It runs in network, mount and process
namespaces of its own, with its own /run, bridges and packet filter rules. So it stands beside a user's Docker, and
when its first process ends, the kernel removes all of it. A cable (veth pair) connects it to the machine: `address()`.

Images that cannot be pulled are made here under honest names (`hcm-local/...`) from Debian packages, and the kind node
from the programs that `tools.binaries` builds. They stay in the engine's data folder in the cache.
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
import tempfile
import time
from pathlib import Path

from tools import binaries, debian
from tools.paths import CACHE, ROOT
from tools.steps import UnavailableError, once, remove, run, say

FOLDER = CACHE / "engine"
HERE = ROOT / "tools"
CABLE = f"hcm-{hashlib.sha256(bytes(FOLDER)).hexdigest()[:8]}"
# Debian 12's Docker 20.10 cannot run privileged containers without CAP_SYS_RESOURCE; Debian 13's can, also on 12.
PACKAGES = ["docker.io/trixie", "docker-cli/trixie", "iptables", "iproute2", "mmdebstrap"]
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

PYTHON = "hcm-local/python:3.11-debian12"
GIT_SYNC = "hcm-local/git-sync-standin:v4.7.1"
SERVER = "hcm-local/server:debian12"
NODE_BASE = "hcm-local/node-base:debian12"
# Each is one Debian 12 system without recommended packages.
SYSTEMS = {
    PYTHON: "python3,python3-pip,python3-venv,python-is-python3,ca-certificates",
    SERVER: "python3,git,openssh-client,openssh-server,postgresql-15,ca-certificates",
    NODE_BASE: "systemd,systemd-sysv,dbus,containerd,runc,iptables,conntrack,ethtool,socat,iproute2,mount,kmod,procps,"
    "ca-certificates,libseccomp2,hostname",
}
# As in the official python image: pip installs into the system.
CUSTOM = ['--customize-hook=rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED']
NODE_PROGRAMS = ["kubeadm", "kubelet", "kubectl", "crictl", "host-local", "loopback", "ptp", "portmap"]
CONTROL_PLANE = ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "etcd", "coredns"]


def check() -> None:
    """Raise UnavailableError when an engine cannot be made here; the message says what is missing."""
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)', Path("/etc/os-release").read_text(), re.M))
    missing = []
    if os.geteuid() != 0:
        missing.append("root")
    if release.get("ID") != "debian" or int(release.get("VERSION_ID") or 0) < 12:
        missing.append("Debian 12 or newer")
    if not KEYRING.exists() or not shutil.which("apt-get"):
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


def docker(*arguments: str | Path, what: str = "", usual: str = "", **options) -> str:
    """Run a docker command on this engine, return its standard output."""
    return run(["docker", *arguments], what, usual, env=environment(), **options)


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
            f"ip link add {CABLE} type veth peer name uplink netns {first[0]}",
            f"ip address add {host}/30 dev {CABLE}",
            f"ip link set {CABLE} up",
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
            run(["ip", "link", "delete", CABLE], env=environment())
    for name in ("pid", "docker.sock", "address"):
        (FOLDER / name).unlink(missing_ok=True)
    for group in sorted(Path("/sys/fs/cgroup").glob("**/hcm-db-migrations/**/"), reverse=True):
        with contextlib.suppress(OSError):
            group.rmdir()


def image_is_current(tag: str, digest: str) -> bool:
    """Whether the engine has the image, made from what `digest` stands for."""
    label = '{{index .Config.Labels "made-from"}}'
    command = ["docker", "image", "inspect", "--format", label, tag]
    return subprocess.run(command, env=environment(), capture_output=True, text=True).stdout.strip() == digest


def make_images() -> str:
    """Make every image that is missing or out of date. Return the name of the kind node's image."""
    for tag, packages in SYSTEMS.items():
        digest = hashlib.sha256(f"{packages} {CUSTOM}".encode()).hexdigest()[:12]
        if not image_is_current(tag, digest):
            _make_system(tag, packages, digest)
    digest = hashlib.sha256(str(SYSTEMS).encode())
    for file in sorted((HERE / "images").iterdir()):
        digest.update(file.read_bytes())
    if not image_is_current(GIT_SYNC, digest.hexdigest()):
        docker("tag", SERVER, "hcm-local/server")
        _build(HERE / "images", GIT_SYNC, "", digest.hexdigest())
    modules = [HERE / module / name for module in ("kubernetes", "etcd") for name in ("go.mod", "go.sum")]
    for file in [*sorted((HERE / "node").iterdir()), *modules]:
        digest.update(file.read_bytes())
    version = binaries.pinned_version("kubelet")
    if not image_is_current(f"hcm-local/node:{version}", digest.hexdigest()):
        _bake_node(version, digest.hexdigest())
    return f"hcm-local/node:{version}"


def _make_system(tag: str, packages: str, digest: str) -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        (Path(folder) / "bookworm.list").write_text(_debian_sources("bookworm"))
        command = [
            "mmdebstrap",
            "--variant=minbase",
            f"--include={packages}",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
        ]
        command += [*CUSTOM, "bookworm", f"{folder}/system.tar", f"{folder}/bookworm.list"]
        run(command, f"making image {tag} from Debian 12's packages", "45 s", env=environment())
        docker(
            "import", "--change", f"LABEL made-from={digest}", "--change", 'CMD ["bash"]', f"{folder}/system.tar", tag
        )


def _build(context: Path, tag: str, target: str, digest: str, *arguments: str) -> None:
    label = f"--label=made-from={digest}"
    target = [f"--target={target}"] if target else []
    docker("build", "--quiet", "--network=none", label, *target, *arguments, f"--tag={tag}", context)


def _bake_node(version: str, digest: str) -> None:
    """Build the kind node, and put the images that a cluster starts with into its containerd: no registry is asked."""
    programs = {name: binaries.find_or_build(name) for name in [*NODE_PROGRAMS, *CONTROL_PLANE]}
    say("building the kind node's image (usually 30 s)")
    docker("tag", NODE_BASE, "hcm-local/node-base")
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        shutil.copytree(HERE / "node", folder, dirs_exist_ok=True)
        for path in programs.values():
            shutil.copy(path, folder)
        for target in ("control-plane", "pause", "node"):
            arguments = [f"--build-arg=KUBERNETES_VERSION={version}"] if target == "node" else []
            _build(Path(folder), f"hcm-local/{target}:unbaked", target, digest, *arguments)
    listed = run([programs["kubeadm"], "config", "images", "list", "--kubernetes-version", version]).split()
    names = [name for name in listed if "/pause:" not in name]
    for name in names:
        docker("tag", "hcm-local/control-plane:unbaked", name)
    pause = re.search(r'sandbox_image = "(.*)"', (HERE / "node/containerd.toml").read_text())[1]
    docker("tag", "hcm-local/pause:unbaked", pause)
    node = ["--privileged", "--security-opt=seccomp=unconfined", "--network=none", "--entrypoint=sleep"]
    container = docker("run", "--detach", *node, "hcm-local/node:unbaked", "infinity").strip()
    try:
        docker("exec", "--detach", container, "containerd")
        archive = FOLDER / "images.tar"
        what = "baking the images of Kubernetes and of the tests into it"
        docker("save", "--output", archive, *names, pause, PYTHON, GIT_SYNC, SERVER, what=what, usual="30 s")
        load = "until ctr version >/dev/null 2>&1; do sleep 0.1; done; "
        load += "ctr -n k8s.io images import --all-platforms --no-unpack --digests - >&2"
        with archive.open("rb") as images:
            words = ["--interactive", container, "timeout", "300", "sh", "-c", load]
            docker("exec", *words, what="  and loading them", usual="30 s", stdin=images)
        remove(archive)
        docker("exec", container, "sh", "-c", "pkill -x containerd; sleep 1; rm -rf /run/containerd")
        entry = 'ENTRYPOINT ["/usr/local/bin/entrypoint", "/sbin/init"]'
        docker(
            "commit", "--change", entry, container, f"hcm-local/node:{version}", what="  and saving it", usual="20 s"
        )
    finally:
        docker("rm", "--force", "--volumes", container)
    docker("image", "prune", "--force")
    remove(binaries.COMPILED)  # 4 GB; a newer Kubernetes would compile nearly all anew


def _programs() -> Path:
    """The folder where the engine's Debian packages are extracted."""
    digest = hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:12]
    return once(CACHE / f"engine-programs-{digest}", _extract_packages)


def _extract_packages(partial: Path) -> None:
    """Download PACKAGES and what they need beyond this system with apt, and extract them."""
    suite = re.search(r"VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text())[1]
    debian.extract(
        partial,
        PACKAGES,
        "downloading Docker from Debian's packages into the cache",
        sources="".join(sorted({_debian_sources(suite), _debian_sources("trixie")})),
        preferences="Package: *\nPin: release n=trixie*\nPin-Priority: 100\n" * (suite != "trixie"),
    )
    links = partial / "usr/local/bin"
    links.mkdir(parents=True, exist_ok=True)
    for name in ("iptables", "ip6tables"):
        (links / name).symlink_to("../../sbin/xtables-nft-multi")


def _debian_sources(suite: str) -> str:
    """sources.list for a Debian suite, from the mirrors that this machine uses."""
    own = re.search(r"VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text())[1]
    listed = run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"])
    lines = sorted({line for line in listed.splitlines() if re.search(rf" {own}(-security|-updates)? main$", line)})
    if not lines:
        raise UnavailableError(f"apt has no source for Debian {own}: add one to /etc/apt/sources.list.d")
    return "".join(f"deb [signed-by={KEYRING}] {line.replace(f' {own}', f' {suite}')}\n" for line in lines)


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
