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

A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"])
B = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"])
V6_PRIMARY_A = node("a", ["2001:db8::1", "10.0.0.1"], ["10.244.1.0/24", "fd00:1::/64"])
V6_PRIMARY_B = node("b", ["2001:db8::2", "10.0.0.2"], ["10.244.2.0/24", "fd00:2::/64"])
FLAGS: dict[str, Any] = {"peer_router_ips": ("10.0.1.1", "2001:db8:1::1"), "peer_router_asns": (65000, 65000)}


def exported(policies: Policies, prefix: str, neighbor: str) -> bool:
    return accepts(decision(policies, EXPORT_ASSIGNMENT, policies.export, prefix, neighbor))


def imported(policies: Policies, prefix: str, neighbor: str) -> bool:
    return accepts(decision(policies, IMPORT_ASSIGNMENT, policies.import_, prefix, neighbor))


def test_names_and_order_are_kube_routers() -> None:
    policies = asking(A, B, **FLAGS).state.policies
    assert [statement.name for statement in policies.export] == [
        "podcidrdefinedsetiBGPpeerset",
        "podcidrdefinedsetv6iBGPpeerset",
        "podcidrdefinedsetexternalpeerset",
        "podcidrdefinedsetv6externalpeerset",
        "podcidrdefinedsetexternalpeersetv6",
        "podcidrdefinedsetv6externalpeersetv6",
    ]
    assert [statement.name for statement in policies.import_] == [
        "defaultroutedefinedsetallpeerset",
        "defaultroutedefinedsetv6allpeerset",
        "protectedrangesdefinedsetallpeerset",
        "protectedrangesdefinedsetv6allpeerset",
        "coveringprefixesdefinedsetallpeerset",
        "coveringprefixesdefinedsetv6allpeerset",
        "defaultroutedefinedsetallpeersetv6",
        "defaultroutedefinedsetv6allpeersetv6",
        "protectedrangesdefinedsetallpeersetv6",
        "protectedrangesdefinedsetv6allpeersetv6",
        "coveringprefixesdefinedsetallpeersetv6",
        "coveringprefixesdefinedsetv6allpeersetv6",
    ]
    assert all(statement.accept for statement in policies.export)
    assert not any(statement.accept for statement in policies.import_)


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
