"""Compiling a NetworkPolicy: directions, clauses in upstream's order and words, and what bad input takes with it."""

from __future__ import annotations

import ipaddress
import random
import time
from collections.abc import Iterable

import pytest
from support.policyworld import (
    BOTH,
    block,
    namespaces,
    pods,
    pods_in,
    policy,
    port,
    rule,
    select,
)

from kube_router.ipc.messages import IpBlock, LabelSelector, NetworkPolicy, PolicyPeer, PolicyPort, PolicyRule
from kube_router.workers.firewall.policies import EVERY_POD, compile_policy
from kube_router.workers.firewall.rules import BlockSet, Clause, Direction, PodSelection, PodSet, PortRange, PortSet
from kube_router.workers.firewall.selectors import Requirement
from kube_router.workers.model import Family

IN, OUT = Direction.INGRESS, Direction.EGRESS
A, B = Requirement("app", "In", ("a",)), Requirement("app", "In", ("b",))
TARGET = PodSelection((), namespace="ns")
HERE_A, HERE_B = PodSelection((A,), namespace="ns"), PodSelection((B,), namespace="ns")
HTTP = PortRange("TCP", 80, 80)


def ingress(*rules: PolicyRule, families: tuple[Family, ...] = BOTH) -> tuple[Clause, ...]:
    compiled = compile_policy(policy("ns/p", ingress=rules), families)
    assert compiled.problems == ()
    assert compiled.egress is None
    assert compiled.ingress is not None
    return compiled.ingress


def egress(*rules: PolicyRule, families: tuple[Family, ...] = BOTH) -> tuple[Clause, ...]:
    compiled = compile_policy(policy("ns/p", egress=rules), families)
    assert compiled.problems == ()
    assert compiled.ingress is None
    assert compiled.egress is not None
    return compiled.egress


def problems(*rules: PolicyRule, of: NetworkPolicy | None = None) -> tuple[str, ...]:
    """The problems of a policy, without the object's name, which every line has to start with."""
    found = compile_policy(of or policy("ns/p", ingress=rules), BOTH).problems
    assert all(line.startswith("networkpolicy ns/p: ") and line.isprintable() for line in found)
    return tuple(line.removeprefix("networkpolicy ns/p: ") for line in found)


def number_text(number: int, family: Family) -> str:
    return str(ipaddress.IPv4Address(number) if family is Family.IPV4 else ipaddress.IPv6Address(number))


def test_key_uid_and_target() -> None:
    compiled = compile_policy(policy("ns/p", select("tier In x,y", app="a"), ingress=()), BOTH)
    assert (compiled.key, compiled.uid) == ("ns/p", "uid-ns/p")
    assert compiled.target == PodSelection((A, Requirement("tier", "In", ("x", "y"))), namespace="ns")


@pytest.mark.parametrize(
    ("types", "has_egress", "covered"),
    [
        (("Ingress",), False, {IN}),
        (("Egress",), False, {OUT}),
        (("Ingress", "Egress"), False, {IN, OUT}),
        (("Ingress",), True, {IN}),  # rules of a direction that is not named mean nothing
        (("Egress",), True, {OUT}),
        (None, False, {IN}),
        (None, True, {IN, OUT}),
        ((), False, {IN}),  # the API server defaults an empty list as a missing one
        ((), True, {IN, OUT}),
    ],
)
def test_policy_types(types: tuple[str, ...] | None, has_egress: bool, covered: set[Direction]) -> None:
    written = NetworkPolicy(
        name="p", namespace="ns", policy_types=types, ingress=(rule(),), egress=(rule(),) if has_egress else None
    )
    compiled = compile_policy(written, BOTH)
    assert {direction for direction in Direction if compiled.clauses(direction) is not None} == covered
    assert compiled.problems == ()


@pytest.mark.parametrize("rules", [None, ()])
def test_a_covered_direction_without_rules_is_a_denial(rules: tuple[PolicyRule, ...] | None) -> None:
    compiled = compile_policy(policy("ns/p", types=("Ingress", "Egress"), ingress=rules, egress=rules), BOTH)
    assert (compiled.ingress, compiled.egress) == ((), ())


