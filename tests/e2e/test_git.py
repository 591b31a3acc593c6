"""The checkout: refs, folders, SSH and HTTPS access, and the messages when the clone fails."""

from __future__ import annotations

import base64
import re
import secrets
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.database import Database
from tests.support.documents import chart_command
from tests.support.kubernetes import FIRST_JOB, Api, contacted
from tests.support.project import PARTS
from tests.support.release import Release
from tests.support.repository import Repository
from tools.cluster import Cluster

GIT = '(README.md of the chart, "Git access")'
# A failed run would be retried after 10 s, with the same result.
ONE_ATTEMPT = {"job": {"backoffLimit": 0}}


@pytest.mark.parametrize("kind", ["branch", "tag", "commit", "folder"])
def test_a_run_uses_exactly_the_given_ref_and_folder(
    release: Release, repository: Repository, database: Database, kind: str
) -> None:
    repository.revision("002", "CREATE TABLE chosen ()")
    git = {"branch": "feature/chosen"}
    if kind == "folder":
        git["path"] = "services/reports/schema"
        folder = repository.folder / git["path"]
        folder.mkdir(parents=True)
        for name in (*PARTS, "requirements.txt"):
            shutil.move(repository.folder / name, folder)
    commit = repository.push("refs/heads/feature/chosen")
    if kind == "tag":
        git["branch"] = "v1.0"
        repository.git("tag", "--annotate", "--message=test", "v1.0")
        repository.git("push", "--quiet", repository.remote, "v1.0")
    if kind == "commit":
        git["branch"] = commit
        repository.push("refs/heads/feature/chosen")
    command = release.start_upgrade({"git": git})
    result = command.wait()
    assert result.returncode == 0, result.text
    assert f"ref {git['branch']}, commit {commit}, path {git.get('path', '.')}" in command.output
    assert database.at == ["002"]
    assert "chosen" in database.relations


@pytest.mark.fault(
    "Supply chain",
    fault="A git tag is moved",
    sees="`code: repository ..., ref v1.0, commit <the new one>, ...` in the first line",
    state="The revisions of the tag's new commit are applied",
    do="To pin the code, set `git.branch` to a full commit SHA",
)
def test_a_moved_tag_shows_in_the_logged_commit(release: Release, repository: Repository, database: Database) -> None:
    values = {"git": {"branch": "v1.0"}}
    runs = []
    for number in ("001", "002"):
        if number == "002":
            repository.revision("002", "CREATE TABLE moved ()")
        commit = repository.push("refs/tags/v1.0")
        command = release.start_upgrade(values)
        assert command.wait().returncode == 0, command.output
        assert f"ref v1.0, commit {commit}, path ." in command.output
        assert database.at == [number]
        runs.append(commit)
    # The first commit is still available by its SHA.
    plan = release.upgrade({"git": {"branch": runs[0]}, "args": ["upgrade", "head", "--sql"]})
    assert (plan.returncode, "CREATE TABLE moved" in plan.text) == (0, False)


def _other_host_key() -> str:
    parts = (b"ssh-ed25519", secrets.token_bytes(32))
    return base64.b64encode(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).decode()


@pytest.fixture
def over_ssh(api: Api, repository: Repository) -> dict[str, Any]:
    return {"git": {"repo": f"git@server.hcm-fixtures:{repository.name}"}, **ONE_ATTEMPT}


def test_an_ssh_key_and_the_servers_host_key_give_access(
    release: Release, api: Api, cluster: Cluster, database: Database, over_ssh: dict
) -> None:
    (release.home / "id_ed25519").write_text(cluster.server_file("ssh"))
    (release.home / "known_hosts").write_text(cluster.server_file("known_hosts"))
    created = release.documented(chart_command("git-creds"), release.home)
    assert created.returncode == 0, created.text
    result = release.upgrade(over_ssh)
    assert (result.returncode, database.at, api.jobs()) == (0, ["001"], []), result.text
    result.line("INFO now at 001 (head)")


