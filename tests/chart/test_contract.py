"""What the defaults give: the contract with everyone who installs the chart."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import pytest
import yaml
from jsonschema_rs import ValidationError

from tests.support.chart import MINIMAL, Helm, environment, git_sync, migrate, nested, one, pod
from tools.binaries import find_or_build
from tools.paths import CHART, ROOT

GOLDEN = Path(__file__).with_name("unified-dev.golden")
OVERLAY = ROOT / "environments" / "unified-dev.yaml"


def test_a_release_has_a_job_a_record_and_a_test(helm: Helm) -> None:
    found = {(document["kind"], document["metadata"]["name"]) for document in helm.render()}
    assert found == {("Job", "hcm-db-migration-1"), ("ConfigMap", "hcm-db-migration"), ("Pod", "hcm-db-migration-test")}


def test_an_object_with_an_unknown_field_is_refused_by_every_rendering(helm4: Helm, tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "chart")
    job = tmp_path / "chart/templates/job.yaml"
    job.write_text(job.read_text().replace("kind: Job", "kind: Job\nimage: misplaced"))
    with pytest.raises(ValidationError, match="'image' was unexpected"):
        helm4.render(chart=tmp_path / "chart")


def test_the_overlay_renders_what_was_reviewed(helm: Helm, tmp_path: Path) -> None:
    """The golden names each script's file instead of its text, and no digest of them: scripts have their own tests."""
    done = helm.run("template", "hcm-db-migrations", CHART, "-n", "health", "-f", OVERLAY)
    text = "".join(line for line in done.stdout.splitlines(keepends=True) if line.strip())  # the two Helms differ there
    for name in ("files/migrate.sh", "files/sync.sh"):
        script = "".join(rf" *{re.escape(line)}\n" for line in (CHART / name).read_text().splitlines() if line.strip())
        text, found = re.subn(script, f"<{name}>\n", text)
        assert found == 2, f"{name} is not verbatim in the Job and in the test"
    text, found = re.subn("(?<=digest: )[\"'][0-9a-f]{64}[\"']", "<sha256>", text)
    assert found == 1
    (tmp_path / "rendered").write_text(text)
    assert text == GOLDEN.read_text(), (
        f"the defaults changed: review `diff {GOLDEN.relative_to(ROOT)} {tmp_path}/rendered`, copy it there, and commit"
    )


def test_the_overlay_is_digits_two_lines_and_no_more() -> None:
    assert yaml.safe_load(OVERLAY.read_text()) == {
        "hcm-db-migrations": {
            "git": {"repo": "git@github.com:egovernments/health-campaign-services", "branch": "airflow-analysis"}
        }
    }


def test_the_overlay_reaches_the_job(helm: Helm) -> None:
    found = helm.objects(yaml.safe_load(OVERLAY.read_text()))
    assert "--repo=git@github.com:egovernments/health-campaign-services" in git_sync(found)["args"]
    assert "--ref=airflow-analysis" in git_sync(found)["args"]
    assert environment(migrate(found))["GIT_PATH"] == "utilities/hcm-db-migrations"


def test_the_job_is_a_hook_that_keeps_a_failed_job(helm: Helm) -> None:
    assert one(helm.render(), "Job")["metadata"]["annotations"] == {
        "helm.sh/hook": "pre-install,pre-upgrade",
        "helm.sh/hook-delete-policy": "before-hook-creation,hook-succeeded",
        "helm.sh/hook-output-log-policy": "hook-succeeded,hook-failed",
    }


ARGOCD = "--api-versions=batch/v1,batch/v1/Job"  # as it runs `helm template`


def test_argo_cd_gets_a_name_for_each_change_and_keeps_a_job_that_it_finds(helm: Helm) -> None:
    """To Argo CD, every release has revision 1. It would delete a failed Job, or a running one after a restart."""
    repositories = [{"git": {"repo": "https://git.example.org/schema", "branch": branch}} for branch in ("a", "a", "b")]
    jobs = [one(helm.render(values, ARGOCD), "Job")["metadata"] for values in repositories]
    names = [job["name"] for job in jobs]
    assert (names[0] == names[1], names[0] == names[2]) == (True, False)
    assert re.fullmatch(r"hcm-db-migration-[0-9a-f]{8}", names[0])
    assert jobs[0]["annotations"]["helm.sh/hook-delete-policy"] == "hook-succeeded"
    assert (
        one(helm.render({}, "--api-versions=argoproj.io/v1alpha1"), "Job")["metadata"]["name"] == "hcm-db-migration-1"
    )