@pytest.mark.parametrize("peers", [None, ()])
@pytest.mark.parametrize("ports", [None, ()])
def test_missing_and_empty_lists_are_about_everything(
    peers: tuple[PolicyPeer, ...] | None, ports: tuple[PolicyPort, ...] | None
) -> None:
    empty = PolicyRule(peers=peers, ports=ports)
    assert ingress(empty) == (Clause(0, "ingress any", None, None),)
    assert egress(empty) == (Clause(0, "egress any", None, None),)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (port(80), HTTP),
        (port(80, protocol="UDP"), PortRange("UDP", 80, 80)),
        (port(80, protocol="SCTP"), PortRange("SCTP", 80, 80)),
        (port(30000, 31000), PortRange("TCP", 30000, 31000)),
        (port(80, 80), HTTP),
        (port(1, 65535), PortRange("TCP", 1, 65535)),
        (port(), PortRange("TCP")),
        (port(protocol="SCTP"), PortRange("SCTP")),
    ],
)
def test_numeric_ports(entry: PolicyPort, expected: PortRange) -> None:
    assert ingress(rule(ports=[entry])) == (Clause(0, "ingress any", None, expected),)
    assert egress(rule(ports=[entry])) == (Clause(0, "egress any", None, expected),)


@pytest.mark.parametrize(
    ("peer", "selection"),
    [
        (pods(app="a"), HERE_A),
        (pods(), PodSelection((), namespace="ns")),
        (namespaces(app="b"), PodSelection((), namespaces=(B,))),
        (namespaces(), EVERY_POD),
        (pods_in(select(app="a"), select(app="b")), PodSelection((A,), namespaces=(B,))),
        (pods_in(select(), select(app="b")), PodSelection((), namespaces=(B,))),
    ],
)
def test_one_entry_with_both_selectors_is_one_selection(peer: PolicyPeer, selection: PodSelection) -> None:
    assert ingress(rule(peer)) == (Clause(0, "ingress pods", PodSet(IN, (selection,)), None),)
    assert egress(rule(peer)) == (Clause(0, "egress pods", PodSet(OUT, (selection,)), None),)


def test_pods_of_a_rule_are_one_set_whatever_their_order() -> None:
    forwards = ingress(rule(pods(app="a"), pods(app="b"), namespaces(), pods(app="a")))
    backwards = ingress(rule(namespaces(), pods(app="b"), pods(app="a")))
    assert forwards == backwards
    assert forwards[0].peer == PodSet(IN, (EVERY_POD, HERE_A, HERE_B))


def test_blocks_of_a_rule_are_one_set_a_family_and_disjoint() -> None:
    rules = rule(block("10.0.0.0/8", "10.1.0.0/16"), block("10.1.2.0/24"), block("fd00::/8"), block("fd00::/16"))
    v4, v6 = ingress(rules)
    assert v4.kind == v6.kind == "ingress cidr"
    assert isinstance(v4.peer, BlockSet)
    assert v4.peer.family is Family.IPV4
    assert "10.1.2.0/24" in v4.peer.prefixes
    assert "10.0.0.0/16" in v4.peer.prefixes
    assert not {"10.0.0.0/8", "10.1.0.0/16"} & set(v4.peer.prefixes)
    assert v6.peer == BlockSet(IN, Family.IPV6, ("fd00::/8",))


@pytest.mark.parametrize(("cidr", "family"), [("0.0.0.0/0", Family.IPV4), ("::/0", Family.IPV6)])
def test_everything_stays_one_network(cidr: str, family: Family) -> None:
    assert egress(rule(block(cidr))) == (Clause(0, "egress cidr", BlockSet(OUT, family, (cidr,)), None),)


def test_host_bits_of_a_block_do_not_count() -> None:
    assert ingress(rule(block("10.0.0.77/24", "10.0.0.201/25"))) == ingress(rule(block("10.0.0.0/25")))


def test_blocks_of_a_disabled_family_are_left_out_and_no_problem() -> None:
    both = rule(block("10.0.0.0/8"), block("fd00::/8"))
    assert [clause.peer for clause in ingress(both, families=(Family.IPV6,))] == [
        BlockSet(IN, Family.IPV6, ("fd00::/8",))
    ]
    # Nor does the rule become one about everybody.
    assert ingress(rule(block("fd00::/8")), families=(Family.IPV4,)) == ()