@pytest.mark.fault(
    "Code and settings",
    fault="A wrong SSH key, or a server with another host key",
    sees="`FAILED: no checkout of ... from ...: Permission denied (publickey). ...` or `Host key verification failed.`",
    state="The database is not contacted",
    do="Fix the Secret `git-creds`, deploy again",
)
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [("host key", "Host key verification failed."), ("user's key", "Permission denied (publickey).")],
)
def test_a_wrong_ssh_key_ends_the_run_before_the_database_is_contacted(
    release: Release, api: Api, cluster: Cluster, database: Database, over_ssh: dict, wrong: str, reason: str
) -> None:
    key, known_hosts = cluster.server_file("ssh"), cluster.server_file("known_hosts")
    if wrong == "host key":
        known_hosts = f"server.hcm-fixtures ssh-ed25519 {_other_host_key()}\n"
    else:
        script = "cd $(mktemp -d) && ssh-keygen -q -t ed25519 -N '' -f key && cat key"
        key = cluster.kubectl("exec", "-n", "hcm-fixtures", "deploy/server", "--", "sh", "-c", script)
    api.secret("git-creds", ssh=key, known_hosts=known_hosts)
    result = release.upgrade(over_ssh)
    assert (result.returncode, api.conditions(FIRST_JOB)["Failed"]) == (1, "BackoffLimitExceeded")
    result.line(f'FAILED: no checkout of "main" from "{over_ssh["git"]["repo"]}": ', reason, GIT)
    assert not contacted(cluster, database)


def test_ssh_without_its_secret_names_the_secret_and_its_keys(release: Release, api: Api, over_ssh: dict) -> None:
    result = release.upgrade(over_ssh)
    assert (result.returncode, api.conditions(FIRST_JOB)["Failed"]) == (1, "BackoffLimitExceeded")
    result.line(
        f'FAILED: no checkout of "main" from "{over_ssh["git"]["repo"]}": no value for key "ssh" of Secret "git-creds"'
        f' in namespace "{api.namespace}"; no value for key "known_hosts" of Secret "git-creds" in namespace'
        f' "{api.namespace}" {GIT}'
    )


# What OpenShift's restricted-v2 sets in a namespace, where the chart's IDs are null: a high ID without an entry in
# /etc/passwd of any image, and the root group.
ASSIGNED = {"runAsUser": 1000650000, "runAsGroup": 0, "fsGroup": 1000650000}


@pytest.fixture
def over_https(over_https: dict[str, Any]) -> dict[str, Any]:
    return {**over_https, **ONE_ATTEMPT}


def test_a_token_and_a_private_ca_give_access(release: Release, api: Api, database: Database, over_https: dict) -> None:
    result = release.upgrade(over_https)
    assert (result.returncode, database.at, api.jobs()) == (0, ["001"], []), result.text
    result.line("INFO now at 001 (head)")


@pytest.mark.parametrize("by", ["https", "ssh"])
def test_the_ids_that_openshift_assigns_give_the_same_access(
    release: Release, api: Api, cluster: Cluster, database: Database, over_https: dict, over_ssh: dict, by: str
) -> None:
    api.secret("git-creds", ssh=cluster.server_file("ssh"), known_hosts=cluster.server_file("known_hosts"))
    values = {"https": over_https, "ssh": over_ssh}[by]
    result = release.upgrade({**values, "podSecurityContext": ASSIGNED})
    assert (result.returncode, database.at, api.jobs()) == (0, ["001"], []), result.text
    result.line("INFO now at 001 (head)")
    test = release.run("test", release.name)
    assert test.returncode == 0, test.text


