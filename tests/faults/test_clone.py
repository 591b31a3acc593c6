"""The clone: the scripts of both containers, with real git and the stand-in for git-sync, and servers that fail."""

from __future__ import annotations

import base64
import importlib.machinery
import importlib.util
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.chart import Helm, git_sync, migrate
from tests.support.chart import pod as pod_of
from tests.support.fault_injection import namespace, root_only, small_disk
from tests.support.git import git
from tests.support.pod_scripts import COMMIT, CREDENTIALS, README, STAND_IN, WITHOUT_CAPABILITIES, Volume
from tests.support.programs import Result
from tests.support.servers import serving
from tools.network import free_port
from tools.values import merged

GIT = f'({README}, "Git access")'
PLACEHOLDER = "https://git.example.org/schema"  # the chart refuses file://, and a token for http://
TIMED_OUT = (
    "the clone did not finish within 6 s: the git server does not respond, a firewall, NetworkPolicy or proxy drops the"
    ' packets, or the network is too slow (then raise "job.activeDeadlineSeconds")'
)


class Pod:
    """A pod's two containers, one after the other. Its deadline is the shortest that the chart accepts, 10 s."""

    def __init__(self, helm: Helm, volume: Volume) -> None:
        self.helm, self.volume = helm, volume
        volume.program("alembic", "echo ran in $PWD")
        self.clone_log = ""

    def run(self, repo: str, *prefix: str, git: dict[str, Any] | None = None, **variables: str) -> Result:
        """Clone `repo`; return the result of the migrate container."""
        is_refused = "httpsSecretName" in (git or {}) or not repo.startswith(("http", "ssh"))
        shown = PLACEHOLDER if is_refused else repo
        values = {"git": {"repo": shown, "branch": "main", "path": "db", "knownHosts": False}, "requirements": ""}
        rendered = self.helm.render(merged({**values, "job": {"activeDeadlineSeconds": 10}}, {"git": git or {}}))
        clone, run = git_sync(rendered), migrate(rendered)
        clone["args"] = [argument.replace(PLACEHOLDER, repo) for argument in clone["args"]]
        annotation = pod_of(rendered)["metadata"]["annotations"]["hcm-db-migrations/sparse-checkout"]
        (self.volume.folder / "sparse-checkout").write_text(annotation)
        for name in ("ssh", "username", "password"):
            if not (self.volume.folder / name).exists():
                (self.volume.folder / name).write_text("x")
        result = self.volume.run(clone, "sh", prefix, **variables)
        assert result.returncode == 0, result.text
        assert "Traceback" not in result.text, result.text
        self.clone_log = result.text
        return self.volume.run(run, "sh", prefix, **CREDENTIALS)

    def run_on(self, options: str, repo: str, *prefix: str, path: str) -> Result:
        """The same with a tmpfs of these mount options as the pod's volume."""
        with small_disk(self.volume, options) as inside:
            return self.run(repo, *inside, *prefix, git={"path": path})


@pytest.fixture
def pod(helm4: Helm, volume: Volume) -> Pod:
    return Pod(helm4, volume)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A repository with alembic.ini in the folder db, whose server supports partial clones."""
    folder = tmp_path / "source"
    (folder / "db").mkdir(parents=True)
    (folder / "db" / "alembic.ini").touch()
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "config", "uploadpack.allowFilter", "true")
    _commit(folder)
    return folder


def _commit(folder: Path) -> str:
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--allow-empty", "--message=test")
    return git(folder, "rev-parse", "HEAD")


def _slow(server: socket.socket) -> None:
    """Answer like a git server, a byte at a time."""
    with suppress(OSError):
        while True:
            client = server.accept()[0]
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-git-upload-pack-advertisement\r\n\r\n")
            for byte in b"001e# service=git-upload-pack\n":
                client.sendall(bytes([byte]))
                time.sleep(1)


@pytest.mark.fault(
    "Network",
    fault="Packets to the git server are dropped (firewall, NetworkPolicy), its SSH port is silent, or it is too slow",
    sees="`FAILED: no checkout of ... from ...: the clone did not finish within N s: ... firewall, NetworkPolicy or"
    " proxy drops the packets, or the network is too slow ...`, before the Job's deadline, exit 1",
    state="The database is not contacted",
    do="Open the port, or set `HTTPS_PROXY` ([Git access](../charts/hcm-db-migrations/README.md#git-access)); deploy"
    " again",
)
@pytest.mark.parametrize(
    "server",
    [
        "http://127.0.0.1:{}/a.git",
        "ssh://git@127.0.0.1:{}/a.git",
        "slow http://127.0.0.1:{}/a.git",
        pytest.param("http://10.9.9.2/a.git", marks=root_only),
    ],
    ids=["silent HTTP", "silent SSH", "slow HTTP", "dropped packets"],
)
def test_a_git_server_that_does_not_respond_in_time_is_reported_before_the_deadline(pod: Pod, server: str) -> None:
    """git-sync kills git only, and then waits for ssh or git-remote-http, which hold its pipes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        if server.startswith("slow "):
            threading.Thread(target=_slow, args=[listening], daemon=True).start()
        repo = server.removeprefix("slow ").format(listening.getsockname()[1])
        start = time.monotonic()
        if "10.9.9.2" in repo:
            # The address is no host's: its packets come back through lo, and the kernel drops them.
            with namespace("net", "ip link set lo up; ip route add 10.9.9.2 dev lo") as enter:
                result = pod.run(repo, *enter)
        else:
            result = pod.run(repo)
        seconds = time.monotonic() - start
    assert result == Result(1, f'FAILED: no checkout of "main" from "{repo}": {TIMED_OUT} {GIT}\n')
    assert 6 <= seconds < 10
    assert TIMED_OUT in pod.clone_log


