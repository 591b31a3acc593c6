"""How the repository is reached: git-sync's flags, and the files that it can read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.chart import Helm, environment, git_sync, nested, pod
from tests.support.git import git
from tests.support.programs import run

# From git-sync's manual (`git-sync --man` of v4.7.1) and main.go of each release since: the type of the flag's value,
# and the first release of v4 that has it.
FLAGS: dict[str, tuple[type, str]] = {
    "repo": (str, "v4.0.0"),
    "ref": (str, "v4.0.0"),
    "root": (Path, "v4.0.0"),
    "link": (str, "v4.0.0"),
    "one-time": (bool, "v4.0.0"),
    "depth": (int, "v4.0.0"),
    "filter": (str, "v4.7.0"),
    "sparse-checkout-file": (Path, "v4.0.0"),
    "submodules": (str, "v4.0.0"),
    "git-gc": (str, "v4.0.0"),
    "max-failures": (int, "v4.0.0"),
    "period": (float, "v4.0.0"),
    "sync-timeout": (float, "v4.0.0"),
    "error-file": (Path, "v4.0.0"),
    "ssh-key-file": (Path, "v4.0.0"),
    "ssh-known-hosts": (bool, "v4.0.0"),
    "ssh-known-hosts-file": (Path, "v4.0.0"),
    "username": (str, "v4.0.0"),
    "password-file": (Path, "v4.0.0"),
}
ALWAYS = [
    "--root=/workspace/git",
    "--link=code",
    "--one-time",
    "--depth=1",
    "--filter=blob:none",
    "--sparse-checkout-file=/etc/git-sync/sparse-checkout",
    "--submodules=off",
    "--git-gc=off",
    "--max-failures=2",
    "--period=2s",
    "--sync-timeout=46s",
    "--error-file=/workspace/git-error",
]
PATTERNS = {
    "downwardAPI": {
        "items": [
            {
                "path": "sparse-checkout",
                "fieldRef": {"fieldPath": "metadata.annotations['hcm-db-migrations/sparse-checkout']"},
            }
        ]
    }
}
SSH_KEY = {"key": "ssh", "path": "ssh", "mode": 0o400}


def _projected(kind: str, name: str, *items: dict[str, Any]) -> dict[str, Any]:
    return {kind: {"name": name, "optional": True, "items": list(items)}}


def _file(key: str, path: str | None = None) -> dict[str, str]:
    return {"key": key, "path": path or key}


ACCESS: dict[str, tuple[dict, list[str], list[dict], list[str], dict[str, str]]] = {
    "HTTPS, public": ({}, [], [], [], {}),
    "HTTPS, user and token": (
        {"httpsSecretName": "token"},
        ["--password-file=/etc/git-sync/password"],
        [_projected("secret", "token", _file("username"), _file("password"))],
        [
            '/etc/git-sync/username key "username" of Secret "token"',
            '/etc/git-sync/password key "password" of Secret "token"',
        ],
        {"USERNAME_FILE": "/etc/git-sync/username"},
    ),
    "HTTPS, private CA in a ConfigMap": (
        {"ca": {"configMapName": "roots", "key": "bundle.pem"}},
        [],
        [_projected("configMap", "roots", _file("bundle.pem", "ca.crt"))],
        ['/etc/git-sync/ca.crt key "bundle.pem" of ConfigMap "roots"'],
        {"GIT_SSL_CAINFO": "/etc/git-sync/ca.crt"},
    ),
    "HTTPS, token and private CA in Secrets": (
        {"httpsSecretName": "token", "ca": {"secretName": "roots"}},
        ["--password-file=/etc/git-sync/password"],
        [
            _projected("secret", "token", _file("username"), _file("password")),
            _projected("secret", "roots", _file("ca.crt")),
        ],
        [
            '/etc/git-sync/username key "username" of Secret "token"',
            '/etc/git-sync/password key "password" of Secret "token"',
            '/etc/git-sync/ca.crt key "ca.crt" of Secret "roots"',
        ],
        {"USERNAME_FILE": "/etc/git-sync/username", "GIT_SSL_CAINFO": "/etc/git-sync/ca.crt"},
    ),
    "SSH": (
        {"repo": "git@github.com:egovernments/health-campaign-services"},
        [
            "--ssh-key-file=/etc/git-sync/ssh",
            "--ssh-known-hosts=true",
            "--ssh-known-hosts-file=/etc/git-sync/known_hosts",
        ],
        [_projected("secret", "git-creds", SSH_KEY, _file("known_hosts"))],
        [
            '/etc/git-sync/ssh key "ssh" of Secret "git-creds"',
            '/etc/git-sync/known_hosts key "known_hosts" of Secret "git-creds"',
        ],
        {},
    ),
    "SSH to any server": (
        {"repo": "ssh://git@git.example.org:2222/schema", "secretName": "deploy-key", "knownHosts": False},
        ["--ssh-key-file=/etc/git-sync/ssh", "--ssh-known-hosts=false"],
        [_projected("secret", "deploy-key", SSH_KEY)],
        ['/etc/git-sync/ssh key "ssh" of Secret "deploy-key"'],
        {},
    ),
}


@pytest.mark.parametrize("way", ACCESS)
def test_git_sync_gets_what_the_url_needs_and_no_more(helm: Helm, way: str) -> None:
    git, flags, sources, required, variables = ACCESS[way]
    address = git.get("repo", "https://git.example.org/schema")
    found = helm.render({"git": {"repo": address, "branch": "main", **git}})
    container = git_sync(found)
    assert container["args"] == [f"--repo={address}", "--ref=main", *ALWAYS, *flags]
    (volume,) = [volume for volume in pod(found)["spec"]["volumes"] if volume["name"] == "git"]
    assert volume == {"name": "git", "projected": {"sources": [PATTERNS, *sources]}}
    assert environment(container)["REQUIRED"].splitlines() == required
    expected = {"HOME": "/git-home", "TMPDIR": "/git-home", "NAMESPACE": "health", "USERNAME_FILE": "", **variables}
    expected["CLONE_SECONDS"] = "99"
    assert {name: value for name, value in environment(container).items() if name != "REQUIRED"} == expected


@pytest.mark.parametrize("way", ACCESS)
def test_the_pinned_release_of_git_sync_has_every_flag_with_that_type(helm: Helm, way: str) -> None:
    git = {"repo": "https://git.example.org/schema", "branch": "main"} | ACCESS[way][0]
    container = git_sync(helm.render({"git": git}))
    pinned = tuple(map(int, container["image"].rpartition(":v")[2].split(".")))
    script = container["command"][2]
    assert '"--username=$(cat "$USERNAME_FILE")"' in script  # the one flag that the script adds
    for argument in [*container["args"], "--username=x"]:
        name, _, value = argument.removeprefix("--").partition("=")
        kind, since = FLAGS[name]
        assert tuple(map(int, since.removeprefix("v").split("."))) <= pinned
        if kind is bool:
            assert value in ("", "true", "false")
        elif kind is float:
            assert float(value.removesuffix("s")) >= 0.01  # a Go duration; git-sync's own lower limit
        elif kind is Path:
            assert value.startswith("/")
        else:
            assert str(kind(value)) == value != ""


IDS = ["runAsUser", "runAsGroup", "fsGroup"]


@pytest.mark.parametrize(
    ("pod_context", "context", "entry"),
    [
        ({}, {}, False),
        ({}, {"runAsUser": None}, False),
        ({"runAsUser": 1000650000}, {"runAsUser": 65533}, False),
        (None, {"runAsUser": 65533}, False),
        (dict.fromkeys(IDS), {}, True),
        (None, None, True),
        ({"runAsUser": 1000650000, "runAsGroup": 0, "fsGroup": 1000650000}, {}, True),
        ({}, {"runAsUser": 1000}, True),
    ],
)
def test_ssh_finds_an_entry_for_any_user_in_etc_passwd(
    helm: Helm, pod_context: dict | None, context: dict | None, entry: bool
) -> None:
    """git-sync's image has one for 65533 only; without an ID, the platform (OpenShift) assigns one."""
    address = {"git": {"repo": "git@git.example.org:schema", "branch": "main"}}
    contexts = {"podSecurityContext": pod_context, "securityContext": context}
    spec = pod(helm.objects({**address, **contexts}))["spec"]
    clone = spec["initContainers"][-1]
    mount = {"name": "git-home", "mountPath": "/etc/passwd", "subPath": "passwd", "readOnly": True}
    assert ([c["name"] for c in spec["initContainers"]], mount in clone["volumeMounts"]) == (
        (["passwd", "git-sync"], True) if entry else (["git-sync"], False)
    )
    if entry:
        passwd = spec["initContainers"][0]
        for key in ("image", "imagePullPolicy", "resources", "terminationMessagePolicy"):
            assert passwd[key] == clone[key]
        assert passwd.get("securityContext") == clone.get("securityContext")
        assert passwd["volumeMounts"] == [{"name": "git-home", "mountPath": "/git-home"}]
    https = helm.objects({"git": {**address["git"], "repo": "https://git.example.org/schema"}, **contexts})
    assert [c["name"] for c in pod(https)["spec"]["initContainers"]] == ["git-sync"]


