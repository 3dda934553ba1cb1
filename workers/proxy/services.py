"""One Service: its frontends, and what becomes of packets for each of them. Endpoints are not looked at here.

Pure: a Service projection in, a frozen `ServicePlan` out. Whatever cannot be understood is a problem that names the
Service, the key and the value; it costs that value alone, and never opens what was meant to be closed.

| frontend      | addresses                                                  | policy                            |
| ------------- | ---------------------------------------------------------- | --------------------------------- |
| cluster       | ``clusterIPs``, in the Service's families                  | ``internalTrafficPolicy``         |
| node port     | the node's, in the families of the cluster IPs             | ``externalTrafficPolicy``         |
| external      | ``externalIPs`` that the operator's ranges allow           | the same                          |
| load balancer | ingress IPs that they allow, unless ``ipMode`` is Proxy    | the same, and the source ranges   |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kube_router.ipc.messages import Key, Service, ServicePort
from kube_router.workers.model import Family, parse_network
from kube_router.workers.nodefacts import Problem
from kube_router.workers.proxy import names
from kube_router.workers.proxy.model import (
    PROTOCOLS,
    AddressKind,
    Balancing,
    Forwarding,
    Frontend,
    PortKey,
    Scheduler,
    Scope,
)
from kube_router.workers.serviceips import (
    CLUSTER_IPS,
    EXTERNAL_IPS,
    INGRESS,
    ServiceAddresses,
    ServiceIps,
    is_served,
)

INVALID = "InvalidService"
"""Event reason: something in a Service cannot be understood, or not be done."""
AFFINITY_DEFAULT, AFFINITY_MOST = 10800, 86400
"""Seconds; what the API server fills in, and the most that it takes."""
_LAST_PORT = 65535
_FLAGS = {f"flag-{number}": number for number in (1, 2, 3)}
_FAMILIES = {"IPv4": Family.IPV4, "IPv6": Family.IPV6}


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """What a Service asks for. ``created`` is the API's time stamp, which sorts as text.

    ``health_port``: 0 for none. ``publish_not_ready``: its endpoints are used whatever their conditions say.
    """

    key: Key
    uid: str = ""
    created: str = ""
    frontends: Mapping[Frontend, Forwarding] = field(default_factory=dict)
    health_port: int = 0
    publish_not_ready: bool = False
    problems: tuple[Problem, ...] = ()


def is_ours(service: Service) -> bool:
    """Whether this proxy serves it: it has a cluster IP, and no label gives it to another or takes it out."""
    if not is_served(service) or names.HEADLESS_LABEL in service.labels:
        return False
    return service.labels.get(names.PROXY_NAME_LABEL, names.OUR_PROXY_NAME) == names.OUR_PROXY_NAME


def plan_service(service: Service, ips: ServiceIps) -> ServicePlan:
    """What ``service`` asks for; nothing for one that is not ours."""
    if not is_ours(service):
        return ServicePlan(service.key, service.uid, service.created)
    reader = _Reader(service, ips)
    frontends = reader.frontends()
    return ServicePlan(
        service.key,
        service.uid,
        service.created,
        frontends,
        reader.health_port(),
        service.publish_not_ready_addresses,
        tuple(reader.problems),
    )


class _Kind(NamedTuple):
    """Addresses of one kind, and what all their forwardings have in common."""

    kind: AddressKind
    addresses: tuple[tuple[Family, str], ...]
    inside: Scope
    outside: Scope
    sources: tuple[str, ...] | None = None
    dsr: bool = False
    hairpin: bool = False

    def forwarding(self, owner: PortKey, family: Family, balancing: Balancing) -> Forwarding:
        """Of one port and family."""
        sources = self.sources
        if sources:
            sources = tuple(source for source in sources if (":" in source) == (family is Family.IPV6))
        return Forwarding(owner, self.kind, self.inside, self.outside, balancing, sources, self.dsr, self.hairpin)


class _Reader:
    """Reads one Service and gathers what is wrong with it."""

    def __init__(self, service: Service, ips: ServiceIps) -> None:
        self._service, self._ips = service, ips
        self.problems: list[Problem] = []

    def frontends(self) -> dict[Frontend, Forwarding]:
        """All of them. An address that is of two kinds is of the one that `_kinds` gives first."""
        found: dict[Frontend, Forwarding] = {}
        kinds, ports, balancing = [*self._kinds()], [*self._ports()], self._balancing()
        for kind in kinds:
            for port, key in ports:
                number = port.node_port if kind.kind is AddressKind.NODE_PORT else port.port
                if not number:
                    continue
                for family, address in kind.addresses:
                    frontend = Frontend(family, address, key.protocol, number)
                    if frontend not in found:
                        found[frontend] = kind.forwarding(key, family, balancing)
        return found

    def health_port(self) -> int:
        """The port of ``healthCheckNodePort``; 0 for none."""
        port = self._service.health_check_node_port
        if 0 <= port <= _LAST_PORT:
            return port
        self._problem("spec.healthCheckNodePort", port, "is no port")
        return 0

    def _problem(self, key: str, value: object, rule: str) -> None:
        self.problems.append(Problem(INVALID, f"service {self._service.key}: {key}: {value!r} {rule}"))

    def _kinds(self) -> Iterator[_Kind]:
        """The narrower before the wider: source ranges are not lost where an address is an external IP as well."""
        service, annotations = self._service, self._service.annotations
        internal, external = self._scopes()
        dsr, hairpin = self._dsr(), names.HAIRPIN in annotations
        cluster = self._addresses(CLUSTER_IPS, self._ips.cluster(service), self._families())
        yield _Kind(AddressKind.CLUSTER, cluster, internal, internal, hairpin=hairpin)
        families = tuple(dict.fromkeys(family for family, _ in cluster))
        # Who is in the cluster is never refused because no endpoint runs on this node.
        inside = Scope.CLUSTER
        if names.SKIP_LOADBALANCER_IPS not in annotations:
            found = self._addresses(INGRESS, self._ips.load_balancer(service), families)
            yield _Kind(AddressKind.LOAD_BALANCER, found, inside, external, self._sources(), dsr)
        found = self._addresses(EXTERNAL_IPS, self._ips.external(service), families)
        also_external = hairpin and names.HAIRPIN_EXTERNAL in annotations
        yield _Kind(AddressKind.EXTERNAL, found, inside, external, dsr=dsr, hairpin=also_external)
        if service.type != "ClusterIP":
            anywhere = tuple((family, "") for family in families)
            yield _Kind(AddressKind.NODE_PORT, anywhere, inside, external, hairpin=hairpin)

    def _families(self) -> tuple[Family, ...]:
        """The Service's families; both when it does not say, as its cluster IPs do."""
        found = []
        for word in self._service.ip_families:
            if word in _FAMILIES:
                found.append(_FAMILIES[word])
            else:
                self._problem("spec.ipFamilies", word, "is no family; not used")
        return tuple(found) if self._service.ip_families else tuple(Family)

    def _addresses(
        self, key: str, judged: ServiceAddresses, families: tuple[Family, ...]
    ) -> tuple[tuple[Family, str], ...]:
        """The accepted addresses that are of the Service's families: endpoints of others there are none."""
        self.problems += judged.problems
        found = []
        for address in judged.accepted:
            family = Family.IPV6 if ":" in address else Family.IPV4
            if family in families:
                found.append((family, address))
            else:
                self._problem(key, address, f"is not used: {family} is none of the Service's families")
        return tuple(found)

    def _ports(self) -> Iterator[tuple[ServicePort, PortKey]]:
        seen = set()
        for port in self._service.ports:
            protocol = port.protocol.lower()
            if protocol not in PROTOCOLS:
                self._problem("spec.ports.protocol", port.protocol, "is none of TCP, UDP, SCTP; the port is not used")
                continue
            if not 0 < port.port <= _LAST_PORT:
                self._problem("spec.ports.port", port.port, "is no port; it is not used")
                continue
            if not 0 <= port.node_port <= _LAST_PORT:
                self._problem("spec.ports.nodePort", port.node_port, "is no port; the port is not used")
                continue
            if (protocol, port.port) in seen:
                self._problem("spec.ports", f"{port.port}/{port.protocol}", "is there twice; the first is used")
                continue
            seen.add((protocol, port.port))
            yield port, PortKey(self._service.key, port.name, protocol)

    def _scopes(self) -> tuple[Scope, Scope]:
        """(internal, external) traffic policy as scopes."""
        if self._service.annotations.get(names.SERVICE_LOCAL) == "true":
            return Scope.CLUSTER, Scope.LOCAL
        return (
            self._scope("spec.internalTrafficPolicy", self._service.internal_traffic_policy),
            self._scope("spec.externalTrafficPolicy", self._service.external_traffic_policy),
        )

    def _scope(self, key: str, policy: str) -> Scope:
        if policy not in ("", "Cluster", "Local"):
            self._problem(key, policy, "is neither Cluster nor Local; Cluster is used")
        return Scope.LOCAL if policy == "Local" else Scope.CLUSTER

    def _balancing(self) -> Balancing:
        annotations = self._service.annotations
        scheduler = Scheduler.ROUND_ROBIN
        if (word := annotations.get(names.SCHEDULER)) is not None:
            try:
                scheduler = Scheduler(word)
            except ValueError:
                self._problem(f"annotation {names.SCHEDULER}", word, "is none of rr, lc, dh, sh, mh; rr is used")
        return Balancing(scheduler, self._flags(scheduler), self._affinity())

    def _flags(self, scheduler: Scheduler) -> tuple[int, ...]:
        value = self._service.annotations.get(names.SCHEDULER_FLAGS)
        if value is None:
            return ()
        key = f"annotation {names.SCHEDULER_FLAGS}"
        if scheduler is not Scheduler.MAGLEV_HASH:
            self._problem(key, value, f"is not used: only scheduler {Scheduler.MAGLEV_HASH} has flags")
            return ()
        found = set()
        for item in filter(None, map(str.strip, value.split(","))):
            if item in _FLAGS:
                found.add(_FLAGS[item])
            else:
                self._problem(key, item, "is none of flag-1, flag-2, flag-3; not used")
        return tuple(sorted(found))

    def _affinity(self) -> int:
        word, seconds = self._service.session_affinity, self._service.affinity_timeout
        if word != "ClientIP":
            if word not in ("", "None"):
                self._problem("spec.sessionAffinity", word, "is neither None nor ClientIP; None is used")
            return 0
        if seconds is None:
            return AFFINITY_DEFAULT
        if 0 < seconds <= AFFINITY_MOST:
            return seconds
        used = AFFINITY_MOST if seconds > AFFINITY_MOST else AFFINITY_DEFAULT
        key = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        self._problem(key, seconds, f"is not within 1 and {AFFINITY_MOST}; {used} is used")
        return used

    def _dsr(self) -> bool:
        value = self._service.annotations.get(names.DSR)
        if value not in (None, "tunnel"):
            self._problem(f"annotation {names.DSR}", value, "is not 'tunnel', the only mode; not used")
        return value == "tunnel"

    def _sources(self) -> tuple[str, ...] | None:
        """Canonical, sorted. A range that is none allows nobody: less is never more."""
        if not self._service.load_balancer_source_ranges:
            return None
        found = set()
        for item in self._service.load_balancer_source_ranges:
            try:
                found.add(str(parse_network(item.strip())))
            except ValueError:
                self._problem("spec.loadBalancerSourceRanges", item, "is no CIDR; nobody is allowed by it")
        return tuple(sorted(found))