class Forbidding(BaseHTTPRequestHandler):
    """Refuses every request, with its server's message; asks for a login first if the server has one."""

    server: Any

    def do_GET(self) -> None:
        given = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic "))
        status = 403 if given == self.server.login else 401
        body = self.server.message + b"\n"
        self.send_response(status)
        self.send_header("WWW-Authenticate", 'Basic realm="git"')
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def forbidding() -> Iterator[Callable[..., str]]:
    """Starts a server that refuses all requests; returns its URL."""
    with ExitStack() as servers:

        def begin(message: bytes, login: bytes = b"") -> str:
            server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Forbidding)
            server.message, server.login = message, login
            servers.enter_context(serving(server))
            return f"http://127.0.0.1:{server.server_port}/a.git"

        yield begin


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (b"\x1b[1;31mdenied\x1b[0m\a by the gate", "denied by the gate"),
        ("geschützt".encode("latin-1"), "geschützt"),
        ("geschützt 日本 🚀 \x9b \u202e".encode(), "geschützt 日本 🚀"),
        (b'a "quote" and C:\\new\x00\x01\x7f', 'a "quote" and C:\\new'),
    ],
)
def test_a_servers_message_is_one_readable_line_in_any_encoding(
    pod: Pod, forbidding: Callable, message: bytes, shown: str
) -> None:
    repo = forbidding(message)
    result = pod.run(repo)
    assert result.returncode == 1
    result.line(f'FAILED: no checkout of "main" from "{repo}": remote: {shown} fatal: unable to access')
    assert result.text.rstrip("\n").isprintable()
    assert result.text.count("\n") == 1


def test_a_private_repository_without_a_token_ends_in_one_line(pod: Pod, forbidding: Callable) -> None:
    repo = forbidding(b"", b"ci:token")
    refused = f"fatal: Authentication failed for '{repo}/'"
    fix = 'for a private repository, set "git.httpsSecretName" to a Secret with a valid token'
    assert pod.run(repo) == Result(1, f'FAILED: no checkout of "main" from "{repo}": {refused}; {fix} {GIT}\n')


def test_a_password_that_is_not_utf_8_reaches_the_server_and_leaves_nothing_for_the_migrate_container(
    pod: Pod, forbidding: Callable
) -> None:
    (pod.volume.folder / "username").write_text("ci\n")
    (pod.volume.folder / "password").write_bytes(b"gesch\xfctzt\n")
    before = set(pod.volume.folder.iterdir())
    result = pod.run(forbidding(b"you are in", b"ci:gesch\xfctzt"), git={"httpsSecretName": "token"})
    git(pod.volume.home, "credential-cache", "exit")  # the pod ends it with the container
    assert "remote: you are in fatal: unable to access" in result.text
    created = {path.name for path in set(pod.volume.folder.iterdir()) - before}
    assert created == {"git", "git-error", "sparse-checkout", "ssh"}
    assert any(path.name.startswith("git-sync.gitconfig.") for path in pod.volume.home.iterdir())


def _v0(volume: Volume, repository: Path) -> dict[str, str]:
    """sshd accepts no GIT_PROTOCOL by default, so git speaks protocol v0 with it; here without sshd."""
    volume.program("over-ssh", f"unset GIT_PROTOCOL\nexec git-upload-pack {repository}")
    return {"GIT_SSH_COMMAND": str(volume.bin / "over-ssh"), "GIT_SSH_VARIANT": "ssh"}


