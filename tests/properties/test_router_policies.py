"""Policies of any cluster: no hole in what they let pass, and nothing refused that the cluster lives on."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from support.bgp import asking, node

from kube_router.ipc.messages import Node
from kube_router.workers.router import names
from kube_router.workers.router.bgpstate import EXPORT_ASSIGNMENT, IMPORT_ASSIGNMENT, BgpState, host_prefix
from kube_router.workers.router.plan import Plan, diff, kept
from kube_router.workers.router.verdicts import accepts, decision
from kube_router.workers.router.vips import Vips


def numbers(most: int) -> st.SearchStrategy[int]:
    return st.integers(1, most)


v4 = st.builds(lambda a, b: f"10.{a}.0.{b}", numbers(3), numbers(20))
v6 = st.builds(lambda a, b: f"2001:db8:{a}::{b:x}", numbers(3), numbers(20))
pods4 = st.builds(lambda a: f"10.244.{a}.0/24", numbers(40))
pods6 = st.builds(lambda a: f"fd00:0:0:{a:x}::/64", numbers(40))
RANGES = ["10.96.0.0/12", "10.0.0.0/8", "0.0.0.0/0", "::/0", "fd96::/112", "203.0.113.0/24", "10.244.7.0/25"]
ranges = st.lists(st.sampled_from(RANGES), max_size=3, unique=True).map(tuple)
services = st.sampled_from(["203.0.113.7", "2001:db8:99::7", "10.96.0.10"])
vips = st.lists(st.one_of(v4, services), max_size=4, unique=True)
rejects = st.sampled_from(["", "172.16.0.0/12", "172.16.0.0/12,172.16.0.0/16,2001:db8:5::/48", "0.0.0.0/0", "x"])


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Node], Vips, dict[str, Any]]:
    """Nodes (the first is ours), Services' addresses, and flags."""
    count = draw(st.integers(1, 4))
    fours = draw(st.lists(v4, min_size=count, max_size=count, unique=True))
    sixes = draw(st.lists(v6, min_size=count, max_size=count, unique=True))
    cidrs4 = draw(st.lists(pods4, min_size=count, max_size=count, unique=True))
    cidrs6 = draw(st.lists(pods6, min_size=count, max_size=count, unique=True))
    nodes = []
    for index in range(count):
        addresses = draw(st.sampled_from([[fours[index], sixes[index]], [sixes[index], fours[index]], [fours[index]]]))
        role = draw(st.sampled_from([{}, {}, {"rr.server": "1"}, {"rr.client": "1"}]))
        custom = {"node.bgp.customimportreject": draw(rejects)} if index == 0 else {}
        nodes.append(node(f"n{index}", addresses, [cidrs4[index], cidrs6[index]], {**role, **custom}))
    known = draw(vips)
    advertised = draw(st.lists(st.sampled_from(known), unique=True)) if known else []
    flags: dict[str, Any] = {
        "router_id": "192.0.2.1",
        "advertise_pod_cidr": draw(st.booleans()),
        "override_nexthop": draw(st.booleans()),
        "enable_ibgp": draw(st.booleans()),
        "bgp_accept_covering_prefixes": draw(st.booleans()),
        "service_cluster_ip_range": draw(ranges),
        "service_external_ip_range": draw(ranges),
    }
    if draw(st.booleans()):
        flags |= {"peer_router_ips": ("192.0.2.9", "2001:db8:ffff::9"), "peer_router_asns": (65000, 65000)}
    return nodes, Vips(frozenset(advertised), frozenset(known)), flags


def state_of(cluster: tuple[list[Node], Vips, dict[str, Any]]) -> BgpState:
    nodes, addresses, flags = cluster
    return asking(*nodes, vips=addresses, **flags).state


def exported(state: BgpState, prefix: str, address: str, source: str) -> bool:
    return accepts(decision(state.policies, EXPORT_ASSIGNMENT, state.policies.export, prefix, address, source))


