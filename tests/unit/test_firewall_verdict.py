"""The judge, sentence by sentence: Kubernetes' specification, kube-router's own rules, and its end-to-end behaviours.

Most cases run in both families: the same pods, by their other addresses.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pytest
from support.policyworld import (
    BOTH,
    GATEWAY,
    OUTSIDE,
    address,
    block,
    cluster,
    namespaces,
    pod,
    pods,
    pods_in,
    policy,
    port,
    rule,
    select,
)

from kube_router.ipc.messages import ContainerPort, LabelSelector, Namespace, NetworkPolicy, Pod, PolicyPeer, PolicyRule
from kube_router.workers.firewall.rules import Direction, Frame
from kube_router.workers.firewall.verdict import (
    ClusterState,
    Decision,
    Hook,
    Packet,
    Reason,
    Verdict,
    evaluate,
)
from kube_router.workers.model import Family

every_family = pytest.mark.parametrize("family", list(Family), ids=str)

# The world of upstream's unit tests (reference §6.2): namespaces, and pods by app and component. All on this node.
SPACES = (
    Namespace(name="nsA", labels={"name": "a", "team": "a"}),
    Namespace(name="nsB", labels={"name": "b", "team": "a"}),
    Namespace(name="nsC", labels={"name": "c"}),
    Namespace(name="nsD", labels={"name": "d"}),
)
WORLD = {
    "Aa": pod("nsA/Aa", 1, app="a"),
    "Aaa": pod("nsA/Aaa", 2, app="a", component="a"),
    "Aab": pod("nsA/Aab", 3, app="a", component="b"),
    "Aac": pod("nsA/Aac", 4, app="a", component="c"),
    "Ba": pod("nsB/Ba", 5, app="a"),
    "Baa": pod("nsB/Baa", 6, app="a", component="a"),
    "Bab": pod("nsB/Bab", 7, app="a", component="b"),
    "Ca": pod("nsC/Ca", 8, app="a"),
}
NUMBERS = {name: number for number, name in enumerate(WORLD, 1)}
DENY_ALL = policy("nsA/deny", ingress=(), egress=())


def world(*policies: NetworkPolicy, frame: Frame | None = None) -> ClusterState:
    return cluster([*SPACES, *WORLD.values(), *policies], frame)


def of(name: str, family: Family) -> str:
    """The address of a pod of the world, of the gateway or of somebody outside."""
    if name in NUMBERS:
        return address(NUMBERS[name], family)
    return {"outside": OUTSIDE, "gateway": GATEWAY}[name][family]


def passes(state: ClusterState, source: str, destination: str, family: Family, number: int = 80) -> bool:
    return evaluate(state, Packet(of(source, family), of(destination, family), port=number)).allowed


def who_reaches(state: ClusterState, destination: str, family: Family) -> set[str]:
    return {name for name in WORLD if name != destination and passes(state, name, destination, family)}


def reached_from(state: ClusterState, source: str, family: Family) -> set[str]:
    return {name for name in WORLD if name != source and passes(state, source, name, family)}


# Isolation


@every_family
def test_a_pod_without_policies_is_not_isolated(family: Family) -> None:
    verdict = evaluate(world(), Packet(of("outside", family), of("Aa", family), port=80))
    assert verdict == Verdict((Decision(Reason.NOT_ISOLATED, "nsA/Aa", Direction.INGRESS),))
    assert verdict.allowed


@every_family
@pytest.mark.parametrize(
    ("selector", "namespace", "isolated"),
    [
        (select(), "nsA", {"Aa", "Aaa", "Aab", "Aac"}),
        (select(), "nsB", {"Ba", "Baa", "Bab"}),
        (select(), "nsC", {"Ca"}),
        (select(), "nsD", set()),  # a namespace without pods
        (select(), "nowhere", set()),
        (select(app="a"), "nsA", {"Aa", "Aaa", "Aab", "Aac"}),
        (select("app In a"), "nsA", {"Aa", "Aaa", "Aab", "Aac"}),
        (select("app In a", "component In b,c"), "nsA", {"Aab", "Aac"}),
        (select("component"), "nsA", {"Aaa", "Aab", "Aac"}),
        (select("!component"), "nsA", {"Aa"}),
        (select("component NotIn a"), "nsA", {"Aa", "Aab", "Aac"}),
        (select("app Like a"), "nsA", {"Aa", "Aaa", "Aab", "Aac"}),  # not understood: rather too many
        (select("app Like a", component="b"), "nsA", {"Aab"}),
    ],
)
def test_a_policy_isolates_the_pods_of_its_namespace_that_it_selects(
    selector: LabelSelector, namespace: str, isolated: set[str], family: Family
) -> None:
    state = world(policy(f"{namespace}/p", selector, ingress=()))
    assert {name for name in WORLD if not passes(state, "outside", name, family)} == isolated


@every_family
@pytest.mark.parametrize(
    ("types", "egress", "closed_in", "closed_out"),
    [
        (("Ingress",), None, True, False),
        (("Ingress",), (rule(),), True, False),
        (("Egress",), None, False, True),
        (("Ingress", "Egress"), None, True, True),
        (None, None, True, False),
        ((), None, True, False),
        (None, (), True, False),  # no egress rules, no Egress type: SetDefaults_NetworkPolicy of the API server
        (None, (rule(),), True, False),  # covered, and everything allowed
        (("Ingress", "Egres"), (rule(),), True, True),  # an unknown word may mean egress: closed, whatever the rules
        (("Egress", "Ingres"), (rule(),), True, False),
    ],
)
def test_directions_are_isolated_each_for_itself(
    types: tuple[str, ...] | None,
    egress: tuple[PolicyRule, ...] | None,
    closed_in: bool,
    closed_out: bool,
    family: Family,
) -> None:
    written = NetworkPolicy(name="p", namespace="nsA", policy_types=types, ingress=(), egress=egress)
    state = world(written)
    assert passes(state, "outside", "Aa", family) is not closed_in
    assert passes(state, "Aa", "outside", family) is not closed_out


@every_family
def test_both_sides_have_to_agree(family: Family) -> None:
    out = policy("nsA/out", ingress=None, egress=[rule(namespaces(name="b"))])
    into = policy("nsB/in", select(component="a"), ingress=[rule(namespaces(name="c"))])
    state = world(out, into)
    assert passes(state, "Aa", "Ba", family)
    assert passes(state, "Ca", "Baa", family)
    verdict = evaluate(state, Packet(of("Aa", family), of("Baa", family), port=80))
    assert verdict.decisions == (
        Decision(Reason.ALLOWED, "nsA/Aa", Direction.EGRESS, "nsA/out", 0, ("nsA/out",)),
        Decision(Reason.REFUSED, "nsB/Baa", Direction.INGRESS, isolated_by=("nsB/in",)),
    )
    assert not verdict.allowed


@every_family
def test_policies_are_additive_and_the_first_by_key_is_named(family: Family) -> None:
    web, dns = rule(pods(component="a"), ports=[port(80)]), rule(namespaces(name="b"), ports=[port(53)])
    one, two = policy("nsA/one", ingress=[web, dns]), policy("nsA/two", ingress=[rule(), rule()])
    state = world(DENY_ALL, one)
    decided = evaluate(state, Packet(of("Ba", family), of("Aa", family), port=53)).deciding
    assert decided == Decision(Reason.ALLOWED, "nsA/Aa", Direction.INGRESS, "nsA/one", 1, ("nsA/deny", "nsA/one"))
    assert not passes(state, "Ba", "Aa", family, 80)
    decided = evaluate(world(DENY_ALL, one, two), Packet(of("Ba", family), of("Aa", family), port=80)).deciding
    assert (decided.policy, decided.rule) == ("nsA/two", 0)


@every_family
def test_a_deleted_policy_restores(family: Family) -> None:
    assert not passes(world(DENY_ALL), "outside", "Aa", family)
    assert passes(world(), "outside", "Aa", family)


# Peers


@every_family
@pytest.mark.parametrize(
    ("peers", "expected"),
    [
        ([pods()], {"Aaa", "Aab", "Aac"}),
        ([pods(component="a")], {"Aaa"}),
        ([pods("component In a,b")], {"Aaa", "Aab"}),
        ([namespaces(name="b")], {"Ba", "Baa", "Bab"}),
        ([namespaces(team="a")], {"Aaa", "Aab", "Aac", "Ba", "Baa", "Bab"}),
        ([namespaces()], {"Aaa", "Aab", "Aac", "Ba", "Baa", "Bab", "Ca"}),
        ([namespaces(name="nobody")], set()),
        ([pods_in(select("component In b"), select(name="b"))], {"Bab"}),  # both selectors of one entry
        ([pods(component="b"), namespaces(name="c")], {"Aab", "Ca"}),  # two entries: one is enough
        ([pods_in(select("component In a"), select())], {"Aaa", "Baa"}),
        ([PolicyPeer()], set()),
        ([pods("app Like a"), namespaces(name="c")], {"Ca"}),
        ([namespaces("name Like a")], set()),
        ([], {"Aaa", "Aab", "Aac", "Ba", "Baa", "Bab", "Ca"}),
    ],
)
def test_peers_by_selectors(peers: Sequence[PolicyPeer], expected: set[str], family: Family) -> None:
    target = select("!component")
    assert who_reaches(world(policy("nsA/p", target, ingress=[rule(*peers)])), "Aa", family) == expected
    assert reached_from(world(policy("nsA/p", target, egress=[rule(*peers)])), "Aa", family) == expected


@every_family
def test_selectors_take_no_address_that_is_not_a_pod_s(family: Family) -> None:
    state = world(policy("nsA/p", ingress=[rule(namespaces(), pods())], egress=[rule(namespaces(), pods())]))
    for direction in (("outside", "Aa"), ("Aa", "outside")):
        assert not passes(state, *direction, family)


BLOCKS = {
    "all but one": (["0.0.0.0/0", "10.0.0.2/32"], ["::/0", "fd00::2/128"], {"Aab", "Ba", "outside"}),
    "one": (["10.0.0.2/32"], ["fd00::2/128"], {"Aaa"}),
    "outside only": (["203.0.113.0/24"], ["2001:db8:9::/48"], {"outside"}),
    "two excepts": (
        ["10.0.0.0/29", "10.0.0.2/31", "10.0.0.4/32"],
        ["fd00::/125", "fd00::2/127", "fd00::4/128"],
        {"Ba"},
    ),
    "a bad except": (["0.0.0.0/0", "10.0.0.2"], ["::/0", "fd00::2"], set()),
    "an except outside": (["10.0.0.0/24", "11.0.0.0/24"], ["fd00::/64", "fd01::/64"], set()),
    "an except of everything": (["10.0.0.0/24", "10.0.0.0/24"], ["fd00::/64", "fd00::/64"], set()),
    "bad": (["10.0.0.0/33"], ["fd00::/129"], set()),
}


@every_family
@pytest.mark.parametrize("case", BLOCKS)
def test_peers_by_block_are_addresses_whoever_has_them(case: str, family: Family) -> None:
    v4, v6, expected = BLOCKS[case]
    peer = rule(block(*(v4 if family is Family.IPV4 else v6)))
    into = world(policy("nsA/p", select("!component"), ingress=[peer]))
    out = world(policy("nsA/p", select("!component"), egress=[peer]))
    others = ("Aaa", "Aab", "Ba", "outside")
    assert {name for name in others if passes(into, name, "Aa", family)} == expected
    assert {name for name in others if passes(out, "Aa", name, family)} == expected


def test_a_block_is_of_one_family_and_isolates_in_both() -> None:
    state = world(policy("nsA/p", ingress=[rule(block("::/0"))]))
    assert passes(state, "outside", "Aa", Family.IPV6)
    assert not passes(state, "outside", "Aa", Family.IPV4)


@every_family
def test_a_block_beside_a_selector_counts_for_nothing(family: Family) -> None:
    both = [PolicyPeer(pod_selector=select(), ip_block=block(cidr).ip_block) for cidr in ("0.0.0.0/0", "::/0")]
    assert not passes(world(policy("nsA/p", ingress=[rule(*both)])), "Aaa", "Aa", family)


# Ports


def allowed_ports(
    written: Iterable[NetworkPolicy], packets: Iterable[tuple[str, int | None]], family: Family
) -> set[object]:
    state = world(*written)
    found: set[object] = set()
    for protocol, number in packets:
        if evaluate(state, Packet(of("Aaa", family), of("Aa", family), protocol, number)).allowed:
            found.add((protocol, number))
    return found


PACKETS: tuple[tuple[str, int | None], ...] = (
    ("TCP", 80),
    ("TCP", 81),
    ("TCP", 90),
    ("UDP", 80),
    ("SCTP", 80),
    ("GRE", None),
)


@every_family
@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        (None, set(PACKETS)),
        ([], set(PACKETS)),
        ([port(80)], {("TCP", 80)}),
        ([port(80, protocol="UDP")], {("UDP", 80)}),
        ([port(80, protocol="SCTP"), port(90)], {("SCTP", 80), ("TCP", 90)}),
        ([port(80, 89)], {("TCP", 80), ("TCP", 81)}),
        ([port(81, 90)], {("TCP", 81), ("TCP", 90)}),
        ([port()], {("TCP", 80), ("TCP", 81), ("TCP", 90)}),
        ([port(protocol="UDP")], {("UDP", 80)}),
        ([port(80, 79)], set()),
        ([port(80, 65536)], set()),
        ([port(None, 90)], set()),
        ([port(80, protocol="tcp")], set()),
        ([port(protocol="GRE")], set()),
        ([port(81, 79), port(90)], {("TCP", 90)}),
    ],
)
def test_ports(ports: list[object] | None, expected: set[object], family: Family) -> None:
    one = rule(ports=ports)  # type: ignore[arg-type]
    assert allowed_ports([policy("nsA/p", ingress=[one], egress=[one])], PACKETS, family) == expected


@every_family
def test_a_named_port_is_the_destination_s(family: Family) -> None:
    ours = ContainerPort("http", 8080), ContainerPort("http", 8443), ContainerPort("dns", 53, "UDP")
    server, other = pod("ns/server", 1, ports=ours, app="x"), pod("ns/other", 2, ports={"http": 80}, app="x")
    both = policy("ns/p", select(app="x"), ingress=[rule(ports=[port("http")])])
    state = cluster([server, other, pod("ns/client", 3, ports={"http": 9999}), both])
    open_ports = {
        (number, wanted)
        for number in (1, 2)
        for wanted in (80, 8080, 8443, 9999, 53)
        if evaluate(state, Packet(address(3, family), address(number, family), port=wanted)).allowed
    }
    assert open_ports == {(1, 8080), (1, 8443), (2, 80)}
    assert not evaluate(state, Packet(address(3, family), address(1, family), "UDP", 8080)).allowed


@every_family
def test_a_named_port_of_egress_is_the_peer_s(family: Family) -> None:
    client = pod("ns/client", 1, ports={"http": 9999}, app="client")
    servers = [pod("ns/near", 2, ports={"http": 80}), pod("other/far", 3, node="n2", ports={"http": 8080})]
    out = policy("ns/p", select(app="client"), egress=[rule(ports=[port("http")])])
    near = policy("ns/p", select(app="client"), egress=[rule(pods(), ports=[port("http")])])

    def reached(written: NetworkPolicy) -> set[tuple[int, int]]:
        state = cluster([client, *servers, written])
        return {
            (number, wanted)
            for number in (2, 3)
            for wanted in (80, 8080, 9999)
            if evaluate(state, Packet(address(1, family), address(number, family), port=wanted)).allowed
        }

    assert reached(out) == {(2, 80), (3, 8080)}
    assert reached(near) == {(2, 80)}


# Whose rules are looked at


@every_family
def test_only_pods_of_this_node_are_looked_at(family: Family) -> None:
    state = cluster(
        [pod("ns/here", 1), pod("ns/there", 2, node="n2"), policy("ns/p", ingress=(), egress=[rule(pods())])]
    )
    here, there = address(1, family), address(2, family)
    # The other node asks for the ingress of its pod, and this one does not ask for its egress.
    assert evaluate(state, Packet(here, there, port=80)).deciding.direction is Direction.EGRESS
    assert not evaluate(state, Packet(there, here, port=80)).allowed
    remote = evaluate(state, Packet(there, of("outside", family), port=80))
    assert remote == Verdict((Decision(Reason.NO_LOCAL_POD),))


@every_family
@pytest.mark.parametrize("hook", [Hook.FORWARD, Hook.OUTPUT])
def test_a_pod_always_reaches_itself(hook: Hook, family: Family) -> None:
    verdict = evaluate(world(DENY_ALL), Packet(of("Aa", family), of("Aa", family), port=80, hook=hook))
    assert verdict == Verdict((Decision(Reason.SAME_POD, "nsA/Aa"),))


def test_a_pod_reaches_itself_by_its_other_address() -> None:
    twin = replace_pod(WORLD["Aa"], ips=("10.0.0.1", "10.0.0.101"))
    state = cluster([*SPACES, twin, DENY_ALL])
    assert evaluate(state, Packet("10.0.0.1", "10.0.0.101", port=80)).deciding.reason is Reason.SAME_POD


@every_family
def test_the_node_reaches_its_pods_and_not_by_others_packets(family: Family) -> None:
    state = world(DENY_ALL)
    packet = Packet(GATEWAY[family], of("Aa", family), port=80, hook=Hook.OUTPUT)
    assert evaluate(state, packet) == Verdict((Decision(Reason.NODE_ITSELF),))
    assert not evaluate(state, replace(packet, hook=Hook.FORWARD)).allowed
    # Another node is an address like any other.
    assert not evaluate(state, replace(packet, source=OUTSIDE[family])).allowed


@every_family
def test_what_a_pod_sends_to_its_node_is_egress(family: Family) -> None:
    packet = Packet(of("Aa", family), GATEWAY[family], port=22, hook=Hook.INPUT)
    assert not evaluate(world(DENY_ALL), packet).allowed
    assert evaluate(world(), packet).deciding.reason is Reason.NOT_ISOLATED
    cidr = f"{GATEWAY[family]}/{family.bits}"
    assert evaluate(world(policy("nsA/p", egress=[rule(block(cidr), ports=[port(22)])])), packet).allowed
    # On its way to the node it meets no ingress, whoever has the address that it is sent to.
    ingress_only = world(policy("nsB/p", ingress=()))
    assert evaluate(ingress_only, replace(packet, destination=of("Ba", family))).allowed
    # Somebody else's packets to the node are no business of policies.
    outside = replace(packet, source=OUTSIDE[family])
    assert evaluate(world(DENY_ALL), outside) == Verdict((Decision(Reason.NO_LOCAL_POD),))


@every_family
def test_a_pod_on_the_host_s_network_is_its_node(family: Family) -> None:
    host = replace_pod(pod("nsA/host", 9, app="a"), host_network=True, ips=(OUTSIDE[family],))
    into = policy("nsA/p", select("!component"), ingress=[rule(pods())])
    state = cluster([*SPACES, *WORLD.values(), host, into])
    assert not passes(state, "outside", "Aa", family)  # a peer only by its address
    assert evaluate(
        cluster([*SPACES, host, DENY_ALL]), Packet("192.0.2.7", OUTSIDE[family], port=1)
    ).allowed  # no target
    cidr = f"{OUTSIDE[family]}/{family.bits}"
    named = policy("nsA/p", select("!component"), ingress=[rule(block(cidr))])
    assert passes(cluster([*SPACES, *WORLD.values(), host, named]), "outside", "Aa", family)


# Life and death


def replace_pod(old: Pod, **fields: object) -> Pod:
    return Pod(**{name: getattr(old, name) for name in old.__struct_fields__} | fields)


def test_a_relabelled_pod_or_namespace_counts_as_what_it_is_now() -> None:
    by_label, by_space = (
        policy("nsA/p", ingress=[rule(pods(role="client"))]),
        policy("nsA/p", ingress=[rule(namespaces(team="b"))]),
    )
    assert not passes(world(by_label), "Aaa", "Aa", Family.IPV4)
    relabelled = {**WORLD, "Aaa": replace_pod(WORLD["Aaa"], labels={"role": "client"})}
    assert passes(cluster([*SPACES, *relabelled.values(), by_label]), "Aaa", "Aa", Family.IPV4)
    assert not passes(world(by_space), "Ca", "Aa", Family.IPV4)
    moved = [space if space.name != "nsC" else Namespace(name="nsC", labels={"team": "b"}) for space in SPACES]
    assert passes(cluster([*moved, *WORLD.values(), by_space]), "Ca", "Aa", Family.IPV4)


@every_family
@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_the_address_of_a_finished_pod_is_the_new_pod_s(phase: str, family: Family) -> None:
    old = replace_pod(pod("ns/old", 1, role="client"), phase=phase)
    new = pod("ns/new", 1, role="stranger")
    server = pod("ns/server", 2, role="server")
    into = policy("ns/p", select(role="server"), ingress=[rule(pods(role="client"))])
    closed = policy("ns/q", select(role="stranger"), ingress=())
    state = cluster([old, new, server, into, closed])
    assert not evaluate(state, Packet(address(1, family), address(2, family), port=80)).allowed
    refused = evaluate(state, Packet(address(2, family), address(1, family), port=80)).deciding
    assert (refused.pod, refused.isolated_by) == ("ns/new", ("ns/q",))
    # Without the new one the address is nobody's.
    alone = cluster([old, server, into, closed])
    assert not evaluate(alone, Packet(address(1, family), address(2, family), port=80)).allowed
    assert evaluate(alone, Packet(address(2, family), address(1, family), port=80)).allowed


@every_family
def test_a_terminating_pod_is_target_and_peer_to_the_end(family: Family) -> None:
    going = replace_pod(pod("ns/going", 1, role="client"), deletion_seconds=30)
    state = cluster([going, pod("ns/server", 2), policy("ns/p", ingress=[rule(pods(role="client"))])])
    assert evaluate(state, Packet(address(1, family), address(2, family), port=80)).allowed
    assert not evaluate(state, Packet(address(2, family), address(1, family), port=80)).allowed


@every_family
def test_of_two_pods_with_one_address_the_one_that_stays_has_it(family: Family) -> None:
    going = replace_pod(pod("ns/a-going", 1, role="client"), deletion_seconds=0)
    into = policy("ns/p", select(role="server"), ingress=[rule(pods(role="client"))])
    server = pod("ns/server", 2, role="server")
    packet = Packet(address(1, family), address(2, family), port=80)
    assert not evaluate(cluster([going, pod("ns/new", 1, role="x"), server, into]), packet).allowed
    # Of two that stay, the first by key.
    twins = [pod("ns/b", 1, role="x"), pod("ns/a", 1, role="client")]
    assert evaluate(cluster([*twins, server, into]), packet).allowed
    turned = [pod("ns/a", 1, role="x"), pod("ns/b", 1, role="client")]
    assert not evaluate(cluster([*turned, server, into]), packet).allowed


def test_a_pod_without_an_address_of_the_family_is_not_there() -> None:
    only = replace_pod(WORLD["Aa"], ips=("10.0.0.1",))
    state = cluster([*SPACES, only, DENY_ALL])
    assert not passes(state, "outside", "Aa", Family.IPV4)
    assert passes(state, "outside", "Aa", Family.IPV6)


def test_a_disabled_family_has_no_pods() -> None:
    state = replace(world(DENY_ALL), frame=Frame(families=(Family.IPV4,)))
    assert not passes(state, "outside", "Aa", Family.IPV4)
    assert passes(state, "outside", "Aa", Family.IPV6)


# What kube-router adds


@pytest.mark.parametrize(
    ("family", "icmp", "free"),
    [
        *(
            (family, icmp, True)
            for family in BOTH
            for icmp in ("echo-request", "destination-unreachable", "time-exceeded")
        ),
        (Family.IPV4, "echo-reply", False),  # an answer: known to the connection tracker, or unasked
        (Family.IPV4, "redirect", False),
        (Family.IPV4, "timestamp-request", False),
        (Family.IPV6, "echo-reply", True),
        (Family.IPV6, "neighbor-solicitation", True),
        (Family.IPV6, "neighbor-advertisement", True),
        (Family.IPV6, "router-advertisement", False),
        (Family.IPV4, "", False),
    ],
)
def test_icmp_that_always_passes(family: Family, icmp: str, free: bool) -> None:
    for ends in (("outside", "Aa"), ("Aa", "outside"), ("Aaa", "Aab")):
        packet = Packet(of(ends[0], family), of(ends[1], family), "ICMP", icmp=icmp)
        verdict = evaluate(world(DENY_ALL), packet)
        assert verdict.allowed is free
        assert (verdict.deciding.reason is Reason.ICMP) is free
        # A rule about all ports is about all protocols.
        assert evaluate(world(policy("nsA/p", ingress=[rule()], egress=[rule()])), packet).allowed


RANGES = Frame(
    cluster_ranges=(ipaddress.ip_network("10.96.0.0/12"), ipaddress.ip_network("fd96::/112")),
    external_ranges=(ipaddress.ip_network("198.51.100.0/25"), ipaddress.ip_network("2001:db8:e::/64")),
    load_balancer_ranges=(ipaddress.ip_network("198.51.100.128/25"), ipaddress.ip_network("2001:db8:f::/64")),
    node_ports=frozenset({("tcp", 30080), ("udp", 30053)}),
)


@pytest.mark.parametrize(
    "service", ["10.96.0.1", "198.51.100.1", "198.51.100.200", "fd96::1", "2001:db8:e::1", "2001:db8:f::1"]
)
def test_services_are_judged_after_their_translation(service: str) -> None:
    family = Family(ipaddress.ip_address(service).version)
    state = world(DENY_ALL, frame=RANGES)
    before = Packet(of("Aa", family), service, port=80, hook=Hook.INPUT)
    assert evaluate(state, before) == Verdict((Decision(Reason.SERVICE_ADDRESS),))
    after = Packet(of("Aa", family), of("Ba", family), port=8080, hook=Hook.OUTPUT)
    assert evaluate(state, after).deciding == Decision(
        Reason.REFUSED, "nsA/Aa", Direction.EGRESS, isolated_by=("nsA/deny",)
    )
    # Elsewhere such an address is one like any other.
    assert not evaluate(state, replace(before, hook=Hook.FORWARD)).allowed


@every_family
def test_a_client_of_a_node_port_is_judged_by_its_own_address(family: Family) -> None:
    state = world(policy("nsA/p", ingress=[rule(block(f"{OUTSIDE[family]}/{family.bits}"))]), frame=RANGES)
    packet = Packet(OUTSIDE[family], of("Aa", family), port=8080, hook=Hook.OUTPUT)
    assert evaluate(state, packet).deciding.policy == "nsA/p"
    assert not evaluate(state, replace(packet, source=of("Ca", family))).allowed


PODS_OF_NODE = replace(
    RANGES,
    pod_cidrs=(ipaddress.ip_network("10.0.0.0/24"), ipaddress.ip_network("fd00::/64")),
    default_deny=True,
)
DENIED = Verdict((Decision(Reason.DEFAULT_DENY),))


@every_family
def test_default_deny_refuses_addresses_without_rules_yet(family: Family) -> None:
    state = cluster([pod("ns/new", 1), pod("ns/old", 2)], PODS_OF_NODE, unprogrammed=["ns/new"])
    new, old, outside = address(1, family), address(2, family), OUTSIDE[family]
    for ends in ((outside, new), (new, outside), (address(77, family), outside), (outside, address(77, family))):
        assert evaluate(state, Packet(*ends, port=80)) == DENIED
    assert evaluate(state, Packet(outside, new, "ICMP", icmp="echo-request")) == DENIED
    for ends in ((old, new), (new, old)):
        assert evaluate(state, Packet(*ends, port=80)).deciding.reason is Reason.DEFAULT_DENY
    assert evaluate(state, Packet(outside, old, port=80)).allowed
    assert evaluate(state, Packet(GATEWAY[family], new, port=80, hook=Hook.OUTPUT)) == DENIED
    assert evaluate(state, Packet(GATEWAY[family], old, port=80, hook=Hook.OUTPUT)).allowed
    assert evaluate(state, Packet(new, GATEWAY[family], port=80, hook=Hook.INPUT)) == DENIED
    # Addresses outside the node's pod range are not its pods.
    assert evaluate(state, Packet("192.0.2.7", "192.0.2.8", port=80)).allowed


@every_family
def test_default_deny_spares_the_node_s_own_address_in_the_pod_range(family: Family) -> None:
    state = cluster([pod("ns/old", 1)], PODS_OF_NODE)
    assert evaluate(state, Packet(address(1, family), GATEWAY[family], port=80, hook=Hook.INPUT)).allowed
    assert evaluate(state, Packet(GATEWAY[family], address(1, family), port=80, hook=Hook.OUTPUT)).allowed
    assert evaluate(state, Packet(GATEWAY[family], OUTSIDE[family], port=80, hook=Hook.OUTPUT)).allowed


@every_family
def test_default_deny_is_of_the_enabled_families(family: Family) -> None:
    frame = replace(PODS_OF_NODE, families=(family,))
    state = replace(cluster([], PODS_OF_NODE), frame=frame)
    for each in BOTH:
        denied = not evaluate(state, Packet(OUTSIDE[each], address(1, each), port=80)).allowed
        assert denied is (each is family)


@every_family
def test_without_default_deny_a_pod_without_rules_is_open(family: Family) -> None:
    closed = policy("ns/p", ingress=(), egress=())
    state = cluster([pod("ns/new", 1), closed], replace(PODS_OF_NODE, default_deny=False), unprogrammed=["ns/new"])
    for ends in ((OUTSIDE[family], address(1, family)), (address(1, family), OUTSIDE[family])):
        assert evaluate(state, Packet(*ends, port=80)) == Verdict((Decision(Reason.NO_LOCAL_POD),))


# Words


@pytest.mark.parametrize(
    ("packet", "text"),
    [
        (Packet("10.0.0.5", "10.0.0.1", port=80), "refused: egress of pod nsB/Ba: not isolated; ingress of pod nsA/Aa: "
         "isolated by nsA/deny, nsA/p; no rule allows it"),
        (Packet("10.0.0.1", "10.0.0.5", port=53), "allowed: egress of pod nsA/Aa: policy nsA/p allows it, rule 1; "
         "ingress of pod nsB/Ba: not isolated"),
        (Packet("10.0.0.1", "10.0.0.1", port=80), "allowed: pod nsA/Aa: same pod"),
        (Packet("10.0.0.254", "10.0.0.1", port=80, hook=Hook.OUTPUT), "allowed: the node itself sends it"),
        (Packet("192.0.2.7", "192.0.2.8", port=80), "allowed: no local pod"),
        (Packet("10.0.0.1", "10.96.0.1", port=80, hook=Hook.INPUT),
         "allowed: the address of a service, judged after its translation"),
    ],
)  # fmt: skip
def test_a_verdict_reads_as_a_sentence(packet: Packet, text: str) -> None:
    some = policy("nsA/p", ingress=[rule(pods())], egress=[rule(pods()), rule(namespaces(name="b"), ports=[port(53)])])
    assert str(evaluate(world(DENY_ALL, some, frame=RANGES), packet)) == text


def test_an_address_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not appear to be an IPv4 or IPv6 address"):
        evaluate(world(), Packet("10.0.0", "10.0.0.1", port=80))


def test_addresses_are_compared_as_addresses_not_as_text() -> None:
    state = world(DENY_ALL)
    assert not evaluate(state, Packet("2001:DB8::9", "FD00:0:0::1", port=80)).allowed


@dataclass(frozen=True)
class Step:
    """One behaviour of upstream's end-to-end suite (reference §6.7)."""

    name: str
    policies: tuple[NetworkPolicy, ...]
    expected: bool
    port: int = 8080