def test_a_block_of_nothing_allows_nothing() -> None:
    assert ingress(rule(block("10.0.0.0/31", "10.0.0.0/32", "10.0.0.1/32"))) == ()


def test_ingress_names_are_the_target_s_own_ports_on_this_node() -> None:
    target = PodSelection((B,), namespace="ns")
    written = policy("ns/p", select(app="b"), ingress=[rule(pods(app="a"), block("10.0.0.0/8"), ports=[port("http")])])
    own = PortSet(IN, (target,), "http", "TCP", local_only=True)
    assert compile_policy(written, BOTH).ingress == (
        Clause(0, "ingress pods np", PodSet(IN, (HERE_A,)), own),
        Clause(0, "ingress cidr np", BlockSet(IN, Family.IPV4, ("10.0.0.0/8",)), own),
    )


def test_egress_names_are_the_peers_ports() -> None:
    named = [port("dns", protocol="UDP")]
    everywhere = PortSet(OUT, (EVERY_POD,), "dns", "UDP")
    assert egress(rule(ports=named)) == (Clause(0, "egress any np", None, everywhere),)
    assert egress(rule(block("10.0.0.0/8"), ports=named)) == (
        Clause(0, "egress cidr np", BlockSet(OUT, Family.IPV4, ("10.0.0.0/8",)), everywhere),
    )
    # The set of the peers' ports says who the peers are; a second set would say it again.
    peers = PortSet(OUT, (HERE_A, HERE_B), "dns", "UDP")
    assert egress(rule(pods(app="b"), pods(app="a"), ports=named)) == (Clause(0, "egress pods np", None, peers),)


@pytest.mark.parametrize("direction", list(Direction))
def test_clauses_stand_in_upstream_s_order_with_its_words(direction: Direction) -> None:
    ports = [port("http"), port(80), port(443), port("http")]
    rules = [rule(block("fd00::/8"), block("10.0.0.0/8"), pods(app="a"), ports=ports), rule(ports=ports[:2]), rule()]
    clauses = ingress(*rules) if direction is IN else egress(*rules)
    assert [(clause.number, clause.kind.removeprefix(f"{direction} ")) for clause in clauses] == [
        (0, "pods"),
        (0, "pods"),
        (0, "pods np"),
        (0, "cidr"),
        (0, "cidr"),
        (0, "cidr np"),
        (0, "cidr"),
        (0, "cidr"),
        (0, "cidr np"),
        (1, "any"),
        (1, "any np"),
        (2, "any"),
    ]


def test_both_directions_of_one_policy_stay_apart() -> None:
    compiled = compile_policy(policy("ns/p", ingress=[rule(ports=[port(80)])], egress=[rule(ports=[port(81)])]), BOTH)
    assert compiled.ingress == (Clause(0, "ingress any", None, HTTP),)
    assert compiled.egress == (Clause(0, "egress any", None, PortRange("TCP", 81, 81)),)


