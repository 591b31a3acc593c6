"""What a platform demands of every object and every pod: labels, a host alias, an admission policy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kubernetes import client

from tests.support.database import Database
from tests.support.kubernetes import Api, admission_policy
from tests.support.release import Release
from tests.support.waiting import until
from tools.cluster import Cluster


@pytest.fixture
def required_label(cluster: Cluster, api: Api) -> Iterator[str]:
    """An admission policy of the test's namespace: every Job, ConfigMap and Pod must have the label `team`."""
    kinds = [("batch", "jobs"), ("", "configmaps"), ("", "pods")]
    rules = [
        {"apiGroups": [group], "apiVersions": ["v1"], "operations": ["CREATE", "UPDATE"], "resources": [resource]}
        for group, resource in kinds
    ]
    has_label = "has(object.metadata.labels) && 'team' in object.metadata.labels"
    spec = {
        "matchConstraints": {"resourceRules": rules},
        "validations": [{"expression": has_label, "message": "the label team is required"}],
    }

    def is_enforced() -> bool:
        try:
            api.core.create_namespaced_config_map(api.namespace, {"metadata": {"name": "x"}}, dry_run="All")
        except client.ApiException as error:
            return "the label team is required" in str(error.body)
        return False

    with admission_policy(cluster, api.namespace, "ValidatingAdmissionPolicy", spec, validationActions=["Deny"]):
        until(is_enforced)
        yield "team"


@pytest.mark.fault(
    "Code and settings",
    fault="An admission policy requires labels or annotations that the chart's objects lack",
    sees="At once `... denied request: the label team is required`, exit 1",
    state="The database is not contacted",
    do="Set `commonLabels` or `commonAnnotations`, deploy again",
)
def test_an_admission_policy_that_requires_a_label_is_met_by_common_labels(
    release: Release, api: Api, database: Database, required_label: str
) -> None:
    denied = release.upgrade()
    assert denied.returncode == 1, denied.text
    denied.line("denied request: the label team is required")
    assert (api.jobs(), database.relations) == ([], [])
    result = release.upgrade({"commonLabels": {required_label: "hcm"}})
    assert (result.returncode, database.at) == (0, ["001"]), result.text
    assert release.run("test", release.name).returncode == 0


def test_a_field_of_the_pods_spec_without_a_value_takes_effect(
    release: Release, api: Api, cluster: Cluster, database: Database
) -> None:
    address = cluster.kubectl("get", "service", "postgres", "-n", "hcm-fixtures", "-o", "jsonpath={.spec.clusterIP}")
    alias = {"ip": address, "hostnames": ["db.example.org"]}
    host = {"name": "DB_HOST", "value": "db.example.org"}
    values = {"extraPodSpec": {"hostAliases": [alias]}, "extraEnv": [*release.values["extraEnv"], host]}
    result = release.upgrade(values)
    assert (result.returncode, database.at) == (0, ["001"]), result.text
    result.line(f"database {database.name} at db.example.org:5432")
