"""The images that cannot be pulled, built for the private engine under names that show it (`hcm-local/...`).

They are built from Debian packages, and the kind node also from the programs that `tools.binaries` builds. They stay in
the engine's data folder in the cache.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tools import binaries, debian
from tools.offline_cluster.engine import FOLDER, docker, environment
from tools.steps import log, remove, run

HERE = Path(__file__).parent

PYTHON = "hcm-local/python:3.11-debian12"
GIT_SYNC = "hcm-local/git-sync-standin:v4.7.1"
SERVER = "hcm-local/server:debian12"
NODE_BASE = "hcm-local/node-base:debian12"
CONTROLLERS_BASE = "hcm-local/controllers-base:debian12"
# Each is one Debian 12 system without recommended packages.
SYSTEMS = {
    PYTHON: "python3,python3-pip,python3-venv,python-is-python3,ca-certificates",
    SERVER: "python3,git,openssh-client,openssh-server,postgresql-15,ca-certificates",
    NODE_BASE: "systemd,systemd-sysv,dbus,containerd,runc,iptables,conntrack,ethtool,socat,iproute2,mount,kmod,procps,"
    "ca-certificates,libseccomp2,hostname",
}
# What the controllers of tools.gitops call, and their redis and registry.
CONTROLLERS_PACKAGES = "git,openssh-client,redis-server,docker-registry,ca-certificates"
CONTROLLERS_PROGRAMS = ["helm-controller", "source-controller", "argocd"]
# As in the official python image: pip installs into the system.
CUSTOM = ['--customize-hook=rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED']
NODE_PROGRAMS = ["kubeadm", "kubelet", "kubectl", "crictl", "host-local", "loopback", "ptp", "portmap"]
CONTROL_PLANE = ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "etcd", "coredns"]


def build_images() -> str:
    """Build every image that is missing or out of date. Return the name of the kind node's image."""
    build_job_images()
    _build_system(NODE_BASE, SYSTEMS[NODE_BASE])
    modules = [HERE / module / name for module in ("kubernetes", "etcd") for name in ("go.mod", "go.sum")]
    digest = _digest("images", "node", *modules)
    version = binaries.pinned_version("kubelet")
    node = f"hcm-local/node:{version}"
    if not _is_current(node, digest):
        _build_node(node, version, digest)
    return node


def build_job_images() -> None:
    """Build the images that the chart's Job runs in, if they are missing or out of date."""
    for tag in (PYTHON, SERVER):
        _build_system(tag, SYSTEMS[tag])
    digest = _digest("images")
    if not _is_current(GIT_SYNC, digest):
        docker("tag", SERVER, "hcm-local/server")
        _build(HERE / "images", GIT_SYNC, "", digest)


def _digest(*sources: str | Path) -> str:
    """The digest of SYSTEMS, and of these files and folders' sources."""
    digest = hashlib.sha256(str(SYSTEMS).encode())
    for source in sources:
        for file in [source] if isinstance(source, Path) else _files(source):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _files(folder: str) -> list[Path]:
    """The sources in a folder; not the folder in which Python keeps what it compiled of them."""
    return sorted(path for path in (HERE / folder).iterdir() if path.is_file())


def build_controllers() -> str:
    """Build the image of Argo CD's and Flux's programs, if it is missing or out of date; return its name."""
    _build_system(CONTROLLERS_BASE, CONTROLLERS_PACKAGES)
    programs = [binaries.helm_3(), *map(binaries.find_or_build, CONTROLLERS_PROGRAMS)]
    dockerfile = HERE / "controllers/Dockerfile"
    # The path of a program that was built contains the digest of its sources.
    digest = hashlib.sha256(f"{CONTROLLERS_PACKAGES} {programs}".encode() + dockerfile.read_bytes()).hexdigest()
    tag = f"hcm-local/controllers:{digest[:12]}"
    if not _is_current(tag, digest):
        docker("tag", CONTROLLERS_BASE, "hcm-local/controllers-base")
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            for file in (dockerfile, *programs):
                shutil.copy(file, folder)
            _build(Path(folder), tag, "", digest)
        remove(binaries.COMPILED)
    return tag


