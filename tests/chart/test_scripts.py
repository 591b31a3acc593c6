"""The scripts of both containers, run as in the rendered pod, in a folder in place of the pod's volume."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.chart import Helm, git_sync, migrate, nested, one, pod
from tests.support.pod_scripts import CODE, COMMIT, CREDENTIALS, README, WITHOUT_CAPABILITIES, Volume, relocate
from tests.support.programs import Program, Result, normalize


def test_kubernetes_leaves_the_scripts_unchanged(helm: Helm) -> None:
    """In a command, the API replaces $$ by $, and $(NAME) by a variable of the container."""
    address = {"git": {"repo": "git@git.example.org:schema", "branch": "main"}}
    spec = pod(helm.render({**address, "podSecurityContext": {"runAsUser": None}}))["spec"]
    containers = spec["initContainers"] + spec["containers"]
    assert [container["name"] for container in containers] == ["passwd", "git-sync", "migrate"]
    for container in containers:
        script = container["command"][2]
        assert "$$" not in script
        assert not re.findall(r"\$\([^\s()]+\)", script)  # whatever the names of the variables are


def test_alembic_runs_in_the_folder_with_its_arguments(volume: Volume, container: Callable, shell: str) -> None:
    folder = volume.clone("alembic.ini")
    volume.program("alembic", 'printf "%s|" "$(pwd -P)" "$@" "$DB_HOST" "$DB_PORT" "$DB_PASSWORD"')
    found = volume.run(container(args=["revision", "-m", "a b $HOME"]), shell, **CREDENTIALS)
    assert found == Result(0, CODE + normalize(f"{folder.resolve()}|revision|-m|a b $HOME|db|5432|p|"))


@pytest.mark.parametrize("status", [0, 1, 3, 255])
def test_the_exit_code_is_alembics(volume: Volume, container: Callable, shell: str, status: int) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", f"exit {status}")
    assert volume.run(container(), shell, **CREDENTIALS) == Result(status, CODE)


def test_every_missing_credential_is_named_with_its_object_and_key(
    volume: Volume, container: Callable, shell: str
) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", "echo not reached")
    assert volume.run(container(), shell, DB_HOST="db", DB_USER="") == Result(
        1,
        CODE
        + 'FAILED: no value for DB_NAME (key "db-name" of ConfigMap "egov-config"), DB_USER (key "username" of Secret '
        '"db"), DB_PASSWORD (key "password" of Secret "db"): create it in namespace "health", or point "db" or '
        f'"extraEnv" to it ({README}, "Database")\n',
    )


def test_an_empty_database_url_is_not_replaced_by_anything(volume: Volume, container: Callable, shell: str) -> None:
    volume.clone("alembic.ini")
    reference = {"secretKeyRef": {"name": "a", "key": "url", "optional": True}}
    found = volume.run(container(extraEnv=[{"name": "DATABASE_URL", "valueFrom": reference}]), shell)
    assert found == Result(
        1,
        CODE
        + 'FAILED: no value for DATABASE_URL (extraEnv): create it in namespace "health", or point "db" or "extraEnv" '
        f'to it ({README}, "Database")\n',
    )


def _git_error(quoted: str, how: str = "exit status 128") -> str:
    """git-sync's --error-file: pkg/logging writes JSON, pkg/cmd quotes the output with Go's %q."""
    error = f'Run(git fetch https://git.example.org/schema nope): {how}: {{ stdout: "", stderr: "{quoted}" }}'
    return json.dumps({"Msg": "too many failures, aborting", "Err": error, "Args": {"failCount": 2}})


FETCH = "Run(git fetch https://git.example.org/schema nope): "
SLOW = '; if the network is slow, raise "job.activeDeadlineSeconds"'
GIT_SYNC_KILLED = "git-sync failed with exit status 137"
LOG = "; for git-sync's log: kubectl logs pod-1 -c git-sync -n health"
NO_FILTER = '; the server does not support partial clones: set "git.filter" to ""'
UNADVERTISED = "error: Server does not allow request for unadvertised object <commit>"
KILLED = '; most likely out of memory: raise "git.resources.limits.memory"'


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (_git_error("fatal: couldn't find remote ref nope"), "fatal: couldn't find remote ref nope"),
        (_git_error(r"POST git-upload-pack (323 bytes)\nfatal: no"), "fatal: no"),
        (
            _git_error(r"Host key verification failed.\r\nfatal: Could not read from remote repository."),
            "Host key verification failed. fatal: Could not read from remote repository.",
        ),
        (_git_error(r"fatal: \"quoted\" C:\\new ünïcode 🚀 }"), 'fatal: "quoted" C:\\new ünïcode 🚀 }'),
        (_git_error(r"remote: \x1b[1;31mdenied\x1b[0m\a by\v\f\b the\x00gate\x7f"), "remote: denied by the gate"),
        (
            _git_error(r"remote: \x1b]0;title\adenied \x1b]8;;x\x1b\\here\u009b31m\u202e\U000e0041"),
            "remote: denied here",
        ),
        (_git_error(r"remote: gesch\xfctzt \x9b\nfatal: ünï"), "remote: geschützt fatal: ünï"),
        (_git_error(r"remote: gesch\xc3\xbctzt"), "remote: geschützt"),
        *(
            (_git_error(said, "context deadline exceeded"), f"{FETCH}context deadline exceeded{SLOW}")
            for said in ("", r"POST git-upload-pack (305 bytes)\nPOST git-upload-pack (179 bytes)")
        ),
        (_git_error("fatal: early EOF", "context deadline exceeded"), f"fatal: early EOF{SLOW}"),
        (
            _git_error("fatal: unable to access 'https://ci:t0ken@host/a/': no proxy http://u:p@ss@proxy:3128"),
            "fatal: unable to access 'https://host/a/': no proxy http://proxy:3128",
        ),
        (
            _git_error("fatal: unable to access 'https://ghp_t0ken@host/a/'"),
            "fatal: unable to access 'https://host/a/'",
        ),
        (
            _git_error(rf"{UNADVERTISED}\nfatal: could not fetch <commit> from promisor remote"),
            f"{UNADVERTISED} fatal: could not fetch <commit> from promisor remote{NO_FILTER}",
        ),
        (
            _git_error(r"fatal: remote error: want <commit> not valid\nfatal: could not fetch x from promisor remote"),
            f"fatal: remote error: want <commit> not valid fatal: could not fetch x from promisor remote{NO_FILTER}",
        ),
        (
            _git_error(rf"warning: filtering not recognized by server, ignoring\n{UNADVERTISED}"),
            f"warning: filtering not recognized by server, ignoring {UNADVERTISED}; the server serves no commit by its"
            ' SHA: set "git.branch" to a branch or tag',
        ),
        (
            _git_error(r"error: RPC failed\nfatal: could not fetch <commit> from promisor remote"),
            "error: RPC failed fatal: could not fetch <commit> from promisor remote",
        ),
        ('{"Msg": "repo contains lock file", "Err": "", "Args": {}}', "repo contains lock file"),
        ("can't wipe unusable root directory: \x1b[0m\xff", "can't wipe unusable root directory: ÿ"),
        ('no value for key "ssh" of Secret "git-creds"', 'no value for key "ssh" of Secret "git-creds"'),
        (_git_error("error: index-pack died of signal 9"), f"error: index-pack died of signal 9{KILLED}"),
        (
            _git_error(r"libgcc_s.so.1 must be installed for pthread_exit to work\nerror: -c died of signal 6"),
            f"libgcc_s.so.1 must be installed for pthread_exit to work error: -c died of signal 6{KILLED}",
        ),
        (
            _git_error(r"fatal: write error: No space left on device\nerror: -c died of signal 6"),
            "fatal: write error: No space left on device error: -c died of signal 6",
        ),
        (_git_error("", "signal: killed"), f"{FETCH}signal: killed{KILLED}"),
        (_git_error("fatal: early EOF", "signal: killed"), "fatal: early EOF" + KILLED),
        (GIT_SYNC_KILLED, GIT_SYNC_KILLED + KILLED + LOG),
        ("git-sync failed with exit status 2", "git-sync failed with exit status 2" + LOG),
        ("", "the clone was interrupted" + LOG),
        (None, "the clone was interrupted" + LOG),
    ],
)
def test_a_failed_clone_is_the_last_line(
    volume: Volume, container: Callable, shell: str, error: str | None, reason: str
) -> None:
    if error is not None:
        (volume.folder / "git-error").write_text(error, "latin-1" if "\xff" in error else "utf-8")
    assert volume.run(container(), shell, **CREDENTIALS) == Result(
        1,
        f'FAILED: no checkout of "main" from "https://git.example.org/schema": {reason} ({README}, "Git access")\n',
    )


def test_a_missing_path_is_named(volume: Volume, helm4: Helm, shell: str) -> None:
    volume.clone("alembic.ini")
    result = volume.run(migrate(helm4.render(nested("git.path", "db/schema"))), shell, **CREDENTIALS)
    assert result == Result(
        255,
        f"{CODE.replace('utilities/hcm-db-migrations', 'db/schema')}"
        f'FAILED: no folder "db/schema" in commit {COMMIT}: set "git.path" to the folder with alembic.ini '
        f'({README}, "Git access")\n',
    )


def test_a_folder_without_alembic_ini_is_named(volume: Volume, container: Callable, shell: str) -> None:
    volume.clone("README.md")
    assert volume.run(container(), shell, **CREDENTIALS) == Result(
        255,
        CODE
        + f'FAILED: no alembic.ini in "utilities/hcm-db-migrations" of commit {COMMIT}: set "git.path" to the folder '
        f'that contains it ({README}, "Git access")\n',
    )


def test_another_name_for_alembic_ini_is_alembics_own_variable(volume: Volume, container: Callable, shell: str) -> None:
    volume.clone("other.ini")
    volume.program("alembic", "echo $ALEMBIC_CONFIG")
    found = volume.run(container(extraEnv=[{"name": "ALEMBIC_CONFIG", "value": "other.ini"}]), shell, **CREDENTIALS)
    assert found == Result(0, f"{CODE}other.ini\n")


def test_without_requirements_neither_pip_nor_venv_runs(volume: Volume, container: Callable, shell: str) -> None:
    volume.clone("alembic.ini", "requirements.txt")
    (volume.bin / "python3").unlink()
    volume.program("python3", "echo python3 ran; exit 9")
    volume.program("alembic", "echo alembic ran")
    assert volume.run(container(), shell, **CREDENTIALS) == Result(0, f"{CODE}alembic ran\n")


def test_an_image_without_alembic_is_reported(volume: Volume, container: Callable, shell: str) -> None:
    volume.clone("alembic.ini")
    for program in ("basename", "readlink", "printenv", "dirname", "head"):
        (volume.bin / program).symlink_to(shutil.which(program))
    (volume.bin / shell).symlink_to(shutil.which(shell))
    assert volume.run(container(), shell, PATH=str(volume.bin), **CREDENTIALS) == Result(
        255,
        CODE + 'FAILED: alembic is not installed: add it to "requirements" (), or to the image if that is "" '
        f'({README}, "Requirements")\n',
    )


def _test_container(helm: Helm) -> dict[str, Any]:
    (container,) = one(helm.render({"requirements": ""}), "Pod")["spec"]["containers"]
    return container


def test_helm_test_passes_at_the_head(volume: Volume, helm4: Helm, shell: str) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", 'echo "$*"; echo "002 (head)"')
    assert volume.run(_test_container(helm4), shell, **CREDENTIALS) == Result(0, f"{CODE}current\n002 (head)\n")


@pytest.mark.parametrize("current", ["001", ""])
def test_helm_test_fails_with_the_fix_when_the_database_is_behind(
    volume: Volume, helm4: Helm, shell: str, current: str
) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", f"echo '{current}'")
    assert volume.run(_test_container(helm4), shell, **CREDENTIALS) == Result(
        1,
        f"{CODE}{current}\n"
        'FAILED: alembic current did not report "(head)": the database is not at the current head of "main"; run helm '
        f'upgrade ({README}, "helm test")\n',
    )


def test_helm_test_fails_as_alembic_does(volume: Volume, helm4: Helm, shell: str) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", "echo 'FAILED: why' >&2; exit 255")
    assert volume.run(_test_container(helm4), shell, **CREDENTIALS) == Result(255, f"{CODE}FAILED: why\n")


WAITS = 'touch "$HOME/running"; exec sleep 60'


def test_sigterm_stops_an_alembic_without_a_handler_at_once(volume: Volume, container: Callable, shell: str) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", WAITS)
    result = volume.stop(volume.start(container(), shell, **CREDENTIALS))
    assert result == Result(
        143,
        CODE
        + "stopped by SIGTERM while running alembic upgrade head; PostgreSQL rolls back what was not committed; if the "
        "Job's deadline was exceeded, raise \"job.activeDeadlineSeconds\" and Helm's --timeout together\n",
    )


def test_an_alembic_that_handles_sigterm_prints_the_last_line(volume: Volume, container: Callable, shell: str) -> None:
    volume.clone("alembic.ini")
    volume.program(
        "alembic",
        "trap 'echo rolled back at 001 >&2; kill $!; exit 7' TERM\nsleep 60 &\ntouch \"$HOME/running\"; wait",
    )
    result = volume.stop(volume.start(container(), shell, **CREDENTIALS))
    assert (result.returncode, result.lines[-1]) == (7, "rolled back at 001")


def test_sigterm_before_alembic_starts_prevents_its_start(volume: Volume, container: Callable, shell: str) -> None:
    """printenv is the first program that the script runs after the checkout was found."""
    volume.clone("alembic.ini")
    volume.program("printenv", 'touch "$HOME/running"; sleep 1; echo value')
    volume.program("alembic", "echo alembic started")
    result = volume.stop(volume.start(container(), shell, **CREDENTIALS))
    assert result == Result(
        143,
        CODE
        + "stopped by SIGTERM while starting; the database was not contacted; if the Job's deadline was exceeded, raise"
        ' "job.activeDeadlineSeconds" and Helm\'s --timeout together\n',
    )


@pytest.mark.parametrize("program", ["mkfifo", "rm", "find"])
def test_sigterm_between_two_programs_ends_the_run_at_once(
    volume: Volume, container: Callable, shell: str, program: str
) -> None:
    volume.clone("alembic.ini")
    volume.program(program, f'touch "$HOME/running"; sleep 1; exec {shutil.which(program)} "$@"')
    volume.program("alembic", "echo alembic started")
    result = volume.stop(volume.start(container(), shell, **CREDENTIALS))
    assert result.returncode == 143, result.text
    assert "alembic started" not in result.text
    assert result.text.count("stopped by SIGTERM") == 1


def test_submodules_and_symlinks_to_nothing_are_named(volume: Volume, container: Callable, shell: str) -> None:
    """Alembic would find no revisions there, and succeed."""
    folder = volume.clone("alembic.ini", "in-the-checkout")
    modules = '[submodule "%s"]\n\tpath = %s\n\turl = https://git.example.org/x\n'
    paths = ["utilities/hcm-db-migrations/migrations/versions", "elsewhere"]
    (volume.folder / "git/code/.gitmodules").write_text("".join(modules % (path, path) for path in paths))
    (folder / "shared").symlink_to("../../lib/shared")
    (folder / "also").symlink_to("in-the-checkout")
    volume.program("alembic", "echo alembic ran")
    assert volume.run(container(), shell, **CREDENTIALS) == Result(
        0,
        CODE
        + "WARNING: not checked out: migrations/versions, ./shared (submodules are not cloned, and symlinks must lead"
        f' to a file in "git.path"); revisions there are missing ({README}, "Git access")\nalembic ran\n',
    )


@pytest.fixture
def pip(volume: Volume, container: Callable, shell: str) -> Iterator[Program]:
    """A container whose pip waits for an index that accepts the connection and does not answer."""
    folder = volume.clone("alembic.ini")
    (folder / "requirements.txt").write_text(f"alembic==0.0.1 --hash=sha256:{'0' * 64}\n")
    volume.program("alembic", "echo not reached >&2")
    with socket.create_server(("127.0.0.1", 0)) as index:
        address = {"PIP_INDEX_URL": f"http://127.0.0.1:{index.getsockname()[1]}/simple/"}
        process = volume.start(container(requirements="requirements.txt"), shell, **CREDENTIALS, **address)
        index.settimeout(60)
        with index.accept()[0]:
            yield process


@pytest.mark.fault(
    "Process and pod",
    fault="SIGTERM while pip installs",
    sees="`stopped by SIGTERM while installing requirements.txt; ...` at once, exit 143",
    state="The database is not contacted",
    do="Deploy again",
)
def test_sigterm_stops_pip_at_once_and_alembic_does_not_start(pip: Program) -> None:
    result = pip.stop()
    assert result == Result(
        143,
        CODE
        + "stopped by SIGTERM while installing requirements.txt; the database was not contacted; if the Job's deadline "
        'was exceeded, raise "job.activeDeadlineSeconds" and Helm\'s --timeout together\n',
    )


@pytest.mark.fault(
    "Process and pod",
    fault="SIGKILL (out of memory) of pip",
    sees="`FAILED: killed while installing requirements.txt, most likely out of memory: raise"
    ' "resources.limits.memory" ...`, exit 1',
    state="The database is not contacted",
    do="Raise the limit, deploy again",
)
@pytest.mark.parametrize("which", ["pip", "its child"])
def test_a_killed_pip_points_to_the_memory_limit(pip: Program, which: str) -> None:
    def child(pid: int) -> int:
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])  # the first copies the log

    killed = child(pip.process.pid)  # it starts the venv's Python with itself
    os.kill(child(killed) if which == "its child" else killed, signal.SIGKILL)
    result = pip.wait()
    assert (result.returncode, result.lines[-1]) == (
        1,
        'FAILED: killed while installing requirements.txt, most likely out of memory: raise "resources.limits.memory" '
        f'({README}, "Requirements")',
    )


def test_a_killed_alembic_points_to_the_memory_limit(volume: Volume, container: Callable, shell: str) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", "kill -9 $$")
    result = volume.run(container(), shell, **CREDENTIALS)
    assert (result.returncode, result.lines[-1]) == (
        137,
        'FAILED: alembic was killed, most likely out of memory: raise "resources.limits.memory"',
    )


@pytest.fixture
def clone(helm4: Helm, volume: Volume) -> Callable[..., dict[str, Any]]:
    """The git-sync init container, for this part of "git"; with a program of the test in place of git-sync."""

    def render(**git: Any) -> dict[str, Any]:
        address = {"repo": "https://git.example.org/schema", "branch": "main"}
        found = git_sync(helm4.render({"git": address | git}))
        assert found["command"][3:] == ["sync", "/git-sync"]
        return relocate(found, volume.folder, volume.home, volume.folder, volume.bin / "git-sync")

    return render


def test_git_sync_gets_its_flags_and_the_user(volume: Volume, clone: Callable, shell: str) -> None:
    for name, text in {"username": "a user\n", "password": "s3cret\n"}.items():
        (volume.folder / name).write_text(text)
    volume.program("git-sync", 'printf "%s|" "$@"')
    of = clone(httpsSecretName="token")
    assert volume.run(of, shell) == Result(0, "|".join([*of["args"], "--username=a user", ""]))
    assert not (volume.folder / "git-error").exists()


@pytest.mark.parametrize(
    ("git", "there", "missing"),
    [
        ({"repo": "git@host:a"}, [], ['"ssh" of Secret "git-creds"', '"known_hosts" of Secret "git-creds"']),
        ({"repo": "git@host:a"}, ["ssh"], ['"known_hosts" of Secret "git-creds"']),
        ({"repo": "git@host:a", "knownHosts": False}, [], ['"ssh" of Secret "git-creds"']),
        ({"httpsSecretName": "token"}, ["username"], ['"password" of Secret "token"']),
        ({"httpsSecretName": "token"}, ["password", "username: \t\n"], ['"username" of Secret "token"']),
        ({"ca": {"configMapName": "roots"}}, [], ['"ca.crt" of ConfigMap "roots"']),
    ],
)
def test_a_missing_git_credential_is_named_by_the_migrate_container(
    volume: Volume, clone: Callable, container: Callable, shell: str, git: dict, there: list[str], missing: list[str]
) -> None:
    for entry in there:
        name, _, contents = entry.partition(":")
        (volume.folder / name).write_text(contents or "x")
    volume.program("git-sync", "echo not reached")
    reason = "; ".join(f'no value for key {key} in namespace "health"' for key in missing)
    assert volume.run(clone(**git), shell) == Result(0, f"{reason}\n")
    assert volume.run(container(), shell, **CREDENTIALS).text == (
        f'FAILED: no checkout of "main" from "https://git.example.org/schema": {reason} ({README}, "Git access")\n'
    )


def test_a_key_that_cannot_be_read_is_not_reported_as_missing(volume: Volume, clone: Callable, shell: str) -> None:
    """Without fsGroup, the key is root's alone: ssh says so."""
    for name in ("ssh", "known_hosts"):
        (volume.folder / name).write_text("x")
    (volume.folder / "ssh").chmod(0)
    volume.program("git-sync", "echo runs")
    assert volume.run(clone(repo="git@host:a"), shell, WITHOUT_CAPABILITIES) == Result(0, "runs\n")


