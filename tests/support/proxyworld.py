"""Clusters of Services for proxy tests, in few words, and random ones.

`Services` are what the API would hold; `judged` asks the judge, `tabled` what the engine's table says, of one packet.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import strategies as st

from kube_router.ipc.messages import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    IngressAddress,
    Key,
    Node,
    NodeAddress,
    Projection,
    Service,
    ServicePort,
    SourceState,
)
from kube_router.ipc.replica import Changes, Cluster
from kube_router.workers.model import Family
from kube_router.workers.proxy.model import Frontend, ServiceTable
from kube_router.workers.proxy.selection import Asked, Judged, World, judge
from kube_router.workers.serviceips import ServiceIps
from kube_router.workers.settings import Settings

NODE, OTHER_NODE = "n1", "n2"
NODE_ADDRESS = {Family.IPV4: "192.168.0.1", Family.IPV6: "fd00:aa::1"}
POD_CIDR = {Family.IPV4: "10.1.0.0/24", Family.IPV6: "fd00:1::/64"}
LOCAL_POD = {Family.IPV4: "10.1.0.9", Family.IPV6: "fd00:1::9"}
OUTSIDE = {Family.IPV4: "203.0.113.9", Family.IPV6: "2001:db8:9::9"}
CLUSTER = {Family.IPV4: "10.96.0.", Family.IPV6: "fd00:96::"}
EXTERNAL = {Family.IPV4: "192.0.2.", Family.IPV6: "2001:db8:e::"}
BALANCER = {Family.IPV4: "198.51.100.", Family.IPV6: "2001:db8:b::"}
SETTINGS = Settings(
    enable_ipv6=True,
    node_name=NODE,
    service_cluster_ip_range=("10.96.0.0/12", "fd00:96::/112"),
    service_external_ip_range=("192.0.2.0/24", "2001:db8:e::/64"),
    loadbalancer_ip_range=("198.51.100.0/24", "2001:db8:b::/64"),
)
IPS = ServiceIps(SETTINGS)
IN_SYNC = SourceState(source="test", in_sync=True)


def both(prefixes: Mapping[Family, str], number: int) -> tuple[str, ...]:
    """An address of each family."""
    return tuple(f"{prefixes[family]}{number}" for family in Family)


def node(name: str = NODE, zone: str = "", **fields: Any) -> Node:
    """A node; the own one has the addresses and pod CIDRs above."""
    number = 1 if name == NODE else 2
    addresses = (NodeAddress("InternalIP", f"192.168.0.{number}"), NodeAddress("InternalIP", f"fd00:aa::{number}"))
    cidrs = tuple(POD_CIDR.values()) if name == NODE else ("10.1.1.0/24", "fd00:1:0:1::/64")
    labels = {"topology.kubernetes.io/zone": zone} if zone else {}
    values: dict[str, Any] = {"addresses": addresses, "pod_cidrs": cidrs, "labels": labels}
    return Node(name=name, uid=f"uid-{name}", **{**values, **fields})


def service(name: str = "web", number: int = 1, *ports: ServicePort, namespace: str = "shop", **fields: Any) -> Service:
    """A dual-stack ClusterIP Service; its addresses end in ``number``."""
    values: dict[str, Any] = {"cluster_ips": both(CLUSTER, number), "ip_families": ("IPv4", "IPv6")}
    values["ports"] = ports or (ServicePort(name="http", port=80, target_port=8080),)
    return Service(name=name, namespace=namespace, uid=f"uid-{name}", **{**values, **fields})


def balanced(name: str, number: int, *ports: ServicePort, **fields: Any) -> Service:
    """A Service of type LoadBalancer with an address of both families, and a node port."""
    ports = ports or (ServicePort(name="http", port=80, target_port=8080, node_port=30000 + number),)
    ingress = tuple(IngressAddress(ip=address) for address in both(BALANCER, number))
    return service(name, number, *ports, **{"type": "LoadBalancer", "ingress": ingress, **fields})


def endpoint(address: str, where: str | None = NODE, **fields: Any) -> Endpoint:
    """An endpoint that is ready."""
    return Endpoint(addresses=(address,), node_name=where, **{"ready": True, **fields})


def slices(
    name: str = "web",
    endpoints: Iterable[Endpoint] = (),
    *ports: EndpointPort,
    namespace: str = "shop",
    suffix: str = "a",
    **fields: Any,
) -> tuple[EndpointSlice, ...]:
    """A slice a family with those of the endpoints that are of it."""
    made = []
    for family in Family:
        items = tuple(item for item in endpoints if (":" in item.addresses[0]) == (family is Family.IPV6))
        values: dict[str, Any] = {"address_type": str(family), "service": name, "endpoints": items}
        values["ports"] = ports or (EndpointPort(name="http", port=8080),)
        values |= {"name": f"{name}-{str(family).lower()}-{suffix}", "namespace": namespace, **fields}
        made.append(EndpointSlice(**values))
    return tuple(made)


def pods(*numbers: int, where: str = NODE, **fields: Any) -> tuple[Endpoint, ...]:
    """Endpoints of both families; pods of the own node have addresses of its pod CIDRs."""
    prefixes = ("10.1.0.", "fd00:1::") if where == NODE else ("10.1.1.", "fd00:1:0:1::")
    return tuple(endpoint(f"{prefix}{number}", where, **fields) for prefix in prefixes for number in numbers)


@dataclass
class Objects:
    """The objects of a cluster, and the changes since they were last taken."""

    items: dict[tuple[str, Key], Projection] = field(default_factory=dict)
    taken: dict[tuple[str, Key], Projection] = field(default_factory=dict)

    def put(self, *objects: Projection) -> Objects:
        """Add or replace objects."""
        for item in objects:
            self.items[kind_of(item), item.key] = item
        return self

    def remove(self, kind: str, key: Key) -> None:
        """Delete one, if it is there."""
        self.items.pop((kind, key), None)

    def cluster(self, *, in_sync: bool = True) -> Cluster:
        """As a worker sees it."""
        by_kind: dict[str, dict[Key, Projection]] = {"nodes": {}, "services": {}, "endpointslices": {}}
        for (kind, key), item in self.items.items():
            by_kind[kind][key] = item
        return Cluster(IN_SYNC if in_sync else SourceState(source="test", stale=True), by_kind)  # type: ignore[arg-type]

    def changes(self) -> Changes:
        """What differs from the last call."""
        found: Changes = {}
        for kind, key in {**self.items, **self.taken}:
            old, new = self.taken.get((kind, key)), self.items.get((kind, key))
            if old != new:
                found.setdefault(kind, {})[key] = (old, new)  # type: ignore[arg-type]
        self.taken = dict(self.items)
        return found

    def of(self, kind: type) -> tuple[Any, ...]:
        """All of one type."""
        return tuple(item for item in self.items.values() if isinstance(item, kind))


def kind_of(item: Projection) -> str:
    """The resource name of an object's kind."""
    return {Node: "nodes", Service: "services", EndpointSlice: "endpointslices"}[type(item)]


