"""Several targets: the Jobs that migrate them, what each pod gets, and what a target may contain."""

from __future__ import annotations

import ast
import gzip
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chart import MINIMAL, Helm, Objects, containers, environment, one
from tests.support.programs import Result
from tools.paths import CHART

Target = dict[str, Any]
KANO, LAGOS, OYO = ({"name": name, "schema": f"ng_{name}"} for name in ("kano", "lagos", "oyo"))
THREE = {"targets": [KANO, LAGOS, OYO]}
KENYA = {"name": "kenya", "configMap": {"name": "db-kenya"}, "secret": {"name": "db-kenya"}}
API = "api"  # the volume with the token
JOB = "hcm-db-migration-1"


def _jobs(objects: Objects) -> dict[str, dict[str, Any]]:
    """The Jobs by name, without that of helm test."""
    found = {document["metadata"]["name"]: document for document in objects if document["kind"] == "Job"}
    found.pop("hcm-db-migration-test", None)
    return found


def _spec(job: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = job["spec"]["template"]["spec"]
    return spec


def _part(job: dict[str, Any]) -> dict[str, str]:
    """What the container "rollout" knows about its Job."""
    found = environment(containers(job)["rollout"])
    return {name: found[name] for name in ("FIRST", "COUNT", "MAX_FAILURES")}


def _list(job: dict[str, Any]) -> list[Any]:
    """The targets as the container "rollout" reads them."""
    metadata = job["spec"]["template"]["metadata"]
    found: list[Any] = json.loads(metadata["annotations"]["hcm-db-migrations/targets"])
    return found


def _sources(job: dict[str, Any], volume: str = "targets") -> list[dict[str, Any]]:
    """The objects in a projected volume, and their items."""
    (found,) = [each["projected"]["sources"] for each in _spec(job)["volumes"] if each["name"] == volume]
    return found


def _digest(objects: Objects) -> str:
    digest: str = one(objects, "ConfigMap")["data"]["digest"]
    return digest


def test_the_canary_has_its_own_job_before_that_of_the_rest(helm: Helm) -> None:
    found = _jobs(helm.render(THREE))
    assert {name: job["metadata"]["annotations"] for name, job in found.items()} == {
        f"{JOB}-canary": {
            "helm.sh/hook": "pre-install,pre-upgrade",
            "helm.sh/hook-weight": "-1",
            "helm.sh/hook-delete-policy": "before-hook-creation,hook-succeeded",
            "helm.sh/hook-output-log-policy": "hook-failed",
        },
        JOB: {
            "helm.sh/hook": "pre-install,pre-upgrade",
            "helm.sh/hook-weight": "0",
            "helm.sh/hook-delete-policy": "before-hook-creation,hook-succeeded",
            "helm.sh/hook-output-log-policy": "hook-succeeded,hook-failed",
        },
    }
    assert {name: _part(job) for name, job in found.items()} == {
        f"{JOB}-canary": {"FIRST": "0", "COUNT": "1", "MAX_FAILURES": "0"},
        JOB: {"FIRST": "1", "COUNT": "2", "MAX_FAILURES": "0"},
    }
    for job in found.values():
        assert _list(job) == [[name, f"ng_{name}", 0, [], []] for name in ("kano", "lagos", "oyo")]


def test_each_target_has_an_index_with_retries_and_the_last_index_is_the_report(helm: Helm) -> None:
    keys = ("completionMode", "completions", "parallelism", "backoffLimitPerIndex", "podReplacementPolicy")
    for job, completions in zip(_jobs(helm.render(THREE)).values(), (2, 3), strict=True):
        spec = job["spec"]
        assert [spec[key] for key in keys] == ["Indexed", completions, 10, 1, "Failed"]
        assert "backoffLimit" not in spec
        rules = [(rule["action"], rule.get("onExitCodes")) for rule in spec["podFailurePolicy"]["rules"]]
        assert rules == [
            ("Ignore", None),
            *(
                (action, {"containerName": "migrate", "operator": "In", "values": [code]})
                for action, code in (("Ignore", 253), ("FailJob", 254), ("FailIndex", 255))
            ),
        ]


def test_kubernetes_1_28_has_no_retries_per_target(helm: Helm) -> None:
    values = {**THREE, "job": {"backoffLimit": 2}}
    old, new = (_jobs(helm.render(values, "--kube-version", version)) for version in ("1.28.9", "1.29.0-eks-1"))
    assert [job["spec"].get("backoffLimit") for job in old.values()] == [2, 4]
    assert [job["spec"].get("backoffLimitPerIndex") for job in new.values()] == [2, 2]
    for job in old.values():
        assert "backoffLimitPerIndex" not in job["spec"]
        actions = [rule["action"] for rule in job["spec"]["podFailurePolicy"]["rules"]]
        assert actions == ["Ignore", "Ignore", "FailJob", "FailJob"]


@pytest.mark.parametrize(
    ("canary", "parts"),
    [
        (0, {JOB: ("0", "3")}),
        (2, {f"{JOB}-canary": ("0", "2"), JOB: ("2", "1")}),
        (3, {JOB: ("0", "3")}),
        (10000, {JOB: ("0", "3")}),
    ],
)
def test_a_job_without_targets_is_not_rendered(helm: Helm, canary: int, parts: dict) -> None:
    found = _jobs(helm.render({**THREE, "rollout": {"canary": canary, "maxFailures": None}}))
    assert {name: (_part(job)["FIRST"], _part(job)["COUNT"]) for name, job in found.items()} == parts
    assert _part(found[JOB])["MAX_FAILURES"] == ("0" if canary >= 3 else "")  # all are canaries
    policy = [job["metadata"]["annotations"]["helm.sh/hook-output-log-policy"] for job in found.values()]
    assert policy[-1] == "hook-succeeded,hook-failed"  # the report of the last Job is always printed


@pytest.mark.parametrize(
    ("count", "parallelism", "job", "seconds"),
    [
        (1, 1, {}, (260 + 10 + 260) + 260),
        (10, 10, {}, 530 + 260),
        (11, 10, {}, 2 * 530 + 260),
        (30, 1, {"backoffLimit": 0}, 30 * 260 + 260),
        (2, 10, {"backoffLimit": 3, "activeDeadlineSeconds": 600}, 4 * 630 + (10 + 20 + 40) + 630),
        (2, 2, {"backoffLimit": 10}, 11 * 260 + (10 + 20 + 40 + 80 + 160 + 320 + 4 * 600) + 600),
    ],
)
def test_the_jobs_deadline_is_that_of_all_rounds_and_the_report(
    helm4: Helm, count: int, parallelism: int, job: dict, seconds: int
) -> None:
    targets = [{"name": f"t{number}", "schema": f"t{number}"} for number in range(count)]
    values = {"targets": targets, "job": job, "rollout": {"canary": 0, "parallelism": parallelism}}
    (found,) = _jobs(helm4.render(values)).values()
    assert (found["spec"]["activeDeadlineSeconds"], found["spec"]["parallelism"]) == (seconds, parallelism)
    of_a_pod = job.get("activeDeadlineSeconds", 230)
    assert _spec(found)["activeDeadlineSeconds"] == of_a_pod
    assert environment(containers(found)["rollout"])["SECONDS"] == str(of_a_pod)


def test_only_the_named_targets_are_migrated_in_the_order_of_the_list(helm: Helm) -> None:
    found = helm.render({**THREE, "rollout": {"only": ["oyo", "kano"]}})
    assert {name: (_part(job), [name for name, *_ in _list(job)]) for name, job in _jobs(found).items()} == {
        f"{JOB}-canary": ({"FIRST": "0", "COUNT": "1", "MAX_FAILURES": "0"}, ["kano", "oyo"]),
        JOB: ({"FIRST": "1", "COUNT": "1", "MAX_FAILURES": "0"}, ["kano", "oyo"]),
    }
    assert [target[0] for target in _list(_job_of_helm_test(found))] == ["kano", "lagos", "oyo"]
    for everything in ([], None):
        assert helm.render({**THREE, "rollout": {"only": everything}}) == helm.render(THREE)
    assert helm.render(THREE, "--set", "rollout.only=null") == helm.render(THREE)
    for values in (THREE, {"hcm-db-migrations": THREE}):
        option = ("--set-string", "hcm-db-migrations.rollout.only={oyo}")  # as the report says
        assert [target[0] for target in _list(_jobs(helm.render(values, *option))[JOB])] == ["oyo"]


@pytest.mark.parametrize(("limit", "expected"), [(0, "0"), (3, "3"), (None, "")])
@pytest.mark.parametrize("below", [False, True], ids=["top level", "nested"])
def test_the_limit_of_failures_is_that_of_the_rest(helm: Helm, limit: int | None, expected: str, below: bool) -> None:
    values = {**MINIMAL, **THREE, "rollout": {"maxFailures": limit}}
    found = _jobs(helm.objects({"hcm-db-migrations": values} if below else values))
    assert {name: _part(job)["MAX_FAILURES"] for name, job in found.items()} == {f"{JOB}-canary": "0", JOB: expected}


@pytest.mark.parametrize("where", ["job.annotations", "commonAnnotations"])
@pytest.mark.parametrize("weight", [5, -5, 0])
def test_the_order_of_the_hooks_follows_the_jobs_own_weight(helm: Helm, where: str, weight: int) -> None:
    annotations = {"helm.sh/hook-weight": str(weight)}
    values = {"job": {"annotations": annotations}} if where == "job.annotations" else {where: annotations}
    found = [document for document in helm.render({**THREE, **values}) if document["kind"] != "ConfigMap"]
    weights = {
        f"{document['kind']} {document['metadata']['name']}": document["metadata"]["annotations"]["helm.sh/hook-weight"]
        for document in found
    }
    accounts = ("hcm-db-migration-rollout", "hcm-db-migration-test")
    kinds = ("ServiceAccount", "Role", "RoleBinding")
    assert weights == {
        **{f"{kind} {account}": str(weight - 2) for kind in kinds for account in accounts},
        f"Job {JOB}-canary": str(weight - 1),
        f"Job {JOB}": str(weight),
        "Job hcm-db-migration-test": str(weight),
    }


def test_an_ordinary_job_has_no_canary_and_another_name_if_its_targets_change(helm: Helm) -> None:
    def render(*targets: Target) -> Objects:
        return helm.render({"targets": targets, "hook": "", "rollout": {"canary": 0}})

    found = render(KANO, LAGOS)
    (name,) = _jobs(found)
    assert re.fullmatch(r"hcm-db-migration-[0-9a-f]{8}", name)
    assert not any(key.startswith("helm.sh/") for each in found for key in each["metadata"].get("annotations", {}))
    kinds = {document["kind"] for document in found}
    assert kinds == {"Job", "ConfigMap", "ServiceAccount", "Role", "RoleBinding"}
    # The previous Job may run while its successor starts.
    assert "resourceNames" not in one(found, "Role")["rules"][0]
    for changed in ([KANO], [LAGOS, KANO], [KANO, {**LAGOS, "schema": "x"}], [KANO, {**LAGOS, "port": 1}]):
        assert set(_jobs(render(*changed))) != {name}


@pytest.mark.parametrize("option", ["", "--api-versions=batch/v1,batch/v1/Job"], ids=["Helm", "Argo CD"])
def test_the_longest_name_fits_in_a_label_of_its_pods(helm: Helm, option: str) -> None:
    """The pod's host name is the Job's name with the index, and may have 63 characters."""
    found = helm.render({**THREE, "fullnameOverride": "a" * 41}, *filter(None, [option]))
    for job in (*_jobs(found), f"{'a' * 41}-12345-canary"):
        assert len(f"{job}-10000") <= 63, job


def test_the_pods_have_a_service_account_that_may_only_read_their_jobs_and_the_pods(helm: Helm) -> None:
    """That of helm test is another, because it may run during an upgrade."""
    found = helm.render(THREE)
    rollout, test = "hcm-db-migration-rollout", "hcm-db-migration-test"
    expected = {rollout: ("pre-install,pre-upgrade", [JOB, f"{JOB}-canary"]), test: ("test", [test])}
    for name, (hook, names) in expected.items():
        own = {each["kind"]: each for each in found if each["metadata"]["name"] == name and each["kind"] != "Job"}
        for each in own.values():
            assert each["metadata"]["namespace"] == "health"
            assert each["metadata"]["annotations"] == {
                "helm.sh/hook": hook,
                "helm.sh/hook-weight": "-2",
                "helm.sh/hook-delete-policy": "before-hook-creation,hook-succeeded",
            }
        assert own["ServiceAccount"]["automountServiceAccountToken"] is False
        assert own["Role"]["rules"] == [
            {"apiGroups": ["batch"], "resources": ["jobs"], "resourceNames": names, "verbs": ["get"]},
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
        ]
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
        assert own["RoleBinding"]["roleRef"] == role
        assert own["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": name, "namespace": "health"}]
    assert {_spec(job)["serviceAccountName"] for job in _jobs(found).values()} == {rollout}
    assert _spec(_job_of_helm_test(found))["serviceAccountName"] == test


