"""Policies: which sets and statements there are, and what they let through to whom."""

from __future__ import annotations

from typing import Any

import pytest
from support.bgp import asking, node

from kube_router.workers.router.bgpstate import (
    CLOSED,
    EXPORT_ASSIGNMENT,
    IMPORT_ASSIGNMENT,
    OPEN,
    Policies,
    PrefixRange,
    Statement,
)
from kube_router.workers.router.policies import merged
from kube_router.workers.router.verdicts import accepts, decision
from kube_router.workers.router.vips import Vips

A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"])
B = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"])
V6_PRIMARY_A = node("a", ["2001:db8::1", "10.0.0.1"], ["10.244.1.0/24", "fd00:1::/64"])
V6_PRIMARY_B = node("b", ["2001:db8::2", "10.0.0.2"], ["10.244.2.0/24", "fd00:2::/64"])
FLAGS: dict[str, Any] = {"peer_router_ips": ("10.0.1.1", "2001:db8:1::1"), "peer_router_asns": (65000, 65000)}


def exported(policies: Policies, prefix: str, neighbor: str) -> bool:
    return accepts(decision(policies, EXPORT_ASSIGNMENT, policies.export, prefix, neighbor))


def imported(policies: Policies, prefix: str, neighbor: str) -> bool:
    return accepts(decision(policies, IMPORT_ASSIGNMENT, policies.import_, prefix, neighbor))


ANNOTATED = node(
    "a",
    ["10.0.0.1", "2001:db8::1"],
    ["10.244.1.0/24", "fd00:1::/64"],
    {"node.bgp.customimportreject": "172.16.0.0/12,2001:db8:5::/48"},
)
REFLECTOR = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"], {"rr.server": "1"})
CLIENT = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"], {"rr.client": "1"})
VIPS = Vips(frozenset({"203.0.113.7", "2001:db8:99::7"}), frozenset({"203.0.113.7", "203.0.113.8", "2001:db8:99::7"}))
PODS, PODS6 = "podcidrdefinedset", "podcidrdefinedsetv6"
SERVICES, SERVICES6 = "servicevipsdefinedset", "servicevipsdefinedsetv6"


def test_names_and_order_are_kube_routers() -> None:
    policies = asking(ANNOTATED, B, vips=VIPS, **FLAGS).state.policies
    assert [statement.name for statement in policies.export] == [
        *(PODS + "iBGPpeerset", PODS6 + "iBGPpeerset"),
        *(SERVICES + "externalpeerset", SERVICES6 + "externalpeerset"),
        *(PODS + "externalpeerset", PODS6 + "externalpeerset"),
        *(SERVICES + "externalpeersetv6", SERVICES6 + "externalpeersetv6"),
        *(PODS + "externalpeersetv6", PODS6 + "externalpeersetv6"),
    ]
    kinds = (
        "servicevips",
        "defaultroute",
        "customimportreject",
        "knownservicevips",
        "protectedranges",
        "coveringprefixes",
    )
    assert [statement.name for statement in policies.import_] == [
        f"{kind}definedset{family}{peers}"
        for peers in ("allpeerset", "allpeersetv6")
        for kind in kinds
        for family in ("", "v6")
    ]
    assert all(statement.accept for statement in policies.export)
    assert not any(statement.accept for statement in policies.import_)


def test_without_members_a_set_and_its_statements_are_not_there() -> None:
    one = node("a", ["10.0.0.1"], ["10.244.1.0/24"])
    flags = {**FLAGS, "peer_router_ips": ("10.0.1.1",), "peer_router_asns": (65000,), "enable_ipv6": False}
    policies = asking(one, B, vips=Vips(frozenset(), frozenset()), **flags).state.policies
    assert [item.name for item in policies.export] == [PODS + "iBGPpeerset", PODS + "externalpeerset"]
    assert not [item.name for item in policies.import_ if "servicevips" in item.name or "custom" in item.name]
    alone = asking(one, enable_ipv6=False).state.policies
    assert (alone.export, alone.import_) == ((), ())


