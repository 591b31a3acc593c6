"""`make bundle`, and docs/restricted-network.md: its commands deploy from the archive alone."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.support.cluster import Shared
from tests.support.database import Database
from tests.support.documents import block
from tests.support.fault_injection import namespace, root_only
from tests.support.git import git
from tests.support.kubernetes import TABLE, Api, Peer, connections, node
from tests.support.packages import debian_program
from tests.support.programs import Program, Result, run, start
from tests.support.project import head
from tests.support.waiting import until
from tools.checkout import location
from tools.cluster import NAME, Cluster
from tools.network import free_port
from tools.offline_cluster import engine
from tools.paths import BIN, CACHE, CHART, ROOT

VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]


@dataclass
class Site:
    """A restricted network: a folder, and commands that reach the cluster and nothing else."""

    root: Path  # has bin, home, and `folder`
    folder: Path
    cluster: Cluster
    replaced: dict[str, str]  # addresses of the page, by those of the cluster

    def text(self, commands: str) -> str:
        for old, new in {"<version>": VERSION, **self.replaced}.items():
            commands = commands.replace(old, new)
        return commands

    def start(self, commands: str) -> Program:
        nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
        environment = {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.root / "home"),
            "KUBECONFIG": self.cluster.kubeconfig,
            "no_proxy": f"127.0.0.1,{self.cluster.address}",
            **nowhere,
        }
        enter = []
        if self.cluster.is_local_build:  # the engine's network has no route to the outside
            enter = ["nsenter", f"--net=/proc/{(engine.FOLDER / 'pid').read_text()}/ns/net"]
        return start([*enter, "sh", "-ec", self.text(commands)], cwd=self.folder, env=environment, one_stream=True)

    def run(self, commands: str) -> Result:
        return self.start(commands).wait(240)

    def succeeds(self, commands: str) -> str:
        result = self.run(commands)
        assert result.returncode == 0, result.text
        return result.text


@pytest.fixture
def site(cluster: Cluster, shared: Shared, api: Api) -> Iterator[Site]:
    """An empty folder, beside one with helm; what is written there is large, and deleted."""
    node(cluster, "true")  # skips the test on a user's cluster
    with tempfile.TemporaryDirectory(prefix="bundle-", dir=CACHE) as name:
        folder = Path(name)
        for each in ("bin", "home", "site"):
            (folder / each).mkdir()
        (folder / "bin/helm").symlink_to(shared.helm)
        replaced = {"registry.example.org": f"{api.namespace}.example.org"}  # no node has an image of that name
        yield Site(folder, folder / "site", cluster, replaced)


MAKE = [*shlex.split(block("make bundle")), "--no-print-directory", f"BIN={BIN}", "--old-file=.venv/ready"]


def _clone(site: Site) -> Path:
    """A clone of this checkout, with its changes committed."""
    clone = site.root / "clone"
    changed = git(ROOT, "stash", "create")  # a commit, without a ref; empty if nothing is changed
    repository, path = location()
    git(ROOT, "clone", "--quiet", "--shared", "--no-checkout", repository, clone)
    git(clone, "checkout", "--quiet", "-B", "main", changed or git(ROOT, "rev-parse", "HEAD"))
    return clone / path


def _make_bundle(site: Site) -> str:
    """Run the page's command in a clone, and move the archive to the site; return what it prints."""
    clone = _clone(site)
    made = run(MAKE, cwd=clone, verbatim=True, check=True, seconds=400)
    archive = clone / "dist" / f"{NAME}-{VERSION}-bundle.tar"
    assert list(archive.parent.iterdir()) == [archive]
    shutil.move(archive, site.folder)
    return made.stdout


def _refuses_a_changed_file(site: Site) -> None:
    """Any bit: the last one of the chart."""
    chart = site.folder / f"{NAME}-{VERSION}.tgz"
    content = chart.read_bytes()
    chart.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused = site.run(block("sha256sum --check").splitlines()[-1])
    chart.write_bytes(content)
    assert refused.returncode == 1
    refused.line(f"{chart.name}: FAILED")


@contextmanager
def _imported(site: Site, api: Api) -> Iterator[None]:
    """The images on the node, as without a registry."""
    folder, commands = f"/var/tmp/{api.namespace}", site.text(block("ctr -n k8s.io images import"))  # noqa: S108
    names = [word for word in commands.split() if word.startswith(api.namespace)]
    node(site.cluster, "mkdir", folder)
    try:
        site.cluster.docker("cp", site.folder / "images", f"{NAME}-control-plane:{folder}/images")
        node(site.cluster, "sh", "-ec", f"cd {folder}\n{commands}")
        yield
    finally:
        node(site.cluster, "rm", "-r", folder)
        node(site.cluster, "ctr", "-n", "k8s.io", "images", "rm", *names)


REGISTRY = """version: 0.1
storage: {filesystem: {rootdirectory: registry}}
http: {addr: "127.0.0.1:%d"}
"""