GOOD_PEERS, GOOD_PORTS = [pods(app="a"), block("10.0.0.0/8")], [port(80)]


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        (block("10.0.0.0/33"), ".ipBlock.cidr: '10.0.0.0/33' does not appear to be an IPv4 or IPv6 network"),
        (block("10.0.0.1"), ".ipBlock.cidr: '10.0.0.1' is not a CIDR: it has no prefix length"),
        (block("fd00::/129"), ".ipBlock.cidr: 'fd00::/129' does not appear to be an IPv4 or IPv6 network"),
        (block("fe80::%eth0/64"), ".ipBlock.cidr: 'fe80::%eth0/64' is not a CIDR: it has a zone"),
        (block("10.0.0.0/255.0.0.0"), ".ipBlock.cidr: '10.0.0.0/255.0.0.0' is not a CIDR: its prefix length is not a"),
        (block("a\nb"), r".ipBlock.cidr: 'a\nb' is not a CIDR: it has no prefix length"),
        (block(""), ".ipBlock.cidr: '' is not a CIDR: it has no prefix length"),
        (block("10.0.0.0/8", "10.1.0.0/16", "10.2/16"), ".ipBlock.except[1]: '10.2/16' does not appear to be an IPv4"),
        (block("10.0.0.0/8", "11.0.0.0/16"), ".ipBlock.except[0]: '11.0.0.0/16' is not a part of 10.0.0.0/8"),
        (block("10.0.0.0/8", "10.0.0.0/7"), ".ipBlock.except[0]: '10.0.0.0/7' is not a part of 10.0.0.0/8"),
        (block("10.0.0.0/8", "10.0.0.0/8"), ".ipBlock.except[0]: '10.0.0.0/8' is not a part of 10.0.0.0/8"),
        (block("10.0.0.0/8", "fd00::/16"), ".ipBlock.except[0]: 'fd00::/16' is not a part of 10.0.0.0/8"),
        (block("fd00::/8", "2001:db8::/32"), ".ipBlock.except[0]: '2001:db8::/32' is not a part of fd00::/8"),
        (pods("app Like x"), ".podSelector: operator 'Like' on label 'app' is not known"),
        (namespaces("app In"), ".namespaceSelector: operator In on label 'app' has no values"),
        (PolicyPeer(), ".podSelector: None: it says nothing of whom is meant"),
        (
            PolicyPeer(pod_selector=LabelSelector(), ip_block=IpBlock(cidr="10.0.0.0/8")),
            ".ipBlock: '10.0.0.0/8' stands beside a selector",
        ),
    ],
)
def test_a_bad_peer_takes_only_itself_with_it(bad: PolicyPeer, line: str) -> None:
    (found,) = problems(rule(), rule(GOOD_PEERS[0], bad, GOOD_PEERS[1]))
    assert found.startswith(f"spec.ingress[1].from[1]{line}")
    compiled = compile_policy(policy("ns/p", egress=[rule(GOOD_PEERS[0], bad, GOOD_PEERS[1])]), BOTH)
    assert compiled.problems[0].startswith(f"networkpolicy ns/p: spec.egress[0].to[1]{line}")
    assert compiled.egress == egress(rule(*GOOD_PEERS))
    # Alone, it leaves a rule that allows nothing; not one without peers, which would allow everything.
    assert compile_policy(policy("ns/p", ingress=[rule(bad)]), BOTH).ingress == ()


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        (port(80, protocol="ICMP"), ".protocol: 'ICMP' is not one of TCP, UDP, SCTP"),
        (port(80, protocol="tcp"), ".protocol: 'tcp' is not one of TCP, UDP, SCTP"),
        (port(80, 79), ".endPort: 79 is not between 80 and 65535"),
        (port(80, 65536), ".endPort: 65536 is not between 80 and 65535"),
        (port(0), ".port: 0 is not between 1 and 65535"),
        (port(-1), ".port: -1 is not between 1 and 65535"),
        (port(65536), ".port: 65536 is not between 1 and 65535"),
        (port("http", 90), ".endPort: 90 needs a port number to start from, which 'http' is not"),
        (port(None, 90), ".endPort: 90 needs a port number to start from, which None is not"),
        (port("80"), ".port: '80' is not the name of a port"),
        (port("HTTP"), ".port: 'HTTP' is not the name of a port"),
        (port("a-name-too-long-"), ".port: 'a-name-too-long-' is not the name of a port"),
        (port("a--b"), ".port: 'a--b' is not the name of a port"),
        (port(""), ".port: '' is not the name of a port"),
    ],
)
def test_a_bad_port_takes_only_itself_with_it(bad: PolicyPort, line: str) -> None:
    mixed = policy("ns/p", ingress=[rule(*GOOD_PEERS, ports=[bad, *GOOD_PORTS])])
    assert problems(of=mixed) == (f"spec.ingress[0].ports[0]{line}",)
    assert compile_policy(mixed, BOTH).ingress == ingress(rule(*GOOD_PEERS, ports=GOOD_PORTS))
    # Alone, it leaves a rule that allows nothing; not one without ports, which would allow all of them.
    assert compile_policy(policy("ns/p", ingress=[rule(*GOOD_PEERS, ports=[bad])]), BOTH).ingress == ()


