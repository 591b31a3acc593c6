"""Every value has its effect, and values.yaml, its schema, its copy for the templates and README.md agree."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from jsonschema_rs import Draft7Validator

from tests.support.chart import (
    MINIMAL,
    Helm,
    Objects,
    Read,
    environment,
    git_sync,
    migrate,
    nested,
    one,
    pod,
)
from tools import docs
from tools.paths import CHART, ROOT
from tools.values import leaves, merged

SSH = {"git": {"repo": "git@git.example.org:schema", "branch": "main"}}
DIGEST = "sha256:" + "0123456789abcdef" * 4
VOLUME = {"name": "ca", "configMap": {"name": "ca"}}
MOUNT = {"name": "ca", "mountPath": "/etc/ca"}
VARIABLE = {"name": "PIP_CERT", "value": "/etc/ca/ca.crt"}
FLEET = [{"name": name, "schema": name} for name in ("a", "b", "c")]
TOLERATION = {"key": "dedicated", "operator": "Exists"}
AFFINITY = {
    "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": []}]}}
}


def _flag(name: str) -> Read:
    def read(objects: Objects) -> list[str]:
        return [arg.partition("=")[2] for arg in git_sync(objects)["args"] if arg.startswith(f"--{name}=")]

    return read


def _variable(name: str) -> Read:
    return lambda objects: environment(migrate(objects))[name]


def _spec(key: str) -> Read:
    return lambda objects: pod(objects)["spec"].get(key)


def _job(key: str) -> Read:
    return lambda objects: one(objects, "Job")["spec"].get(key)


def _sources(objects: Objects) -> list[dict[str, Any]]:
    """What the git-sync init container can read, without the sparse checkout patterns."""
    (volume,) = [volume for volume in pod(objects)["spec"]["volumes"] if volume["name"] == "git"]
    return volume["projected"]["sources"][1:]


def _of_jobs(read: Callable[[dict[str, Any]], Any]) -> Read:
    """For each of the targets' Jobs, without that of helm test."""
    return lambda objects: [
        read(each) for each in objects if each["kind"] == "Job" and not each["metadata"]["name"].endswith("-test")
    ]


def _targets(job: dict[str, Any]) -> list[str]:
    annotations = job["spec"]["template"]["metadata"]["annotations"]
    return [name for name, *_ in json.loads(annotations["hcm-db-migrations/targets"])]


def _limit(job: dict[str, Any]) -> str:
    limit: str = environment(job["spec"]["template"]["spec"]["initContainers"][0])["MAX_FAILURES"]
    return limit


OBJECTS = ["ConfigMap", "Pod", "Job", "the Job's pod"]


def _metadata(objects: Objects) -> dict[str, dict[str, Any]]:
    """The metadata of each object in OBJECTS."""
    found = {document["kind"]: document["metadata"] for document in objects}
    return found | {"the Job's pod": pod(objects)["metadata"]}


def _label(objects: Objects, name: str) -> dict[str, str]:
    return {of: each["labels"][name] for of, each in _metadata(objects).items() if name in each["labels"]}


def _annotation(objects: Objects, name: str) -> dict[str, str]:
    return {
        of: each["annotations"][name] for of, each in _metadata(objects).items() if name in each.get("annotations", {})
    }


def _reference(kind: str, name: str, key: str) -> dict[str, Any]:
    return {f"{kind}KeyRef": {"name": name, "key": key, "optional": True}}


def _resources(path: str, container: Callable[[Objects], dict[str, Any]]) -> dict[str, tuple[Any, Read, Any]]:
    """The entries of EFFECTS for the resources of a container."""

    def of(kind: str, name: str) -> Read:
        return lambda objects: container(objects)["resources"][kind][name]

    values = {
        "requests": {"cpu": "1", "memory": "1Gi", "ephemeral-storage": "1Gi"},
        "limits": {"memory": "1Gi", "ephemeral-storage": "2Gi"},
    }
    return {
        f"{path}.{kind}.{name}": (value, of(kind, name), value)
        for kind, of_kind in values.items()
        for name, value in of_kind.items()
    }


