"""Hypothesis strategies for clusters with network policies, and for packets that meet them: any of them, bad ones too.

Few names, labels, addresses and ports, so that much coincides: namespaces and policies whose names run into each other
(S6), addresses that nest in each other's prefixes, pods that claim one address, different ports of one name.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass

from hypothesis import strategies as st
from support.policyworld import BOTH, NODE
from support.walk import WirePacket

from kube_router.ipc.messages import (
    ContainerPort,
    IpBlock,
    LabelExpression,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    Pod,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Projection,
)
from kube_router.workers.firewall.rules import Frame
from kube_router.workers.firewall.verdict import ICMP, ClusterState, Hook, Packet
from kube_router.workers.model import Family, parse_network

SPACES = ("dev", "dev1", "prod")
POD_ADDRESSES = {
    Family.IPV4: (
        "10.244.1.2",
        "10.244.1.3",
        "10.244.1.18",
        "10.244.1.130",
        "10.244.1.255",
        "10.244.2.2",
        "172.16.0.2",
    ),
    Family.IPV6: ("fd00::2", "fd00::3", "fd00::20", "fd00::1:0:0:0", "fd00::ffff", "fd01::2", "::ffff:10.244.1.2"),
}
NODE_ADDRESSES = {Family.IPV4: ("10.244.1.1", "192.0.2.1"), Family.IPV6: ("fd00::1", "2001:db8::1")}
"""The first is the bridge's, inside the pods' range."""
OTHER_ADDRESSES = {
    Family.IPV4: ("10.244.1.77", "203.0.113.9", "203.0.113.200", "10.96.0.10", "198.51.100.7"),
    Family.IPV6: ("fd00::77", "2001:db8:9::9", "64:ff9b::9", "fd96::10", "2001:db8:7::7"),
}
"""One of the pods' range that no pod has, two of the world, one of each of the Services' ranges."""
PORTS = (80, 8080, 30080)
CROWD = 40
"""So many more pods make dispatch a tree."""

labels = st.dictionaries(st.sampled_from(["app", "tier"]), st.sampled_from(["x", "y"]), max_size=2)
expressions = st.builds(
    LabelExpression,
    key=st.sampled_from(["app", "tier"]),
    operator=st.sampled_from(["In", "NotIn", "In", "NotIn", "Gt"]),
    values=st.lists(st.sampled_from(["x", "y"]), max_size=2, unique=True).map(tuple),
) | st.builds(LabelExpression, key=st.just("app"), operator=st.sampled_from(["Exists", "DoesNotExist"]))
selectors = st.builds(
    LabelSelector, match_labels=labels, match_expressions=st.lists(expressions, max_size=1).map(tuple)
)
space_selectors = st.just(LabelSelector()) | st.builds(
    LabelSelector, match_labels=st.dictionaries(st.just("name"), st.sampled_from(SPACES), max_size=1)
)
blocks = st.one_of(
    st.builds(
        IpBlock,
        cidr=st.sampled_from(["0.0.0.0/0", "10.244.0.0/16", "10.244.1.2/31", "203.0.113.0/24", "10.0.0.0/7"]),
        excepted=st.lists(st.sampled_from(["10.244.1.0/24", "10.244.1.2/32", "203.0.113.128/25"]), max_size=2).map(
            tuple
        ),
    ),
    st.builds(
        IpBlock,
        cidr=st.sampled_from(["::/0", "fd00::/16", "fd00::2/127", "2001:db8::/32", "64:ff9b::/96"]),
        excepted=st.lists(st.sampled_from(["fd00::/64", "fd00::2/128", "2001:db8:9::/48"]), max_size=2).map(tuple),
    ),
    st.builds(IpBlock, cidr=st.sampled_from(["10.0.0.0/33", "10.0.0.1", "fd00::/129"])),
)
peers = st.one_of(
    st.builds(PolicyPeer, pod_selector=st.none() | selectors, namespace_selector=st.none() | space_selectors),
    st.builds(PolicyPeer, ip_block=blocks),
)
ports = st.builds(
    PolicyPort,
    protocol=st.sampled_from(["TCP", "TCP", "TCP", "UDP", "SCTP", "tcp"]),
    port=st.sampled_from([None, 80, 80, 8080, "web", "web", "dns", 0]),
    end_port=st.sampled_from([None, None, None, 8080, 79]),
)
rules = st.builds(
    PolicyRule,
    peers=st.none() | st.lists(peers, max_size=3).map(tuple),
    ports=st.none() | st.lists(ports, max_size=2).map(tuple),
)
rule_lists = st.none() | st.lists(rules, max_size=2).map(tuple)
policies = st.builds(
    NetworkPolicy,
    name=st.sampled_from(["allow", "1allow", "p"]),
    namespace=st.sampled_from(SPACES),
    pod_selector=st.just(LabelSelector()) | selectors,
    policy_types=st.sampled_from([("Ingress", "Egress"), ("Ingress", "Egress"), ("Ingress",), ("Egress",), None]),
    ingress=rule_lists,
    egress=rule_lists,
)
container_ports = st.builds(
    ContainerPort,
    name=st.sampled_from(["web", "web", "dns"]),
    port=st.sampled_from([80, 8080]),
    protocol=st.sampled_from(["TCP", "TCP", "UDP", "SCTP"]),
)


@st.composite
def pod(draw: st.DrawFn, number: int) -> Pod:
    """One pod; with any of the addresses, none or several of a family, perhaps those of another one."""
    ips = [
        address
        for family in BOTH
        for address in draw(st.lists(st.sampled_from(POD_ADDRESSES[family]), max_size=2, unique=True))
    ]
    return Pod(
        name=f"pod{number}",
        namespace=draw(st.sampled_from(SPACES)),
        uid=f"uid-{number}",
        labels=draw(labels),
        node_name=draw(st.sampled_from([NODE, NODE, NODE, "n2"])),
        phase=draw(st.sampled_from(["Running", "Running", "Running", "Pending", "Succeeded"])),
        host_network=draw(st.sampled_from([False, False, False, False, True])),
        deletion_seconds=draw(st.sampled_from([None, None, None, 30])),
        ips=tuple(ips),
        ports=tuple(draw(st.lists(container_ports, max_size=2))),
    )


def crowd(count: int) -> list[Pod]:
    """Many pods of this node, with labels by turns and addresses one after the other."""
    return [
        Pod(
            name=f"crowd{number}",
            namespace=SPACES[number % 3],
            uid=f"uid-crowd-{number}",
            labels={"app": "xy"[number % 2]},
            node_name=NODE,
            phase="Running",
            ips=(f"10.244.1.{30 + number}", f"fd00::{30 + number:x}"),
        )
        for number in range(count)
    ]


@st.composite
def object_lists(draw: st.DrawFn) -> tuple[Projection, ...]:
    """Pods, policies and namespaces; of each object one, and not every namespace is known."""
    count = draw(st.integers(1, 6))
    found: list[Projection] = [draw(pod(number)) for number in range(count)]
    found += crowd(draw(st.sampled_from([0, 0, 0, CROWD])))
    found += {policy.key: policy for policy in draw(st.lists(policies, max_size=4))}.values()
    found += [
        Namespace(name=name, labels={"name": name}) for name in draw(st.sets(st.sampled_from(SPACES), min_size=2))
    ]
    return tuple(found)


frames = st.builds(
    Frame,
    families=st.just(BOTH),
    cluster_ranges=st.sampled_from([(), (parse_network("10.96.0.0/12"), parse_network("fd96::/112"))]),
    external_ranges=st.sampled_from([(), (parse_network("198.51.100.0/24"),)]),
    load_balancer_ranges=st.sampled_from([(), (parse_network("2001:db8:7::/48"),)]),
    node_ports=st.frozensets(st.sampled_from([("tcp", 30080), ("udp", 30080), ("sctp", 30080), ("tcp", 80)])),
    pod_cidrs=st.sampled_from([(), (parse_network("10.244.1.0/24"), parse_network("fd00::/64"))]),
    default_deny=st.booleans(),
)


def state_of(objects: tuple[Projection, ...], frame: Frame) -> ClusterState:
    """What the judge has to know."""
    return ClusterState(
        node_name=NODE,
        pods={item.key: item for item in objects if isinstance(item, Pod)},
        namespaces={item.key: item for item in objects if isinstance(item, Namespace)},
        policies={item.key: item for item in objects if isinstance(item, NetworkPolicy)},
        frame=frame,
        node_addresses=frozenset(NODE_ADDRESSES[Family.IPV4] + NODE_ADDRESSES[Family.IPV6]),
    )


@dataclass(frozen=True, slots=True)
class Tried:
    """A packet in the words of the judge and as netfilter sees it."""

    packet: Packet
    wire: WirePacket

    def in_state(self, state: str) -> WirePacket:
        """The same in another state of its connection."""
        return dataclasses.replace(self.wire, state=state)


_ICMP_TYPES = {
    Family.IPV4: {"echo-request": 8, "echo-reply": 0, "destination-unreachable": 3, "time-exceeded": 11},
    Family.IPV6: {"echo-request": 128, "echo-reply": 129, "packet-too-big": 2, "neighbor-solicitation": 135},
}


def tried(seed: int, count: int) -> Iterator[Tried]:
    """Packets of any kind and with any marks between any two addresses, in any hook that may see them.

    INPUT sees what is for the node, and Services' addresses, which it has (IPVS) or which are translated later. By a
    seed rather than as a strategy: so there can be many of them, and the smallest cluster is sought, not the smallest
    list of packets.
    """
    chance = random.Random(seed)
    for _ in range(count):
        family = chance.choice(BOTH)
        hook = chance.choice([Hook.FORWARD, Hook.FORWARD, Hook.INPUT, Hook.OUTPUT])
        pods = (*POD_ADDRESSES[family], "10.244.1.31" if family is Family.IPV4 else "fd00::1f")
        others = NODE_ADDRESSES[family] + OTHER_ADDRESSES[family]
        ends = (
            chance.choice([pods, pods, others]),
            chance.choice([others] if hook is Hook.INPUT else [pods, pods, others]),
        )
        source, destination = map(chance.choice, ends)
        protocol = chance.choice(["TCP", "TCP", "TCP", "UDP", "SCTP", ICMP, "GRE"])
        port = chance.choice(PORTS) if protocol in ("TCP", "UDP", "SCTP") else None
        icmp = chance.choice([*_ICMP_TYPES[family]]) if protocol == ICMP else ""
        packet = Packet(source, destination, protocol, port, hook, icmp)
        yield Tried(
            packet, wire_of(packet, chance.choice([0, 0, 0x10000, 0x20000, 0x30001]), bridged=chance.random() < 0.5)
        )


def wire_of(packet: Packet, mark: int = 0, *, bridged: bool = False) -> WirePacket:
    """The judge's packet as netfilter sees it."""
    family = packet.family
    kind = packet.protocol.lower()
    if packet.protocol == ICMP:
        kind = "icmp" if family is Family.IPV4 else "ipv6-icmp"
    return WirePacket(
        packet.hook.value,
        packet.source,
        packet.destination,
        kind,
        packet.port or 0,
        _ICMP_TYPES[family].get(packet.icmp, 0),
        mark=mark,
        source_local=packet.source in NODE_ADDRESSES[family],
        destination_local=packet.destination in NODE_ADDRESSES[family],
        bridged=bridged,
    )