@pytest.mark.parametrize("name", ["http", "a", "x-1", "1a", "fifteen-letters"])
def test_names_that_a_container_port_can_have(name: str) -> None:
    assert len(ingress(rule(ports=[port(name)]))) == 1


def test_every_problem_is_told() -> None:
    found = problems(rule(block("x/1"), block("y/1"), ports=[port(0)]), rule(ports=[port("")]))
    assert [line.partition(":")[0] for line in found] == [
        "spec.ingress[0].from[0].ipBlock.cidr",
        "spec.ingress[0].from[1].ipBlock.cidr",
        "spec.ingress[0].ports[0].port",
        "spec.ingress[1].ports[0].port",
    ]


def test_an_unclear_target_isolates_at_least_who_is_meant_and_opens_nobody() -> None:
    written = policy("ns/p", select("tier Like x", "old", app="a"), ingress=[rule()], egress=[rule()])
    compiled = compile_policy(written, BOTH)
    assert compiled.target == PodSelection((A, Requirement("old", "Exists")), namespace="ns")
    assert (compiled.ingress, compiled.egress) == ((), ())
    assert problems(of=written) == (
        "spec.podSelector: operator 'Like' on label 'tier' is not known; all pods that it may mean are isolated",
    )


@pytest.mark.parametrize(
    ("types", "in_force", "denied"),
    [
        (("ingress",), set(), {IN}),
        (("Egres", "Ingress"), {IN}, set()),
        (("Ingres", "Egress"), {OUT}, {IN}),
    ],
)
def test_an_unknown_policy_type_denies_what_it_may_mean(
    types: tuple[str, ...], in_force: set[Direction], denied: set[Direction]
) -> None:
    written = policy("ns/p", types=types, ingress=[rule()], egress=[rule()] if "Egress" in types else None)
    compiled = compile_policy(written, BOTH)
    assert {direction for direction in Direction if compiled.clauses(direction)} == in_force
    assert {direction for direction in Direction if compiled.clauses(direction) == ()} == denied
    bad = next(word for word in types if word not in ("Ingress", "Egress"))
    assert problems(of=written) == (f"spec.policyTypes[{types.index(bad)}]: {bad!r} is not one of Ingress, Egress",)


def test_unknown_policy_type_beside_an_egress_section() -> None:
    compiled = compile_policy(policy("ns/p", types=("Ingress", "Egres"), ingress=[rule()], egress=[rule()]), BOTH)
    assert compiled.ingress == (Clause(0, "ingress any", None, None),)
    assert compiled.egress == ()


@pytest.mark.parametrize("family", list(Family), ids=str)
def test_blocks_without_end_are_refused_and_the_other_family_stays(family: Family) -> None:
    # One address out of ::/0 leaves 128 networks, out of 0.0.0.0/0 32: the addresses are spread to share none of them.
    every, other = ("0.0.0.0/0", "fd00::/8") if family is Family.IPV4 else ("::/0", "10.0.0.0/8")
    count = 1 << (14 if family is Family.IPV4 else 12)
    step = 1 << (family.bits - count.bit_length() + 1)
    holes = (f"{number_text(number * step, family)}/{family.bits}" for number in range(count))
    compiled = compile_policy(policy("ns/p", ingress=[rule(block(every, *holes), block(other))]), BOTH)
    assert [clause.peer for clause in compiled.ingress or ()] == [
        BlockSet(IN, Family(10 - family), (other,)),
    ]
    assert compiled.problems == (
        f"networkpolicy ns/p: spec.ingress[0].from: ipBlock entries of {family} come to more than 262144 networks",
    )


def test_five_thousand_blocks_take_half_a_second_at_most() -> None:
    choice = random.Random(4)

    def addresses(family: Family) -> Iterable[PolicyPeer]:
        for _ in range(2500):
            text = number_text(choice.getrandbits(family.bits), family)
            yield block(f"{text}/{choice.randrange(family.bits // 2, family.bits)}")

    peers = [*addresses(Family.IPV4), *addresses(Family.IPV6)]
    start = time.process_time()
    compiled = compile_policy(policy("ns/p", ingress=[rule(*peers, ports=[port(80), port(443)])]), BOTH)
    assert time.process_time() - start < 0.5
    assert compiled.problems == ()
    assert len(compiled.ingress or ()) == 4