def test_with_a_service_account_of_the_user_the_chart_creates_none(helm: Helm) -> None:
    found = helm.render({**THREE, "serviceAccountName": "migrations"})
    assert {document["kind"] for document in found} == {"Job", "ConfigMap"}
    for job in (*_jobs(found).values(), _job_of_helm_test(found)):
        assert _spec(job)["serviceAccountName"] == "migrations"


def test_only_the_container_rollout_has_the_token(helm: Helm) -> None:
    """Neither git, nor pip, nor a revision may talk to the API."""
    address = {"git": {"repo": "git@git.example.org:schema", "branch": "main"}}
    found = helm.render({**THREE, **address, "podSecurityContext": {"runAsUser": None}})
    for job in (*_jobs(found).values(), _job_of_helm_test(found)):
        assert _spec(job)["automountServiceAccountToken"] is False
        assert list(containers(job)) == ["rollout", "passwd", "git-sync", "migrate"]
        mounts = {
            name: [mount["name"] for mount in container["volumeMounts"] if mount["name"] == API]
            for name, container in containers(job).items()
        }
        assert mounts == {"rollout": [API], "passwd": [], "git-sync": [], "migrate": []}
        token = [each["name"] for each in _spec(job)["volumes"] if "serviceAccountToken" in json.dumps(each)]
        assert token == [API]


