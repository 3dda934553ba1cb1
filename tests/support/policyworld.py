"""Clusters for network policy tests, in few words; and the reading of compiled clauses, packet by packet.

`fits` is what a backend has to make of a `PolicyRules`: it knows clauses and pods, and nothing of NetworkPolicy.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from kube_router.ipc.messages import (
    ContainerPort,
    IpBlock,
    Key,
    LabelExpression,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    Pod,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
)
from kube_router.workers.firewall.podfacts import PodFacts, pod_facts
from kube_router.workers.firewall.rules import (
    BlockSet,
    Clause,
    Direction,
    Frame,
    PodSelection,
    PodSet,
    PolicyRules,
    PortRange,
    PortSet,
)
from kube_router.workers.firewall.selectors import matches
from kube_router.workers.firewall.verdict import ClusterState, Packet
from kube_router.workers.model import Family

BOTH = (Family.IPV4, Family.IPV6)
NODE = "n1"
GATEWAY = {Family.IPV4: "10.0.0.254", Family.IPV6: "fd00::fe"}
"""An address of the node inside its own pod range, as the bridge has one."""
OUTSIDE = {Family.IPV4: "203.0.113.9", Family.IPV6: "2001:db8:9::9"}


def select(*conditions: str, **labels: str) -> LabelSelector:
    """A selector: ``select(app="web")``, ``select("tier In a,b", "!old", "new")``."""
    return LabelSelector(match_labels=labels, match_expressions=tuple(map(_expression, conditions)))


def _expression(text: str) -> LabelExpression:
    key, _, rest = text.partition(" ")
    if rest:
        operator, _, values = rest.partition(" ")
        return LabelExpression(key=key, operator=operator, values=tuple(values.split(",")) if values else ())
    if key.startswith("!"):
        return LabelExpression(key=key[1:], operator="DoesNotExist")
    return LabelExpression(key=key, operator="Exists")


def pods(*conditions: str, **labels: str) -> PolicyPeer:
    """A peer: pods of the policy's namespace."""
    return PolicyPeer(pod_selector=select(*conditions, **labels))


def namespaces(*conditions: str, **labels: str) -> PolicyPeer:
    """A peer: all pods of some namespaces."""
    return PolicyPeer(namespace_selector=select(*conditions, **labels))


def pods_in(inner: LabelSelector, outer: LabelSelector) -> PolicyPeer:
    """A peer: some pods of some namespaces, in one entry."""
    return PolicyPeer(pod_selector=inner, namespace_selector=outer)


def block(cidr: str, *excepted: str) -> PolicyPeer:
    """A peer: addresses."""
    return PolicyPeer(ip_block=IpBlock(cidr=cidr, excepted=excepted))


def port(number: int | str | None = None, last: int | None = None, protocol: str = "TCP") -> PolicyPort:
    """A port entry."""
    return PolicyPort(protocol=protocol, port=number, end_port=last)


def rule(*peers: PolicyPeer, ports: Sequence[PolicyPort] | None = None) -> PolicyRule:
    """A rule of either direction; without peers the list is missing."""
    return PolicyRule(peers=peers or None, ports=None if ports is None else tuple(ports))


def policy(
    key: Key,
    selector: LabelSelector | None = None,
    *,
    ingress: Iterable[PolicyRule] | None = None,
    egress: Iterable[PolicyRule] | None = None,
    types: tuple[str, ...] | None = None,
) -> NetworkPolicy:
    """A policy; it covers the directions that it has a list for, unless ``types`` says otherwise."""
    given = [word for word, rules in (("Ingress", ingress), ("Egress", egress)) if rules is not None]
    namespace, _, name = key.partition("/")
    return NetworkPolicy(
        name=name,
        namespace=namespace,
        uid=f"uid-{key}",
        pod_selector=selector or LabelSelector(),
        policy_types=tuple(given) if types is None else types,
        ingress=None if ingress is None else tuple(ingress),
        egress=None if egress is None else tuple(egress),
    )


def pod(
    key: Key,
    number: int,
    node: str = NODE,
    ports: Mapping[str, int] | Sequence[ContainerPort] = (),
    **labels: str,
) -> Pod:
    """A running pod with the addresses 10.0.0.``number`` and fd00::``number`` (in hexadecimal)."""
    namespace, _, name = key.partition("/")
    named = tuple(ContainerPort(*item) for item in ports.items()) if isinstance(ports, Mapping) else tuple(ports)
    return Pod(
        name=name,
        namespace=namespace,
        uid=f"uid-{key}",
        labels=labels,
        node_name=node,
        phase="Running",
        ips=tuple(address(number, family) for family in BOTH),
        ports=named,
    )


