"""Which open connections are cut: the ruleset's word on a flow is the judge's word on its first packet.

Random clusters and flows; the judge (`verdict.py`) reads the policies, the recheck reads what the engine made of them.
And what a change has forbidden is among the addresses that the change concerns.
"""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st
from support.policyworld import (
    BOTH,
    GATEWAY,
    NODE,
    OUTSIDE,
    address,
    block,
    cluster,
    namespaces,
    pod,
    pods,
    policy,
    port,
    rule,
)

from kube_router.ipc.messages import NetworkPolicy, Pod, SourceState
from kube_router.ipc.replica import Cluster
from kube_router.workers.firewall.engine import Engine
from kube_router.workers.firewall.recheck import Judge, concerned
from kube_router.workers.firewall.rules import Frame
from kube_router.workers.firewall.verdict import ClusterState, Hook, Packet, evaluate
from kube_router.workers.flowfacts import Flow
from kube_router.workers.model import Family

labels = st.sampled_from([{}, {"app": "a"}, {"app": "b"}, {"app": "a", "old": "yes"}])
numbers = st.integers(1, 5)


@st.composite
def some_pods(draw: st.DrawFn) -> list[Pod]:
    found = []
    for number in range(1, 6):
        where, space = draw(st.sampled_from([NODE, NODE, "n2"])), draw(st.sampled_from(["x", "y"]))
        named = draw(st.sampled_from([{}, {"http": 80}, {"http": 81, "dns": 53}]))
        found.append(pod(f"{space}/p{number}", number, where, named, **draw(labels)))
    return found


peers = st.one_of(
    st.builds(lambda found: pods(**found), labels),
    st.builds(lambda name: namespaces(name=name), st.sampled_from(["x", "y"])),
    st.sampled_from([block("10.0.0.0/29", "10.0.0.2/32"), block("::/0", "fd00::4/127"), block("0.0.0.0/0")]),
)
port_entries = st.sampled_from([port(80), port("http"), port(None, protocol="UDP"), port(79, 81), port("dns")])
rules = st.builds(
    lambda peers, ports: rule(*peers, ports=ports),
    st.lists(peers, max_size=2),
    st.none() | st.lists(port_entries, max_size=2),
)
rule_lists = st.none() | st.lists(rules, max_size=2)


@st.composite
def some_policies(draw: st.DrawFn) -> list[NetworkPolicy]:
    found = []
    for number in range(draw(st.integers(0, 3))):
        key = f"{draw(st.sampled_from(['x', 'y']))}/policy{number}"
        selector = pods(**draw(labels)).pod_selector
        found.append(policy(key, selector, ingress=draw(rule_lists), egress=draw(rule_lists)))
    return found


worlds = st.tuples(some_pods(), some_policies())


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    family = draw(st.sampled_from(BOTH))
    ends = st.one_of(numbers.map(lambda number: address(number, family)), st.just(OUTSIDE[family]))
    source = draw(st.one_of(ends, st.just(GATEWAY[family])))
    protocol = draw(st.sampled_from(["TCP", "UDP", "SCTP"]))
    return Flow(family, protocol, source, draw(ends), draw(st.sampled_from([53, 79, 80, 81, 82])), b"", b"")


def view(state: ClusterState) -> Cluster:
    objects = {"pods": state.pods, "namespaces": state.namespaces, "networkpolicies": state.policies}
    return Cluster(SourceState(source="test", in_sync=True), objects)  # type: ignore[arg-type]


def first_packet(flow: Flow, state: ClusterState) -> Packet:
    hook = Hook.OUTPUT if flow.source in state.node_addresses else Hook.FORWARD
    return Packet(flow.source, flow.destination, flow.protocol, flow.port, hook)


def judge(engine: Engine, state: ClusterState) -> Judge:
    return Judge(engine.ruleset, state.frame, state.node_addresses)


@given(worlds, st.lists(flows(), min_size=1, max_size=6))
def test_a_flow_is_forbidden_if_its_first_packet_would_be(
    world: tuple[list[Pod], list[NetworkPolicy]], seen: list[Flow]
) -> None:
    state = cluster([*world[0], *world[1]])
    engine = Engine(NODE, BOTH)
    engine.update(view(state), None)
    cut = {id(flow) for flow, _ in judge(engine, state).forbidden(seen)}
    for flow in seen:
        verdict = evaluate(state, first_packet(flow, state))
        assert (id(flow) in cut) is not verdict.allowed, (str(flow), verdict)