ROUTES = {
    "own pod CIDR": ("10.244.1.0/24", "fd00:1::/64", ""),
    "own Service address": ("203.0.113.7/32", "2001:db8:99::7/128", ""),
    "own other path": ("198.51.100.0/24", "2001:db8:7::/48", ""),
    "node's pod CIDR from a node": ("10.244.2.0/24", "fd00:2::/64", "internal"),
    "node's pod CIDR from outside": ("10.244.2.0/24", "fd00:2::/64", "external"),
    "part of a node's pod CIDR": ("10.244.2.0/25", "fd00:2::/65", "internal"),
    "other from a node": ("198.51.100.0/24", "2001:db8:7::/48", "internal"),
    "other from outside": ("198.51.100.0/24", "2001:db8:7::/48", "external"),
}
NODE, OUTSIDE = "node", "outside"
MAY = {
    "plain": {
        "own pod CIDR": {NODE, OUTSIDE},
        "own Service address": {OUTSIDE},
    },
    "reflector": {
        "own pod CIDR": {NODE, OUTSIDE},
        "own Service address": {OUTSIDE},
        "node's pod CIDR from a node": {NODE, OUTSIDE},
        "node's pod CIDR from outside": {NODE},
        "part of a node's pod CIDR": {NODE},
        "other from a node": {NODE},
        "other from outside": {NODE},
    },
}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("role", MAY)
@pytest.mark.parametrize("route", ROUTES)
def test_who_may_get_what_by_role(route: str, role: str, hidden: bool) -> None:
    """The table of the manual: routes by where they come from, peers by what they are, nodes by their role."""
    own, other = (A, B) if role == "plain" else (REFLECTOR, CLIENT)
    state = asking(own, other, vips=VIPS, advertise_pod_cidr=not hidden, **FLAGS).state
    pod_route = "pod CIDR" in route
    for prefix in ROUTES[route][:2]:
        for kind, neighbor in ((NODE, "10.0.0.2"), (OUTSIDE, "10.0.1.1"), (OUTSIDE, "2001:db8:1::1")):
            wanted = kind in MAY[role].get(route, set()) and not (hidden and pod_route and kind == OUTSIDE)
            if role == "reflector" and kind == OUTSIDE and route == "node's pod CIDR from a node":
                wanted = wanted and (":" in prefix) == (":" in neighbor)
            verdict = decision(
                state.policies, EXPORT_ASSIGNMENT, state.policies.export, prefix, neighbor, ROUTES[route][2]
            )
            assert accepts(verdict) is wanted, (prefix, neighbor)


@pytest.mark.parametrize("role", ["plain", "reflector"])
def test_no_role_takes_defaults_service_addresses_or_the_listed(role: str) -> None:
    own, other = (ANNOTATED, B) if role == "plain" else (REFLECTOR, CLIENT)
    state = asking(own, other, vips=VIPS, **FLAGS).state
    for neighbor in ("10.0.0.2", "10.0.1.1", "2001:db8:1::1"):
        for prefix in ("0.0.0.0/0", "::/0", "203.0.113.7/32", "203.0.113.8/32", "2001:db8:99::7/128", "10.244.1.0/24"):
            assert not imported(state.policies, prefix, neighbor)
        assert imported(state.policies, "172.16.0.0/16", neighbor) is (role == "reflector")
        assert imported(state.policies, "198.51.100.0/24", neighbor)


def test_every_statement_names_sets_that_have_members() -> None:
    for own, other, flags in ((A, B, {}), (A, B, FLAGS), (V6_PRIMARY_A, V6_PRIMARY_B, FLAGS), (A, A, {})):
        policies = asking(own, other, **flags).state.policies
        for statement in (*policies.export, *policies.import_):
            assert policies.prefix_sets[statement.prefix_set]
            assert policies.neighbor_sets[statement.neighbor_set]