def test_argo_cd_does_not_stop_an_ordinary_job(helm: Helm) -> None:
    safe = {"argocd.argoproj.io/sync-options": "Prune=false", "argocd.argoproj.io/compare-options": "IgnoreExtraneous"}
    assert one(helm.render({"hook": ""}), "Job")["metadata"]["annotations"] == safe
    own = {"argocd.argoproj.io/sync-options": "Prune=true"}
    changed = one(helm.render({"hook": "", "job": {"annotations": own}}), "Job")["metadata"]["annotations"]
    assert changed == safe | own


def test_a_program_that_embeds_helm_gets_no_annotation_that_crashes_it(
    helm4: Helm, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Flux's helm-controller has no writer for a hook's log."""
    embedded = Helm(find_or_build("helm", stamped=False), tmp_path_factory.getbasetemp())
    assert re.fullmatch(r"v4\.\d+", embedded.run("version", "--template={{.Version}}").stdout)
    found = embedded.render()
    assert "output-log" not in str(found)
    assert "output-log" not in str(embedded.render({"targets": [{"name": "a"}, {"name": "b", "schema": "b"}]}))
    annotated = {"helm.sh/hook-output-log-policy": "hook-failed"}
    assert "output-log" not in str(one(embedded.render({"podAnnotations": annotated}), "Pod"))
    expected = helm4.render()
    for document in expected:
        document["metadata"].get("annotations", {}).pop("helm.sh/hook-output-log-policy", None)
    assert found == expected


def test_the_deadlines_fit_below_helms_timeout(helm: Helm) -> None:
    found = helm.render()
    job = one(found, "Job")["spec"]["activeDeadlineSeconds"]
    spec = pod(found)["spec"]
    assert (spec["activeDeadlineSeconds"], job, spec["terminationGracePeriodSeconds"]) == (230, 250, 30)
    assert job + spec["terminationGracePeriodSeconds"] + 10 < 300


def test_the_job_is_retried_only_if_that_may_help(helm: Helm) -> None:
    spec = one(helm.render(), "Job")["spec"]
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onPodConditions": [],
            "onExitCodes": {"containerName": "migrate", "operator": "In", "values": [255]},
        },
    ]
    assert (spec["backoffLimit"], spec["podReplacementPolicy"], pod(helm.render())["spec"]["restartPolicy"]) == (
        1,
        "Failed",
        "Never",
    )


def test_integers_stay_integers(helm: Helm) -> None:
    values = {"db": {"port": 6432}, "job": {"activeDeadlineSeconds": 86400, "ttlSecondsAfterFinished": 1209600}}
    text = helm.template({**MINIMAL, **values}).stdout
    assert "ttlSecondsAfterFinished: 1209600\n" in text
    assert "activeDeadlineSeconds: 86420\n" in text
    assert "--sync-timeout=17280s\n" in text
    assert 'value: "6432"\n' in text


def test_the_pod_is_admitted_under_the_restricted_standard(helm: Helm) -> None:
    """Each control of https://kubernetes.io/docs/concepts/security/pod-security-standards/, restricted."""
    spec = pod(helm.render())["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] != 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert {next(iter(set(volume) - {"name"})) for volume in spec["volumes"]} <= {"emptyDir", "projected"}
    for container in spec["initContainers"] + spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_the_pod_has_no_token_and_no_variables_of_services(helm: Helm) -> None:
    spec = pod(helm.render())["spec"]
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    assert "serviceAccountName" not in spec


def test_both_containers_share_one_volume_and_work_in_it(helm: Helm) -> None:
    found = helm.render()
    assert [volume["name"] for volume in pod(found)["spec"]["volumes"]] == ["workspace", "git-home", "git"]
    for container in (git_sync(found), migrate(found)):
        assert {"name": "workspace", "mountPath": "/workspace"} in container["volumeMounts"]
        assert container["workingDir"] == "/workspace"
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_what_git_sync_leaves_in_its_home_is_not_in_the_migrate_container(helm: Helm) -> None:
    """Its git configuration, and the socket of git's credential cache."""
    found = helm.render()
    homes = {name: environment(container(found))["HOME"] for name, container in (("git", git_sync), ("run", migrate))}
    assert homes == {"git": "/git-home", "run": "/workspace"}
    for container in (git_sync(found), migrate(found)):
        assert environment(container)["TMPDIR"] == environment(container)["HOME"]
    assert {"name": "git-home", "emptyDir": {"sizeLimit": "1Gi"}} in pod(found)["spec"]["volumes"]
    assert {"name": "git-home", "mountPath": "/git-home"} in git_sync(found)["volumeMounts"]
    assert [mount["name"] for mount in migrate(found)["volumeMounts"]] == ["workspace"]


def test_credentials_are_references_one_variable_a_key(helm: Helm) -> None:
    found = environment(migrate(helm.render()))
    assert {name: value for name, value in found.items() if name.startswith("DB_")} == {
        "DB_HOST": {"configMapKeyRef": {"name": "egov-config", "key": "db-host", "optional": True}},
        "DB_PORT": "5432",
        "DB_NAME": {"configMapKeyRef": {"name": "egov-config", "key": "db-name", "optional": True}},
        "DB_USER": {"secretKeyRef": {"name": "db", "key": "username", "optional": True}},
        "DB_PASSWORD": {"secretKeyRef": {"name": "db", "key": "password", "optional": True}},
    }
    assert found["REQUIRED"].splitlines() == [
        'DB_HOST key "db-host" of ConfigMap "egov-config"',
        'DB_NAME key "db-name" of ConfigMap "egov-config"',
        'DB_USER key "username" of Secret "db"',
        'DB_PASSWORD key "password" of Secret "db"',
    ]


def test_the_git_sync_init_container_sees_no_database_credential(helm: Helm) -> None:
    assert set(environment(git_sync(helm.render()))) == {
        *("HOME", "TMPDIR", "CLONE_SECONDS", "USERNAME_FILE", "NAMESPACE", "REQUIRED")
    }


def test_helm_test_is_the_same_pod_with_other_arguments(helm: Helm) -> None:
    found = helm.render()
    test, job = one(found, "Pod"), pod(found)
    assert test["spec"]["containers"][0]["args"] == ["current"]
    assert environment(test["spec"]["containers"][0])["EXPECTED"] == "(head)"
    assert test["metadata"]["annotations"] == {
        **job["metadata"]["annotations"],
        "helm.sh/hook": "test",
        "helm.sh/hook-delete-policy": "before-hook-creation,hook-succeeded",
        "helm.sh/hook-output-log-policy": "hook-succeeded,hook-failed",
    }
    test["spec"]["containers"][0]["args"] = migrate(found)["args"]
    test["spec"]["containers"][0]["env"] = [e for e in test["spec"]["containers"][0]["env"] if e["name"] != "EXPECTED"]
    assert test["spec"] == job["spec"]
    assert test["metadata"]["labels"] == job["metadata"]["labels"]


def test_every_object_has_the_standard_labels(helm: Helm) -> None:
    for document in helm.render({}, release="y"):
        assert document["metadata"]["labels"] == {
            "app.kubernetes.io/name": "hcm-db-migrations",
            "app.kubernetes.io/instance": "y",
            "app.kubernetes.io/version": "0.2.0",
            "app.kubernetes.io/managed-by": "Helm",
            "helm.sh/chart": "hcm-db-migrations-0.2.0",
        }


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("hcm-db-migrations", "hcm-db-migration"),
        ("y", "y-hcm-db-migration"),
        ("null", "null-hcm-db-migration"),
        ("hcm-db-migration", "hcm-db-migration-hcm-db-migration"),
        ("a" * 53, "a" * 53),
        ("a" * 52, "a" * 52),
        ("a" * 40, "a" * 40 + "-hcm-db-migra"),
    ],
)
def test_any_other_release_has_its_name_in_every_object(helm: Helm, release: str, name: str) -> None:
    found = {(document["kind"], document["metadata"]["name"]) for document in helm.render({}, release=release)}
    assert found == {("Job", f"{name}-1"), ("ConfigMap", name), ("Pod", f"{name}-test")}