def test_the_container_rollout_has_the_settings_of_the_others(helm: Helm) -> None:
    for job in _jobs(helm.render({**THREE, "image": {"digest": f"sha256:{'0' * 64}"}})).values():
        own, migrate = containers(job)["rollout"], containers(job)["migrate"]
        for key in ("image", "imagePullPolicy", "securityContext", "resources", "terminationMessagePolicy"):
            assert own[key] == migrate[key], key
        script = (CHART / "files" / "rollout.py").read_text().strip()
        assert own["command"] == ["python3", "-I", "-c", f"{script}\n"]
        assert "$$" not in script
        assert not re.findall(r"\$\([^\s()]+\)", script)  # Kubernetes would replace it


def test_the_container_rollout_needs_nothing_but_the_oldest_python() -> None:
    """It runs before anything is installed."""
    source = (CHART / "files" / "rollout.py").read_text()
    tree = ast.walk(ast.parse(source, feature_version=(3, 10)))
    names = [
        name
        for node in tree
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    ]
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
    assert names


def test_a_target_has_what_differs_from_db_and_its_pod_nothing_of_another(helm: Helm) -> None:
    other = {"name": "niger", "port": 6432, "configMap": {"nameKey": "niger"}, "secret": {"passwordKey": "p2"}}
    found = _jobs(helm.render({"targets": [KANO, KENYA, other]}))
    rest = found[JOB]
    assert _list(rest) == [
        ["kano", "ng_kano", 0, [], []],
        ["kenya", "", 0, ["db-kenya", "db-host", "db-name"], ["db-kenya", "username", "password"]],
        ["niger", "", 6432, ["egov-config", "db-host", "niger"], ["db", "username", "p2"]],
    ]
    own = [source for source in _sources(rest) if "downwardAPI" not in source]

    def items(index: int, keys: dict[str, str]) -> list[dict[str, str]]:
        return [{"key": key, "path": f"{index}/{name}"} for name, key in keys.items()]

    host, user = {"DB_HOST": "db-host"}, {"DB_USER": "username"}
    assert own == [
        {"configMap": {"name": "db-kenya", "optional": True, "items": items(0, host | {"DB_NAME": "db-name"})}},
        {"configMap": {"name": "egov-config", "optional": True, "items": items(1, host | {"DB_NAME": "niger"})}},
        {"secret": {"name": "db", "optional": True, "items": items(1, user | {"DB_PASSWORD": "p2"})}},
        {"secret": {"name": "db-kenya", "optional": True, "items": items(0, user | {"DB_PASSWORD": "password"})}},
    ]
    assert [source for source in _sources(found[f"{JOB}-canary"]) if "downwardAPI" not in source] == []
    for job in found.values():
        mounts = {name: container["volumeMounts"] for name, container in containers(job).items()}
        assert {name: [each for each in of if each["name"] == "targets"] for name, of in mounts.items()} == {
            "rollout": [{"name": "targets", "mountPath": "/etc/targets/list", "subPath": "list", "readOnly": True}],
            "git-sync": [],
            "migrate": [
                {
                    "name": "targets",
                    "mountPath": "/etc/target",
                    "subPathExpr": "$(JOB_COMPLETION_INDEX)",
                    "readOnly": True,
                }
            ],
        }