@pytest.mark.parametrize(("own", "other"), [(A, B), (V6_PRIMARY_A, V6_PRIMARY_B)], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("advertise", [True, False])
@pytest.mark.parametrize("external", ["10.0.1.1", "2001:db8:1::1"])
def test_who_may_get_what(own: object, other: object, advertise: bool, external: str) -> None:
    state = asking(own, other, advertise_pod_cidr=advertise, **FLAGS).state  # type: ignore[arg-type]
    (internal,) = (address for address in state.neighbors if address not in FLAGS["peer_router_ips"])
    for prefix in ("10.244.1.0/24", "fd00:1::/64"):
        assert exported(state.policies, prefix, internal)
        assert exported(state.policies, prefix, external) is advertise
    for prefix in ("10.244.2.0/24", "fd00:2::/64", "10.244.1.0/25", "10.244.0.0/16", "fd00::/16", "0.0.0.0/0"):
        assert not exported(state.policies, prefix, internal)
        assert not exported(state.policies, prefix, external)
    for neighbor in (internal, external):
        assert not imported(state.policies, "0.0.0.0/0", neighbor)
        assert not imported(state.policies, "::/0", neighbor)
        assert imported(state.policies, "10.244.2.0/24", neighbor)
        assert imported(state.policies, "128.0.0.0/1", neighbor)


def test_own_next_hop_only_where_session_and_route_are_of_one_family() -> None:
    policies = asking(A, B, override_nexthop=True, **FLAGS).state.policies
    own_hop = [statement.name for statement in policies.export if statement.attributes.next_hop_self]
    assert own_hop == ["podcidrdefinedsetexternalpeerset", "podcidrdefinedsetv6externalpeersetv6"]


def test_both_families_get_the_same_statements() -> None:
    export = asking(A, B, **FLAGS).state.policies.export
    pairs = {(item.prefix_set.removesuffix("v6"), item.neighbor_set.removesuffix("v6")) for item in export}
    for prefix_set, neighbor_set in pairs - {("podcidrdefinedset", "iBGPpeerset")}:
        names = {prefix_set + a + neighbor_set + b for a in ("", "v6") for b in ("", "v6")}
        assert names <= {item.name for item in export}


def test_evaluation_is_gobgpds_also_where_that_surprises() -> None:
    statement = Statement("some", "nobody", accept=True)
    everyone = Policies({"some": frozenset({PrefixRange("10.0.0.0/8", 8, 16)})}, {}, (statement,), ())
    assert exported(everyone, "10.1.0.0/16", "192.0.2.1"), "an empty neighbour set matches every neighbour"
    assert not exported(everyone, "10.1.1.0/24", "192.0.2.1")
    assert not exported(Policies({}, {"nobody": frozenset()}, (statement,), ()), "10.1.0.0/16", "192.0.2.1")
    assert decision(everyone, OPEN, everyone.export, "10.1.0.0/16", "192.0.2.1") is True
    assert decision(everyone, CLOSED, everyone.export, "10.1.0.0/16", "192.0.2.1") is False


def test_merging_takes_nothing_away() -> None:
    before = asking(A, B, **FLAGS).state.policies
    after = asking(node("a", ["10.0.0.1"], ["10.244.7.0/24"]), node("c", ["10.0.0.3"])).state.policies
    both = merged(before, after)
    for prefix in ("10.244.1.0/24", "10.244.7.0/24", "fd00:1::/64"):
        for neighbor in ("10.0.0.2", "10.0.0.3", "10.0.1.1"):
            assert exported(both, prefix, neighbor) or (neighbor == "10.0.1.1" and prefix == "10.244.7.0/24")
    assert merged(before, before) == before


def test_merging_takes_over_no_statement_that_is_not_of_our_kind() -> None:
    ours = asking(A, B, **FLAGS).state.policies
    open_to_all = Statement("podcidrdefinedset", "emptied", accept=True)
    strange = Statement("foreign:whatever:", "", accept=True)
    for theirs in (open_to_all, strange, Statement("gone", "iBGPpeerset", accept=True)):
        found = Policies(ours.prefix_sets, ours.neighbor_sets, (*ours.export, theirs), (*ours.import_, theirs))
        assert merged(found, ours) == ours


def test_merging_has_each_statement_once_with_the_new_attributes() -> None:
    with_communities = node("a", ["10.0.0.1", "2001:db8::1"], A.pod_cidrs, {"node.bgp.communities": "1:1"})
    before, after = asking(A, B, **FLAGS).state.policies, asking(with_communities, B, **FLAGS).state.policies
    assert merged(before, after) == after
