"""The network policies admit the documented flows and no others, judged by Kubernetes' rules over what was rendered.

A flow passes when the egress side and the ingress side both admit it; a side that no policy selects admits everything.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from cluster.config import build_config
from tests.helm.rendering import CASES, Object, of_kind, pod_templates, render, rendered, tandem_configs

NAMESPACE = "serving"
GUARDED = [case for case in CASES if case != "open"]
TCP = "TCP"
NODE_PORTS = (
    "node-manager-port", "object-manager-port", "runtime-env-agent-port", "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port", "metrics-export-port", "min-worker-port", "max-worker-port",
)  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """One end of a flow. ports: names of container ports."""

    name: str
    labels: tuple[tuple[str, str], ...] = ()
    namespace: str = NAMESPACE
    address: str = ""
    ports: tuple[tuple[str, int], ...] = ()


STRANGER = Peer("a pod of another namespace", (("app", "x"),), "elsewhere")
NEIGHBOUR = Peer("a pod of this namespace", (("app", "x"),))
PROMETHEUS = Peer("prometheus", (("app", "prometheus"),), "monitoring")
NAMES = Peer("the name service", (("k8s-app", "kube-dns"),), "kube-system")
INTERNET = Peer("an address outside", namespace="", address="203.0.113.7")


def admits(policies: list[Object], source: Peer, target: Peer, port: int, protocol: str = TCP) -> bool:
    """Whether a connection can be made."""
    return _side(policies, "Egress", source, target, target, port, protocol) and _side(
        policies, "Ingress", target, source, target, port, protocol
    )


def _side(policies: list[Object], kind: str, own: Peer, other: Peer, target: Peer, port: int, protocol: str) -> bool:
    if own.namespace != NAMESPACE:
        return True
    chosen = [
        p["spec"] for p in policies if kind in p["spec"]["policyTypes"] and _selects(p["spec"]["podSelector"], own)
    ]
    rules = [rule for spec in chosen for rule in spec.get(kind.lower()) or ()]
    peers = "to" if kind == "Egress" else "from"
    return not chosen or any(
        (not rule.get(peers) or any(_is_peer(peer, other) for peer in rule[peers]))
        and (not rule.get("ports") or any(_is_port(entry, target, port, protocol) for entry in rule["ports"]))
        for rule in rules
    )


def _selects(selector: dict[str, Any], pod: Peer) -> bool:
    assert set(selector) <= {"matchLabels"}, "teach this evaluator matchExpressions first"
    return selector.get("matchLabels", {}).items() <= dict(pod.labels).items()


def _is_peer(peer: dict[str, Any], other: Peer) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        inside = [network for network in (block["cidr"], *block.get("except", ())) if _has(network, other.address)]
        return inside == [block["cidr"]]
    if other.address:
        return False
    if "namespaceSelector" in peer:
        wanted = peer["namespaceSelector"].get("matchLabels", {})
        if not wanted.items() <= {"kubernetes.io/metadata.name": other.namespace}.items():
            return False
    elif other.namespace != NAMESPACE:
        return False
    return _selects(peer.get("podSelector", {}), other)


def _has(network: str, address: str) -> bool:
    """Whether an address is of a network; an address of the one kind is of no network of the other."""
    return bool(address) and ipaddress.ip_address(address) in ipaddress.ip_network(network)


def _is_port(entry: dict[str, Any], target: Peer, port: int, protocol: str) -> bool:
    if entry.get("protocol", TCP) != protocol:
        return False
    first = entry["port"] if isinstance(entry["port"], int) else dict(target.ports).get(entry["port"], -1)
    return bool(first <= port <= entry.get("endPort", first))


def pods(objects: list[Object]) -> dict[str, Peer]:
    found = {}
    for where, template in pod_templates(objects):
        ports = [
            (port["name"], port["containerPort"])
            for container in template["spec"]["containers"]
            for port in container.get("ports", ())
        ]
        found[where] = Peer(where, tuple(template["metadata"]["labels"].items()), ports=tuple(ports))
    return found


def _flows(case: str) -> Iterator[tuple[Peer, Peer, int, bool]]:
    """(from, to, port, is it documented) of every pair of pods of the release and every port that matters."""
    objects = rendered(case)
    all_pods = pods(objects)
    configs = [build_config(yaml.safe_load(text)) for text in tandem_configs(objects).values()]
    transfer, api = configs[0].transfer.port_range, configs[0].gateway.port
    assert transfer is not None
    (params, *_) = [c["spec"]["headGroupSpec"]["rayStartParams"] for c in of_kind(objects, "RayCluster")]
    gcs, dashboard = int(params["port"]), int(params["dashboard-port"])
    node = {int(params[key]) for key in NODE_PORTS}
    others = {22, 443, 10001, 65000, transfer[0] - 1, transfer[-1] + 1, int(params["max-worker-port"]) + 1}
    for source in all_pods.values():
        for target in all_pods.values():
            same = dict(source.labels).get("tandem/track") == dict(target.labels).get("tandem/track")
            are_ray = same and source.name.startswith("RayCluster/") and target.name.startswith("RayCluster/")
            is_head, is_gateway = target.name.endswith("/head"), target.name.endswith("/gateway")
            carry = are_ray and not is_head and not source.name.endswith("/head")
            for port in {*node, gcs, dashboard, api, transfer[0], transfer[-1], *others}:
                allowed = (
                    (are_ray and port in node)
                    or (are_ray and is_head and port in (gcs, dashboard))
                    or (carry and port in transfer)
                    or (same and is_head and port == dashboard and source.name.startswith("Deployment/"))
                    or (is_gateway and port == api and source.name.startswith("Pod/"))
                )
                yield source, target, port, allowed


@pytest.mark.parametrize("case", GUARDED)
def test_between_the_pods_of_a_release_only_documented_flows_pass(case: str) -> None:
    policies = of_kind(rendered(case), "NetworkPolicy")
    wrong, passed = [], 0
    for source, target, port, is_documented in _flows(case):
        is_admitted = admits(policies, source, target, port)
        passed += is_admitted
        if is_admitted != is_documented:
            wrong.append(f"{source.name} -> {target.name}:{port} {'passes' if is_admitted else 'is blocked'}")
    assert not wrong, "\n".join(wrong[:20])
    assert passed > 20


@pytest.mark.parametrize("case", GUARDED)
def test_from_and_to_elsewhere(case: str) -> None:
    objects = rendered(case)
    policies, all_pods = of_kind(objects, "NetworkPolicy"), pods(objects)
    api = build_config(yaml.safe_load(next(iter(tandem_configs(objects).values())))).gateway.port
    is_default = case not in ("ingress", "gateway-api", "everything")
    for where, pod in all_pods.items():
        is_gateway = where.endswith("/gateway")
        assert admits(policies, NEIGHBOUR, pod, api) == (is_gateway and is_default), where
        assert admits(policies, PROMETHEUS, pod, api) == is_gateway, where
        assert not admits(policies, STRANGER, pod, api), where
        for port in (22, 6379, 8265, 20000, 52365):
            assert not any(admits(policies, other, pod, port) for other in (NEIGHBOUR, STRANGER, PROMETHEUS)), where
        assert admits(policies, pod, NAMES, 53, "UDP") and not admits(policies, pod, NAMES, 80), where
        may_copy = case == "public-s3" and where.startswith("RayCluster/") and not where.endswith("/head")
        may_read_images = case == "media" and is_gateway
        assert admits(policies, pod, INTERNET, 443) == (may_copy or may_read_images), where
        assert admits(policies, pod, INTERNET, 80) == may_read_images, where
        for address, port in (("203.0.113.7", 22), ("10.30.0.1", 80), ("169.254.169.254", 80), ("fd00::7", 443)):
            assert not admits(policies, pod, Peer(address, namespace="", address=address), port), (where, address)
        for address, port in (("10.20.30.40", 9001), ("2606:4700::1111", 443)):
            outside = Peer(address, namespace="", address=address)
            assert admits(policies, pod, outside, port) == may_read_images, (where, address)
        assert not admits(policies, pod, STRANGER, 443), where


def test_a_name_service_on_ports_of_its_own_is_reached_there_alone() -> None:
    objects = render("--set", "networkPolicy.dnsPorts={5353}")
    policies = of_kind(objects, "NetworkPolicy")
    for where, pod in pods(objects).items():
        for protocol in ("UDP", "TCP"):
            assert admits(policies, pod, NAMES, 5353, protocol), where
            assert not admits(policies, pod, NAMES, 53, protocol), where


def test_pods_are_reached_by_the_service_that_names_them() -> None:
    for case in CASES:
        objects = rendered(case)
        everyone = pods(objects)
        for service in of_kind(objects, "Service"):
            chosen = [p for p in everyone.values() if _selects({"matchLabels": service["spec"]["selector"]}, p)]
            assert len(chosen) == 1 and chosen[0].name.endswith("/gateway"), (case, service["metadata"]["name"])
            (port,) = service["spec"]["ports"]
            assert (
                dict(chosen[0].ports)[port["targetPort"]]
                == build_config(yaml.safe_load(next(iter(tandem_configs(objects).values())))).gateway.port
            )


def test_the_service_follows_the_active_track() -> None:
    def track(case: str) -> str:
        services = {s["metadata"]["name"]: s for s in of_kind(rendered(case), "Service")}
        return str(services["release-tandem"]["spec"]["selector"]["tandem/track"])

    assert track("both-tracks") == "blue" and track("green") == "green" and track("defaults") == "main"


def test_tracks_differ_in_what_was_overridden() -> None:
    configs = {name: yaml.safe_load(text) for name, text in tandem_configs(rendered("both-tracks")).items()}
    assert configs["release-tandem-green-config"]["language"]["max_num_seqs"] == 128
    assert "language" not in configs["release-tandem-blue-config"]
    images = dict(_images("both-tracks"))
    assert {image for where, image in images.items() if "-green/" in where} == {"tandem:0.1.1"}
    assert {image for where, image in images.items() if "-blue/" in where} == {"tandem:0.1.0"}


def _images(case: str) -> Iterator[tuple[str, str]]:
    for where, pod in pod_templates(rendered(case)):
        if where.startswith("RayCluster/"):
            yield where, pod["spec"]["containers"][0]["image"]
