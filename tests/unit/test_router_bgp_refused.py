"""What peers may not announce: the ranges that are ours, what contains them, and what stays possible."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from support.bgp import asking, node

from kube_router.workers.router.bgpstate import IMPORT_ASSIGNMENT, BgpState
from kube_router.workers.router.refused import around, inside
from kube_router.workers.router.verdicts import accepts, decision
from kube_router.workers.router.vips import Vips

A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"])
B = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"])
PEERS: dict[str, Any] = {"peer_router_ips": ("10.0.1.1",), "peer_router_asns": (65000,)}
RANGES: dict[str, Any] = {
    "service_cluster_ip_range": ("10.96.0.0/12", "fd96::/112"),
    "service_external_ip_range": ("203.0.113.0/24",),
    "loadbalancer_ip_range": ("198.51.100.0/24", "2001:db8:99::/64"),
}
VIPS = Vips(frozenset({"192.0.2.1"}), frozenset({"192.0.2.1", "192.0.2.2", "2001:db8:77::1"}))
DEFAULTS = ["0.0.0.0/0", "::/0"]
OURS = [
    *(
        "10.244.1.0/24",
        "10.244.1.0/25",
        "10.244.1.7/32",
        "fd00:1::/64",
        "fd00:1::/65",
        "10.0.0.1/32",
        "2001:db8::1/128",
    ),
    *(
        "10.96.0.0/12",
        "10.96.0.10/32",
        "10.100.0.0/16",
        "fd96::/112",
        "fd96::a/128",
        "203.0.113.0/24",
        "203.0.113.9/32",
    ),
    *(
        "198.51.100.128/25",
        "2001:db8:99::/64",
        "2001:db8:99::5/128",
        "192.0.2.1/32",
        "192.0.2.2/32",
        "2001:db8:77::1/128",
    ),
]
COVERING = [
    *("0.0.0.0/1", "128.0.0.0/1", "10.0.0.0/8", "10.244.0.0/16", "10.244.0.0/23", "10.0.0.0/24", "10.0.0.0/31"),
    *("10.64.0.0/10", "203.0.0.0/8", "198.51.100.0/23", "fd00::/8", "fd00:1::/63", "2000::/3", "2001:db8::/64"),
    *("8000::/1", "fd96::/111", "2001:db8:99::/63"),
]
POSSIBLE = [
    *(
        "10.244.2.0/24",
        "10.244.0.0/24",
        "fd00:2::/64",
        "10.0.0.2/32",
        "10.0.1.0/24",
        "10.245.0.0/16",
        "2001:db8::2/128",
    ),
    *("192.0.2.0/24", "192.0.2.3/32", "64.0.0.0/2", "fc00::/8", "2001:db8:1::/48", "172.16.0.0/12"),
]


def taken(state: BgpState, prefix: str, neighbor: str) -> bool:
    return accepts(decision(state.policies, IMPORT_ASSIGNMENT, state.policies.import_, prefix, neighbor))


@pytest.mark.parametrize("neighbor", ["10.0.0.2", "10.0.1.1"])
def test_what_is_ours_and_what_contains_it_is_refused_from_everybody(neighbor: str) -> None:
    strict = asking(A, B, vips=VIPS, **PEERS, **RANGES)
    lenient = asking(A, B, vips=VIPS, bgp_accept_covering_prefixes=True, **PEERS, **RANGES)
    assert strict.problems == lenient.problems == ()
    for prefix in (*DEFAULTS, *OURS):
        assert not taken(strict.state, prefix, neighbor), prefix
        assert not taken(lenient.state, prefix, neighbor), prefix
    for prefix in COVERING:
        assert not taken(strict.state, prefix, neighbor), prefix
        assert taken(lenient.state, prefix, neighbor), prefix
    for prefix in POSSIBLE:
        assert taken(strict.state, prefix, neighbor), prefix
        assert taken(lenient.state, prefix, neighbor), prefix


def test_a_service_range_that_holds_nodes_or_pods_is_not_protected_as_a_whole() -> None:
    """Whoever sets 10.0.0.0/8 as the range of external IPs must not lose the other nodes' pod routes."""
    wide = {**RANGES, "service_external_ip_range": ("10.0.0.0/8",), "loadbalancer_ip_range": ("10.244.2.128/25",)}
    desired = asking(A, B, vips=VIPS, **PEERS, **wide)
    texts = [problem.text for problem in desired.problems]
    assert len(texts) == 2
    assert "flag --service-external-ip-range: 10.0.0.0/8 shares addresses with node a" in texts[0]
    assert "flag --loadbalancer-ip-range: 10.244.2.128/25 shares addresses with node b" in texts[1]
    for prefix in ("10.244.2.0/24", "10.0.0.2/32", "10.7.0.0/16", "10.244.2.128/25"):
        assert taken(desired.state, prefix, "10.0.0.2"), prefix
    for prefix in ("10.244.1.0/24", "10.0.0.1/32", "10.96.0.10/32", "10.0.0.0/8"):
        assert not taken(desired.state, prefix, "10.0.0.2"), prefix


def test_the_operators_list_holds_for_longer_prefixes_of_both_families() -> None:
    own = node(
        "a", ["10.0.0.1", "2001:db8::1"], A.pod_cidrs, {"node.bgp.customimportreject": "172.16.0.0/12,2001:db8:5::/48"}
    )
    state = asking(own, B, **PEERS).state
    for prefix in ("172.16.0.0/12", "172.20.0.0/16", "172.31.255.255/32", "2001:db8:5::/48", "2001:db8:5:1::/64"):
        assert not taken(state, prefix, "10.0.1.1"), prefix
    for prefix in ("172.0.0.0/8", "2001:db8:6::/48", "2001:db8:4::/47"):
        assert taken(state, prefix, "10.0.1.1"), prefix
    everything = node("a", ["10.0.0.1", "2001:db8::1"], A.pod_cidrs, {"node.bgp.customimportreject": "0.0.0.0/0"})
    state = asking(everything, B, **PEERS).state
    assert not taken(state, "172.16.0.0/12", "10.0.1.1")
    assert taken(state, "2001:db8:6::/48", "10.0.1.1")


def test_covering_prefixes_are_listed_one_by_one() -> None:
    found = list(around([ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("192.0.3.0/24")]))
    assert len(found) == 23, "the two share all but their own length"
    assert all(item.shortest == item.longest and 0 < item.longest < 24 for item in found)
    assert {item.prefix for item in found} >= {"128.0.0.0/1", "192.0.0.0/8", "192.0.2.0/23"}
    assert len(list(around([ipaddress.ip_network("2001:db8::1/128")]))) == 127
    assert list(around([ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("128.0.0.0/1")])) == []
    assert str(inside(ipaddress.ip_network("fd00::/64"))) == "fd00::/64 64..128"


def test_a_set_is_exact_or_holds_parts_throughout() -> None:
    """gobgpd 3.x asks only the longest member that contains a prefix: a mixed set would hide its shorter members."""
    own = node(
        "a", ["10.0.0.1", "2001:db8::1"], A.pod_cidrs, {"node.bgp.customimportreject": "172.16.0.0/12,172.16.0.0/16"}
    )
    for name, members in asking(own, B, vips=VIPS, **PEERS, **RANGES).state.policies.prefix_sets.items():
        exact = {item.shortest == item.longest for item in members if item.longest not in (32, 128)}
        whole = {item.longest in (32, 128) for item in members if item.shortest != item.longest}
        assert len(exact) <= 1 and whole <= {True}, name
        assert len({":" in item.prefix for item in members}) == 1, "gobgpd refuses a set of two families"
