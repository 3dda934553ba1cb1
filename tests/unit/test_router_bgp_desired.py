"""What gobgpd is to do: speaker, sessions, policies and paths out of Nodes, flags and annotations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from support.bgp import asking, node, own_state

from kube_router.workers.model import Family
from kube_router.workers.nodefacts import NodeFacts, parse_address
from kube_router.workers.router.bgpstate import FRESH, Neighbor
from kube_router.workers.router.desired import router_id
from kube_router.workers.router.vips import Vips

V4, V6 = Family.IPV4, Family.IPV6
DUAL = (V4, V6)
Wanted = partial(Neighbor, most_prefixes=50_000)
A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"])
B = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"])
C = node("c", ["10.0.0.3"], ["10.244.3.0/24"])


def with_annotations(annotations: dict[str, str]) -> Any:
    return node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"], annotations)


def test_mesh_peers_with_every_other_node_over_one_session_with_the_families_of_both() -> None:
    desired = asking(A, B, C)
    assert desired.problems == ()
    assert desired.state.neighbors == {
        "10.0.0.2": Wanted("10.0.0.2", 0, "10.0.0.1", 179, DUAL),
        "10.0.0.3": Wanted("10.0.0.3", 0, "10.0.0.1", 179, (V4,)),
    }
    assert desired.state.paths == {"10.244.1.0/24": "10.0.0.1", "fd00:1::/64": "2001:db8::1"}
    speaker = desired.state.speaker
    assert speaker is not None
    assert (speaker.asn, speaker.router_id, speaker.listen_port) == (64512, "10.0.0.1", 179)
    assert speaker.listen_addresses == {"10.0.0.1", "2001:db8::1"}


def test_cluster_asn_and_bgp_port_reach_speaker_and_peers() -> None:
    state = asking(A, B, cluster_asn=65010, bgp_port=1790).state
    assert state.speaker is not None
    assert (state.speaker.asn, state.speaker.listen_port) == (65010, 1790)
    assert state.neighbors["10.0.0.2"].remote_port == 1790


def test_without_full_mesh_only_nodes_of_the_same_asn_pair_up_and_the_number_is_fixed() -> None:
    asn = {"node.asn": "64600"}
    own = with_annotations(asn)
    same = node("b", ["10.0.0.2"], [], {"node.asn": "0xfc58"})
    other = node("c", ["10.0.0.3"], [], {"node.asn": "64601"})
    bad = node("d", ["10.0.0.4"], [], {"node.asn": "many"})
    state = asking(own, same, other, bad, nodes_full_mesh=False).state
    assert {address: neighbor.asn for address, neighbor in state.neighbors.items()} == {"10.0.0.2": 64600}
    assert state.speaker is not None and state.speaker.asn == 64600


def test_without_full_mesh_a_node_without_asn_does_not_start_and_a_running_one_goes_on() -> None:
    fresh = asking(A, B, nodes_full_mesh=False)
    assert fresh.state.speaker is None
    assert "node.asn" in fresh.problems[0].text and "node a" in fresh.problems[0].text
    running = own_state(speaker_asn=64600)
    assert asking(A, B, nodes_full_mesh=False, actual=running).state.speaker == running.speaker


def test_ibgp_off_leaves_no_node_peer() -> None:
    assert asking(A, B, enable_ibgp=False).state.neighbors == {}


def test_nodes_without_address_or_of_another_family_spoil_nothing() -> None:
    v6_only = node("v6", ["2001:db8::9"], ["fd00:9::/64"])
    desired = asking(C, B, node("none", [], []), v6_only)
    assert set(desired.state.neighbors) == {"10.0.0.2"}
    (text,) = [problem.text for problem in desired.problems if problem.reason == "NoCommonFamily"]
    assert "node v6" in text


def test_ipv6_only_cluster_needs_a_router_id_and_says_so() -> None:
    own = node("a", ["2001:db8::1"], ["fd00:1::/64"])
    peer = node("b", ["2001:db8::2"], ["fd00:2::/64"])
    without = asking(own, peer, enable_ipv4=False)
    assert without.state.speaker is None
    assert "--router-id" in without.problems[0].text
    generated = asking(own, peer, enable_ipv4=False, router_id="generate").state
    assert generated.speaker is not None
    assert generated.neighbors["2001:db8::2"].families == (V6,)


@pytest.mark.parametrize(
    ("address", "identity"),
    [("10.0.0.1", "0.15.248.254"), ("192.168.1.10", "47.29.204.12"), ("2001:db8:42:2::1", "165.103.209.36")],
)
def test_generated_router_ids_are_kube_routers(address: str, identity: str) -> None:
    parsed = parse_address(address)
    facts = NodeFacts("n", "", parsed, (parsed,), (), None, ())
    assert router_id("generate", facts) == identity
    assert router_id("10.9.9.9", facts) == "10.9.9.9"


def test_local_addresses_are_taken_item_by_item() -> None:
    own = with_annotations({"bgp-local-addresses": " 10.0.0.9, nonsense ,2001:db8::9"})
    desired = asking(own)
    assert desired.state.speaker is not None
    assert desired.state.speaker.listen_addresses == {"10.0.0.9", "2001:db8::9"}
    assert [problem.reason for problem in desired.problems] == ["InvalidLocalAddress"]
    assert "'nonsense'" in desired.problems[0].text


def test_local_address_of_a_disabled_family_is_ignored_with_a_word() -> None:
    own = with_annotations({"bgp-local-addresses": "10.0.0.9,2001:db8::9"})
    desired = asking(own, enable_ipv6=False)
    assert desired.state.speaker is not None
    assert desired.state.speaker.listen_addresses == {"10.0.0.9"}
    assert "IPv6" in desired.problems[0].text


def test_a_node_without_any_address_leaves_bgp_as_it_is() -> None:
    running = asking(A, B).state
    assert asking(node("a", [], []), B, actual=running).state == running
    silent = own_state()
    desired = asking(node("a", [], []), B, actual=silent)
    assert desired.state == silent
    assert "MissingNodeAddress" in [problem.reason for problem in desired.problems]
    assert asking(node("a", [], []), B, actual=FRESH).state.speaker is None


@pytest.mark.parametrize("lost", ["address", "pod CIDR"])
@pytest.mark.parametrize("family", DUAL)
def test_a_family_that_loses_its_address_or_cidr_keeps_the_last_good_state(family: Family, lost: str) -> None:
    running = asking(A, B).state
    addresses = [item.address for item in A.addresses]
    cidrs = list(A.pod_cidrs)
    (addresses if lost == "address" else cidrs).pop(0 if family is V4 else 1)
    desired = asking(node("a", addresses, cidrs), B, actual=running)
    if lost == "address" and family is V4:  # the other nodes cannot know the address that sessions ran on
        assert desired.state.neighbors == {"2001:db8::2": Wanted("2001:db8::2", 0, "2001:db8::1", 179, DUAL)}
        running = replace(running, neighbors=desired.state.neighbors, policies=desired.state.policies)
    assert desired.state == running
    if lost == "pod CIDR":
        assert [problem.reason for problem in desired.problems] == ["MissingPodCIDR"]
        assert f"{family}" in desired.problems[0].text


@pytest.mark.parametrize("family", DUAL)
def test_another_node_that_loses_a_family_keeps_its_session_with_the_other(family: Family) -> None:
    running = asking(A, B, C).state
    addresses = [item.address for item in B.addresses]
    addresses.pop(0 if family is V4 else 1)
    desired = asking(A, node("b", addresses, B.pod_cidrs), C, actual=running)
    assert desired.problems == ()
    assert desired.state.paths == running.paths and desired.state.speaker == running.speaker
    assert desired.state.neighbors["10.0.0.3"] == running.neighbors["10.0.0.3"]
    if family is V6:
        assert desired.state.neighbors["10.0.0.2"] == running.neighbors["10.0.0.2"]
    else:
        assert desired.state.neighbors["2001:db8::2"] == Wanted("2001:db8::2", 0, "2001:db8::1", 179, (V6,))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["10.0.0.1", "2001:db8::1"], ["2001:db8::2"]),
        (["10.0.0.1", "2001:db8::1"], ["2001:db8::2", "10.0.0.2"]),
        (["2001:db8::1"], ["10.0.0.2", "2001:db8::2"]),
        (["10.0.0.1", "2001:db8::1"], ["10.0.0.2"]),
    ],
)
def test_both_nodes_of_a_pair_come_to_the_same_two_addresses(one: list[str], other: list[str]) -> None:
    a, b = node("a", one, []), node("b", other, [])
    (ours,) = asking(a, b, router_id="10.9.9.9").state.neighbors.values()
    (theirs,) = asking(b, a, router_id="10.9.9.9").state.neighbors.values()
    assert (ours.address, ours.local_address) == (theirs.local_address, theirs.address)


def test_a_changed_cidr_of_one_family_leaves_the_other_alone() -> None:
    running = asking(A, B).state
    state = asking(node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.9.0/24", "fd00:1::/64"]), B, actual=running).state
    assert state.paths == {"10.244.9.0/24": "10.0.0.1", "fd00:1::/64": "2001:db8::1"}


VIPS = Vips(frozenset({"192.0.2.1", "2001:db8:e::1"}), frozenset({"192.0.2.1", "2001:db8:e::1", "192.0.2.2"}))


def test_service_addresses_are_host_prefixes_by_the_nodes_address_of_the_same_family() -> None:
    paths = asking(A, B, vips=VIPS).state.paths
    assert paths == {
        "10.244.1.0/24": "10.0.0.1",
        "fd00:1::/64": "2001:db8::1",
        "192.0.2.1/32": "10.0.0.1",
        "2001:db8:e::1/128": "2001:db8::1",
    }


def test_service_addresses_of_a_family_without_node_address_wait() -> None:
    paths = asking(node("a", ["10.0.0.1"], ["10.244.1.0/24"]), B, vips=VIPS).state.paths
    assert paths == {"10.244.1.0/24": "10.0.0.1", "192.0.2.1/32": "10.0.0.1"}


@pytest.mark.parametrize("lost", ["address", "pod CIDR"])
@pytest.mark.parametrize("family", DUAL)
def test_the_last_good_state_tells_pod_cidrs_and_service_addresses_apart(family: Family, lost: str) -> None:
    running = asking(A, B, vips=VIPS).state
    addresses, cidrs = [item.address for item in A.addresses], list(A.pod_cidrs)
    (addresses if lost == "address" else cidrs).pop(0 if family is V4 else 1)
    one_family_less = node("a", addresses, cidrs)
    state = asking(one_family_less, B, actual=running, vips=VIPS).state
    assert state.paths == running.paths
    assert state.policies.prefix_sets == running.policies.prefix_sets
    assert asking(one_family_less, B, actual=running).state.paths == asking(A, B).state.paths


def test_a_path_that_no_policy_knows_any_more_is_no_pod_cidr() -> None:
    """The worker was killed after the policies were written, and before the path was withdrawn."""
    torn = replace(asking(A, B).state, paths=asking(A, B, vips=VIPS).state.paths)
    state = asking(node("a", ["10.0.0.1", "2001:db8::1"]), B, actual=torn).state
    assert state.paths == asking(A, B).state.paths


def test_external_peer_gets_flags_and_an_address_of_its_own_family() -> None:
    state = asking(
        A,
        B,
        peer_router_ips=("10.0.1.1", "2001:db8:1::1"),
        peer_router_asns=(65000, 65001),
        peer_router_ports=(1179, 179),
        peer_router_multihop_ttl=4,
        bgp_holdtime=30.0,
        passwords=("", "geheim"),
    ).state
    assert state.neighbors["10.0.1.1"] == Wanted("10.0.1.1", 65000, "10.0.0.1", 1179, DUAL, 30, 4)
    assert state.neighbors["2001:db8:1::1"] == Wanted("2001:db8:1::1", 65001, "2001:db8::1", 179, DUAL, 30, 4, "geheim")
    assert "geheim" not in f"{state}{state.neighbors['2001:db8:1::1']}"


def test_flag_peers_hide_the_annotations() -> None:
    own = with_annotations({"peers": "- remoteip: 10.0.1.2\n  remoteasn: 65000"})
    state = asking(own, peer_router_ips=("10.0.1.1",), peer_router_asns=(65000,)).state
    assert set(state.neighbors) == {"10.0.1.1"}


def test_an_external_peer_that_is_a_node_is_external_and_an_own_address_is_no_peer() -> None:
    own = with_annotations(
        {"peers": "[{remoteip: 10.0.0.2, remoteasn: 65000}, {remoteip: 2001:db8::1, remoteasn: 65000}]"}
    )
    desired = asking(own, B)
    assert {address: item.asn for address, item in desired.state.neighbors.items()} == {"10.0.0.2": 65000}
    assert "iBGPpeerset" not in desired.state.policies.neighbor_sets
    assert ["2001:db8::1" in problem.text for problem in desired.problems] == [False, True]


def test_a_bad_peer_keeps_its_running_session_and_disturbs_no_other() -> None:
    good = with_annotations(
        {"peers": "- {remoteip: 10.0.1.1, remoteasn: 65000}\n- {remoteip: 10.0.1.2, remoteasn: 65000}"}
    )
    running = asking(good, B).state
    bad = with_annotations(
        {"peers": "- {remoteip: 10.0.1.1, remoteasn: 23456}\n- {remoteip: 10.0.1.2, remoteasn: 65009}"}
    )
    desired = asking(bad, B, actual=running)
    assert desired.state.neighbors["10.0.1.1"] == running.neighbors["10.0.1.1"]
    assert desired.state.neighbors["10.0.1.2"].asn == 65009
    assert "23456" in desired.problems[0].text and "peer 1" in desired.problems[0].text


def test_a_broken_annotation_keeps_all_running_external_sessions() -> None:
    good = with_annotations({"peers": "- {remoteip: 10.0.1.1, remoteasn: 65000}"})
    running = asking(good, B).state
    desired = asking(with_annotations({"peers": "- {remoteip: 10.0.1.1"}), B, actual=running)
    assert desired.state == running
    assert "kube-router.io/peers" in desired.problems[0].text
    assert asking(A, B, actual=running).state.neighbors.keys() == {"10.0.0.2"}
