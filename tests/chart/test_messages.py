"""Every mistake in the values has one message with its fix. Of the schema's, which are Helm's, the key is pinned."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chart import MINIMAL, TEXT, Helm, environment, migrate, nested
from tools import docs
from tools.paths import CHART
from tools.values import merged

REPO = "https://git.example.org/schema"
ADD = """ not set: add to a values file (-f)

    hcm-db-migrations:
      git:
        repo: "https://github.com/<owner>/<repository>"   # or git@github.com:<owner>/<repository>
        branch: "<branch, tag or full commit SHA>"
"""
ADDRESS = '"git.repo" is not a valid repository URL: set https://host/path, git@host:path or ssh://git@host/path'
CREDENTIALS = (
    '"git.repo" contains credentials or a query string, which logs would show: put them into a Secret and set its name '
    'as "git.httpsSecretName" (user and token for https://) or "git.secretName" (SSH key)'
)
HTTPS_ONLY = (
    '"git.httpsSecretName" and "git.ca" are for https:// URLs only, but "git.repo" is an SSH URL: '
    "unset them, or set an https:// URL"
)

TWO_CA = '"git.ca.configMapName" and "git.ca.secretName" are both set: keep the one that holds the CA'
ABBREVIATED = (
    '"git.branch" is "0a1b2c3", which looks like an abbreviated commit SHA; git servers only accept full ones: set the '
    "full 40-character SHA (git rev-parse 0a1b2c3), or refs/heads/0a1b2c3 if it is a branch"
)
ARGUMENT = (
    '"args" contains a password or token, which logs would show: put it into a Secret, and reference that as '
    'DATABASE_URL in "extraEnv"'
)
UNENCRYPTED = (
    '"git.httpsSecretName" is set, but "git.repo" is an http:// URL, which would send the token unencrypted: set an '
    "https:// URL"
)
DISABLED = (
    '"enabled" is false, which only works in an umbrella chart: add condition: hcm-db-migrations.enabled to the '
    "umbrella's Chart.yaml, or do not install this chart"
)


def _replayed(command: str) -> str:
    return (
        f'"args" is a {command} and "hook" is "": helm rollback, or a tool that applies an older state, would run this '
        'Job again: set "hook" to pre-install,pre-upgrade for this one upgrade'
    )


def _unprintable(path: str, escaped: str) -> str:
    return f'"{path}" contains the unprintable character "{escaped}": remove it'


def _replaced(path: str) -> str:
    return f'"{path}" contains $( or $$, which Kubernetes would replace: remove it'


def _reference(variable: str) -> dict[str, Any]:
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}


def _literals(*names: str) -> str:
    return (
        f'"extraEnv" sets secrets ({", ".join(names)}) as literals, which everyone who can read the release or the Job '
        "would see: put each into a Secret and reference it\n\n    extraEnv:\n"
        f"      - {{name: {names[0]}, valueFrom: {{secretKeyRef: {{name: <Secret>, key: <key>}}}}}}\n"
    )


def _hook_annotation(path: str, name: str) -> str:
    return f'"{path}" contains "{name}", which the chart sets: remove it, and set "hook"'


def _null(path: str) -> str:
    return (
        f'"{path}" is null, which removes the default: set a value, or leave it out (after --reuse-values of an older'
        " chart: use --reset-then-reuse-values)"
    )


def _unexpanded(name: str) -> str:
    return (
        f'"extraEnv" sets {name} with $(...), which git-sync would get unexpanded: put the whole URL into a Secret and '
        "reference it by valueFrom"
    )


def _owned(name: str) -> str:
    return (
        f'"extraPodSpec" contains "{name}", which the chart sets, or leaves unset for the pod\'s isolation: remove it, '
        "or set the chart's value of that name"
    )


def _relative(value: str) -> str:
    return (
        f'"args" contains "{value}", which is relative to the current revision, and Kubernetes may run a Job\'s pod '
        'twice: name the revision, such as [downgrade, "002"]'
    )


def _path(value: str) -> str:
    return (
        f'"git.path" is "{value}": set a folder relative to the repository\'s root, such as '
        'utilities/hcm-db-migrations, or . for the root (no .., space or * ? [ ] ! \\ ")'
    )


def _extra_env(*names: str) -> str:
    return (
        f'"extraEnv" has duplicate or reserved variable names ({", ".join(names)}): define each variable once, and '
        "none of EXPECTED, GIT_COMMIT, GIT_PATH, GIT_REF, GIT_REPO, JOB_COMPLETION_INDEX, NAMESPACE, POSITION_FILE, "
        "REQUIRED, REQUIREMENTS, USERNAME_FILE"
    )


def _no_image(path: str) -> str:
    return f'"{path}" has neither tag nor digest, and would be unpinned: set "{path}.tag" or "{path}.digest"'


def _hook(value: str) -> str:
    allowed = 'set pre-install,pre-upgrade or post-install,post-upgrade, or "" for an ordinary Job'
    return f'"hook" contains "{value}": {allowed}'


def _twice(path: str) -> str:
    return (
        f'"{path}" and "hcm-db-migrations.{path}" are set to different values: set only one of them '
        f"(on the command line: --set hcm-db-migrations.{path}=...)"
    )


KANO = {"name": "kano", "schema": "ng_kano"}


def _fleet(*targets: dict, **more: Any) -> dict[str, Any]:
    return {**MINIMAL, "targets": list(targets), **more}


def _same_name(name: str) -> str:
    return f'"targets" has two entries with the name "{name}": rename one'


def _same_database(one: str, other: str) -> str:
    return (
        f'"targets" has two entries with the same database and schema, "{one}" and "{other}": remove one, or set its '
        '"schema", "configMap" or "port"'
    )


def _unprintable_schema(escaped: str) -> str:
    return f'"targets" contains the unprintable character "{escaped}", in the schema of "kano": remove it'


def _not_a_target(name: str) -> str:
    return f'"rollout.only" contains "{name}", which is no name in "targets": set one of their names, or [] for all'


def _set_twice(variable: str, field: str) -> str:
    return f'"extraEnv" sets {variable} for all of "targets", and some have their own "{field}": remove one of the two'


def _taken(path: str) -> str:
    return f'"extraVolumeMounts" contains "{path}", where the pods of "targets" have their own: set another path'


def _long_name(name: str) -> str:
    return (
        f'the name "{name}" has more than 41 characters, which is too long for the pods of "targets": set '
        '"fullnameOverride"'
    )


CANARY_WITHOUT_HOOKS = (
    '"rollout.canary" needs hooks, which run one Job after the other, and "hook" is "": set "rollout.canary" to 0'
)


def _too_many(size: int) -> str:
    return (
        f'"targets" takes {size} bytes in the pod\'s annotation, which holds 250000: divide them among several releases'
    )


def _too_slow(seconds: int) -> str:
    return (
        f'"targets" may take {seconds} s with these deadlines, retries and parallelism, which is more than 7 days, and '
        'no --timeout of Helm should be that long: raise "rollout.parallelism", lower "job.activeDeadlineSeconds" or '
        '"job.backoffLimit", or divide them among several releases'
    )


def _message(*problems: str) -> str:
    return (
        "\n\nInvalid values for hcm-db-migrations:\n\n- "
        + "\n- ".join(problems)
        + '\n\nSee "Values" in README.md of the chart (helm show readme).\n'
    )


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ['"git.repo" and "git.branch" are' + ADD]),
    ({"git": {"repo": REPO}}, ['"git.branch" is' + ADD]),
    ({"git": {"branch": "main"}}, ['"git.repo" is' + ADD]),
    (nested("args", ["downgrade", "-1"]), [_relative("-1")]),
    (nested("args", ["upgrade", "+2"]), [_relative("+2")]),
    (nested("git.repo", "github.com/owner/name"), [ADDRESS]),
    (nested("git.repo", "/srv/git/schema"), [ADDRESS]),
    (nested("git.repo", "https://user:s3cret@git.example.org/schema"), [CREDENTIALS]),
    (nested("git.repo", "https://user@git.example.org/schema"), [CREDENTIALS]),
    (nested("git.repo", "https://git.example.org/schema?access_token=s3cret"), [CREDENTIALS]),
    (nested("git.repo", "ssh://git:s3cret@git.example.org/schema"), [CREDENTIALS]),
    (nested("git.repo", "git:s3cret@git.example.org:schema"), [ADDRESS]),
    (nested("git.repo", "https://git.example.org/sch ema"), [ADDRESS]),
    (nested("git.repo", "https://git.example.org/schema\n"), [ADDRESS]),
    (nested("git.repo", "git@git.example.org:schema\n--upload-pack=x"), [ADDRESS]),
    (nested("git.repo", "https://git.example.org"), [ADDRESS]),
    (nested("image", {"tag": ""}), [_no_image("image")]),
    (nested("image", {"tag": None}), [_no_image("image")]),
    (nested("git.image", {"tag": None, "digest": None}), [_no_image("git.image")]),
    (nested("extraEnv", [{"name": "A", "value": "s3cret"}, {"name": "B"}, {"name": "A"}]), [_extra_env("A")]),
    (
        nested("extraEnv", [{"name": name} for name in ("GIT_REPO", "REQUIRED", "HOME", "GIT_REPO")]),
        [_extra_env("GIT_REPO", "REQUIRED")],
    ),
    ({"git": {"repo": "git@host:a", "branch": "main", "httpsSecretName": "token"}}, [HTTPS_ONLY]),
    ({"git": {"repo": "ssh://git@host/a", "branch": "main", "ca": {"secretName": "ca"}}}, [HTTPS_ONLY]),
    (nested("git.ca", {"configMapName": "a", "secretName": "b"}), [TWO_CA]),
    (nested("git.branch", "0a1b2c3"), [ABBREVIATED]),
    (nested("git.path", "/utilities"), [_path("/utilities")]),
    (nested("git.path", "a/../b"), [_path("a/../b")]),
    (nested("git.path", "a/*"), [_path("a/*")]),
    (nested("git.path", "a[1]"), [_path("a[1]")]),
    (nested("git.path", "a b"), [_path("a b")]),
    (nested("hook", "pre-delete"), [_hook("pre-delete")]),
    (nested("hook", "pre-install,Sync"), [_hook("Sync")]),
    (nested("hook", "pre-install,pre-upgrade,"), [_hook("")]),
    (nested("hook", ","), [_hook("")]),
    (nested("hook", " "), [_hook(" ")]),
    (nested("hook", "pre-install, pre-upgrade"), [_hook(" pre-upgrade")]),
    (nested("args", ["downgrade", "b@-1"]), [_relative("b@-1")]),
    (nested("args", ["-x", "a=b", "upgrade", "001:+2", "--sql"]), [_relative("001:+2")]),
    *(
        ({**MINIMAL, "hook": "", "args": [*options, command, "001"]}, [_replayed(command)])
        for command in ("downgrade", "stamp")
        for options in ([], ["-x", "tenant=a"], ["--raiseerr"], ["-n", "other", "-c", "other.ini"])
    ),
    (nested("args", ["upgrade", "$(DB_PASSWORD)"]), [_replaced("args")]),
    (nested("args", ["-x", "url=postgresql://user:s3cret@host/db", "upgrade", "head"]), [ARGUMENT]),
    (nested("args", ["-x", "db_password=s3cret", "upgrade", "head"]), [ARGUMENT]),
    (nested("args", ["upgrade", "he\u200bad"]), [_unprintable("args", "\\u200b")]),
    (nested("args", ["revision", "-m", "costs 5 $$"]), [_replaced("args")]),
    (nested("git.repo", "https://git.example.org/$(DB_PASSWORD)"), [_replaced("git.repo")]),
    (nested("git.branch", "$(DB_PASSWORD)"), [_replaced("git.branch")]),
    (nested("git.path", "a/$(DB_PASSWORD)"), [_replaced("git.path")]),
    (nested("requirements", "$(DB_PASSWORD).txt"), [_replaced("requirements")]),
    (nested("git.path", "a\u2028b"), [_unprintable("git.path", "\\u2028")]),
    (nested("git.path", "a\u00a0b"), [_unprintable("git.path", "\\u00a0")]),
    (nested("git.branch", "ma\u202ein"), [_unprintable("git.branch", "\\u202e")]),
    (nested("git.branch", "main\x01"), [_unprintable("git.branch", "\\x01")]),
    (nested("git.repo", "https://git.example.org/a\u200bb"), [_unprintable("git.repo", "\\u200b")]),
    (nested("requirements", "a\ufeff.txt"), [_unprintable("requirements", "\\ufeff")]),
    ({"git": {"repo": "http://host/a", "branch": "main", "httpsSecretName": "token"}}, [UNENCRYPTED]),
    *(
        (nested("extraEnv", [{"name": "A", "value": "x"}, {"name": name, "value": value}]), [_literals(name)])
        for name, value in [
            ("DB_PASSWORD", "s3cret"),
            ("PGPASSWORD", "s3cret"),
            ("GIT_TOKEN", "s3cret"),
            ("aws_secret_access_key", "s3cret"),
            ("SMTP_PASS", "$(DB_USER)s3cret"),
            ("DATABASE_URL", "postgresql://user:s3cret@host/db"),
            ("DATABASE_URL", "postgresql://user:s3/cret@host:5432/db"),
            ("DATABASE_URL", "postgresql://$(DB_USER):s3cret@host/db"),
            ("DATABASE_URL", "postgresql://host:5432/db?sslmode=require&password=s3cret"),
            ("PIP_INDEX_URL", "https://user:s3cret@mirror.example.org/simple"),
            ("PIP_INDEX_URL", "https://s3cret@mirror.example.org/simple"),
            ("https_proxy", "http://user:s3cret@proxy:3128"),
            ("HTTPS_PROXY", "user:s3cret@proxy:3128"),
            ("ALL_PROXY", "socks5://s3cret@proxy"),
            ("DATABASE_URL", "postgresql://user:12345#s3cret@host/db"),
            ("DATABASE_URL", "postgresql://user:1/s3cret@host/db"),
            ("INDEX", "https://mirror.example.org/simple?token=s3cret"),
            ("DSN", "host=db password = s3cret"),
            ("DB_PASSWORD_PROD", "s3cret"),
            ("JWT_SECRET_KEY", "s3cret"),
            ("DBPASS", "s3cret"),
            ("FERNET_KEY", "s3cret"),
            ("SIGNING_KEY", "/9j/s3cret=="),
            ("HTTP_AUTHORIZATION", "Bearer s3cret"),
            ("GIT", "ghp_s3crets3crets3crets3cret"),
            ("INDEX", "https://mirror.example.org/simple?private_token=s3cret"),
            ("SETTINGS", "-----BEGIN RSA PRIVATE KEY-----s3cret"),
        ]
    ),
    (
        nested("extraEnv", [{"name": "HTTPS_PROXY", "value": "http://$(PROXY_USER):$(PROXY_PASSWORD)@proxy:3128"}]),
        [_unexpanded("HTTPS_PROXY")],
    ),
    (
        nested("extraEnv", [{"name": "PGPASSWORD", "value": "s3cret"}, {"name": "API_KEY", "value": "s3cret"}]),
        [_literals("PGPASSWORD", "API_KEY")],
    ),
    (nested("commonAnnotations", {"helm.sh/hook": "x"}), [_hook_annotation("commonAnnotations", "helm.sh/hook")]),
    (
        nested("job.annotations", {"helm.sh/hook-delete-policy": "hook-failed"}),
        [_hook_annotation("job.annotations", "helm.sh/hook-delete-policy")],
    ),
    *((nested("extraPodSpec", {name: []}), [_owned(name)]) for name in ("containers", "hostNetwork", "tolerations")),
    (_fleet(KANO, {"name": "kano", "schema": "x"}), [_same_name("kano")]),
    (_fleet(KANO, {"name": "x.y", "schema": "ng_kano"}), [_same_database("kano", "x.y")]),
    (_fleet(KANO, KANO), [_same_name("kano"), _same_database("kano", "kano")]),
    *(
        (_fleet({**KANO, "schema": f"a{character}b"}), [_unprintable_schema(escaped)])
        for character, escaped in [
            ("\x07", "\\a"),
            ("\t", "\\t"),
            ("\n", "\\n"),
            ("\u00a0", "\\u00a0"),
            ("\u200b", "\\u200b"),
            ("\u2028", "\\u2028"),
            ("\u202e", "\\u202e"),
        ]
    ),
    ({**MINIMAL, "rollout": {"only": ["kano"]}}, [_not_a_target("kano")]),
    (_fleet(KANO, rollout={"only": ["kano", "lagos", "x.y"]}), [_not_a_target("lagos"), _not_a_target("x.y")]),
    *(
        (_fleet(KANO, {"name": "a", **own}, extraEnv=[_reference(variable)]), [_set_twice(variable, field)])
        for variable, field, own in [
            ("DB_SCHEMA", "schema", {}),
            ("DB_PORT", "port", {"port": 1}),
            ("DB_HOST", "configMap", {"configMap": {"nameKey": "x"}}),
            ("DB_NAME", "configMap", {"configMap": {"name": "x"}}),
            ("DB_USER", "secret", {"secret": {"name": "x"}}),
            ("DB_PASSWORD", "passwordKey", {"secret": {"passwordKey": "x"}}),
            ("DATABASE_URL", "port", {"port": 1}),
            ("DATABASE_URL", "configMap", {"configMap": {"name": "x"}}),
            ("DATABASE_URL", "secret", {"secret": {"passwordKey": "x"}}),
        ]
    ),
    *(
        (_fleet(KANO, extraVolumeMounts=[{"name": "x", "mountPath": path}]), [_taken(path)])
        for path in ("/etc/target", "//etc/./target/", "etc/target/DB_HOST")
    ),
    (_fleet(KANO, fullnameOverride="a" * 42), [_long_name("a" * 42)]),
    (_fleet(KANO, hook=""), [CANARY_WITHOUT_HOOKS]),
    (_fleet(*({"name": f"t{at:04}", "schema": "s" * 40 + str(at)} for at in range(4000))), [_too_many(258891)]),
    (_fleet(KANO, job={"activeDeadlineSeconds": 86400, "backoffLimit": 6}), [_too_slow(692120)]),
    (
        _fleet(*({"name": f"t{at}", "schema": f"t{at}"} for at in range(1200)), rollout={"parallelism": 1}),
        [_too_slow(636310)],
    ),
    (nested("enabled", False), [DISABLED]),
    (
        {"git": {"path": ".."}, "hook": "x", "enabled": False},
        ['"git.repo" and "git.branch" are' + ADD, _path(".."), _hook("x"), DISABLED],
    ),
]


@pytest.mark.parametrize(("values", "problems"), REFUSED)
def test_a_mistake_has_one_message(helm: Helm, values: dict, problems: list[str]) -> None:
    refused = helm.refuse(values)
    assert _message(*problems) in refused
    assert "s3cret" not in refused


@pytest.mark.parametrize(("values", "problems"), REFUSED)
def test_a_nested_mistake_has_the_same_message(helm4: Helm, values: dict, problems: list[str]) -> None:
    refused = helm4.refuse({"hcm-db-migrations": values})
    assert _message(*problems) in refused
    assert "s3cret" not in refused


EGOV = {"configMap": {"name": "egov-config", "hostKey": "db-host", "nameKey": "db-name"}}


@pytest.mark.fault(
    "Code and settings",
    fault="Two entries of `targets` are one database and schema",
    sees='`"targets" has two entries with the same database and schema, "<name>" and "<name>": remove one, ...`',
    state="Nothing was changed",
    do="Follow the message, deploy again",
)
@pytest.mark.parametrize(
    ("one", "other", "more"),
    [
        ({}, {}, {}),
        ({"schema": "s"}, {"schema": "s"}, {}),
        ({}, {"port": 5432}, {}),
        ({"port": 6432}, {}, {"db": {"port": 6432, "configMap": {"name": "x"}}}),
        ({}, {"secret": {"passwordKey": "x"}}, {}),
        ({"schema": "s"}, {"schema": "s", "secret": {"name": "x", "usernameKey": "y"}}, {}),
        ({}, {"configMap": {"name": "egov-config"}}, {}),
        ({"schema": "s", **EGOV}, {"schema": "s", "configMap": {"nameKey": "db-name"}}, {}),
        ({"configMap": {"name": "x"}, "port": 5432}, {"configMap": {"nameKey": "db-name", "name": "x"}}, {}),
    ],
)
def test_two_targets_of_one_database_are_refused(helm4: Helm, one: dict, other: dict, more: dict) -> None:
    refused = helm4.refuse(_fleet({"name": "a", **one}, KANO, {"name": "b_c", **other}, **more))
    assert _message(_same_database("a", "b_c")) in refused


@pytest.mark.parametrize(
    "differs",
    [
        {"schema": "S"},
        {"schema": "s "},
        {"port": 5433},
        {"configMap": {"name": "x"}},
        {"configMap": {"hostKey": "x"}},
        {"configMap": {"nameKey": "x"}},
    ],
)
def test_two_databases_are_two_targets(helm4: Helm, differs: dict) -> None:
    helm4.render({"targets": [{"name": "a", "schema": "s"}, {"name": "b", "schema": "s", **differs}]})


@pytest.mark.parametrize("secret", [{"name": "x"}, {"usernameKey": "x"}])
def test_two_roles_may_have_two_schemas(helm4: Helm, secret: dict) -> None:
    helm4.render({"targets": [{"name": "a"}, {"name": "b", "secret": secret}]})


@pytest.mark.parametrize(
    ("target", "variable"),
    [
        ({"schema": "s"}, "DATABASE_URL"),
        ({"schema": "s"}, "DB_HOST"),
        ({"port": 1}, "DB_SCHEMA"),
        ({"secret": {"name": "x"}}, "DB_PASSWORD"),
        ({"configMap": {"name": "x"}}, "PGSSLMODE"),
    ],
)
def test_a_variable_that_no_target_has_is_that_of_all(helm4: Helm, target: dict, variable: str) -> None:
    helm4.render({"targets": [{"name": "a", **target}], "extraEnv": [_reference(variable)]})


@pytest.mark.parametrize(
    "repo",
    [
        "https://git.example.org:8443/a/b.git",
        "http://server.hcm-fixtures/git/a.git",
        "https://[::1]/a",
        "https://git.example.org/@scope/a:b",
        "git@github.com:owner/name",
        "org-1_a.b@host:~a/b",
        "ssh://host/a",
        "ssh://git@host:2222/~/a",
    ],
)
def test_a_url_that_git_understands_is_accepted(helm: Helm, repo: str) -> None:
    helm.render(nested("git.repo", repo))


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("hook", "hook"),
        ("requirements", "requirements"),
        ("image", "image"),
        ("image.repository", "image.repository"),
        ("git.filter", "git.filter"),
        ("db.secret", "db.secret"),
        ("job.activeDeadlineSeconds", "job.activeDeadlineSeconds"),
    ],
)
def test_a_null_that_removes_a_default_is_named(helm: Helm, path: str, named: str) -> None:
    values = nested(path, None)
    assert _message(_null(named)) in helm.refuse(values)
    del values["git"]["repo"], values["git"]["branch"]
    assert _message(_null(named)) in helm.refuse({**values, "hcm-db-migrations": MINIMAL})


def _paths(values: dict, path: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{path}{key}.")


def test_no_null_ends_in_an_error_of_a_template(helm4: Helm) -> None:
    for path in _paths(yaml.safe_load((CHART / "values.yaml").read_text())):
        null: dict[str, Any] = functools.reduce(lambda value, key: {key: value}, reversed(path.split(".")), None)
        for values in (merged(MINIMAL, null), {**null, "hcm-db-migrations": MINIMAL}):
            result = helm4.template(values)
            if result.returncode:
                ours, of_the_schema = "Invalid values for hcm-db-migrations:", "meet the specifications of the schema"
                assert ours in result.stderr or of_the_schema in result.stderr, f"{path}: {result.stderr}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DB_PASSWORD", ""),
        ("DB_PASSWORD", "$(OTHER)"),
        ("PGPASSFILE", "/etc/pgpass/pgpass"),
        ("DATABASE_URL", "postgresql://$(DB_USER):$(DB_PASSWORD)@$(DB_HOST):$(DB_PORT)/$(DB_NAME)?sslmode=require"),
        ("DATABASE_URL", "postgresql://user@host:5432/db"),
        ("PIP_INDEX_URL", "https://mirror.example.org:8443/@scope/simple"),
        ("PIP_PROXY", "http://$(PROXY_USER):$(PROXY_PASSWORD)@proxy:3128"),
        ("NO_PROXY", ".svc,.example.org,::1"),
        ("HTTPS_PROXY", "http://proxy.example.org:3128"),
        ("DATABASE_URL", "postgresql://h1:5432,h2:5432/db?application_name=a@b"),
        ("REQUIRE_PASSWORD", "true"),
        ("DB_PASSWORD_FILE", "/run/secrets/db"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/var/run/key.json"),
        ("SSH_PRIVATE_KEY", "/etc/ssh/key"),
        ("TOKEN_TTL", "60"),
        ("OAUTH_TOKEN_URL", "https://login.example.org/token"),
        ("DB_SECRET_ARN", "arn:aws:secretsmanager:x"),
        ("PASSWORD_ENCRYPTION", "scram-sha-256"),
        ("MAX_TOKENS", "10"),
        ("ACCESS_TOKEN_EXPIRE_MINUTES", "5"),
        ("IMAGE", "oci://registry.example.org:5000/x@sha256:0123"),
    ],
)
def test_a_literal_that_is_not_a_secret_is_accepted(helm: Helm, name: str, value: str) -> None:
    found = helm.render({"extraEnv": [{"name": name, "value": value}]})
    assert environment(migrate(found))[name] == value


def test_a_secret_by_reference_is_accepted(helm: Helm) -> None:
    reference = {"secretKeyRef": {"name": "migrations", "key": "password"}}
    found = helm.render({"extraEnv": [{"name": "PGPASSWORD", "valueFrom": reference}]})
    assert environment(migrate(found))["PGPASSWORD"] == reference


@pytest.mark.parametrize(
    "branch", ["1234567", "deadbeef", "20251201", "v1.0", "release/1.0", "refs/heads/0a1b2c3", "0a" * 20]
)
def test_a_branch_a_tag_and_a_full_commit_are_accepted(helm: Helm, branch: str) -> None:
    helm.render(nested("git.branch", branch))


@pytest.mark.parametrize(
    ("above", "below", "paths"),
    [
        (nested("git.branch", "hotfix"), MINIMAL, ["git.branch"]),
        ({"args": ["stamp", "head"]}, {**MINIMAL, "args": ["downgrade", "001"]}, ["args"]),
        ({"db": {"port": 6432}}, {**MINIMAL, "db": {"port": 6433, "secret": {"name": "other"}}}, ["db.port"]),
        ({"podLabels": {"a": "1"}}, {**MINIMAL, "podLabels": {"a": "2"}}, ["podLabels.a"]),
        ({"job": {"backoffLimit": 0}}, {**MINIMAL, "job": {"backoffLimit": 2}}, ["job.backoffLimit"]),
        (
            {"job": {"ttlSecondsAfterFinished": 60}},
            {**MINIMAL, "job": {"ttlSecondsAfterFinished": None}},
            ["job.ttlSecondsAfterFinished"],
        ),
        (
            {"git": {"knownHosts": False}, "requirements": ""},
            {**nested("git.knownHosts", True), "requirements": "r.txt"},
            ["git.knownHosts", "requirements"],
        ),
        ({"targets": [KANO]}, _fleet({**KANO, "schema": "x"}), ["targets"]),
        (
            {"rollout": {"canary": 2, "only": ["kano"], "maxFailures": 5}},
            _fleet(KANO, rollout={"canary": 3, "only": [], "maxFailures": None}),
            ["rollout.canary", "rollout.maxFailures", "rollout.only"],
        ),
    ],
)
def test_a_value_with_two_different_settings_is_refused(helm: Helm, above: dict, below: dict, paths: list[str]) -> None:
    assert _message(*map(_twice, paths)) in helm.refuse({**above, "hcm-db-migrations": below})


@pytest.mark.parametrize(
    "above",
    [MINIMAL, {"git": {"branch": "main"}}, {"git": {"path": "a"}}, {"podLabels": {"b": "1"}}, {"db": {"port": 5432}}],
)
def test_values_beside_the_nested_form_are_merged_unless_they_conflict(helm: Helm, above: dict) -> None:
    below = copy.deepcopy(MINIMAL) | {"podLabels": {"a": "1"}}
    both = copy.deepcopy(below)
    both["git"] = {**below["git"], **above.get("git", {})}
    both["podLabels"] = {**below["podLabels"], **above.get("podLabels", {})}
    assert helm.objects({**above, "hcm-db-migrations": below}) == helm.objects(both)


def test_a_secret_that_is_set_twice_is_not_shown(helm: Helm) -> None:
    def values(secret: str) -> list[dict]:
        return [{"name": "DATABASE_URL", "value": secret}]

    refused = helm.refuse(
        {"extraEnv": values("s3cret"), "hcm-db-migrations": {**MINIMAL, "extraEnv": values("s3cret2")}}
    )
    assert _message(_twice("extraEnv")) in refused
    assert "s3cret" not in refused


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"gti": {}}, "gti"),
        (nested("git.brnach", "main"), "brnach"),
        (nested("git.branch", 1.1), "branch"),
        (nested("git.branch", "-x"), "branch"),
        (nested("git.filter", "blob none"), "filter"),
        (nested("git.filter", "none"), "filter"),
        (nested("git.branch", "--upload-pack=x"), "branch"),
        (nested("git.branch", "a*"), "branch"),
        (nested("git.branch", "a\nb"), "branch"),
        (nested("git.branch", "a b"), "branch"),
        (nested("git.knownHosts", "false"), "knownHosts"),
        (nested("git.secretName", ""), "secretName"),
        (nested("image.tag", 3.1), "tag"),
        (nested("image.digest", "sha256:abc"), "digest"),
        (nested("image.pullPolicy", "Sometimes"), "pullPolicy"),
        (nested("requirements", "/etc/passwd"), "requirements"),
        (nested("args", "upgrade head"), "args"),
        (nested("args", []), "args"),
        (nested("db.port", "5432"), "port"),
        (nested("db.port", 70000), "port"),
        (nested("db.secret.name", "Not_A_Name"), "name"),
        (nested("db.configMap.hostKey", "a b"), "hostKey"),
        (nested("job.activeDeadlineSeconds", 5), "activeDeadlineSeconds"),
        (nested("job.backoffLimit", -1), "backoffLimit"),
        (nested("job.ttlSecondsAfterFinished", 1.5), "ttlSecondsAfterFinished"),
        (nested("namespace", "Health"), "namespace"),
        (nested("fullnameOverride", "a" * 54), "fullnameOverride"),
        (nested("resources", {"limits": {"memory": "much"}}), "memory"),
        (nested("podLabels", {"a": 1}), "podLabels"),
        (nested("podLabels", {"a": "b c"}), "podLabels"),
        (nested("extraEnv", [{"value": "x"}]), "extraEnv"),
        (nested("extraEnv", [{"name": "A", "value": 1}]), "extraEnv"),
        (nested("extraEnv", [{"name": "A", "value": "1", "valueFrom": {"fieldRef": {}}}]), "extraEnv"),
        (nested("db.secret.passwordKey", "..data"), "passwordKey"),
        (nested("resources", {"limits": {"gpu": 1}}), "gpu"),
        (nested("image.repository", "example.org/python:3.13"), "repository"),
        (nested("nodeSelector", {"a": "b c"}), "nodeSelector"),
        (nested("tolerations", [{"operator": "Equal", "value": "x"}]), "tolerations"),
        (nested("affinity", {"podAfinity": {}}), "podAfinity"),
        (nested("podSecurityContext", {"runAsNonroot": True}), "runAsNonroot"),
        (nested("securityContext", {"privileged": True}), "privileged"),
        (nested("extraVolumeMounts", [{"name": "a", "mountPath": "/workspace/git"}]), "extraVolumeMounts"),
        (nested("securityContext", {"seccompProfile": {"type": "Localhost"}}), "seccompProfile"),
        (nested("extraVolumeMounts", [{"name": "a", "mountPath": "/a", "readonly": True}]), "readonly"),
        *(
            (nested("extraVolumeMounts", [{"name": "a", "mountPath": path}]), "mountPath")
            for path in (
                "/workspace",
                "//workspace/",
                "/./workspace",
                "workspace",
                "/x/../workspace",
                "/x/..",
                "../x",
                "/",
                ".",
                " /workspace",
            )
        ),
        *(
            (nested(key, [{"name": name, **rest}]), key)
            for name in ("git", "git-home", "workspace")
            for key, rest in (("extraVolumes", {"emptyDir": {}}), ("extraVolumeMounts", {"mountPath": "/x"}))
        ),
        (nested("job.ttlSecondsAfterFinished", 0), "ttlSecondsAfterFinished"),
        (nested("job.ttlSecondsAfterFinished", 59), "ttlSecondsAfterFinished"),
        (nested("commonLabels", {"a": "b c"}), "commonLabels"),
        (nested("job.annotations", {"a": 1}), "annotations"),
        (nested("extraPodSpec", []), "extraPodSpec"),
        (_fleet({"schema": "x"}), "name"),
        *(
            (_fleet({"name": name}), "name")
            for name in ("", "Kano", "_kano", "a b", "a.", "-a", "a" * 64, "a\n", "$(X)", 1, None, True)
        ),
        *((_fleet({"name": "a", "schema": schema}), "schema") for schema in ("", "s" * 64, 1, None, ["a"])),
        *((_fleet({"name": "a", "port": port}), "port") for port in (0, 65536, "5432", 1.5, None)),
        (_fleet({"name": "a", "shcema": "x"}), "shcema"),
        (_fleet({"name": "a", "host": "x"}), "host"),
        (_fleet({"name": "a", "configMap": {}}), "configMap"),
        (_fleet({"name": "a", "configMap": None}), "configMap"),
        (_fleet({"name": "a", "configMap": {"hostkey": "x"}}), "hostkey"),
        (_fleet({"name": "a", "configMap": {"nameKey": "../x"}}), "nameKey"),
        (_fleet({"name": "a", "secret": {}}), "secret"),
        (_fleet({"name": "a", "secret": {"name": "A"}}), "secret"),
        (_fleet({"name": "a", "secret": {"password": "s3cret"}}), "password"),
        (nested("targets", {"kano": {}}), "targets"),
        (nested("targets", ["kano"]), "targets"),
        (nested("rollout.canary", -1), "canary"),
        (nested("rollout.canary", 10001), "canary"),
        (nested("rollout.canary", "1"), "canary"),
        (nested("rollout.parallelism", 0), "parallelism"),
        (nested("rollout.parallelism", 1001), "parallelism"),
        (nested("rollout.maxFailures", -1), "maxFailures"),
        (nested("rollout.maxFailures", "all"), "maxFailures"),
        (nested("rollout.only", "kano"), "only"),
        (nested("rollout.only", [1]), "only"),
        (nested("rollout.onyl", []), "onyl"),
        *((nested("extraVolumes", [{"name": name, "emptyDir": {}}]), "extraVolumes") for name in ("targets", "api")),
    ],
)
def test_the_schema_names_the_key_of_what_it_refuses(helm: Helm, values: dict, key: str) -> None:
    refused = helm.refuse(values)
    assert "values don't meet the specifications of the schema" in refused
    assert key in refused


WRONG = {
    str: st.one_of(st.integers(), st.booleans(), st.lists(TEXT)),
    int: st.one_of(TEXT, st.floats(1, 2).filter(lambda number: number % 1), st.lists(st.integers())),
    bool: st.one_of(TEXT, st.integers()),
    list: st.one_of(TEXT, st.integers(), st.lists(st.integers(), min_size=1)),
    dict: st.one_of(TEXT, st.integers(), st.lists(TEXT)),
}


@pytest.mark.fault(
    "Code and settings",
    fault="A value of the chart has a wrong type, or a key is misspelt",
    sees="`values don't meet the specifications of the schema`, with the key",
    state="Nothing was changed",
    do="Fix the value: [Values](../charts/hcm-db-migrations/README.md#values)",
)
def test_any_value_of_a_wrong_type_and_any_unknown_key_is_refused_by_name(helm: Helm) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        path, default, _ = data.draw(st.sampled_from(docs.documented()))
        parent, _, key = path.rpartition(".")
        if data.draw(st.booleans(), "misspelt"):
            key = data.draw(st.from_regex("[a-z]{1,9}_", fullmatch=True))
        wrong = nested(f"{parent}.{key}".lstrip("."), data.draw(WRONG[type(default)]))
        refused = helm.refuse({"hcm-db-migrations": wrong} if data.draw(st.booleans(), "below") else wrong)
        assert "values don't meet the specifications of the schema" in refused
        assert key in refused

    check()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"gti": {}}, "gti"),
        (nested("git.brnach", "x"), "brnach"),
        ({"db": {"port": "x"}}, "port"),
        ({"args": []}, "args"),
    ],
)
def test_the_schema_is_as_strict_below_the_nested_key(helm: Helm, values: dict, key: str) -> None:
    assert key in helm.refuse({"hcm-db-migrations": values, "egov-user": {}})


def test_keys_of_other_charts_are_allowed_beside_the_nested_form(helm: Helm) -> None:
    others = {"global": {"domain": "x"}, "egov-user": {"replicas": 1}, "cluster-configs": {"db": {"port": "x"}}}
    assert helm.objects({"hcm-db-migrations": MINIMAL, **others}) == helm.render()
    assert helm.objects({"hcm-db-migrations": {**MINIMAL, "enabled": True, "global": {}}}) == helm.render()
    assert helm.objects({**MINIMAL, "global": {"domain": "x"}, "enabled": True}) == helm.render()


def test_a_key_beside_the_nested_form_with_the_name_of_a_value_is_that_value(helm: Helm) -> None:
    found = helm.objects({"namespace": "egov", "hcm-db-migrations": MINIMAL})
    assert {document["metadata"]["namespace"] for document in found} == {"egov"}
    assert "registry" in helm.refuse({"image": {"registry": "x"}, "hcm-db-migrations": MINIMAL})


def test_the_notes_say_what_ran_and_how_to_see_it(helm4: Helm) -> None:
    """Helm 3 needs a cluster to print notes."""
    assert _notes(helm4, {}) == (
        "alembic upgrade head has run (hook pre-install,pre-upgrade) with the code of main from "
        "https://git.example.org/schema.\n"
        "Its Job hcm-db-migration-1 in namespace health has been deleted. Helm 3.18 and newer have printed its log.\n"
        "\nA failed Job and its log are kept:\n"
        "\n    kubectl logs job/hcm-db-migration-1 -n health\n"
        "\nIs the database at the current head of main?\n"
        "\n    helm test hcm-db-migrations -n health\n\n"
        "Python 3.10 has had no security fixes since 2026-10. "
        'Set image.tag to "3.13-slim" if the requirements support it.'
    )


def test_the_notes_of_a_hook_that_is_for_upgrades_only_do_not_say_that_it_has_run(helm4: Helm) -> None:
    notes = _notes(helm4, {"hook": "pre-upgrade"})
    assert notes.startswith("Nothing has run: the hook pre-upgrade does not run on install. ")
    assert "has run (" not in notes


def test_the_notes_of_an_ordinary_job_do_not_say_that_it_has_run(helm4: Helm) -> None:
    notes = _notes(helm4, {"hook": "", "image": {"tag": "3.13-slim"}}).splitlines()
    job = notes[0].split()[1]
    assert notes == [
        f"Job {job} in namespace health runs alembic upgrade head with the current code of main from "
        "https://git.example.org/schema.",
        "It re-runs when values change, not when the branch moves. Its log, or why it has none:",
        "",
        f"    kubectl logs job/{job} -n health",
        "    kubectl get events -n health",
        "",
        "To retry a failed Job unchanged, delete it and apply again:",
        "",
        f"    kubectl delete job {job} -n health",
    ]


def test_the_notes_of_an_image_that_has_a_digest_only_are_printed(helm4: Helm) -> None:
    notes = _notes(helm4, {"image": {"tag": None, "digest": f"sha256:{'0' * 64}"}})
    assert notes.endswith("helm test hcm-db-migrations -n health")


def _notes(helm: Helm, values: dict) -> str:
    options = ("-n", "health", "-f", "-", "--dry-run=client")
    done = helm.run("install", "hcm-db-migrations", CHART, *options, stdin=json.dumps({**MINIMAL, **values}))
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("\nNOTES:\n")[2].strip()