# A value, where it is rendered, and what is expected there. The default must render differently.
EFFECTS: dict[str, tuple[Any, Read, Any]] = {
    "namespace": ("elsewhere", lambda o: one(o, "Job")["metadata"]["namespace"], "elsewhere"),
    "fullnameOverride": ("schema", lambda o: one(o, "Job")["metadata"]["name"], "schema-1"),
    "git.repo": ("https://other.example.org/a", _flag("repo"), ["https://other.example.org/a"]),
    "git.branch": ("v1.0", _flag("ref"), ["v1.0"]),
    "git.path": ("a/b/", _variable("GIT_PATH"), "a/b"),
    "git.filter": ("", _flag("filter"), []),
    "git.secretName": ("key", lambda o: [s["secret"]["name"] for s in _sources(o)], ["key"]),
    "git.knownHosts": (False, _flag("ssh-known-hosts"), ["false"]),
    "git.httpsSecretName": ("token", lambda o: [s["secret"]["name"] for s in _sources(o)], ["token"]),
    "git.ca.configMapName": ("ca", lambda o: [s["configMap"]["name"] for s in _sources(o)], ["ca"]),
    "git.ca.secretName": ("ca", lambda o: [s["secret"]["name"] for s in _sources(o)], ["ca"]),
    "git.ca.key": ("bundle.pem", lambda o: _sources(o)[0]["configMap"]["items"][0]["key"], "bundle.pem"),
    "git.image.repository": ("mirror/git-sync", lambda o: git_sync(o)["image"], "mirror/git-sync:v4.7.1"),
    "git.image.tag": ("v4.8.0", lambda o: git_sync(o)["image"], "registry.k8s.io/git-sync/git-sync:v4.8.0"),
    "git.image.digest": (DIGEST, lambda o: git_sync(o)["image"], f"registry.k8s.io/git-sync/git-sync:v4.7.1@{DIGEST}"),
    "git.image.pullPolicy": ("Never", lambda o: git_sync(o)["imagePullPolicy"], "Never"),
    **_resources("git.resources", git_sync),
    "image.repository": ("mirror/python", lambda o: migrate(o)["image"], "mirror/python:3.10-slim"),
    "image.tag": ("3.13-slim", lambda o: migrate(o)["image"], "python:3.13-slim"),
    "image.digest": (DIGEST, lambda o: migrate(o)["image"], f"python:3.10-slim@{DIGEST}"),
    "image.pullPolicy": ("Always", lambda o: migrate(o)["imagePullPolicy"], "Always"),
    "imagePullSecrets": ([{"name": "pull"}], _spec("imagePullSecrets"), [{"name": "pull"}]),
    "requirements": ("", _variable("REQUIREMENTS"), ""),
    "args": (["downgrade", "002"], lambda o: migrate(o)["args"], ["downgrade", "002"]),
    "db.port": (6432, _variable("DB_PORT"), "6432"),
    "db.configMap.name": ("other", _variable("DB_HOST"), _reference("configMap", "other", "db-host")),
    "db.configMap.hostKey": ("host", _variable("DB_HOST"), _reference("configMap", "egov-config", "host")),
    "db.configMap.nameKey": ("name", _variable("DB_NAME"), _reference("configMap", "egov-config", "name")),
    "db.secret.name": ("other", _variable("DB_USER"), _reference("secret", "other", "username")),
    "db.secret.usernameKey": ("user", _variable("DB_USER"), _reference("secret", "db", "user")),
    "db.secret.passwordKey": ("pass", _variable("DB_PASSWORD"), _reference("secret", "db", "pass")),
    "targets": (FLEET, _of_jobs(_targets), [["a", "b", "c"]] * 2),
    "rollout.canary": (2, _of_jobs(lambda job: job["spec"]["completions"]), [3, 2]),
    "rollout.parallelism": (3, _of_jobs(lambda job: job["spec"]["parallelism"]), [3, 3]),
    "rollout.maxFailures": (2, _of_jobs(_limit), ["0", "2"]),
    "rollout.only": (["b", "c"], _of_jobs(_targets), [["b", "c"]] * 2),
    "hook": (
        "post-install,post-upgrade",
        lambda o: one(o, "Job")["metadata"]["annotations"]["helm.sh/hook"],
        "post-install,post-upgrade",
    ),
    "job.activeDeadlineSeconds": (
        600,
        lambda o: (_spec("activeDeadlineSeconds")(o), _job("activeDeadlineSeconds")(o), _flag("sync-timeout")(o)),
        (600, 620, ["120s"]),
    ),
    "job.backoffLimit": (0, _job("backoffLimit"), 0),
    "job.ttlSecondsAfterFinished": (60, _job("ttlSecondsAfterFinished"), 60),
    "job.annotations": ({"a/b": "c"}, lambda o: _annotation(o, "a/b"), {"Job": "c"}),
    **_resources("resources", migrate),
    "commonLabels": ({"team": "hcm"}, lambda o: _label(o, "team"), dict.fromkeys(OBJECTS, "hcm")),
    "commonAnnotations": ({"a/b": "c"}, lambda o: _annotation(o, "a/b"), dict.fromkeys(OBJECTS, "c")),
    "podLabels": ({"team": "hcm"}, lambda o: pod(o)["metadata"]["labels"].get("team"), "hcm"),
    "podAnnotations": ({"a/b": "c"}, lambda o: pod(o)["metadata"]["annotations"].get("a/b"), "c"),
    "nodeSelector": ({"disk": "ssd"}, _spec("nodeSelector"), {"disk": "ssd"}),
    "tolerations": ([TOLERATION], _spec("tolerations"), [TOLERATION]),
    "affinity": (AFFINITY, _spec("affinity"), AFFINITY),
    "serviceAccountName": ("migrations", _spec("serviceAccountName"), "migrations"),
    "extraPodSpec": ({"priorityClassName": "high"}, _spec("priorityClassName"), "high"),
    "podSecurityContext.runAsNonRoot": (False, lambda o: _spec("securityContext")(o)["runAsNonRoot"], False),
    "podSecurityContext.runAsUser": (1000680000, lambda o: _spec("securityContext")(o)["runAsUser"], 1000680000),
    "podSecurityContext.runAsGroup": (0, lambda o: _spec("securityContext")(o)["runAsGroup"], 0),
    "podSecurityContext.fsGroup": (1, lambda o: _spec("securityContext")(o)["fsGroup"], 1),
    "podSecurityContext.seccompProfile.type": (
        "Unconfined",
        lambda o: _spec("securityContext")(o)["seccompProfile"]["type"],
        "Unconfined",
    ),
    "securityContext.allowPrivilegeEscalation": (
        True,
        lambda o: [c["securityContext"]["allowPrivilegeEscalation"] for c in (migrate(o), git_sync(o))],
        [True, True],
    ),
    "securityContext.readOnlyRootFilesystem": (
        False,
        lambda o: [c["securityContext"]["readOnlyRootFilesystem"] for c in (migrate(o), git_sync(o))],
        [False, False],
    ),
    "securityContext.capabilities.drop": (
        ["NET_RAW"],
        lambda o: [c["securityContext"]["capabilities"]["drop"] for c in (migrate(o), git_sync(o))],
        [["NET_RAW"], ["NET_RAW"]],
    ),
    "extraEnv": ([VARIABLE], lambda o: VARIABLE in migrate(o)["env"], True),
    "extraVolumes": ([VOLUME], lambda o: VOLUME in pod(o)["spec"]["volumes"], True),
    "extraVolumeMounts": ([MOUNT], lambda o: MOUNT in migrate(o)["volumeMounts"], True),
}