@pytest.mark.fault(
    "Code and settings",
    fault="A missing or wrong token for the repository, or a CA that did not sign its server's certificate",
    sees="`FAILED: no checkout of ... from ...: <git's message>`",
    state="The database is not contacted",
    do="Fix the Secret or `git.ca`, deploy again",
)
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("token", "Authentication failed for 'https://server.hcm-fixtures/git/.*'; for a private repository, set "),
        ("CA", "server certificate verification failed|server verification failed: certificate signer not trusted"),
    ],
)
def test_a_wrong_token_or_ca_ends_the_run_before_the_database_is_contacted(
    release: Release, api: Api, cluster: Cluster, database: Database, over_https: dict, wrong: str, reason: str
) -> None:
    if wrong == "token":
        api.secret("wrong", username="git", password=cluster.passwords["TOKEN"][:-1])
        over_https["git"]["httpsSecretName"] = "wrong"
    else:
        over_https["git"]["ca"]["configMapName"] = "kube-root-ca.crt"  # every namespace has it
    result = release.upgrade(over_https)
    assert (result.returncode, api.conditions(FIRST_JOB)["Failed"]) == (1, "BackoffLimitExceeded")
    result.line(f'FAILED: no checkout of "main" from "{over_https["git"]["repo"]}": ', GIT)
    assert re.search(reason, result.text)  # in the words of GnuTLS before 3.8, or of the newer one in git-sync's image
    assert not contacted(cluster, database)


def _unknown_ref(repository: Repository, api: Api) -> tuple[dict, list[str]]:
    reason = "fatal: couldn't find remote ref missing"
    return {"git": {"branch": "missing"}}, [f'FAILED: no checkout of "missing" from "{repository.url}": {reason} {GIT}']


def _unknown_commit(repository: Repository, api: Api) -> tuple[dict, list[str]]:
    reason = f'FAILED: no checkout of "<commit>" from "{repository.url}": '
    return {"git": {"branch": "0" * 40}}, [reason, "not our ref", GIT]


def _server_down(repository: Repository, api: Api) -> tuple[dict, list[str]]:
    service = {"metadata": {"name": "git"}, "spec": {"ports": [{"port": 80}]}}  # with no pod behind it
    api.core.create_namespaced_service(api.namespace, service)
    address = f"http://git.{api.namespace}/schema.git"
    return {"git": {"repo": address}}, [f'FAILED: no checkout of "main" from "{address}": fatal: unable to access', GIT]


def _no_such_folder(repository: Repository, api: Api) -> tuple[dict, list[str]]:
    reason = f'FAILED: no folder "nowhere" in commit <commit>: set "git.path" to the folder with alembic.ini {GIT}'
    return {"git": {"path": "nowhere"}}, [reason]


def _no_alembic_ini(repository: Repository, api: Api) -> tuple[dict, list[str]]:
    fix = 'set "git.path" to the folder that contains it'
    return {"git": {"path": "migrations"}}, [f'FAILED: no alembic.ini in "migrations" of commit <commit>: {fix} {GIT}']


def _no_revisions(repository: Repository, api: Api) -> tuple[dict, list[str]]:
    versions = repository.folder / "migrations" / "versions"
    for file in versions.iterdir():
        file.unlink()
    (versions / ".gitkeep").touch()
    repository.push()
    folder = "/workspace/git/.worktrees/<commit>/migrations/versions"
    fix = "check the branch and the path of the checkout (in the chart: 'git.branch' and 'git.path')"
    return {}, [f"FAILED: no revisions found in {folder}; nothing to do, treated as an error: {fix}"]


@pytest.mark.fault(
    "Code and settings",
    fault="The clone fails (unknown ref, server down), or its folder does not contain the revisions",
    sees="`FAILED: no checkout of ... from ...: <git's message>`, `no folder ...`, `no alembic.ini ...` or"
    " `no revisions found ...`, with the value to set",
    state="The database is not contacted",
    do="Follow the message, deploy again",
)
@pytest.mark.parametrize(
    "prepare", [_unknown_ref, _unknown_commit, _server_down, _no_such_folder, _no_alembic_ini, _no_revisions]
)
def test_an_unusable_checkout_is_reported_in_helms_output_and_the_database_is_not_contacted(
    release: Release,
    api: Api,
    cluster: Cluster,
    repository: Repository,
    database: Database,
    prepare: Callable[[Repository, Api], tuple[dict, list[str]]],
) -> None:
    values, message = prepare(repository, api)
    result = release.upgrade({**values, **ONE_ATTEMPT})
    assert result.returncode == 1
    result.line(*message)
    assert (set(api.conditions(FIRST_JOB)), contacted(cluster, database)) == ({"FailureTarget", "Failed"}, False)