SERVER = select(app="server")
CIDR = {Family.IPV4: "10.0.0.2/32", Family.IPV6: "fd00::2/128"}


def steps(direction: str, family: Family) -> Iterable[Step]:
    """The nine behaviours that upstream checks in each direction, of the server's ingress or the client's egress."""
    target, other = (SERVER, "client") if direction == "ingress" else (select(app="client"), "server")

    def one(name: str, expected: bool, *rules: PolicyRule, number: int = 8080) -> Step:
        written = (
            policy("ns/p", target, ingress=rules) if direction == "ingress" else policy("ns/p", target, egress=rules)
        )
        return Step(f"{direction} {name}", (written,), expected, number)

    every = "0.0.0.0/0" if family is Family.IPV4 else "::/0"
    its_cidr = CIDR[family] if direction == "ingress" else CIDR[family].replace("2/", "1/")
    yield one("blocks", False)
    yield one("podSelector", True, rule(pods(app=other)))
    yield one("podSelector of others", False, rule(pods(app="nobody")))
    yield one("namespaceSelector", True, rule(namespaces(name="ns")))
    yield one("namespaceSelector of others", False, rule(namespaces(name="other")))
    yield one("both selectors", True, rule(pods_in(select(app=other), select(name="ns"))))
    yield one("both selectors, one wrong", False, rule(pods_in(select(app=other), select(name="other"))))
    yield one("ipBlock of one address", True, rule(block(its_cidr)))
    yield one("ipBlock of all but one", False, rule(block(every, its_cidr)))
    yield one("one port", True, rule(ports=[port(8080)]))
    yield one("another port", False, rule(ports=[port(8080)]), number=8081)
    yield one("port range", True, rule(ports=[port(8080, 8090)]), number=8090)
    yield one("beyond the range", False, rule(ports=[port(8080, 8090)]), number=8091)
    yield one("named port", True, rule(ports=[port("http")]))
    yield one("not the named port", False, rule(ports=[port("http")]), number=8081)
    yield one("protocol only", True, rule(ports=[port()]), number=8081)
    yield one("empty rule", True, rule())
    yield one("one of two rules", True, rule(pods(app="nobody")), rule(pods(app=other)))


@every_family
@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_upstream_s_end_to_end_behaviours(direction: str, family: Family) -> None:
    server, client = pod("ns/server", 1, ports={"http": 8080}, app="server"), pod("ns/client", 2, app="client")
    for step in steps(direction, family):
        state = cluster([server, client, *step.policies])
        verdict = evaluate(state, Packet(address(2, family), address(1, family), port=step.port))
        assert verdict.allowed is step.expected, f"{step.name}: {verdict}"
        # The other direction of the same two pods, and pods that nobody selected, stay as they were.
        assert evaluate(state, Packet(address(1, family), address(2, family), port=step.port)).allowed