def test_a_password_of_extra_env_is_that_of_all_targets(helm: Helm) -> None:
    password = {"name": "DB_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "shared", "key": "password"}}}
    job = _jobs(helm.render({"targets": [KENYA], "extraEnv": [password]}))[JOB]
    assert _list(job)[0][4] == ["db-kenya", "username", ""]
    assert {"key": "username", "path": "0/DB_USER"} in _sources(job)[2]["secret"]["items"]
    assert "DB_PASSWORD" not in json.dumps(_sources(job))
    assert environment(containers(job)["migrate"])["DB_PASSWORD"] == password["valueFrom"]


@pytest.mark.parametrize(
    "changed",
    [
        [KANO, LAGOS],
        [OYO, LAGOS, KANO],
        [KANO, LAGOS, {**OYO, "schema": "x"}],
        [KANO, LAGOS, {**OYO, "port": 5433}],
        [KANO, LAGOS, {**OYO, "name": "x"}],
        [{**KANO, "schema": "x"}, LAGOS, OYO],
        [KANO, LAGOS, {**OYO, "secret": {"name": "x"}}],
    ],
)
def test_the_record_of_the_release_changes_with_the_targets(helm: Helm, changed: list[Target]) -> None:
    """GitOps tools see a change of the release there."""
    assert _digest(helm.render({"targets": changed})) != _digest(helm.render(THREE))
    assert _digest(helm.render({**THREE, "job": {"backoffLimit": 0}})) == _digest(helm.render(THREE))


def _job_of_helm_test(objects: Objects) -> dict[str, Any]:
    named = [each for each in objects if each["metadata"]["name"] == "hcm-db-migration-test"]
    (found,) = [each for each in named if each["kind"] == "Job"]
    return found


def test_helm_test_is_a_job_that_checks_all_targets(helm: Helm) -> None:
    found = helm.render({**THREE, "rollout": {"canary": 2}})
    job = _job_of_helm_test(found)
    assert (job["kind"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Job", 4, 10)
    assert _part(job) == {"FIRST": "0", "COUNT": "3", "MAX_FAILURES": ""}
    annotations = job["metadata"]["annotations"]
    assert (annotations["helm.sh/hook"], annotations["helm.sh/hook-weight"]) == ("test", "0")
    assert "hcm-db-migrations/targets" not in annotations
    container = containers(job)["migrate"]
    assert (container["args"], environment(container)["EXPECTED"]) == (["current"], "(head)")
    for other in _jobs(found).values():
        assert _list(other) == _list(job)
        assert containers(other)["migrate"]["args"] == ["upgrade", "head"]
        assert "EXPECTED" not in environment(containers(other)["migrate"])


def _text(helm: Helm, values: dict[str, Any], *options: str, chart: Path = CHART) -> str:
    done: Result = helm.template(values, *options, chart=chart)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "more",
    [
        {"targets": None},
        {"rollout": None},
        {"rollout": {"only": None, "maxFailures": None}},
        {"targets": [], "rollout": {"canary": 5, "parallelism": 1, "maxFailures": 3}},
    ],
)
@pytest.mark.parametrize("hook", ["pre-install,pre-upgrade", ""])
def test_without_targets_the_objects_are_byte_for_byte_as_before(helm4: Helm, more: dict, hook: str) -> None:
    expected = _text(helm4, {**MINIMAL, "hook": hook})
    assert _text(helm4, {**MINIMAL, "hook": hook, **more}) == expected
    if more.get("rollout", True):  # the schema refuses a map that is null below the nested key
        assert _text(helm4, {"hook": hook, "hcm-db-migrations": {**MINIMAL, **more}}) == expected


@pytest.fixture
def old_chart(tmp_path: Path) -> Path:
    """The chart with the defaults of a release before "targets", as `helm upgrade --reuse-values` has them."""
    shutil.copytree(CHART, tmp_path / "chart")
    path = tmp_path / "chart" / "values.yaml"
    values = yaml.safe_load(path.read_text())
    del values["targets"], values["rollout"]
    path.write_text(yaml.safe_dump(values))
    return tmp_path / "chart"


def test_the_values_of_an_older_release_have_no_targets(helm: Helm, old_chart: Path) -> None:
    assert _text(helm, MINIMAL, chart=old_chart) == _text(helm, MINIMAL)
    result = helm.template({**MINIMAL, **THREE}, chart=old_chart)
    assert '- "rollout" is null, which removes the default: set a value, or leave it out (' in result.stderr
    rollout = {"canary": 1, "parallelism": 10, "maxFailures": 0}
    assert _text(helm, {**MINIMAL, **THREE, "rollout": rollout}, chart=old_chart) == _text(helm, {**MINIMAL, **THREE})


@pytest.mark.parametrize("key", ["canary", "parallelism"])
def test_a_null_in_rollout_is_named(helm: Helm, key: str) -> None:
    message = f'- "rollout.{key}" is null, which removes the default: set a value, or leave it out ('
    assert message in helm.refuse({**MINIMAL, **THREE, "rollout": {key: None}})


def test_no_null_ends_in_an_error_of_a_template(helm4: Helm) -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    paths = [(key, None) for key in defaults if key != "git"]
    paths += [(key, below) for key in ("db", "job", "rollout") for below in defaults[key]]
    for key, below in paths:
        null = {key: {below: None} if below else None}
        for values in ({**MINIMAL, **THREE, **null}, {**null, "hcm-db-migrations": {**MINIMAL, **THREE}}):
            result = helm4.template(values)
            assert result.returncode == 0 or "Invalid values for hcm-db-migrations:" in result.stderr, result.stderr


def test_nested_targets_are_those_of_the_top_level(helm: Helm) -> None:
    values = {**THREE, "rollout": {"canary": 2, "only": ["kano", "oyo"]}}
    expected = helm.render(values)
    assert helm.objects({"hcm-db-migrations": {**MINIMAL, **values}}) == expected
    assert helm.objects({**THREE, "hcm-db-migrations": {**MINIMAL, "rollout": values["rollout"]}}) == expected
    # A null there removes what the top level left at its default.
    assert helm.objects({"hcm-db-migrations": {**MINIMAL, "targets": None}}) == helm.render()


SCHEMA = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], include_characters=" "), min_size=1)


