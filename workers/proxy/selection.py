"""The judge: which endpoints a packet for a Service may reach, straight from API objects.

Pure. It is the specification against which what a backend programs is held, so it shares nothing with the engine but
the strict validation of addresses: no plan, no pool, no index; it looks at everything, one packet at a time, and is as
slow as it is plain. What Kubernetes documents stands in the words in which it documents it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from kube_router.ipc.messages import Endpoint, EndpointSlice, Service, ServicePort
from kube_router.workers.proxy.names import (
    HEADLESS_LABEL,
    OUR_PROXY_NAME,
    PROXY_NAME_LABEL,
    SERVICE_LOCAL,
    SKIP_LOADBALANCER_IPS,
)
from kube_router.workers.serviceips import ServiceIps, is_served

Target = tuple[str, int]
"""(address, port) of an endpoint."""


@dataclass(frozen=True, slots=True)
class World:
    """What the judge is told. ``node_ports_on``: addresses of this node on which node ports are open.

    ``services`` have distinct keys; slices belong to the Service that they name.
    """

    services: tuple[Service, ...]
    slices: tuple[EndpointSlice, ...]
    node: str
    zone: str
    node_ports_on: frozenset[str]
    ips: ServiceIps


@dataclass(frozen=True, slots=True)
class Asked:
    """The first packet of a connection. ``inside``: sent by this node or by one of its pods."""

    source: str
    destination: str
    protocol: str
    port: int
    inside: bool


@dataclass(frozen=True, slots=True)
class Judged:
    """What must become of it.

    ``served``: some Service has this address and port. ``refused_silently``: its source may not use it. Otherwise it
    goes to one of ``targets``, each with a chance, and is rejected if there are none.
    """

    served: bool = False
    refused_silently: bool = False
    targets: frozenset[Target] = frozenset()


def judge(world: World, asked: Asked) -> Judged:
    """What must become of a packet."""
    claims = [claim for service in world.services for claim in _claims(world, service, asked)]
    exact = [claim for claim in claims if claim.kind != "node-port"]
    chosen = min(exact or claims, key=lambda claim: (claim.service.created, claim.service.key), default=None)
    if chosen is None:
        return Judged()
    service = chosen.service
    if chosen.kind == "load-balancer" and not _source_allowed(service, asked.source):
        return Judged(served=True, refused_silently=True)
    return Judged(served=True, targets=frozenset(_targets(world, chosen, asked)))


@dataclass(frozen=True, slots=True)
class _Claim:
    service: Service
    port: ServicePort
    kind: str


def _claims(world: World, service: Service, asked: Asked) -> Iterable[_Claim]:
    """The one reason, if any, for which a packet is this Service's."""
    labels = service.labels
    if (
        not is_served(service)
        or HEADLESS_LABEL in labels
        or labels.get(PROXY_NAME_LABEL, OUR_PROXY_NAME) != OUR_PROXY_NAME
    ):
        return
    version6 = ":" in asked.destination
    families = service.ip_families or ("IPv4", "IPv6")
    if ("IPv6" if version6 else "IPv4") not in families:
        return
    cluster = [item for item in world.ips.cluster(service).accepted if (":" in item) == version6]
    if not cluster:
        return
    kinds = [("cluster", cluster)]
    if SKIP_LOADBALANCER_IPS not in service.annotations:
        kinds.append(("load-balancer", list(world.ips.load_balancer(service).accepted)))
    kinds.append(("external", list(world.ips.external(service).accepted)))
    for port in service.ports:
        if port.protocol.lower() != asked.protocol:
            continue
        for kind, addresses in kinds:
            if asked.destination in addresses and port.port == asked.port:
                yield _Claim(service, port, kind)
                return
    for port in service.ports:
        node_port = port.node_port if service.type != "ClusterIP" else 0
        open_here = asked.destination in world.node_ports_on
        if port.protocol.lower() == asked.protocol and open_here and node_port == asked.port:
            yield _Claim(service, port, "node-port")
            return


def _source_allowed(service: Service, source: str) -> bool:
    ranges = service.load_balancer_source_ranges
    if not ranges:
        return True
    address = ipaddress.ip_address(source)
    networks = (ipaddress.ip_network(item.strip(), strict=False) for item in ranges)
    return any(network.version == address.version and address in network for network in networks)


def _targets(world: World, claim: _Claim, asked: Asked) -> set[Target]:
    service = claim.service
    everywhere = service.annotations.get(SERVICE_LOCAL) == "true"
    if claim.kind == "cluster":
        only_local = service.internal_traffic_policy == "Local" and not everywhere
    else:
        only_local = (service.external_traffic_policy == "Local" or everywhere) and not asked.inside
    found = [
        (endpoint, (address, port.port))
        for item in world.slices
        if f"{item.namespace}/{item.service}" == service.key and HEADLESS_LABEL not in item.labels
        if item.address_type == ("IPv6" if ":" in asked.destination else "IPv4")
        for port in item.ports
        if port.name == claim.port.name and port.protocol.lower() == asked.protocol and port.port
        for endpoint in item.endpoints
        for address in endpoint.addresses
        if not only_local or endpoint.node_name == world.node
    ]
    ready = [(endpoint, target) for endpoint, target in found if _is_ready(service, endpoint)]
    if ready:
        if not only_local:
            ready = _in_zone(world.zone, ready)
        return {target for _, target in ready}
    return {target for endpoint, target in found if endpoint.terminating and _serves(endpoint)}


def _is_ready(service: Service, endpoint: Endpoint) -> bool:
    if service.publish_not_ready_addresses:
        return True
    return not endpoint.terminating if endpoint.ready is None else endpoint.ready


def _serves(endpoint: Endpoint) -> bool:
    """``serving`` is ``ready`` for who does not say; and who terminates without a word of it is not ready."""
    return bool(endpoint.ready if endpoint.serving is None else endpoint.serving)


def _in_zone(zone: str, found: list[tuple[Endpoint, Target]]) -> list[tuple[Endpoint, Target]]:
    """Hints count if all have them and some name this zone."""
    if not zone or not all(endpoint.hint_zones for endpoint, _ in found):
        return found
    return [(endpoint, target) for endpoint, target in found if zone in endpoint.hint_zones] or found