def test_a_name_leaves_room_for_a_revision_number_of_nine_digits(helm: Helm) -> None:
    """A Job's name is a label of its pods: 63 characters. Helm's own limit for a release is 53."""
    name = one(helm.render({}, release="a" * 53), "ConfigMap")["metadata"]["name"]
    assert len(f"{name}-999999999") <= 63


@pytest.mark.parametrize(
    ("values", "expected"), [({}, "health"), ({"namespace": ""}, "elsewhere"), ({"namespace": "a"}, "a")]
)
def test_objects_go_to_the_namespace_of_the_values_else_of_the_release(helm: Helm, values: dict, expected: str) -> None:
    found = helm.render(values, namespace="elsewhere")
    assert {document["metadata"]["namespace"] for document in found} == {expected}
    assert environment(migrate(found))["NAMESPACE"] == expected


def test_the_record_changes_with_the_pod_and_with_nothing_else(helm: Helm) -> None:
    def digest(values: dict) -> str:
        return one(helm.render(values), "ConfigMap")["data"]["digest"]

    assert one(helm.render(), "ConfigMap")["data"] == {
        "repository": "https://git.example.org/schema",
        "ref": "main",
        "path": "utilities/hcm-db-migrations",
        "digest": digest({}),
    }
    assert len(digest({})) == len(hashlib.sha256().hexdigest())
    assert digest(nested("git.branch", "next")) != digest({})
    assert digest({"args": ["downgrade", "001"]}) != digest({})
    assert digest({"job": {"backoffLimit": 0}}) == digest({})


