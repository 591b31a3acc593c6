"""Argo CD and Flux in a cluster, a registry for charts, and the examples of gitops/ for this cluster.

A tool that the cluster has is used as it is. Otherwise it is installed from the manifests of its Go module, at the
version that go.mod pins: Argo CD's core (no API server, no UI); Flux's source-controller and helm-controller.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tools import fixtures
from tools.binaries import pinned_version, source_folder
from tools.offline_cluster import images
from tools.paths import ROOT
from tools.steps import log
from tools.values import merged

if TYPE_CHECKING:
    from tools.cluster import Cluster


HERE = Path(__file__).parent
FLUX, ARGOCD = "flux-system", "argocd"  # their namespaces
CRDS = {FLUX: "helmreleases.helm.toolkit.fluxcd.io", ARGOCD: "applications.argoproj.io"}
CONTROLLERS = {
    FLUX: ["deploy/source-controller", "deploy/helm-controller"],
    ARGOCD: ["deploy/argocd-redis", "deploy/argocd-repo-server", "statefulset/argocd-application-controller"],
}
CODE = "https://github.com/egovernments/health-campaign-services"  # of the examples
REGISTRY = "registry.hcm-fixtures:5000"


def install(cluster: Cluster) -> None:
    """Install the tools that the cluster lacks, and the registry; `wait_until_ready` waits for them."""
    image = cluster.load_image(images.build_controllers()) if cluster.is_local_build else None
    # Into a cluster of ours always: what is there may be partial, or another version.
    present = cluster.kubectl("get", "crd", "--output=name") if cluster.is_existing else ""
    for tool, namespace, manifests in (("flux", FLUX, _flux()), ("argocd", ARGOCD, _argocd())):
        if CRDS[namespace] not in present:
            log(f"installing {' and '.join(name.partition('/')[2] for name in CONTROLLERS[namespace])}")
            cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
            _apply(cluster, namespace, manifests, image)
            cluster.kubectl("wait", "--for=condition=Established", f"crd/{CRDS[namespace]}")
            cluster.kubectl("apply", "-f", HERE / tool / "extra.yaml")
    _apply(cluster, "hcm-fixtures", _load(HERE / "registry.yaml"), image)


def wait_until_ready(cluster: Cluster) -> None:
    """Wait for the tools' controllers and the registry."""
    for namespace, names in {**CONTROLLERS, "hcm-fixtures": ["deploy/registry"]}.items():
        for name in names:
            cluster.wait_for_rollout(namespace, name)


def example(file: str, namespace: str, addresses: Mapping[str, str], values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects of gitops/`file` for a namespace, with `addresses` of this cluster and `values` for the chart.

    An Application gets the namespace's name, because all are in one namespace. Raises ValueError for an address that
    the file does not contain.
    """
    text = (ROOT / "gitops" / file).read_text()
    for old, new in addresses.items():
        if old not in text:
            raise ValueError(f"gitops/{file} does not contain {old}")
        text = text.replace(old, new)
    objects: list[dict[str, Any]] = list(yaml.safe_load_all(text))
    for each in objects:
        if each["kind"] == "Application":
            each["metadata"]["name"] = each["spec"]["destination"]["namespace"] = namespace
            helm = each["spec"]["source"]["helm"]
            helm["valuesObject"] = merged(helm.get("valuesObject", {}), values)
        else:
            each["metadata"]["namespace"] = namespace
        if each["kind"] == "HelmRelease":
            each["spec"]["values"] = merged(each["spec"].get("values", {}), values)
    return objects


def _flux() -> Iterator[dict[str, Any]]:
    for name in ("source-controller", "helm-controller"):
        config = source_folder(name) / "config"
        for file in [*sorted((config / "crd/bases").iterdir()), *sorted((config / "manager").iterdir())]:
            for each in _load(file):
                if each["kind"] == "Deployment":
                    (container,) = each["spec"]["template"]["spec"]["containers"]
                    container["image"] = f"ghcr.io/fluxcd/{name}:{pinned_version(name)}"
                if each["kind"] != "Kustomization":
                    yield each


def _argocd() -> Iterator[dict[str, Any]]:
    for each in _load(source_folder("argocd") / "manifests/core-install.yaml"):
        if each["metadata"]["name"] == "argocd-cmd-params-cm":
            # A short name's TXT record is looked up outside the cluster: 2 s for each request if that is unreachable.
            each["data"] = {"repo.server": f"argocd-repo-server.{ARGOCD}.svc.cluster.local:8081"}
        if "applicationset" not in each["metadata"]["name"]:
            yield each


def _load(file: Path) -> Iterator[dict[str, Any]]:
    return yaml.load_all(file.read_text(), yaml.CSafeLoader)


def _apply(cluster: Cluster, namespace: str, objects: Iterator[dict[str, Any]], image: str | None) -> None:
    items = list(objects)
    if image:
        for each in items:
            images.use_controllers(image, each)
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    cluster.kubectl("apply", "--server-side", "--force-conflicts", f"--namespace={namespace}", "-f", "-", input=text)


def deploy_checkout(cluster: Cluster) -> None:
    """Deploy this checkout's HEAD with both tools, each in a separate namespace, to the database unifieddevdb."""
    fixtures.push_checkout(cluster)
    install(cluster)
    wait_until_ready(cluster)
    log("Argo CD deploys to health-argocd (kubectl -n argocd get applications),")
    log("Flux deploys to health-flux (kubectl -n health-flux get helmreleases)")
    login = {"username": "hcm", "password": cluster.passwords["USER_PASSWORD"]}
    config = {"db-host": "postgres.hcm-fixtures", "db-name": "unifieddevdb"}
    addresses = {
        CODE: f"{cluster.git_in_cluster}/hcm-db-migrations.git",
        "unified-dev.yaml": "kind.yaml",
    }
    for namespace, file in (("health-argocd", "argocd/dev.yaml"), ("health-flux", "flux/dev.yaml")):
        metadata = {"namespace": namespace}
        cluster.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "egov-config", **metadata}, "data": config},
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "db", **metadata}, "stringData": login},
        )
        values = {"namespace": namespace, **cluster.image_values()}
        cluster.apply(*example(file, namespace, addresses, {"hcm-db-migrations": values}))
