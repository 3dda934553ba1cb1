"""Any cluster, any policies, any packets: the judge, the rules of iptables and those of nftables say the same.

The three share nothing but the objects: the judge reads NetworkPolicy, the walkers read the text of rules.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.firewall_strategies import (
    NODE_ADDRESSES,
    OTHER_ADDRESSES,
    SPACES,
    Tried,
    crowd,
    frames,
    object_lists,
    state_of,
    tried,
    wire_of,
)
from support.firewall_walks import ipsets_text, iptables_text, iptables_walk, nft_walk, ruleset_of
from support.iptables_walk import IptablesWalk
from support.policyworld import BOTH, NODE, block, namespaces, pods, policy, port, rule, select
from support.walk import WirePacket

from kube_router.ipc.messages import ContainerPort, Namespace, Pod, PolicyPort, Projection
from kube_router.workers.firewall.names import ALLOWED, PASSED
from kube_router.workers.firewall.rules import Frame
from kube_router.workers.firewall.verdict import Hook, Packet, Reason, evaluate
from kube_router.workers.model import Family, parse_network

OURS = ALLOWED | PASSED
AHEAD = (Reason.SERVICE_ADDRESS, Reason.NODE_PORT)


@given(objects=object_lists(), frame=frames, seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_both_backends_do_what_the_judge_says(objects: tuple[Projection, ...], frame: Frame, seed: int) -> None:
    state, ruleset = state_of(objects, frame), ruleset_of(objects)
    tables = {family: (iptables_walk(ruleset, frame, family), nft_walk(ruleset, frame, family)) for family in BOTH}
    local = {address for pod in ruleset.pods.values() for address in pod.addresses}
    for each in tried(seed, 150):
        verdict = evaluate(state, each.packet)
        for table in tables[each.packet.family]:
            walked = table.walk(each.wire)
            assert walked.allowed == verdict.allowed, f"{each.packet}: {type(table).__name__} {walked}; {verdict}"
            assert walked.mark & ~OURS == each.wire.mark & ~OURS, "other bits of the mark belong to others"
            ends = {each.wire.source} if each.packet.hook is Hook.INPUT else {each.wire.source, each.wire.destination}
            if ends & local and verdict.deciding.reason not in AHEAD:
                assert table.walk(each.in_state("ESTABLISHED")).verdict == "ACCEPT"
                assert table.walk(each.in_state("RELATED")).verdict == "ACCEPT"
                assert table.walk(each.in_state("INVALID")).verdict == "DROP"


WEB = PolicyPort(port="web")
WORLD: tuple[Projection, ...] = (
    *(Namespace(name=name, labels={"name": name}) for name in SPACES),
    *crowd(18),  # more than one chain of dispatch lists
    Pod(
        name="web",
        namespace="dev",
        node_name=NODE,
        phase="Running",
        labels={"app": "web"},
        ips=("10.244.1.2", "10.244.1.3", "fd00::2", "fd00::3"),
        ports=(ContainerPort("web", 8080),),
    ),
    Pod(
        name="far",
        namespace="prod",
        node_name="n2",
        phase="Running",
        labels={"app": "x"},
        ips=("10.244.2.2", "fd01::2"),
    ),
    policy("dev/web", select(app="web"), ingress=[rule(pods(app="x"), ports=[port(80)]), rule(ports=[WEB])]),
    policy(
        "dev/out",
        select(app="web"),
        egress=[rule(namespaces(name="prod")), rule(block("203.0.113.0/24"), block("::/1"))],
    ),
    policy(
        "dev1/x",
        select(app="x"),
        ingress=[rule(namespaces(name="dev"), ports=[port(protocol="UDP")])],
        egress=[rule(pods(app="y"))],
    ),
    policy("prod/all", ingress=[rule(block("0.0.0.0/0", "203.0.113.128/25"), block("2001:db8::/32"))]),
)
FRAME = Frame(
    families=BOTH,
    cluster_ranges=(parse_network("10.96.0.0/12"), parse_network("fd96::/112")),
    node_ports=frozenset({("tcp", 80), ("udp", 8080), ("sctp", 80)}),
    pod_cidrs=(parse_network("10.244.1.0/24"), parse_network("fd00::/64")),
    default_deny=True,
)


BESIDE = re.compile(r"NFLOG|-m conntrack|icmp|--set-xmark|-[sd] \S+ -j RETURN|-j ACCEPT|KUBE-NWPLCY-(TAIL|COMMON)$")
"""Rules that no verdict of a new connection hangs on here: others come to the same, or nobody drops what passes."""


def every_packet(family: Family) -> Iterator[Tried]:
    """Packets between enough pairs of addresses that each rule is somebody's."""
    own = [address for pod in ruleset_of(WORLD).pods.values() for address in pod.addresses_of(family)]
    others = (*NODE_ADDRESSES[family], *OTHER_ADDRESSES[family], "10.244.2.2" if family is Family.IPV4 else "fd01::2")
    pairs = (itertools.product(own, others), itertools.product(others, own), itertools.permutations(own, 2))
    for source, destination in itertools.chain(*pairs):
        here = (*NODE_ADDRESSES[family], OTHER_ADDRESSES[family][3])
        hooks = [Hook.INPUT] if destination in here else [Hook.FORWARD, Hook.OUTPUT]
        kinds = (("TCP", 80), ("TCP", 8080), ("UDP", 8080), ("SCTP", 80))
        for hook, (protocol, number) in itertools.product(hooks, kinds):
            packet = Packet(source, destination, protocol, number, hook)
            yield Tried(packet, wire_of(packet, mark=0x30000))