def _push(site: Site, command: str) -> str:
    """Run one of the page's commands, with a registry on loopback; return the digest of the pushed image's manifest."""
    (site.root / "bin/docker-registry").symlink_to(debian_program("docker-registry")[0])
    skopeo, libraries = debian_program("skopeo")
    (site.root / "bin/skopeo").symlink_to(skopeo)
    variables = "".join(f"export {name}={value}\n" for name, value in libraries.items())
    port, configuration = free_port(), site.root / "home/.config/containers"
    configuration.mkdir(parents=True)
    (configuration / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    (configuration / "registries.conf").write_text(f'[[registry]]\nlocation = "127.0.0.1:{port}"\ninsecure = true\n')
    (site.root / "registry.yaml").write_text(REGISTRY % port)
    registry = site.start(f"cd {site.root}; exec docker-registry serve registry.yaml")
    registry.prints("listening on")
    address = f"127.0.0.1:{port}"
    site.succeeds(variables + command.replace("registry.example.org", address))
    digest = site.succeeds(
        f"{variables} skopeo inspect --format '{{{{.Digest}}}}' docker://{address}/hcm/{NAME}:{VERSION}"
    )
    registry.kill()
    return digest.strip()


def _deploy(site: Site, api: Api, revision: int, *options: str) -> set[Peer]:
    """Run the page's helm command for the test's namespace; return what the Job's pod connected to over TCP."""
    command = block("-f restricted.yaml").strip().replace("-n health", f"-n {api.namespace}")
    upgrade = site.start(" ".join([command, "--set", f"{NAME}.namespace={api.namespace}", *options]))
    pods = lambda: api.pods(f"hcm-db-migration-{revision}")  # noqa: E731
    address = until(lambda: next((pod.status.pod_ip for pod in pods() if pod.status.pod_ip), "") or not upgrade.running)
    result = upgrade.wait(240)
    assert result.returncode == 0, result.text
    peers = connections(site.cluster, str(address), "--orig-src")
    assert {port for protocol, _, port in peers if protocol != "tcp"} <= {53}
    return {peer for peer in peers if peer[0] == "tcp"}


def test_the_commands_of_the_page_deploy_from_the_bundle_with_every_other_source_unreachable(
    site: Site, api: Api, cluster: Cluster, database: Database
) -> None:
    printed = _make_bundle(site)
    if cluster.is_local_build:
        outside = site.run("exec python3 -c 'import socket; socket.create_connection((\"192.0.2.1\", 443), 5)'")
        outside.line("Network is unreachable")

    assert site.succeeds(block("sha256sum --check")) == ""
    site.folder /= f"{NAME}-{VERSION}-bundle"
    assert site.succeeds("sha256sum SHA256SUMS").split()[0] == printed.splitlines()[-1].split()[-1]
    _refuses_a_changed_file(site)

    digest = re.search(rf"^images/{NAME}.tar: .* manifest (\S+),", printed, re.M)
    assert digest and _push(site, block("skopeo copy").splitlines()[-1]) == digest[1]

    name = f"{api.namespace}.git"
    site.replaced |= {"https://git.example.org": cluster.git_url, f"{NAME}.git": name}
    site.succeeds(block("git clone hcm-db-migrations.bundle"))
    page = (site.folder / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)", page)
    assert (len(links) > 3, "<version>" in page) == (True, False)
    assert [link for link in links if not (site.folder / link).exists()] == []
    site.replaced["https://git.example.org"] = cluster.git_in_cluster
    (site.folder / "restricted.yaml").write_text(site.text(block('requirements: "" #')))

    servers = {("tcp", api.fixture(app).status.pod_ip, port) for app, port in (("server", 80), ("postgres", 5432))}
    with _imported(site, api):
        assert _deploy(site, api, 1) == servers
        assert (set(TABLE) <= set(database.relations), database.at) == (True, [head()])
        assert not [event for event in api.events() if event.startswith("Pulling")]

        script = f"import os; os.chdir('/tmp'); os.execvp('python3', {shlex.split(block('http.server'))})"
        wheels = api.serve("wheels", cluster.images["python"], script)
        cluster.kubectl("cp", "-n", api.namespace, site.folder / "wheels", "wheels:/tmp/wheels")
        site.replaced |= {"wheels.example.org": wheels.status.pod_ip}
        own = yaml.safe_load(site.text(block("PIP_FIND_LINKS")))
        own[NAME]["image"] = dict(zip(("repository", "tag"), cluster.images["python"].rsplit(":", 1), strict=True))
        (site.folder / "pip.yaml").write_text(yaml.safe_dump(own))
        assert _deploy(site, api, 2, "-f", "pip.yaml") == servers | {("tcp", wheels.status.pod_ip, 8080)}


@root_only
def test_a_full_disk_is_one_line_and_leaves_nothing(site: Site) -> None:
    dist = _clone(site) / "dist"
    dist.mkdir()
    with namespace("mount", f"mount -t tmpfs -o size=1m tmpfs {dist}") as enter:
        failed = run([*enter, *MAKE, f"--directory={dist.parent}"])
        assert failed.returncode != 0
        failed.line(f"FAILED: {dist}/", ": No space left on device")
        assert run([*enter, "ls", "-A", dist], check=True).stdout == ""