def world(objects: Objects, node_ports_on: Iterable[str] = tuple(NODE_ADDRESS.values())) -> World:
    """The cluster as the judge is told of it."""
    own = objects.items.get(("nodes", NODE))
    zone = own.labels.get("topology.kubernetes.io/zone", "") if isinstance(own, Node) else ""
    return World(objects.of(Service), objects.of(EndpointSlice), NODE, zone, frozenset(node_ports_on), IPS)


def ask(family: Family, destination: str, port: int = 80, *, inside: bool, protocol: str = "tcp") -> Asked:
    """A packet from a pod of this node, or from outside of the cluster."""
    source = LOCAL_POD[family] if inside else OUTSIDE[family]
    return Asked(source, destination, protocol, port, inside)


def judged(objects: Objects, asked: Asked) -> Judged:
    """What must become of a packet."""
    return judge(world(objects), asked)


def tabled(table: ServiceTable, asked: Asked, node_ports_on: Iterable[str] = tuple(NODE_ADDRESS.values())) -> Judged:
    """What a table says of a packet."""
    family = Family.IPV6 if ":" in asked.destination else Family.IPV4
    frontend = Frontend(family, asked.destination, asked.protocol, asked.port)
    if frontend not in table.frontends and asked.destination in node_ports_on:
        frontend = Frontend(family, "", asked.protocol, asked.port)
    forwarding = table.frontends.get(frontend)
    if forwarding is None:
        return Judged()
    if forwarding.sources is not None:
        source = ipaddress.ip_address(asked.source)
        if not any(source in ipaddress.ip_network(item) for item in forwarding.sources):
            return Judged(served=True, refused_silently=True)
    found = table.endpoints(frontend, inside=asked.inside)
    return Judged(served=True, targets=frozenset((item.address, item.port) for item in found))