def _strings(of: Any) -> Iterator[str]:
    if isinstance(of, dict):
        of = [*of, *of.values()]
    if isinstance(of, list):
        for each in of:
            yield from _strings(each)
    elif isinstance(of, str):
        yield of


AWKWARD = [
    "re  ports ",
    " x",
    "a\"b'c`d",
    "back\\slash\\n",
    "$(JOB_COMPLETION_INDEX)",
    "$(DB_PASSWORD) $$(X) $$",
    "ünïcode 学校 🚀",
    "{{ .Values.git.repo }}",
    "# no comment: - [x]",
    "</script>&<b>",
    "%s %d %",
    "null",
    "1e3",
    "~",
]


def test_any_schema_reaches_the_pod_and_only_where_kubernetes_replaces_nothing(helm: Helm) -> None:
    """Kubernetes expands $(NAME) in a command, in arguments, variables and subPathExpr."""
    texts = [f"{schema}|" for schema in AWKWARD]  # a text that nothing else has
    targets = [{"name": f"x.y-{number}", "schema": text} for number, text in enumerate(texts)]
    found = helm.render({"targets": targets})
    for job in (*_jobs(found).values(), _job_of_helm_test(found)):
        assert _list(job) == [[target["name"], target["schema"], 0, [], []] for target in targets]
        strings = list(_strings(job["spec"]["template"]["spec"]))
        assert not [each for each in strings for text in ("x.y-", *texts) if text in each]


