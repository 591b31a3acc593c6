"""What a restricted network needs: a mirror with a private CA, a proxy, and a NetworkPolicy."""

from __future__ import annotations

import functools
import ipaddress
from typing import Any

import pytest
import yaml

from tests.support.database import Database
from tests.support.documents import block
from tests.support.kubernetes import Api, Peer, connections
from tests.support.release import Release
from tests.support.repository import Repository
from tests.support.waiting import until
from tools.cluster import Cluster
from tools.values import merged

PROXY = r"""
import socket, socketserver, threading

def copy(source, target):
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        request = self.rfile.readline().decode()
        if not request.startswith("CONNECT "):
            return
        print(request.rpartition(" ")[0])
        while self.rfile.readline().strip():
            pass
        host, _, port = request.split()[1].rpartition(":")
        with socket.create_connection((host, int(port))) as upstream:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=copy, args=(upstream, self.connection))
            back.start()
            copy(self.connection, upstream)
            back.join()

socketserver.ThreadingTCPServer(("", 8080), Handler).serve_forever()
"""


@pytest.fixture
def over_https(api: Api, cluster: Cluster, with_pip: dict[str, Any], over_https: dict[str, Any]) -> dict[str, Any]:
    """Values for git over HTTPS and for pip, whose index is `mirror.example.org`; both have the private CA."""
    api.config_map("mirror-ca", **{"ca.crt": cluster.server_file("ca.crt")})
    return merged(with_pip, over_https)


def test_a_mirror_with_a_private_ca_and_a_proxy_for_git(
    release: Release, api: Api, cluster: Cluster, database: Database, over_https: dict[str, Any]
) -> None:
    """NO_PROXY has the domain of the mirror, but not that of the git server."""
    proxy = api.serve("proxy", cluster.images["python"], PROXY)
    values = block("PIP_CERT").replace("mirror.example.org", "server.hcm-fixtures.svc")
    example = yaml.safe_load(values.replace("proxy.example.org:3128", f"{proxy.status.pod_ip}:8080"))
    result = release.upgrade({**over_https, **example})
    assert (result.returncode, database.at) == (0, ["001"]), result.text
    assert set(api.log(proxy, "proxy").splitlines()) == {"CONNECT server.hcm-fixtures:443"}


def _allowed(api: Api, rules: list[dict[str, Any]], peer: Peer) -> bool:
    protocol, address, port = peer

    def selects(target: dict[str, Any]) -> bool:
        if network := target.get("ipBlock"):
            return ipaddress.ip_address(address) in ipaddress.ip_network(network["cidr"])
        assert target["namespaceSelector"] == {}
        labels = ",".join(f"{name}={value}" for name, value in target["podSelector"]["matchLabels"].items())
        found = api.core.list_pod_for_all_namespaces(label_selector=labels).items
        return address in [pod.status.pod_ip for pod in found]

    return any(
        (protocol, port) in [(found.get("protocol", "TCP").lower(), found["port"]) for found in rule["ports"]]
        and any(map(selects, rule["to"]))
        for rule in rules
    )


def test_the_network_policy_allows_what_a_run_connects_to_and_needs_each_rule(
    release: Release,
    api: Api,
    cluster: Cluster,
    repository: Repository,
    database: Database,
    over_https: dict[str, Any],
) -> None:
    """An install over HTTPS and an upgrade over SSH. The offline cluster's network plugin does not enforce policies, so
    the node's table of connections is compared with the rules.
    """
    text = block("kind: NetworkPolicy").replace("health", api.namespace)
    text = text.replace("192.0.2.10", api.fixture("postgres").status.pod_ip)
    policy = yaml.safe_load(text.replace("198.51.100.0/24", f"{api.fixture('server').status.pod_ip}/32"))
    cluster.apply(policy)
    labels = ",".join(f"{name}={value}" for name, value in policy["spec"]["podSelector"]["matchLabels"].items())

    def upgrade(values: dict[str, Any]) -> set[Peer]:
        """Install or upgrade; return what the pod that the policy selects connected to. Nothing connects to it."""
        pods = functools.partial(api.core.list_namespaced_pod, api.namespace, label_selector=labels)
        started = release.start_upgrade(values)
        address = until(lambda: next((pod.status.pod_ip for pod in pods().items if pod.status.pod_ip), ""))
        result = started.wait()
        assert (result.returncode, connections(cluster, address, "--orig-dst")) == (0, set()), result.text
        return connections(cluster, address, "--orig-src")

    example = yaml.safe_load(block("PIP_CERT").replace("mirror.example.org", "server.hcm-fixtures.svc"))
    example["extraEnv"] = [entry for entry in example["extraEnv"] if "PROXY" not in entry["name"]]
    api.secret("git-creds", ssh=cluster.server_file("ssh"), known_hosts=cluster.server_file("known_hosts"))
    ssh = {"git": {**over_https["git"], "repo": f"git@server.hcm-fixtures:{repository.name}"}}
    ssh["git"] |= {"httpsSecretName": "", "ca": {"configMapName": ""}}
    peers = upgrade({**over_https, **example}) | upgrade({**over_https, **example, **ssh})
    assert database.at == ["001"]
    assert {(protocol, port) for protocol, _, port in peers} == {("udp", 53), ("tcp", 5432), ("tcp", 443), ("tcp", 22)}
    rules = policy["spec"]["egress"]
    assert [peer for peer in peers if not _allowed(api, rules, peer)] == []
    for rule in rules:
        assert any(not _allowed(api, [other for other in rules if other is not rule], peer) for peer in peers), rule
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]  # without a rule, nothing is admitted