# ----------------------------------------------------------------------------------------------------- random clusters

PROTOCOLS = st.sampled_from(["TCP", "TCP", "UDP", "SCTP"])
NUMBERS = st.integers(1, 3)
POLICY = st.sampled_from(["Cluster", "Local"])


@st.composite
def service_ports(draw: st.DrawFn) -> tuple[ServicePort, ...]:
    """One to three ports, as an API server lets them pass: no number twice."""
    made: dict[tuple[str, int], ServicePort] = {}
    node_ports = st.sampled_from([0, 30001, 30002])
    for name in draw(st.lists(st.sampled_from(["", "http", "dns"]), min_size=1, max_size=3, unique=True)):
        port = ServicePort(name=name, protocol=draw(PROTOCOLS), port=draw(st.sampled_from([80, 80, 53])))
        node_port = draw(node_ports)
        if any((one.protocol, one.node_port) == (port.protocol, node_port) for one in made.values()):
            node_port = 0
        made.setdefault((port.protocol, port.port), msgspec.structs.replace(port, node_port=node_port))
    return tuple(made.values())


@st.composite
def random_services(draw: st.DrawFn) -> Service:
    """A Service with some of everything; addresses and ports are few, so that Services quarrel."""
    number = draw(NUMBERS)
    annotations = {}
    if draw(st.integers(0, 5)) == 0:
        annotations["kube-router.io/service.local"] = draw(st.sampled_from(["true", "yes"]))
    if draw(st.integers(0, 5)) == 0:
        annotations["kube-router.io/service.skiplbips"] = ""
    if draw(st.integers(0, 9)) == 0:
        annotations["kube-router.io/service.scheduler"] = "sh"
    labels = draw(
        st.sampled_from(
            [{}] * 6
            + [{"service.kubernetes.io/headless": ""}]
            + [{"service.kubernetes.io/service-proxy-name": who} for who in ("kube-router", "another")]
        )
    )
    families = draw(st.sampled_from([("IPv4", "IPv6"), ("IPv4", "IPv6"), ("IPv4",), ("IPv6",)]))
    cluster_ips = [address for address in both(CLUSTER, number) if ("IPv6" if ":" in address else "IPv4") in families]
    ingress = tuple(
        IngressAddress(ip=address, ip_mode=draw(st.sampled_from(["", "VIP", "Proxy"])))
        for address in draw(st.sampled_from([(), both(BALANCER, number), both(EXTERNAL, number)]))
    )
    return service(
        draw(st.sampled_from("abc")),
        number,
        *draw(service_ports()),
        namespace=draw(st.sampled_from(["x", "y"])),
        type=draw(st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer", "ExternalName"])),
        created=draw(st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"])),
        annotations=annotations,
        labels=labels,
        ip_families=families,
        cluster_ips=draw(st.sampled_from([tuple(cluster_ips)] * 4 + [("None",)])),
        external_ips=draw(
            st.sampled_from([(), both(EXTERNAL, number), ("203.0.113.77",), (NODE_ADDRESS[Family.IPV4],)])
        ),
        ingress=ingress,
        internal_traffic_policy=draw(POLICY),
        external_traffic_policy=draw(POLICY),
        session_affinity=draw(st.sampled_from(["None", "None", "ClientIP"])),
        load_balancer_source_ranges=draw(
            st.sampled_from([()] * 3 + [("203.0.113.0/24",), ("10.0.0.0/8", "fd00::/8"), (" 2001:db8::/32",)])
        ),
        publish_not_ready_addresses=draw(st.sampled_from([False, False, False, True])),
    )


@st.composite
def random_endpoints(draw: st.DrawFn, family: Family) -> Endpoint:
    """One endpoint in any condition; its conditions and hints hang on its address: a pod has one state."""
    where = draw(st.sampled_from([NODE, OTHER_NODE]))
    number = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 7))
    prefix = {NODE: ("10.1.0.", "fd00:1::"), OTHER_NODE: ("10.1.1.", "fd00:1:0:1::")}[where][family is Family.IPV6]
    conditions = [
        (True, None, None),
        (True, True, False),
        (None, None, None),
        (False, True, True),
        (False, False, True),
        (False, False, False),
        (None, True, True),
        (True, True, True),
    ][seed]
    hints = draw(st.sampled_from([(), ("a",), ("b",), ("a", "b")]))
    ready, serving, terminating = conditions
    return Endpoint(
        addresses=(f"{prefix}{number * 8 + seed}",),
        node_name=where,
        ready=ready,
        serving=serving,
        terminating=terminating,
        hint_zones=hints,
    )