@pytest.mark.fault(
    "Code and settings",
    fault="A git server that speaks protocol v0 only, and serves advertised objects only",
    sees='`FAILED: no checkout of ... from ...: ...; the server does not support partial clones: set "git.filter" to'
    ' "" ...`, exit 1; for a commit `...; the server serves no commit by its SHA: set "git.branch" to a'
    " branch or tag ...`",
    state="The database is not contacted",
    do="Follow the message, deploy again",
)
def test_a_server_of_protocol_v0_needs_no_filter_and_a_branch_or_tag(pod: Pod, source: Path) -> None:
    commit, repo = git(source, "rev-parse", "HEAD"), "ssh://git@git.example.org/schema"
    _commit(source)
    variables = _v0(pod.volume, source)
    refused = "error: Server does not allow request for unadvertised object <commit>"
    filtered = (
        f'FAILED: no checkout of "main" from "{repo}": {refused} fatal: could not fetch <commit> from promisor remote; '
    )
    assert pod.run(repo, **variables) == Result(
        1, f'{filtered}the server does not support partial clones: set "git.filter" to "" {GIT}\n'
    )
    shutil.rmtree(pod.volume.folder / "git")
    assert pod.run(repo, git={"filter": "", "branch": commit}, **variables) == Result(
        1,
        f'FAILED: no checkout of "{COMMIT}" from "{repo}": {refused}; the server serves no commit by its SHA: set'
        f' "git.branch" to a branch or tag {GIT}\n',
    )
    shutil.rmtree(pod.volume.folder / "git")
    result = pod.run(repo, git={"filter": ""}, **variables)
    assert (result.returncode, "ran in " in result.lines[-1]) == (0, True), result.text


def test_a_tag_takes_precedence_over_a_branch_of_the_same_name(pod: Pod, source: Path) -> None:
    """As the chart's README says."""
    git(source, "tag", "same")
    tag, branch = git(source, "rev-parse", "HEAD"), _commit(source)
    git(source, "branch", "same")
    for ref, commit in {"same": tag, "refs/heads/same": branch, "refs/tags/same": tag, "main": branch}.items():
        assert pod.run(f"file://{source}", git={"branch": ref}).returncode == 0
        assert (pod.volume.folder / "git" / "code").resolve().name == commit, ref
        shutil.rmtree(pod.volume.folder / "git")