def test_a_schema_of_any_text_is_what_the_pod_reads(helm4: Helm) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(SCHEMA.filter(lambda text: len(text) <= 63), min_size=1, max_size=20, unique=True))
    def check(schemas: list[str]) -> None:
        targets = [{"name": f"t{number}", "schema": schema} for number, schema in enumerate(schemas)]
        text = _text(helm4, {**MINIMAL, "targets": targets})
        jobs = _jobs([each for each in yaml.load_all(text, yaml.CSafeLoader) if each])
        for job in jobs.values():
            assert [target[1] for target in _list(job)] == schemas

    check()


def _many(shape: str) -> list[Target]:
    """1,000 targets."""

    def target(number: int) -> Target:
        name = f"region-{number:04}"
        if shape == "schemas":
            return {"name": name, "schema": name.replace("-", "_")}
        if shape == "keys":
            keys = {"usernameKey": f"{name}-username", "passwordKey": f"{name}-password"}
            return {"name": name, "configMap": {"nameKey": f"{name}-database"}, "secret": keys}
        return {"name": name, "configMap": {"name": f"database-{name}"}, "secret": {"name": f"database-{name}"}}

    return [target(number) for number in range(1000)]


@pytest.mark.parametrize("shape", ["schemas", "keys", "objects"])
def test_a_thousand_targets_fit_in_a_release(helm4: Helm, shape: str) -> None:
    """Kubernetes holds 262144 bytes of annotations, about 1.5 MB of an object, and Helm's compressed release 1 MiB."""
    targets = _many(shape)
    text = _text(helm4, {**MINIMAL, "targets": targets})
    jobs = _jobs([each for each in yaml.load_all(text, yaml.CSafeLoader) if each])
    assert {name: job["spec"]["completions"] for name, job in jobs.items()} == {f"{JOB}-canary": 2, JOB: 1000}
    for job in jobs.values():
        assert [target[0] for target in _list(job)] == [target["name"] for target in targets]
    rest = jobs[JOB]
    paths = [item["path"] for source in _sources(rest)[1:] for of in source.values() for item in of["items"]]
    assert len(paths) == len(set(paths)) == (0 if shape == "schemas" else 4 * 999)
    assert len(rest["spec"]["template"]["metadata"]["annotations"]["hcm-db-migrations/targets"]) < 130_000
    assert len(json.dumps(rest)) < 550_000
    assert len(gzip.compress(text.encode())) < 140_000