def use_controllers(image: str, manifest: dict[str, Any]) -> None:
    """Replace the images of a manifest's containers by that of `build_controllers`, which has no entry point."""
    pod = manifest.get("spec", {}).get("template", {}).get("spec", {})
    for container in [*pod.get("initContainers", ()), *pod.get("containers", ())]:
        container |= {"image": image, "imagePullPolicy": "IfNotPresent"}
        if container["name"] == "redis":
            container["command"] = ["redis-server"]
        elif container["name"] == "manager":
            container["command"] = [manifest["metadata"]["name"]]


def _is_current(tag: str, digest: str) -> bool:
    """Whether the engine has the image, built from the files and packages with this digest."""
    label = '{{index .Config.Labels "made-from"}}'
    command = ["docker", "image", "inspect", "--format", label, tag]
    return subprocess.run(command, env=environment(), capture_output=True, text=True).stdout.strip() == digest


def _build_system(tag: str, packages: str) -> None:
    digest = hashlib.sha256(f"{packages} {CUSTOM}".encode()).hexdigest()[:12]
    if _is_current(tag, digest):
        return
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        sources, archive = Path(folder) / "bookworm.list", Path(folder) / "system.tar"
        sources.write_text(debian.sources_list("bookworm"))
        options = ["--variant=minbase", f"--include={packages}", "--dpkgopt=path-exclude=/usr/share/doc/*", *CUSTOM]
        what = f"building image {tag} from Debian 12's packages"
        run(["mmdebstrap", *options, "bookworm", archive, sources], what, "45 s", env=environment())
        changes = ["--change", f"LABEL made-from={digest}", "--change", 'CMD ["bash"]']
        docker("import", *changes, archive, tag)


def _build(context: Path, tag: str, target: str, digest: str, *arguments: str) -> None:
    label = f"--label=made-from={digest}"
    stage = [f"--target={target}"] if target else []
    docker("build", "--quiet", "--network=none", label, *stage, *arguments, f"--tag={tag}", context)


def _build_node(tag: str, version: str, digest: str) -> None:
    """Build the kind node, with the images that a cluster starts with in its containerd: no registry is needed."""
    programs = {name: binaries.find_or_build(name) for name in [*NODE_PROGRAMS, *CONTROL_PLANE]}
    log("building the kind node's image (usually 30 s)")
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
    pause = _sandbox_image()
    docker("tag", "hcm-local/pause:unbaked", pause)
    options = ["--privileged", "--security-opt=seccomp=unconfined", "--network=none", "--entrypoint=sleep"]
    container = docker("run", "--detach", *options, "hcm-local/node:unbaked", "infinity").strip()
    try:
        docker("exec", "--detach", container, "containerd")
        archive = FOLDER / "images.tar"
        what = "saving the images of Kubernetes and of the tests"
        docker("save", "--output", archive, *names, pause, PYTHON, GIT_SYNC, SERVER, what=what, expected="30 s")
        load = (
            "until ctr version >/dev/null 2>&1; do sleep 0.1; done; "
            "ctr -n k8s.io images import --all-platforms --no-unpack --digests - >&2"
        )
        command = ["--interactive", container, "timeout", "300", "sh", "-c", load]
        with archive.open("rb") as saved:
            docker("exec", *command, what="  loading them into the node", expected="30 s", stdin=saved)
        remove(archive)
        docker("exec", container, "sh", "-c", "pkill -x containerd; sleep 1; rm -rf /run/containerd")
        entry_point = ["--change", 'ENTRYPOINT ["/usr/local/bin/entrypoint", "/sbin/init"]']
        docker("commit", *entry_point, container, tag, what="  committing the node's image", expected="20 s")
    finally:
        docker("rm", "--force", "--volumes", container)
    docker("image", "prune", "--force")
    remove(binaries.COMPILED)  # 4 GB; a newer Kubernetes would recompile nearly all of it


def _sandbox_image() -> str:
    """The image of every pod's pause container, as containerd is configured."""
    file = HERE / "node/containerd.toml"
    found = re.search(r'sandbox_image = "(.*)"', file.read_text())
    if not found:
        raise RuntimeError(f"{file} sets no sandbox_image")
    return found[1]