@pytest.mark.parametrize(("path", "named"), [("sub", "sub"), ("sub/db", "sub"), ("db/sub", "db/sub")])
def test_a_path_in_a_submodule_is_named(pod: Pod, source: Path, tmp_path: Path, path: str, named: str) -> None:
    for folder in ("sub", "db/sub"):
        git(source, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", tmp_path / "source", folder)
    _commit(source)
    assert pod.run(f"file://{source}", git={"path": path}).lines[1:] == [
        f'FAILED: "{named}" is a submodule in commit {COMMIT}, and submodules are not cloned: set "git.repo" to the'
        f' submodule\'s repository, and "git.path" to the folder in it {GIT}'
    ]


def test_a_path_that_is_a_symlink_is_named_with_its_target(pod: Pod, source: Path) -> None:
    (source / "link").symlink_to("schema/db")
    _commit(source)
    assert pod.run(f"file://{source}", git={"path": "link"}).lines[1:] == [
        f'FAILED: "link" is a symbolic link to schema/db in commit {COMMIT}: set "git.path" to that folder {GIT}'
    ]


UNWRITABLE = (
    'FAILED: no checkout of "main" from "https://git.example.org/schema": the clone was interrupted;'
    " the pod's volume cannot be written: {}; for git-sync's log: kubectl logs pod-1 -c git-sync -n health {}\n"
)


@pytest.mark.fault(
    "Process and pod",
    fault="The pod's volume fills up during the clone, or has no more inodes",
    sees="`FAILED: no checkout of ... from ...: ... No space left on device ...`, exit 1",
    state="The database is not contacted",
    do="Free disk space on the node, or make the repository smaller; deploy again",
)
@root_only
@pytest.mark.parametrize("options", ["size=1m", "size=64k", "nr_inodes=25", "nr_inodes=1"])
def test_a_full_volume_during_the_clone_is_reported(pod: Pod, source: Path, options: str) -> None:
    (source / "db" / "large").write_bytes(random.randbytes(3_000_000))  # noqa: S311
    _commit(source)
    result = pod.run_on(options, f"file://{source}", path="db")
    assert (result.returncode, result.text.count("\n")) == (1, 1)
    result.line('FAILED: no checkout of "main" from "https://git.example.org/schema": ', "No space left on device", GIT)
    assert options == "size=1m" or result.text == UNWRITABLE.format("No space left on device", GIT)


@pytest.mark.fault(
    "Process and pod",
    fault="The pod's volume cannot be written (its owner, or a read-only disk)",
    sees="`FAILED: no checkout of ... from ...: ...; the pod's volume cannot be written: Permission denied; for"
    " git-sync's log: kubectl logs ...` or `...: Read-only file system; ...`, exit 1",
    state="The database is not contacted",
    do="Set `podSecurityContext.fsGroup`, or fix the node's disk; deploy again",
)
@root_only
@pytest.mark.parametrize(
    ("options", "reason"), [("ro", "Read-only file system"), ("mode=755,uid=65533", "Permission denied")]
)
def test_a_volume_that_cannot_be_written_is_reported(pod: Pod, source: Path, options: str, reason: str) -> None:
    result = pod.run_on(options, f"file://{source}", *WITHOUT_CAPABILITIES, path="db")
    assert result == Result(1, UNWRITABLE.format(reason, GIT))


def test_a_git_that_is_killed_points_to_the_memory_limit(pod: Pod, source: Path) -> None:
    pod.volume.program("git", f'[ "$1" != fetch ] || kill -9 $$\nexec {shutil.which("git")} "$@"')
    result = pod.run(f"file://{source}")
    assert result.returncode == 1
    result.line(
        'FAILED: no checkout of "main" from ',
        'signal: killed; most likely out of memory: raise "git.resources.limits.memory"',
    )


def test_what_a_killed_git_left_is_replaced(pod: Pod, source: Path) -> None:
    root = pod.volume.folder / "git"
    root.mkdir()
    git(root, "init", "--quiet")
    (root / ".git" / "shallow.lock").touch()
    (root / "dangling").symlink_to("nowhere")
    assert pod.run(f"file://{source}").returncode == 0
    assert "repo contains lock file" in pod.clone_log


def test_an_unreachable_server_is_reported_in_gits_own_words(pod: Pod) -> None:
    repo = f"http://127.0.0.1:{free_port()}/a.git"
    pod.run(repo).line(
        f'FAILED: no checkout of "main" from "{repo}": fatal: unable to access', "Failed to connect", GIT
    )


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        (b"fatal: 'x' \"y\" \\z", r'"fatal: ' + r"'x' \"y\" \\z" + '"'),
        (b"\a\b\f\n\r\t\v", r'"\a\b\f\n\r\t\v"'),
        (b"\x00\x1b[31m\x1f\x7f", r'"\x00\x1b[31m\x1f\x7f"'),
        ("ü日🚀\ufffd".encode(), '"ü日🚀\ufffd"'),
        (b"gesch\xfctzt \xe2\x82 \xed\xa0\x80", r'"gesch\xfctzt \xe2\x82 \xed\xa0\x80"'),
        ("\x9b \xa0 \u00ad \u200d \u2028 \ufeff".encode(), r'"\u009b \u00a0 \u00ad \u200d \u2028 \ufeff"'),
        ("\U000e0041 \U0010ffff".encode(), r'"\U000e0041 \U0010ffff"'),
    ],
)
def test_the_stand_in_quotes_as_go_does(text: bytes, quoted: str) -> None:
    """The expected texts are Go's: fmt.Printf("%q")."""
    loader = importlib.machinery.SourceFileLoader("git_sync_stand_in", os.fspath(STAND_IN))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    assert module.quote(text) == quoted


@pytest.mark.parametrize(
    ("flag", "refused"),
    [
        ("--add-user", "unknown flag: --add-user"),
        ("--group-write", "unknown flag: --group-write"),
        ("--exechook-command=x", "unknown flag: --exechook-command"),
        ("--submodules=recursive", "this stand-in for git-sync has only --submodules=off"),
        ("--git-gc=always", "this stand-in for git-sync has only --git-gc=off"),
    ],
)
def test_the_stand_in_refuses_what_it_does_not_do(pod: Pod, source: Path, flag: str, refused: str) -> None:
    pod.volume.program("git-sync", f'exec {STAND_IN} "$@" {flag}')
    assert pod.run(f"file://{source}").returncode == 1
    assert refused in pod.clone_log.splitlines()