def imported(state: BgpState, prefix: str, address: str) -> bool:
    return accepts(decision(state.policies, IMPORT_ASSIGNMENT, state.policies.import_, prefix, address))


@given(clusters())
@settings(max_examples=60)
def test_sets_and_statements_are_such_as_gobgpd_takes_them(cluster: tuple[list[Node], Vips, dict[str, Any]]) -> None:
    policies = state_of(cluster).policies
    statements = (*policies.export, *policies.import_)
    assert len({item.name for item in statements}) == len(statements)
    assert all(policies.neighbor_sets.get(item.neighbor_set) for item in statements)
    assert all(policies.prefix_sets.get(item.prefix_set) or item.learned for item in statements)
    for members in policies.prefix_sets.values():
        assert members and len({":" in item.prefix for item in members}) == 1
        exact = [item for item in members if item.prefix.endswith(f"/{item.longest}") and item.shortest == item.longest]
        parts = [item for item in members if item.longest in (32, 128) and item.prefix.endswith(f"/{item.shortest}")]
        assert len(members) in (len(exact), len(parts)), "a mixed set means one thing to 3.x and another to 4.x"


@given(clusters())
@settings(max_examples=60)
def test_no_peer_gets_what_is_not_for_it(cluster: tuple[list[Node], Vips, dict[str, Any]]) -> None:
    nodes, addresses, flags = cluster
    state = state_of(cluster)
    external = {item for item in state.neighbors if host_prefix(item) in _members(state, names.EXTERNAL_PEER_SETS)}
    own = {item.prefix for name in names.POD_CIDR_SETS.values() for item in state.policies.prefix_sets.get(name, ())}
    reflector = "kube-router.io/rr.server" in nodes[0].annotations
    for address in state.neighbors:
        for vip in addresses.known:
            wanted = address in external and vip in addresses.advertised
            assert exported(state, host_prefix(vip), address, "") is wanted
        for prefix in own:
            assert exported(state, prefix, address, "") is (address not in external or flags["advertise_pod_cidr"])
        for source in ("internal", "external"):
            for prefix in ("198.51.100.0/24", "0.0.0.0/0", "2001:db8:7::/48"):
                assert exported(state, prefix, address, source) is (reflector and address not in external)


def _members(state: BgpState, sets: Any) -> set[str]:
    return {member for name in sets.values() for member in state.policies.neighbor_sets.get(name, ())}


@given(clusters())
@settings(max_examples=60)
def test_nobody_teaches_what_is_ours_and_nodes_keep_teaching_what_is_theirs(
    cluster: tuple[list[Node], Vips, dict[str, Any]],
) -> None:
    nodes, addresses, _ = cluster
    state = state_of(cluster)
    everything = "0.0.0.0/0" in nodes[0].annotations["kube-router.io/node.bgp.customimportreject"]
    for neighbor in state.neighbors:
        for prefix in ("0.0.0.0/0", "::/0", *map(host_prefix, addresses.known), *nodes[0].pod_cidrs):
            assert not imported(state, prefix, neighbor)
        for own in nodes[0].addresses:
            assert not imported(state, host_prefix(own.address), neighbor)
        for other in nodes[1:]:
            for cidr in other.pod_cidrs:
                assert imported(state, cidr, neighbor) is not (everything and ":" not in cidr)


@given(clusters(), clusters())
@settings(max_examples=60)
def test_from_any_state_to_any_other_and_nothing_is_taken_away_on_a_stale_word(
    first: tuple[list[Node], Vips, dict[str, Any]], second: tuple[list[Node], Vips, dict[str, Any]]
) -> None:
    before, after = state_of(first), state_of(second)
    assert diff(before, before) == Plan()
    both = kept(before, after)
    names_of = [item.name for item in (*both.policies.export, *both.policies.import_)]
    assert len(set(names_of)) == len(names_of)
    for address in before.neighbors:
        for prefix in before.paths:
            if exported(before, prefix, address, ""):
                assert exported(both, prefix, address, "")