def address(number: int, family: Family) -> str:
    """The address that `pod` gives in a family."""
    return f"10.0.0.{number}" if family is Family.IPV4 else f"fd00::{number:x}"


def cluster(
    objects: Iterable[Pod | NetworkPolicy | Namespace],
    frame: Frame | None = None,
    unprogrammed: Iterable[Key] = (),
) -> ClusterState:
    """What this node knows. A namespace that only its pods name gets an object with the label ``name``."""
    found = tuple(objects)
    named = {item.namespace for item in found if not isinstance(item, Namespace)}
    spaces = {name: Namespace(name=name, labels={"name": name}) for name in named}
    spaces |= {item.key: item for item in found if isinstance(item, Namespace)}
    return ClusterState(
        node_name=NODE,
        pods={item.key: item for item in found if isinstance(item, Pod)},
        namespaces=spaces,
        policies={item.key: item for item in found if isinstance(item, NetworkPolicy)},
        frame=replace(frame or Frame(), families=BOTH),
        node_addresses=frozenset({*GATEWAY.values(), "192.0.2.1", "2001:db8::1", "127.0.0.1", "::1"}),
        unprogrammed=frozenset(unprogrammed),
    )


class Owners:
    """Which pod has which address, as clauses see it; of two, the one that stays, then the first by key."""

    def __init__(self, state: ClusterState) -> None:
        self.state = state
        self._by_address: dict[str, PodFacts] = {}
        known = [pod_facts(state.pods[key], state.node_name, state.frame.families) for key in sorted(state.pods)]
        for facts in sorted(filter(None, known), key=lambda facts: facts.terminating):
            for own in facts.addresses:
                self._by_address.setdefault(own, facts)

    def of(self, address: str) -> PodFacts | None:
        """The pod that an address belongs to."""
        return self._by_address.get(address)

    def takes(self, selections: Iterable[PodSelection], facts: PodFacts | None) -> bool:
        """Whether any selection takes a pod."""
        return facts is not None and any(self._takes(selection, facts) for selection in selections)

    def _takes(self, selection: PodSelection, facts: PodFacts) -> bool:
        if not matches(selection.pods, facts.labels):
            return False
        if selection.namespaces is None:
            return selection.namespace == facts.namespace
        space = self.state.namespaces.get(facts.namespace)
        return space is not None and matches(selection.namespaces, space.labels)


def fits(clause: Clause, direction: Direction, packet: Packet, owners: Owners) -> bool:
    """Whether a packet meets a clause of a policy of one of its ends."""
    peer = packet.source if direction is Direction.INGRESS else packet.destination
    if isinstance(clause.peer, PodSet) and not owners.takes(clause.peer.selections, owners.of(peer)):
        return False
    if isinstance(clause.peer, BlockSet) and not any(
        ipaddress.ip_address(peer) in ipaddress.ip_network(text) for text in clause.peer.prefixes
    ):
        return False
    if clause.port is None:
        return True
    if packet.port is None or clause.port.protocol != packet.protocol:
        return False
    if isinstance(clause.port, PortRange):
        return clause.port.first is None or clause.port.first <= packet.port <= (clause.port.last or 0)
    return _has_port(clause.port, packet, owners)


def _has_port(ports: PortSet, packet: Packet, owners: Owners) -> bool:
    facts = owners.of(packet.destination)
    if facts is None or not owners.takes(ports.selections, facts) or (ports.local_only and not facts.local):
        return False
    return (ports.port_name, packet.port, ports.protocol) in {(own.name, own.port, own.protocol) for own in facts.ports}


def compiled_passes(owners: Owners, compiled: Sequence[PolicyRules], packet: Packet) -> bool:
    """What clauses make of a packet in FORWARD: each local end's policies of its direction, one clause is enough."""
    ends = (owners.of(packet.source), owners.of(packet.destination))
    for direction, end in zip((Direction.EGRESS, Direction.INGRESS), ends, strict=True):
        if end is None or not end.local:
            continue
        isolating = [
            clauses
            for rules in compiled
            if owners.takes((rules.target,), end) and (clauses := rules.clauses(direction)) is not None
        ]
        if isolating and not any(fits(clause, direction, packet, owners) for part in isolating for clause in part):
            return False
    return True