CLONE_TIMED_OUT = (
    "the clone did not finish within 2 s: the git server does not respond, a firewall, NetworkPolicy or proxy drops the"
    ' packets, or the network is too slow (then raise "job.activeDeadlineSeconds")'
)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo reason >git-error; exit 1", "reason"),
        ("echo 'unknown flag: --x' >&2; exit 2", "git-sync failed with exit status 2; "),
        ("exit 124", "git-sync failed with exit status 124; "),
        ("kill -9 $$", "git-sync failed with exit status 137; most likely out of memory"),
        ("exec sleep 60", CLONE_TIMED_OUT),
        ("echo access denied >git-error; exec sleep 60", f"{CLONE_TIMED_OUT}; an attempt before: access denied"),
        ("trap '' TERM; while :; do sleep 1; done", CLONE_TIMED_OUT),
    ],
)
def test_a_failed_git_sync_leaves_its_reason_to_the_migrate_container(
    volume: Volume, clone: Callable, container: Callable, shell: str, script: str, reason: str
) -> None:
    volume.program("git-sync", script)
    assert volume.run(clone(), shell, CLONE_SECONDS="2").returncode == 0
    result = volume.run(container(), shell, **CREDENTIALS)
    assert result.returncode == 1
    prefix = f'FAILED: no checkout of "main" from "https://git.example.org/schema": {reason}'
    assert result.text.startswith(prefix), result.text