@given(some_pods(), some_pods(), some_policies(), some_policies(), flows())
def test_what_a_change_has_forbidden_is_of_an_address_that_it_concerns(
    pods_before: list[Pod],
    pods_after: list[Pod],
    before: list[NetworkPolicy],
    after: list[NetworkPolicy],
    flow: Flow,
) -> None:
    """As long as its pods are the same ones: a new pod with an old address has no open connections."""
    states = [cluster([*pods_before, *before]), cluster([*pods_after, *after])]
    engine = Engine(NODE, BOTH)
    engine.update(view(states[0]), None)
    engine.take_changed()
    assume(not judge(engine, states[0]).forbidden([flow]))
    engine.update(view(states[1]), None)
    changed = engine.take_changed()
    if judge(engine, states[1]).forbidden([flow]):
        assert {flow.source, flow.destination} & concerned(engine.ruleset, changed)


def ruled(*objects: Pod | NetworkPolicy) -> tuple[Engine, ClusterState]:
    state = cluster(objects)
    engine = Engine(NODE, BOTH)
    engine.update(view(state), None)
    engine.take_changed()
    return engine, state


def tcp(family: Family, source: str, destination: str, number: int = 80, protocol: str = "TCP") -> Flow:
    return Flow(family, protocol, source, destination, number, b"", b"")


def test_the_refusal_names_pod_and_direction() -> None:
    engine, state = ruled(
        pod("x/p1", 1, app="a"), pod("x/p2", 2), policy("x/in", pods(app="a").pod_selector, ingress=[], egress=[])
    )
    family = Family.IPV6
    there, back = tcp(family, "fd00::2", "fd00::1"), tcp(family, "fd00::1", "fd00::2")
    assert judge(engine, state).forbidden([there, back]) == [
        (there, "ingress of pod x/p1"),
        (back, "egress of pod x/p1"),
    ]


def test_what_only_adds_concerns_nobody_and_what_leaves_a_set_concerns_itself() -> None:
    engine, _ = ruled(
        pod("x/p1", 1), pod("y/p2", 2, app="a"), policy("x/in", ingress=[rule(namespaces(), ports=[port(80)])])
    )
    engine.update(view(cluster([pod("x/p1", 1), pod("y/p2", 2, app="a"), pod("y/p3", 3, "n2"),
                                policy("x/in", ingress=[rule(namespaces(), ports=[port(80)])])])), None)  # fmt: skip
    assert concerned(engine.ruleset, engine.take_changed()) == frozenset()
    engine.update(view(cluster([pod("x/p1", 1), pod("y/p2", 2, app="a"),
                                policy("x/in", ingress=[rule(namespaces(), ports=[port(80)])])])), None)  # fmt: skip
    assert concerned(engine.ruleset, engine.take_changed()) == {"10.0.0.3", "fd00::3"}


def test_icmp_service_addresses_and_real_node_ports_are_left_alone() -> None:
    import ipaddress

    ranges = (ipaddress.ip_network("10.96.0.0/12"), ipaddress.ip_network("fd00:96::/112"))
    engine, state = ruled(pod("x/p1", 1), policy("x/all", egress=[]))
    frame = Frame(families=BOTH, cluster_ranges=ranges, node_ports=frozenset({("tcp", 30001)}))
    found = Judge(engine.ruleset, frame, state.node_addresses).forbidden(
        [
            Flow(Family.IPV4, "ICMP", "10.0.0.1", "10.0.0.9", None, b"", b""),
            tcp(Family.IPV4, "10.0.0.1", "10.96.0.1", 443),
            tcp(Family.IPV6, "fd00::1", "fd00:96::1", 443),
            tcp(Family.IPV4, "10.0.0.1", GATEWAY[Family.IPV4], 30001),
            tcp(Family.IPV4, "10.0.0.1", GATEWAY[Family.IPV4], 30001, "UDP"),
            tcp(Family.IPV6, "fd00::1", GATEWAY[Family.IPV6], 30002),
        ]
    )
    assert [(flow.protocol, flow.port) for flow, _ in found] == [("UDP", 30001), ("TCP", 30002)]


def test_a_family_that_is_off_is_left_alone() -> None:
    engine, state = ruled(pod("x/p1", 1), policy("x/all", ingress=[]))
    only = Frame(families=(Family.IPV6,))
    seen = [tcp(Family.IPV4, "10.0.0.9", "10.0.0.1"), tcp(Family.IPV6, "fd00::9", "fd00::1")]
    assert [flow.family for flow, _ in Judge(engine.ruleset, only, state.node_addresses).forbidden(seen)] == [6]