@pytest.mark.parametrize("hook", ["", "pre-install,pre-upgrade"])
def test_no_digest_is_made_of_a_literal_of_extra_env(helm: Helm, hook: str) -> None:
    """Everyone who can read the ConfigMap, or the name of the Job, could try out passwords otherwise."""

    def digests(*entries: dict) -> tuple[str, str]:
        found = helm.render({"hook": hook, "extraEnv": list(entries)})
        return one(found, "ConfigMap")["data"]["digest"], one(found, "Job")["metadata"]["name"]

    guess, right = ({"name": "KEY", "value": value} for value in ("guess", "right"))
    assert digests(guess) == digests(right)
    other = digests({"name": "OTHER", "value": "guess"})
    reference = digests({"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}})
    assert len({digests()[0], digests(guess)[0], other[0], reference[0]}) == 4


def test_an_ordinary_job_has_no_test_because_tools_without_hooks_would_run_it_too(helm: Helm) -> None:
    assert {document["kind"] for document in helm.render({"hook": ""})} == {"Job", "ConfigMap"}


def test_an_ordinary_job_has_a_new_name_exactly_when_its_spec_changes(helm: Helm) -> None:
    def job(values: dict) -> dict:
        return one(helm.render({"hook": "", **values}), "Job")["metadata"]

    assert "helm.sh/hook" not in job({})["annotations"]
    assert job({})["name"] == job({"fullnameOverride": ""})["name"]
    assert job({})["name"] != job({"args": ["upgrade", "001"]})["name"]
    assert job({})["name"] != job({"job": {"backoffLimit": 0}})["name"]
    base, digest = job({})["name"].rsplit("-", 1)
    assert (base, len(digest)) == ("hcm-db-migration", 8)
    assert len(job({"fullnameOverride": "a" * 53})["name"]) == 62


@pytest.mark.parametrize("hook", ["pre-install,pre-upgrade", "post-install,post-upgrade", "pre-install,post-upgrade"])
def test_the_job_runs_at_the_hooks_that_are_set(helm: Helm, hook: str) -> None:
    assert one(helm.render({"hook": hook}), "Job")["metadata"]["annotations"]["helm.sh/hook"] == hook


def test_rendering_twice_gives_the_same(helm4: Helm) -> None:
    command = ("template", "x", CHART, "--set", "git.repo=https://git.example.org/schema,git.branch=main")
    assert helm4.run(*command).stdout == helm4.run(*command).stdout