def test_an_image_without_timeout_clones_without_a_limit_and_says_so(
    volume: Volume, clone: Callable, shell: str
) -> None:
    volume.program("git-sync", "sleep 2")
    for program in ("cat", "date", "sleep", "sh", shell):
        (volume.bin / program).unlink(missing_ok=True)
        (volume.bin / program).symlink_to(str(shutil.which(program)))
    assert volume.run(clone(), shell, PATH=str(volume.bin), CLONE_SECONDS="1") == Result(
        0,
        'the image has no program "timeout": only the deadline ends a clone from a git server that does not respond\n',
    )
    assert not (volume.folder / "git-error").exists()


@pytest.mark.fault(
    "Process and pod",
    fault="SIGTERM during the clone",
    sees="The git-sync init container stops at once, exit 143",
    state="The database is not contacted",
    do="Deploy again",
)
def test_sigterm_stops_the_clone_at_once(volume: Volume, clone: Callable, shell: str) -> None:
    volume.program("git-sync", f"HOME={volume.folder}\n{WAITS}")
    result = volume.stop(volume.start(clone(), shell))
    assert result.returncode == 143


def test_the_pod_has_what_the_scripts_need(helm: Helm) -> None:
    """The pod has what the tests above replace: the volume's folder and the link to the checkout."""
    found = helm.render()
    assert {"--root=/workspace/git", "--link=code", "--error-file=/workspace/git-error"} <= set(git_sync(found)["args"])
    assert migrate(found)["workingDir"] == "/workspace"
    assert pod(found)["spec"]["restartPolicy"] == "Never"
