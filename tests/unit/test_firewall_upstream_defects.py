"""The known ways in which Go kube-router gives a wrong verdict (S1 to S15), each by its recipe and by ours.

Each test plays upstream's recipe in a few lines and shows that it errs; then it asks the judge and the compiled clauses
for the same packet. So a test would fail on upstream's recipe, and says what is wrong about it. Where the order of
steps in a kernel is the defect, the backends' tests have it.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import msgspec
import pytest
from support.policyworld import (
    BOTH,
    NODE,
    OUTSIDE,
    Owners,
    address,
    block,
    cluster,
    compiled_passes,
    namespaces,
    pod,
    pods,
    policy,
    port,
    rule,
    select,
)

from kube_router.ipc.messages import NetworkPolicy, Pod
from kube_router.workers.firewall.names import pod_chain, policy_chain, set_name
from kube_router.workers.firewall.podfacts import pod_facts
from kube_router.workers.firewall.policies import compile_policy
from kube_router.workers.firewall.rules import Direction, Frame, SetKey
from kube_router.workers.firewall.verdict import ClusterState, Hook, Packet, Reason, evaluate
from kube_router.workers.model import Family
from kube_router.workers.watcher.apiobjects import PodObject
from kube_router.workers.watcher.projections import project_pod

every_family = pytest.mark.parametrize("family", list(Family), ids=str)


def passes(state: ClusterState, source: str, destination: str, number: int = 80) -> bool:
    """What the judge says of a forwarded packet, once the compiled clauses have said the same."""
    packet = Packet(source, destination, port=number)
    verdict = evaluate(state, packet)
    compiled = [compile_policy(each, BOTH) for each in state.policies.values()]
    assert compiled_passes(Owners(state), compiled, packet) is verdict.allowed
    return verdict.allowed


def upstream_hash(text: str) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:16]


# S1: one chain a policy, one mark bit for both directions


Match = Callable[[str, str], bool]


def one_chain(clauses: Iterable[Match], source: str, destination: str) -> bool:
    """Upstream: each end's chain jumps to the policy's one chain, where a clause of either direction sets the mark."""
    return all(any(clause(source, destination) for clause in clauses) for _end in ("source", "destination"))


@every_family
@pytest.mark.parametrize("remote", [False, True])
def test_s01_clauses_of_one_direction_allow_nothing_in_the_other(family: Family, remote: bool) -> None:
    a, b, x = (address(number, family) for number in (1, 2, 3))
    # Ingress from x only, egress to all: b must not be reached from a.
    written = policy("ns/both", ingress=[rule(pods(app="x"))], egress=[rule()])
    clauses: list[Match] = [
        lambda source, destination: source == x and destination in (a, b, x),
        lambda source, destination: source in (a, b, x),
    ]
    assert one_chain(clauses, a, b)
    node = "n2" if remote else NODE
    state = cluster([pod("ns/a", 1, node, app="a"), pod("ns/b", 2, app="b"), pod("ns/x", 3, node, app="x"), written])
    assert not passes(state, a, b)
    assert passes(state, x, b)


@every_family
def test_s01_the_ingress_clause_of_the_peer_does_not_let_the_source_out(family: Family) -> None:
    a, b = address(1, family), address(2, family)
    written = policy("ns/both", ingress=[rule(pods(app="a"))], egress=())
    assert one_chain([lambda source, destination: source == a and destination in (a, b)], a, b)
    state = cluster([pod("ns/a", 1, app="a"), pod("ns/b", 2, app="b"), written])
    assert not passes(state, a, b)
    assert evaluate(state, Packet(a, b, port=80)).deciding.direction is Direction.EGRESS


# S2: a port name that nobody has


def upstream_ports(names: Sequence[str], pods_with: Mapping[str, int]) -> Sequence[int] | None:
    """Upstream resolves names over the pods; no numbers at all is taken for no ports given: every port."""
    return [pods_with[name] for name in names if name in pods_with] or None


@every_family
@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_s02_a_port_name_that_no_pod_has_matches_nothing(direction: str, family: Family) -> None:
    assert upstream_ports(["http"], {"metrics": 9090}) is None
    server, client = pod("ns/server", 1, ports={"metrics": 9090}, app="server"), pod("ns/client", 2, app="client")
    peer = rule(pods(app="client" if direction == "ingress" else "server"), ports=[port("http")])
    written = (
        policy("ns/p", select(app="server"), ingress=[peer])
        if direction == "ingress"
        else policy("ns/p", select(app="client"), egress=[peer])
    )
    state = cluster([server, client, written])
    for number in (80, 9090, 22):
        assert not passes(state, address(2, family), address(1, family), number)
    # It heals by itself when a pod comes that has such a port.
    grown = cluster([pod("ns/server", 1, ports={"http": 80}, app="server"), client, written])
    assert passes(grown, address(2, family), address(1, family), 80)


# S3: pods with different named ports


def upstream_buckets(declared: Sequence[tuple[str, Mapping[str, int]]]) -> dict[tuple[str, int], dict[str, bool]]:
    """Upstream groups addresses by (name, number); a pod that opens several groups opens them with one shared map."""
    buckets: dict[tuple[str, int], dict[str, bool]] = {}
    for own, ports in declared:
        shared = {own: True}
        for name, number in ports.items():
            if (name, number) in buckets:
                buckets[name, number][own] = True
            else:
                buckets[name, number] = shared
    return buckets


@every_family
def test_s03_a_pod_counts_only_for_the_names_that_it_has(family: Family) -> None:
    one, two, client = (address(number, family) for number in (1, 2, 3))
    assert two in upstream_buckets([(one, {"http": 80, "metrics": 9090}), (two, {"http": 80})])["metrics", 9090]
    state = cluster(
        [
            pod("ns/one", 1, ports={"http": 80, "metrics": 9090}, app="server"),
            pod("ns/two", 2, ports={"http": 80}, app="server"),
            pod("ns/client", 3, app="client"),
            policy("ns/p", select(app="server"), ingress=[rule(pods(app="client"), ports=[port("metrics")])]),
        ]
    )
    assert passes(state, client, one, 9090)
    assert not passes(state, client, two, 9090)
    assert not passes(state, client, one, 80)


# S4: excepts of one block and its neighbours


def nomatch_set(blocks: Sequence[tuple[str, Sequence[str]]], text: str) -> bool:
    """Upstream: one hash:net for a rule, excepts are ``nomatch``; the longest prefix, then the last add, wins."""
    entries: dict[str, bool] = {}
    for cidr, excepted in blocks:
        entries[cidr] = True
        entries.update(dict.fromkeys(excepted, False))
    own = ipaddress.ip_address(text)
    holding = [cidr for cidr in entries if own in ipaddress.ip_network(cidr)]
    return bool(holding) and entries[max(holding, key=lambda cidr: ipaddress.ip_network(cidr).prefixlen)]


@pytest.mark.parametrize("direction", ["ingress", "egress"])
@pytest.mark.parametrize(
    ("blocks", "source", "expected"),
    [
        ([("10.0.0.0/8", ["10.1.0.0/16"]), ("10.0.0.0/7", [])], "10.1.1.1", True),
        ([("10.1.0.0/16", []), ("10.0.0.0/8", ["10.1.0.0/16"])], "10.1.1.1", True),
        ([("fd00::/16", ["fd00:1::/32"]), ("fd00::/15", [])], "fd00:1::1", True),
        ([("fd00:1::/32", []), ("fd00::/16", ["fd00:1::/32"])], "fd00:1::1", True),
    ],
)
def test_s04_an_except_is_of_its_own_block(
    blocks: list[tuple[str, list[str]]], source: str, expected: bool, direction: str
) -> None:
    assert nomatch_set(blocks, source) is not expected
    written = rule(*(block(cidr, *excepted) for cidr, excepted in blocks))
    state = cluster([pod("ns/a", 1), policy("ns/p", **{direction: [written]})])
    ends = [source, address(1, Family(ipaddress.ip_address(source).version))]
    assert passes(state, *(ends if direction == "ingress" else ends[::-1])) is expected


@every_family
def test_s04_an_except_still_hides_what_no_other_block_holds(family: Family) -> None:
    everything, hole = ("0.0.0.0/0", "203.0.113.0/24") if family is Family.IPV4 else ("::/0", "2001:db8::/32")
    state = cluster([pod("ns/a", 1), policy("ns/p", ingress=[rule(block(everything, hole), block("192.0.2.0/24"))])])
    assert not passes(state, OUTSIDE[family], address(1, family))


# S5: everything, in IPv6


@pytest.mark.parametrize("source", ["fc00::1", "fe80::1", "64:ff9b::1", "::ffff:192.0.2.1", "4000::1", "2001:db8::1"])
def test_s05_the_block_of_all_ipv6_addresses_is_all_of_them(source: str) -> None:
    upstream = [ipaddress.ip_network("2000::/3"), ipaddress.ip_network("fd00::/8")]
    wrong = not any(ipaddress.ip_address(source) in network for network in upstream)
    assert wrong is (source != "2001:db8::1")
    state = cluster([pod("ns/a", 1), policy("ns/p", ingress=[rule(block("::/0"))], egress=[rule(block("::/0"))])])
    assert passes(state, source, address(1, Family.IPV6))
    assert passes(state, address(1, Family.IPV6), source)


# S6: names of two namespaces


@pytest.mark.parametrize("direction", list(Direction))
def test_s06_names_of_two_namespaces_do_not_meet(direction: Direction) -> None:
    assert upstream_hash("dev" + "1allow" + "IPv4") == upstream_hash("dev1" + "allow" + "IPv4")
    assert policy_chain("dev/1allow", direction) != policy_chain("dev1/allow", direction)
    assert pod_chain("dev/1web", direction) != pod_chain("dev1/web", direction)
    # Sets are named by what they hold, and pods of different namespaces are different.
    names = set()
    for key in ("dev/1allow", "dev1/allow"):
        (clause,) = compile_policy(policy(key, ingress=[rule(pods(app="a"))]), BOTH).ingress or ()
        names |= {set_name(each, family) for each in clause.sets for family in Family}
    assert len(names) == 4


@every_family
def test_s06_both_policies_hold(family: Family) -> None:
    state = cluster(
        [
            pod("dev/web", 1),
            pod("dev1/web", 2),
            policy("dev/1allow", ingress=[rule(ports=[port(80)])]),
            policy("dev1/allow", ingress=[rule(ports=[port(81)])]),
        ]
    )
    open_ports = {
        (number, wanted)
        for number in (1, 2)
        for wanted in (80, 81)
        if passes(state, OUTSIDE[family], address(number, family), wanted)
    }
    assert open_ports == {(1, 80), (2, 81)}


# S7: a named port of egress


@every_family
def test_s07_a_named_port_of_egress_is_a_pod_s(family: Family) -> None:
    namespace_ports = {"dns": 53}  # upstream looks at the policy's namespace only, and asks for no destination
    assert upstream_ports(["dns"], namespace_ports) == [53]
    state = cluster(
        [
            pod("ns/client", 1, app="client"),
            pod("ns/near", 2, ports={"dns": 53}),
            pod("kube-system/dns", 3, "n2", ports={"dns": 5353}),
            policy("ns/p", select(app="client"), egress=[rule(ports=[port("dns")])]),
        ]
    )
    client = address(1, family)
    assert not passes(state, client, OUTSIDE[family], 53)
    assert not passes(state, client, address(3, family), 53)
    assert passes(state, client, address(2, family), 53)
    assert passes(state, client, address(3, family), 5353)


# S8: ports of the host in the range of node ports


@every_family
@pytest.mark.parametrize(("protocol", "number"), [("TCP", 30081), ("UDP", 30080), ("TCP", 32767)])
def test_s08_a_host_port_in_the_node_port_range_is_no_node_port(protocol: str, number: int, family: Family) -> None:
    frame = Frame(node_ports=frozenset({("tcp", 30080)}))
    local = "192.0.2.1" if family is Family.IPV4 else "2001:db8::1"

    def range_returns(wanted: int) -> bool:  # upstream, ahead of all pod chains: any protocol, LOCAL destination
        return frame.node_port_range[0] <= wanted <= frame.node_port_range[1]

    assert range_returns(number)
    state = cluster([pod("ns/a", 1), policy("ns/p", egress=())], frame)
    to_host = Packet(address(1, family), local, protocol, number, Hook.INPUT)
    assert evaluate(state, to_host).deciding.reason is Reason.REFUSED
    to_service = replace(to_host, protocol="TCP", port=30080)
    assert evaluate(state, to_service).deciding.reason is Reason.NODE_PORT
    # The port alone is not it: the address has to be the node's, and the packet has to be at the node's door.
    assert not evaluate(state, replace(to_service, destination=OUTSIDE[family])).allowed
    assert not evaluate(state, replace(to_service, hook=Hook.FORWARD)).allowed


# S9: who is the node


@every_family
def test_s09_a_node_s_address_in_a_forwarded_packet_is_not_the_node(family: Family) -> None:
    state = cluster([pod("ns/a", 1), pod("ns/b", 2), policy("ns/p", ingress=())])
    local = "192.0.2.1" if family is Family.IPV4 else "2001:db8::1"

    def from_local_node(source: str) -> bool:  # upstream, in every pod chain, wherever the packet comes from
        return source in state.node_addresses

    assert from_local_node(local)
    assert not passes(state, local, address(1, family))
    own = Packet(local, address(1, family), port=80, hook=Hook.OUTPUT)
    assert evaluate(state, own).deciding.reason is Reason.NODE_ITSELF


# S10: ports of sidecars

SIDECAR = b"""{"metadata": {"name": "web", "namespace": "ns", "labels": {"app": "web"}}, "spec": {"nodeName": "n1",
"initContainers": [
  {"name": "setup", "ports": [{"name": "setup", "containerPort": 1111}]},
  {"name": "proxy", "restartPolicy": "Always", "ports": [{"name": "proxied", "containerPort": 15000}]}],
"containers": [{"name": "main", "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}]}]},
"status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}}"""


@every_family
@pytest.mark.parametrize(("name", "number", "expected"), [("proxied", 15000, True), ("setup", 1111, False)])
def test_s10_named_ports_of_sidecars_count(name: str, number: int, expected: bool, family: Family) -> None:
    raw = msgspec.json.decode(SIDECAR)
    containers_only = {each["name"] for container in raw["spec"]["containers"] for each in container["ports"]}
    assert name not in containers_only
    web = project_pod(msgspec.json.decode(SIDECAR, type=PodObject))
    state = cluster([web, policy("ns/p", ingress=[rule(ports=[port(name)])])])
    assert passes(state, OUTSIDE[family], address(1, family), number) is expected


# S11: which pods are local


@every_family
@pytest.mark.parametrize("host_ips", [(), ("192.0.2.99",)], ids=["unset", "changed"])
def test_s11_a_pod_is_local_by_the_node_s_name(host_ips: tuple[str, ...], family: Family) -> None:
    addresses_at_start = ("192.0.2.1", "2001:db8::1")
    assert not any(ip in addresses_at_start for ip in host_ips)  # upstream: not local, so not isolated
    web = pod("ns/web", 1)
    web = Pod(**{name: getattr(web, name) for name in web.__struct_fields__} | {"host_ips": host_ips})
    state = cluster([web, policy("ns/p", ingress=())])
    assert not passes(state, OUTSIDE[family], address(1, family))


# S12: all addresses of a pod


@every_family
def test_s12_every_address_of_a_pod_is_isolated_and_is_a_peer(family: Family) -> None:
    def with_two(name: str, number: int, **labels: str) -> Pod:
        one = pod(name, number, **labels)
        more = tuple(address(number + 100, each) for each in BOTH)
        return Pod(**{field: getattr(one, field) for field in one.__struct_fields__} | {"ips": one.ips + more})

    server, client = with_two("ns/server", 1, app="server"), with_two("ns/client", 2, app="client")
    facts = pod_facts(server, NODE, BOTH)
    assert facts is not None
    first_of_family = next(ip for ip in facts.addresses if ipaddress.ip_address(ip).version == family)
    assert first_of_family != address(101, family)  # upstream has a chain and a set entry for the first only
    state = cluster([server, client, policy("ns/p", select(app="server"), ingress=[rule(pods(app="client"))])])
    for source, destination in itertools.product((2, 102), (1, 101)):
        assert passes(state, address(source, family), address(destination, family))
    for destination in (1, 101):
        assert not passes(state, OUTSIDE[family], address(destination, family))


# S14, S15: names of sets


def names_of(written: NetworkPolicy) -> dict[str, SetKey]:
    """The sets of a policy's clauses by the names that they have in the kernel."""
    compiled = compile_policy(written, BOTH)
    clauses = (*(compiled.ingress or ()), *(compiled.egress or ()))
    return {set_name(key, family): key for clause in clauses for key in clause.sets for family in BOTH}


def upstream_named_sets(order: Iterable[tuple[str, int]]) -> dict[str, tuple[str, int]]:
    """Upstream numbers the resolved (name, port) pairs of a rule in the random order of a map."""
    return {
        f"KUBE-DST-{upstream_hash(f'nspingressrule0{index}IPv4namedport')}": pair for index, pair in enumerate(order)
    }


def test_s14_sets_of_named_ports_do_not_trade_names() -> None:
    pairs = [("http", 80), ("http", 8080)]
    one, two = upstream_named_sets(pairs), upstream_named_sets(reversed(pairs))
    assert one.keys() == two.keys()
    assert one != two
    # Ours depend on no pod, and each holds its ports beside its addresses.
    written = [port("http"), port("metrics")]
    first = names_of(policy("ns/p", ingress=[rule(pods(app="a"), ports=written)]))
    second = names_of(policy("ns/p", ingress=[rule(pods(app="a"), ports=written[::-1])]))
    assert first == second
    assert len(first) == 6


def upstream_rule_sets(rules: Sequence[str]) -> dict[str, str]:
    """Upstream names the set of a rule's pods by the rule's number."""
    return {f"KUBE-SRC-{upstream_hash(f'nspingressrule{index}IPv4pod')}": peer for index, peer in enumerate(rules)}


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_s15_a_rule_put_in_front_gives_no_old_rule_new_members(direction: str) -> None:
    before, after = upstream_rule_sets(["app=a"]), upstream_rule_sets(["app=b", "app=a"])
    assert any(before[name] != after[name] for name in before.keys() & after.keys())
    old = [rule(pods(app="a"), block("10.0.0.0/8"), block("fd00::/8"), ports=[port("http"), port(80)])]
    new = [rule(namespaces(app="b"), block("192.0.2.0/24"), block("2001:db8::/32"), ports=[port("dns"), port(53)])]
    ours_before = names_of(policy("ns/p", **{direction: old}))
    ours_after = names_of(policy("ns/p", **{direction: new + old}))
    assert ours_before.items() <= ours_after.items()
    assert len(ours_after) > len(ours_before)
    # Edited in place, a rule names other sets: the ones that stand keep what they hold.
    edited = names_of(policy("ns/p", **{direction: [rule(pods(app="c"), block("172.16.0.0/12"), ports=[port("x")])]}))
    assert not any(ours_before[name] != edited[name] for name in ours_before.keys() & edited.keys())