# What else must be set for the effect to show.
WITH: dict[str, dict[str, Any]] = {
    "git.secretName": SSH,
    "git.knownHosts": SSH,
    "git.ca.key": {"git": {"ca": {"configMapName": "ca"}}},
    **{f"rollout.{key}": {"targets": FLEET} for key in ("canary", "parallelism", "maxFailures", "only")},
}


def test_every_value_has_a_test_of_its_effect() -> None:
    assert list(EFFECTS) == [name for name, _ in leaves(yaml.safe_load((CHART / "values.yaml").read_text()))]


@pytest.mark.parametrize("name", EFFECTS)
def test_a_value_has_its_effect(helm: Helm, name: str) -> None:
    value, read, expected = EFFECTS[name]
    others = WITH.get(name, {})
    assert read(helm.render(merged(nested(name, value), others))) == expected
    try:
        by_default = read(helm.render(merged(MINIMAL, others)))
    except (KeyError, IndexError):  # nothing is there
        by_default = None
    assert by_default != expected


@pytest.mark.parametrize("address", ["https://other.example.org/a", "git@other.example.org:a"])
def test_every_value_has_the_same_effect_when_it_is_nested(helm: Helm, address: str) -> None:
    everything: dict[str, Any] = {}
    for name, (value, _, _) in EFFECTS.items():
        if name not in (
            "git.ca.secretName",
            *(("git.httpsSecretName", "git.ca.configMapName") if "@" in address else ()),
        ):
            everything = merged(everything, nested(name, value))
    everything["git"]["repo"] = address
    assert helm.objects({"hcm-db-migrations": everything, "egov-user": {"replicas": 1}}) == helm.objects(everything)