@pytest.mark.parametrize("family", BOTH, ids=str)
def test_a_rule_less_is_a_difference(family: Family) -> None:
    """The comparison can fail: no clause, jump, dispatch or reject could be missing without some packet telling."""
    state, ruleset = state_of(WORLD, FRAME), ruleset_of(WORLD)
    saved, sets = iptables_text(ruleset, FRAME, family), ipsets_text(ruleset, FRAME, family)
    whole = IptablesWalk(family, saved, sets)
    taken: dict[str, list[tuple[WirePacket, bool]]] = {}
    for each in every_packet(family):
        walked, allowed = whole.walk(each.wire), evaluate(state, each.packet).allowed
        assert walked.allowed == allowed, f"{each.packet}: {walked}"
        for text in walked.path:
            taken.setdefault(text, []).append((each.wire, allowed))
    unnoticed = []
    for text in saved.splitlines():
        if text.startswith("-A KUBE-") and not BESIDE.search(text):
            table = IptablesWalk(family, saved.replace(f"{text}\n", "", 1), sets)
            if all(table.walk(wire).allowed == allowed for wire, allowed in taken.get(text, ())):
                unnoticed.append(text)
    assert unnoticed == []
    assert len(taken) > 100


def spread(count: int) -> tuple[Projection, ...]:
    """So many isolated pods of this node, dual-stack, and one policy that lets everybody to port 80."""
    pods_of_node = [
        Pod(
            name=f"p{number}",
            namespace="dev",
            node_name=NODE,
            phase="Running",
            ips=(f"10.244.{number // 250}.{number % 250 + 2}", f"fd00::{number + 2:x}"),
        )
        for number in range(count)
    ]
    return (Namespace(name="dev"), *pods_of_node, policy("dev/web", ingress=[rule(ports=[port(80)])]))


@pytest.mark.parametrize("family", BOTH, ids=str)
def test_what_a_packet_costs_hardly_depends_on_how_many_pods_there_are(family: Family) -> None:
    """Rules that are looked at: by packets of a connection a few, by a first packet some more for 16 times the pods."""
    looked: dict[tuple[str, str], list[int]] = {}
    for count in (20, 320):
        ruleset = ruleset_of(spread(count))
        for table in (iptables_walk(ruleset, FRAME, family), nft_walk(ruleset, FRAME, family)):
            most = dict.fromkeys(("NEW", "ESTABLISHED"), 0)
            for pod in ruleset.pods.values():
                packet = Packet(OTHER_ADDRESSES[family][1], pod.addresses_of(family)[0], "TCP", 80)
                tried_one = Tried(packet, wire_of(packet))
                for state in most:
                    walked = table.walk(tried_one.in_state(state))
                    assert walked.allowed
                    most[state] = max(most[state], walked.looked)
            for state, number in most.items():
                looked.setdefault((type(table).__name__, state), []).append(number)
    assert all(few == many <= 6 for (_, state), (few, many) in looked.items() if state == "ESTABLISHED"), looked
    few, many = looked["IptablesWalk", "NEW"]
    assert many <= few + 32, "two more chains of dispatch at most"
    few, many = looked["NftWalk", "NEW"]
    assert few == many, "a map is one look-up"
