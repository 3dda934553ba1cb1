"""Compiled clauses against the judge: any cluster, any policies, also bad ones; the two must say the same of a packet.

They share selectors and the notion of a pod, nothing else. So a misreading has to be made twice to stay unseen here.
"""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from support.policyworld import BOTH, OUTSIDE, Owners, address, block, cluster, compiled_passes, pod

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
)
from kube_router.workers.firewall.policies import compile_policy
from kube_router.workers.firewall.verdict import Packet, evaluate
from kube_router.workers.model import Family

SPACES = ("a", "b")
KINDS = (("TCP", 80), ("TCP", 8080), ("UDP", 80), ("GRE", None))
LABELS = st.dictionaries(st.sampled_from(["app", "tier"]), st.sampled_from(["x", "y"]), max_size=2)

expressions = st.builds(
    LabelExpression,
    key=st.sampled_from(["app", "tier"]),
    operator=st.sampled_from(["In", "NotIn", "In", "NotIn", "Gt"]),
    values=st.lists(st.sampled_from(["x", "y"]), max_size=2, unique=True).map(tuple),
) | st.builds(LabelExpression, key=st.just("app"), operator=st.sampled_from(["Exists", "DoesNotExist"]))
selectors = st.builds(
    LabelSelector, match_labels=LABELS, match_expressions=st.lists(expressions, max_size=1).map(tuple)
)
space_selectors = st.just(LabelSelector()) | st.builds(
    LabelSelector, match_labels=st.dictionaries(st.just("name"), st.sampled_from(SPACES), max_size=1)
)
blocks_ipv4 = st.builds(
    IpBlock,
    cidr=st.sampled_from(["0.0.0.0/0", "10.0.0.0/29", "10.0.0.2/31", "203.0.113.0/24"]),
    excepted=st.lists(st.sampled_from(["10.0.0.1/32", "10.0.0.2/32", "10.0.0.4/30"]), max_size=2).map(tuple),
)
blocks_ipv6 = st.builds(
    IpBlock,
    cidr=st.sampled_from(["::/0", "fd00::/125", "2001:db8::/32", "fd00::2/127"]),
    excepted=st.lists(st.sampled_from(["fd00::1/128", "fd00::4/126", "fd00::/16"]), max_size=2).map(tuple),
)
bad_blocks = st.builds(IpBlock, cidr=st.sampled_from(["10.0.0.0/33", "10.0.0.1", "fd00::/129", ""]))
blocks = st.one_of(blocks_ipv4, blocks_ipv4, blocks_ipv6, blocks_ipv6, bad_blocks)
pod_peers = st.builds(PolicyPeer, pod_selector=st.none() | selectors, namespace_selector=st.none() | space_selectors)
block_peers = st.builds(PolicyPeer, ip_block=blocks)
mixed_peers = st.builds(PolicyPeer, ip_block=blocks, pod_selector=selectors)
peers = st.one_of(pod_peers, pod_peers, pod_peers, block_peers, block_peers, mixed_peers)
ports = st.builds(
    PolicyPort,
    protocol=st.sampled_from(["TCP", "TCP", "TCP", "UDP", "tcp"]),
    port=st.sampled_from([None, 80, 80, 8080, "web", "web", "dns", 0, 70000]),
    end_port=st.sampled_from([None, None, None, 8080, 79, 70000]),
)
rules = st.builds(
    PolicyRule,
    peers=st.none() | st.lists(peers, max_size=3).map(tuple),
    ports=st.none() | st.lists(ports, max_size=3).map(tuple),
)
rule_lists = st.none() | st.lists(rules, max_size=3).map(tuple)
policies = st.builds(
    NetworkPolicy,
    name=st.sampled_from(["p", "q", "r"]),
    namespace=st.sampled_from(SPACES),
    pod_selector=st.just(LabelSelector()) | selectors,
    policy_types=st.sampled_from([("Ingress", "Egress"), ("Ingress",), ("Egress",), None, (), ("Egress", "Ingess")]),
    ingress=rule_lists,
    egress=rule_lists,
)
named_rules = st.builds(
    PolicyRule,
    peers=st.none() | st.tuples(pod_peers | st.sampled_from([block("0.0.0.0/0"), block("::/0"), block("10.0.0.2/31")])),
    ports=st.tuples(st.just(PolicyPort(port="web"))),
)
named_policies = st.builds(
    NetworkPolicy,
    name=st.just("named"),
    namespace=st.sampled_from(SPACES),
    policy_types=st.sampled_from([("Ingress",), ("Egress",)]),
    ingress=st.tuples(named_rules),
    egress=st.tuples(named_rules),
)
container_ports = st.builds(
    ContainerPort,
    name=st.sampled_from(["web", "dns"]),
    port=st.sampled_from([80, 8080]),
    protocol=st.sampled_from(["TCP", "TCP", "UDP"]),
)


@st.composite
def pod_lists(draw: st.DrawFn, least_ports: int = 0) -> list[Pod]:
    found = []
    for number in range(1, draw(st.integers(2, 4)) + 1):
        key = f"{draw(st.sampled_from(SPACES))}/pod{number}"
        node = draw(st.sampled_from(["n1", "n1", "n2"]))
        labels = draw(LABELS)
        found.append(
            pod(key, number, node, draw(st.lists(container_ports, min_size=least_ports, max_size=2)), **labels)
        )
    return found


def agree(pods: list[Pod], objects: list[NetworkPolicy], known: bool) -> None:
    """Over all pairs of ends, in both families."""
    spaces = [Namespace(name=name, labels={"name": name} if known else {}) for name in SPACES]
    state = cluster([*pods, *objects, *spaces])
    owners = Owners(state)
    compiled = [compile_policy(policy, BOTH) for policy in state.policies.values()]
    for family in BOTH:
        ends = [*(address(number + 1, family) for number in range(len(pods))), OUTSIDE[family]]
        for source, destination in itertools.permutations(ends, 2):
            for protocol, port in KINDS:
                packet = Packet(source, destination, protocol, port)
                verdict = evaluate(state, packet)
                assert compiled_passes(owners, compiled, packet) is verdict.allowed, verdict


@given(pods=pod_lists(), objects=st.lists(policies, min_size=1, max_size=3), known=st.sampled_from([True, True, False]))
@settings(max_examples=150)
def test_clauses_say_what_the_judge_says(pods: list[Pod], objects: list[NetworkPolicy], known: bool) -> None:
    agree(pods, objects, known)


@given(pods=pod_lists(least_ports=1), objects=st.lists(named_policies, min_size=1, max_size=1))
@settings(max_examples=100)
def test_named_ports_are_what_the_judge_finds(pods: list[Pod], objects: list[NetworkPolicy]) -> None:
    agree(pods, objects, known=True)


@given(policy=policies, families=st.sampled_from([(Family.IPV4,), (Family.IPV6,), BOTH]))
def test_compiling_never_raises_and_is_stable(policy: NetworkPolicy, families: tuple[Family, ...]) -> None:
    compiled = compile_policy(policy, families)
    assert compile_policy(policy, families) == compiled
    for direction_clauses in (compiled.ingress, compiled.egress):
        assert len(set(direction_clauses or ())) == len(direction_clauses or ())
    assert all(line.startswith(f"networkpolicy {policy.key}: spec.") and "\n" not in line for line in compiled.problems)