def test_null_removes_an_optional_value(helm: Helm) -> None:
    ids = {"runAsUser": None, "runAsGroup": None, "fsGroup": None}
    values = {"podSecurityContext": ids, "job": {"ttlSecondsAfterFinished": None}, "resources": {"limits": None}}
    for found in (helm.render(values), helm.render({}, "--set-json", f"hcm-db-migrations={json.dumps(values)}")):
        assert pod(found)["spec"]["securityContext"] == {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert "ttlSecondsAfterFinished" not in one(found, "Job")["spec"]
        assert list(migrate(found)["resources"]) == ["requests"]


@pytest.mark.parametrize("tag", ["", None])
@pytest.mark.parametrize(("path", "name"), [("image", "python"), ("git.image", "registry.k8s.io/git-sync/git-sync")])
def test_a_digest_needs_no_tag(helm: Helm, path: str, name: str, tag: str | None) -> None:
    values = nested(path, {"tag": tag, "digest": DIGEST})
    for found in (helm.objects(values), helm.objects({"hcm-db-migrations": values})):
        assert f"{name}@{DIGEST}" in (migrate(found)["image"], git_sync(found)["image"])


def test_the_charts_own_labels_and_annotations_take_precedence_over_the_common_ones(helm: Helm) -> None:
    common = {"app.kubernetes.io/instance": "mine", "team": "hcm", "tier": "batch"}
    found = helm.render(
        {
            "commonLabels": common,
            "podLabels": {"tier": "pod"},
            "commonAnnotations": {"kubectl.kubernetes.io/default-container": "git-sync", "a": "common", "b": "common"},
            "podAnnotations": {"a": "pod"},
            "job": {"annotations": {"a": "job"}},
        }
    )
    assert set(_label(found, "app.kubernetes.io/instance").values()) == {"hcm-db-migrations"}
    assert _label(found, "team") == dict.fromkeys(OBJECTS, "hcm")
    assert _label(found, "tier") == {"ConfigMap": "batch", "Job": "batch", "Pod": "pod", "the Job's pod": "pod"}
    assert _annotation(found, "a") == {"ConfigMap": "common", "Job": "job", "Pod": "pod", "the Job's pod": "pod"}
    assert _annotation(found, "b") == dict.fromkeys(OBJECTS, "common")
    for kind in ("Pod", "the Job's pod"):
        assert _annotation(found, "kubectl.kubernetes.io/default-container")[kind] == "migrate"
    assert one(found, "Job")["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"


def test_an_ordinary_job_may_have_annotations(helm: Helm) -> None:
    found = helm.render({"hook": "", "job": {"annotations": {"a/b": "c"}}})
    safe = {"argocd.argoproj.io/sync-options": "Prune=false", "argocd.argoproj.io/compare-options": "IgnoreExtraneous"}
    assert one(found, "Job")["metadata"]["annotations"] == {"a/b": "c"} | safe


@pytest.mark.parametrize(
    ("ours", "git", "expected"),
    [
        ("1Gi", "1Gi", {"sizeLimit": "1Gi"}),
        ("2Gi", "1Gi", {"sizeLimit": "2Gi"}),
        ("999Mi", "1Gi", {"sizeLimit": "1Gi"}),
        ("1G", "1Gi", {"sizeLimit": "1Gi"}),
        ("1.5Gi", "1500M", {"sizeLimit": "1.5Gi"}),
        (2e9, "1Gi", {"sizeLimit": 2000000000}),
        ("5000000000000m", "1Gi", {"sizeLimit": "5000000000000m"}),
        (None, "1Gi", {}),
        ("1Gi", None, {}),
        (None, None, {}),
    ],
)
def test_a_volume_is_as_large_as_the_greater_limit_of_the_containers(
    helm: Helm, ours: str | None, git: str | None, expected: dict
) -> None:
    limits = [{"limits": {"ephemeral-storage": limit}} for limit in (ours, git)]
    found = helm.render(merged({"resources": limits[0]}, nested("git.resources", limits[1])))
    for spec in (pod(found)["spec"], one(found, "Pod")["spec"]):
        volumes = [volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume]
        assert volumes == [expected] * len(volumes) != []


def test_the_charts_own_labels_and_annotations_take_precedence(helm: Helm) -> None:
    mine = {"app.kubernetes.io/instance": "mine", "team": "hcm"}
    annotations = {"kubectl.kubernetes.io/default-container": "git-sync", "helm.sh/hook": "none", "team": "hcm"}
    found = helm.render({"podLabels": mine, "podAnnotations": annotations})
    for metadata in (pod(found)["metadata"], one(found, "Pod")["metadata"]):
        assert metadata["labels"]["app.kubernetes.io/instance"] == "hcm-db-migrations"
        assert metadata["annotations"]["kubectl.kubernetes.io/default-container"] == "migrate"
        assert (metadata["labels"]["team"], metadata["annotations"]["team"]) == ("hcm", "hcm")
    assert one(found, "Pod")["metadata"]["annotations"]["helm.sh/hook"] == "test"


@pytest.mark.parametrize(
    "key",
    [
        *("resources", "podLabels", "podAnnotations", "nodeSelector", "tolerations", "affinity", "imagePullSecrets"),
        *("serviceAccountName", "podSecurityContext", "securityContext", "extraEnv", "extraVolumes"),
        *("extraVolumeMounts", "podSecurityContext.seccompProfile", "securityContext.capabilities", "git.resources"),
        *("commonLabels", "commonAnnotations", "job.annotations", "extraPodSpec"),
    ],
)
@pytest.mark.parametrize("below", [False, True], ids=["top level", "nested"])
def test_an_optional_part_may_be_left_empty(helm: Helm, key: str, below: bool) -> None:
    """As in `podLabels:` with nothing after it."""
    values = nested(key, None)
    found = helm.objects({"hcm-db-migrations": values} if below else values)
    assert '": null' not in json.dumps(found)


def test_a_null_quantity_is_not_a_limit_of_0(helm: Helm) -> None:
    found = migrate(helm.render({"resources": {"limits": {"cpu": None}, "requests": {"cpu": None}}}))
    assert found["resources"]["limits"] == {"memory": "512Mi", "ephemeral-storage": "1Gi"}
    assert "cpu" not in found["resources"]["requests"]


@pytest.mark.parametrize(
    ("limit", "attempt", "both"),
    [(10, "10s", 6), (44, "10s", 26), (45, "10s", 27), (60, "12s", 31), (230, "46s", 99), (86400, "17280s", 34567)],
)
def test_a_clone_attempt_takes_a_fifth_of_the_deadline_or_10_s_and_both_leave_two_fifths(
    helm4: Helm, limit: int, attempt: str, both: int
) -> None:
    found = helm4.render({"job": {"activeDeadlineSeconds": limit}})
    assert _flag("sync-timeout")(found) == [attempt]
    assert environment(git_sync(found))["CLONE_SECONDS"] == str(both)
    assert both <= limit * 3 / 5


def test_database_url_is_all_that_is_required_and_may_refer_to_the_other_credentials(helm: Helm) -> None:
    """Kubernetes expands $(NAME) from the variables before it."""
    others = list(environment(migrate(helm.render())))
    entry = {"name": "DATABASE_URL", "value": "postgresql://$(DB_USER):$(DB_PASSWORD)@$(DB_HOST)/$(DB_NAME)"}
    found = environment(migrate(helm.render({"extraEnv": [entry]})))
    assert list(found) == [*others, "DATABASE_URL"]
    assert found["DATABASE_URL"] == entry["value"]
    assert found["REQUIRED"] == "DATABASE_URL extraEnv"


def test_a_password_of_extra_env_may_be_empty(helm: Helm) -> None:
    """libpq needs none with a client certificate."""
    found = environment(migrate(helm.render({"extraEnv": [{"name": "DB_PASSWORD", "value": ""}]})))
    assert found["DB_PASSWORD"] == ""
    assert [line.split()[0] for line in found["REQUIRED"].splitlines()] == ["DB_HOST", "DB_NAME", "DB_USER"]


def test_an_entry_of_extra_env_overrides_the_charts_own(helm: Helm) -> None:
    found = environment(migrate(helm.render({"extraEnv": [{"name": "DB_HOST", "value": "db.example.org"}]})))
    assert found["DB_HOST"] == "db.example.org"
    assert found["REQUIRED"].splitlines()[0] == "DB_HOST extraEnv"
    assert found["DB_NAME"] == _reference("configMap", "egov-config", "db-name")


def test_the_git_sync_init_container_gets_the_proxy_and_nothing_else_of_extra_env(helm: Helm) -> None:
    proxies = [{"name": name, "value": "http://proxy"} for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY")]
    others = [VARIABLE, {"name": "DATABASE_URL", "value": "x"}]
    found = git_sync(helm.render({"extraEnv": proxies + others}))["env"]
    assert [entry for entry in found if entry in proxies + others] == proxies


@pytest.mark.parametrize("path", docs.generated(), ids=lambda path: path.name)
def test_what_is_written_from_the_values_is_up_to_date(path) -> None:
    assert path.read_text() == docs.generated()[path], "values.yaml changed: run `make docs` and commit"


def test_every_value_is_documented_with_its_default() -> None:
    rows = re.findall(
        r"^\| `(\S+)` \| `(.*?)` \| .+ \|$", docs.VALUES.search((CHART / "README.md").read_text())[0], re.M
    )
    written = {name: json.loads(default) for name, default in rows}
    assert written == {name: default for name, default, _ in docs.documented()}


def test_the_schema_describes_every_value_for_editors() -> None:
    """A description beside $ref is for people: JSON Schema ignores it."""
    values = json.loads((CHART / "values.schema.json").read_text())["definitions"]["values"]
    for name, _, prose in docs.documented():
        of = values
        for key in name.split("."):
            of = of["properties"][key]
        assert of["description"] == prose.replace("`", "'"), name


@pytest.mark.parametrize("path", ["environments/unified-dev.yaml", "charts/hcm-db-migrations/ci/nested-values.yaml"])
def test_an_overlay_is_valid_in_an_editor(path: str) -> None:
    """An editor does not merge the defaults."""
    editor = Draft7Validator(json.loads((CHART / "values.schema.json").read_text()))
    overlay = yaml.safe_load((ROOT / path).read_text())
    editor.validate(overlay)
    editor.validate(overlay["hcm-db-migrations"])
    assert not editor.is_valid({"hcm-db-migrations": {"gti": {}}})
    assert not editor.is_valid({"gti": {}})


def test_every_example_in_the_schema_is_a_valid_value(helm4: Helm) -> None:
    values = json.loads((CHART / "values.schema.json").read_text())["definitions"]["values"]

    def examples(of: dict, path: str) -> Iterator[tuple[str, Any]]:
        for key, schema in of.get("properties", {}).items():
            yield from ((f"{path}{key}", example) for example in schema.get("examples", []))
            yield from examples(schema, f"{path}{key}.")

    found = [(path, example) for path, example in examples(values, "") if "<owner>" not in str(example)]
    assert len(found) > 8
    for path, example in found:
        assert helm4.render(nested(path, example)) != helm4.render() or example in ("main", ["upgrade", "head"])


def test_the_schema_knows_exactly_the_values(helm4: Helm) -> None:
    definitions = json.loads((CHART / "values.schema.json").read_text())["definitions"]
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    parts_of_a_pod = {"resources", "affinity", "podSecurityContext", "securityContext"}

    def known(schema: dict, default: dict, path: str) -> Iterator[str]:
        schema = definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        for key, of_key in schema.get("properties", {}).items():
            of_key = definitions[of_key["$ref"].rpartition("/")[2]] if "$ref" in of_key else of_key
            if of_key.get("additionalProperties") is False and key not in parts_of_a_pod:
                yield from known(of_key, default.get(key, {}), f"{path}{key}.")
            else:
                yield f"{path}{key}"

    def there(default: dict, path: str) -> Iterator[str]:
        for key, value in default.items():
            if isinstance(value, dict) and value and key not in parts_of_a_pod:
                yield from there(value, f"{path}{key}.")
            else:
                yield f"{path}{key}"

    assert set(known(definitions["values"], values, "")) - {"enabled"} == set(there(values, ""))
    assert set(definitions["closed"]["properties"]) - {"global", "enabled"} == set(values)
