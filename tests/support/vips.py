"""Services, slices and settings for tests of VIP advertisement, and a judge that knows no increments."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any

from kube_router.ipc.messages import Endpoint, EndpointSlice, IngressAddress, Node, NodeAddress, Service
from kube_router.workers.nodefacts import NodeFacts, node_facts
from kube_router.workers.router.vips import Vips
from kube_router.workers.settings import Settings

OWN = "a"
OWN_ADDRESSES = ("10.0.0.1", "2001:db8::1")
PREFIX = "kube-router.io/service."


def settings(**flags: Any) -> Settings:
    """Dual-stack, node ``a``, ranges for external and load balancer IPs."""
    values: dict[str, Any] = {
        "node_name": OWN,
        "enable_ipv6": True,
        "service_cluster_ip_range": ("10.96.0.0/12", "fd00:96::/112"),
        "service_external_ip_range": ("192.0.2.0/24", "2001:db8:e::/64"),
        "loadbalancer_ip_range": ("198.51.100.0/24", "2001:db8:b::/64"),
    }
    return Settings(**{**values, **flags})


def facts(addresses: Iterable[str] = OWN_ADDRESSES) -> NodeFacts:
    """The own node."""
    listed = tuple(NodeAddress("InternalIP", address) for address in addresses)
    return node_facts(Node(name=OWN, addresses=listed), settings().families)


def service(
    name: str = "web", *cluster: str, external: Iterable[str] = (), ingress: Iterable[str] = (), **fields: Any
) -> Service:
    """A Service ``shop/<name>``; annotations by their name without ``kube-router.io/service.``."""
    annotations = {PREFIX + key: value for key, value in fields.pop("annotations", {}).items()}
    values: dict[str, Any] = {"type": "LoadBalancer" if ingress else "ClusterIP", **fields}
    return Service(
        name=name,
        namespace="shop",
        uid=f"uid-{name}",
        cluster_ips=cluster or ("10.96.0.1", "fd00:96::1"),
        external_ips=tuple(external),
        ingress=tuple(IngressAddress(ip=ip) for ip in ingress),
        annotations=annotations,
        **values,
    )


def endpoint(*addresses: str, node: str | None = OWN, **conditions: Any) -> Endpoint:
    """One endpoint."""
    return Endpoint(addresses=addresses, node_name=node, **conditions)


def endpoint_slice(name: str, owner: str, *endpoints: Endpoint, kind: str = "IPv4", **fields: Any) -> EndpointSlice:
    """A slice ``shop/<name>`` of Service ``shop/<owner>``."""
    return EndpointSlice(name=name, namespace="shop", service=owner, address_type=kind, endpoints=endpoints, **fields)


TRUE = ("1", "t", "T", "TRUE", "true", "True")
LEADER = "control-plane.alpha.kubernetes.io/leader"


def judged(
    config: Settings, own_addresses: Iterable[str], services: Iterable[Service], slices: Iterable[EndpointSlice]
) -> Vips:
    """What is right, Service by Service and without memory; addresses in the input are canonical."""
    slices, own = list(slices), set(own_addresses)
    advertised: set[str] = set()
    known: set[str] = set()
    for item in services:
        if item.type not in ("ClusterIP", "NodePort", "LoadBalancer") or item.cluster_ips[:1] in ((), ("None",), ("",)):
            continue
        for kind in ("cluster", "external", "loadbalancer"):
            annotation = item.annotations.get(f"{PREFIX}advertise.{kind}ip")
            if not (getattr(config, f"advertise_{kind}_ip") if annotation is None else annotation in TRUE):
                continue
            for address in _candidates(config, item, kind):
                known.add(address)
                if not _needs_local(item, kind) or _has_local(item, address, slices, own):
                    advertised.add(address)
    return Vips(frozenset(advertised), frozenset(known))


def _candidates(config: Settings, item: Service, kind: str) -> list[str]:
    if kind == "cluster":
        return list(item.cluster_ips)
    if kind == "external":
        found, ranges = list(item.external_ips), config.service_external_ip_range
    else:
        if item.type != "LoadBalancer" or f"{PREFIX}skiplbips" in item.annotations:
            return []
        found = [entry.ip for entry in item.ingress if entry.ip and entry.ip_mode != "Proxy"]
        ranges = config.loadbalancer_ip_range
    if not config.strict_external_ip_validation:
        return found
    return [ip for ip in found if _inside(ip, ranges) and not _inside(ip, config.service_cluster_ip_range)]


def _inside(text: str, ranges: Iterable[str]) -> bool:
    return any(ipaddress.ip_address(text) in ipaddress.ip_network(item) for item in ranges)


def _needs_local(item: Service, kind: str) -> bool:
    if kind == "cluster":
        return item.internal_traffic_policy == "Local"
    return item.external_traffic_policy == "Local" or item.annotations.get(f"{PREFIX}local") == "true"


def _has_local(item: Service, vip: str, slices: Iterable[EndpointSlice], own: set[str]) -> bool:
    version = ipaddress.ip_address(vip).version
    for part in slices:
        if (part.namespace, part.service) != (item.namespace, item.name) or part.address_type != f"IPv{version}":
            continue
        if LEADER in part.annotations:
            continue
        for one in part.endpoints:
            addresses = {ip for ip in one.addresses if ipaddress.ip_address(ip).version == version}
            here = bool(addresses) if one.node_name == OWN else one.node_name is None and bool(addresses & own)
            if here and one.ready in (None, True) and one.terminating in (None, False):
                return True
    return False