def test_the_entry_is_the_first_for_its_user(helm4: Helm, tmp_path: Path) -> None:
    """getpwuid returns the first: an image may have one without a home, or with another shell."""
    address = {"repo": "git@git.example.org:schema", "branch": "main"}
    rendered = helm4.render({"git": address, "podSecurityContext": {"runAsUser": 1000}})
    (script,) = pod(rendered)["spec"]["initContainers"][0]["command"][2:]
    (tmp_path / "image").write_text("root:x:0:0:root:/root:/bin/bash\n")
    script = script.replace("/git-home/", f"{tmp_path}/").replace("/etc/passwd", f"{tmp_path}/image")
    assert run(["sh", "-c", script], check=True).text == ""
    assert (tmp_path / "passwd").read_text().splitlines() == [
        f"git-sync:x:{os.getuid()}:{os.getgid()}::/git-home:/sbin/nologin",
        "root:x:0:0:root:/root:/bin/bash",
    ]


@pytest.mark.parametrize(
    ("path", "patterns"),
    [
        (".", ["/*"]),
        ("", ["/*"]),
        ("./", ["/*"]),
        ("db", ["/*", "!/*/", "/db/"]),
        ("./a//b/", ["/*", "!/*/", "/a/", "!/a/*/", "/a/b/"]),
        ("a/b/c", ["/*", "!/*/", "/a/", "!/a/*/", "/a/b/", "!/a/b/*/", "/a/b/c/"]),
    ],
)
def test_the_patterns_are_the_cone_that_git_checks_out(
    helm: Helm, tmp_path: Path, path: str, patterns: list[str]
) -> None:
    annotation = pod(helm.render(nested("git.path", path)))["metadata"]["annotations"][
        "hcm-db-migrations/sparse-checkout"
    ]
    assert annotation.splitlines() == patterns
    assert (
        _checked_out(tmp_path, annotation)
        == {
            "/*": {"top", "db/f", "a/f", "a/b/f", "a/b/c/f", "a/b/c/d/f", "z/f"},
            "/db/": {"top", "db/f"},
            "/a/b/": {"top", "a/f", "a/b/f", "a/b/c/f", "a/b/c/d/f"},
            "/a/b/c/": {"top", "a/f", "a/b/f", "a/b/c/f", "a/b/c/d/f"},
        }[patterns[-1]]
    )


def _checked_out(folder: Path, patterns: str) -> set[str]:
    """What git checks out for these patterns, with git-sync's commands in their order."""
    git(folder, "init", "-q")
    for name in ("top", "db/f", "a/f", "a/b/f", "a/b/c/f", "a/b/c/d/f", "z/f"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")
    commit = git(folder, "rev-parse", "HEAD")
    tree = folder / ".worktrees" / commit
    git(folder, "worktree", "add", "--force", "--detach", tree, commit, "--no-checkout")
    info = folder / ".git" / "worktrees" / commit / "info"
    info.mkdir(exist_ok=True)
    (info / "sparse-checkout").write_text(patterns)
    git(tree, "sparse-checkout", "init")
    git(tree, "reset", "-q", "--hard", commit, "--")
    return {str(file.relative_to(tree)) for file in tree.rglob("*") if file.is_file() and file.name != ".git"}