STRAY_PORTS = (("", "TCP"), ("http", "TCP"), ("dns", "UDP"))


@st.composite
def random_slices(draw: st.DrawFn, services: tuple[Service, ...] = ()) -> EndpointSlice:
    """A slice of one of ``services``, for ports that it has and others; now and then of a Service that there is not."""
    family = draw(st.sampled_from(list(Family)))
    owner = draw(st.sampled_from(services)) if services and draw(st.integers(0, 9)) > 0 else None
    own = tuple((port.name, port.protocol) for port in owner.ports) if owner is not None else ()
    stray = draw(st.lists(st.sampled_from(STRAY_PORTS), max_size=1 if own else 3))
    ports = tuple(
        EndpointPort(name=name, protocol=protocol, port=draw(st.sampled_from([8080, 8080, 8080, 9090, None])))
        for name, protocol in dict.fromkeys([*own, *stray])
    )
    found = draw(st.lists(random_endpoints(family), max_size=5, unique_by=lambda item: item.addresses))
    name = owner.name if owner is not None else draw(st.sampled_from("abc"))
    return EndpointSlice(
        name=f"{name}-{family}-{draw(st.sampled_from('12'))}",
        namespace=owner.namespace if owner is not None else draw(st.sampled_from(["x", "y"])),
        service=name,
        labels=draw(st.sampled_from([{}] * 8 + [{"service.kubernetes.io/headless": ""}])),
        address_type=str(family),
        endpoints=tuple(found),
        ports=ports,
    )


random_nodes = st.sampled_from([node(), node(zone="a"), node(zone="c")])


@st.composite
def random_objects(draw: st.DrawFn) -> Objects:
    """A whole cluster. A pod has the same hints in every slice, as the control plane gives them."""
    objects = Objects().put(draw(random_nodes), node(OTHER_NODE))
    services: list[Service] = draw(st.lists(random_services(), min_size=1, max_size=5))
    objects.put(*services)
    objects.put(*draw(st.lists(random_slices(tuple(services)), min_size=1, max_size=8)))
    return objects


def random_change(objects: Objects) -> st.SearchStrategy[Projection]:
    """Something new, or something known that becomes another thing."""
    return random_services() | random_slices(objects.of(Service)) | random_nodes


def questions(objects: Objects) -> Iterable[Asked]:
    """Every packet that could be of interest."""
    for family in Family:
        destinations = [f"{prefix[family]}{n}" for prefix in (CLUSTER, EXTERNAL, BALANCER) for n in (1, 2, 3)]
        destinations.append(NODE_ADDRESS[family])
        for destination in destinations:
            for protocol in ("tcp", "udp", "sctp"):
                for port in (80, 53, 30001, 30002):
                    for inside in (True, False):
                        yield ask(family, destination, port, inside=inside, protocol=protocol)
