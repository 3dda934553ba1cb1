"""Sessions in the presence of odd clusters, and what they are told about graceful restart."""

from __future__ import annotations

from support.bgp import asking, node

from kube_router.workers.router.bgpstate import GracefulRestart
from kube_router.workers.router.plan import AddNeighbor, ReplaceNeighbor, UpdateNeighbor, diff

A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"])
B = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"])
PEER = {"peer_router_ips": ("10.0.1.1",), "peer_router_asns": (65000,)}


def test_a_node_that_claims_our_address_or_anothers_gets_no_session_and_is_told() -> None:
    thief = node("thief", ["10.0.0.1"], ["10.244.8.0/24"])
    copy = node("copy", ["10.0.0.2"], ["10.244.9.0/24"])
    desired = asking(A, B, thief, copy)
    assert set(desired.state.neighbors) == {"10.0.0.2"}
    texts = [problem.text for problem in desired.problems]
    assert "node thief: its address 10.0.0.1 is also a's; no BGP session with thief" in texts
    assert "node copy: its address 10.0.0.2 is also b's; no BGP session with copy" in texts


def test_a_node_that_claims_our_other_address_is_no_peer_either() -> None:
    thief = node("thief", ["2001:db8::1"], [])
    desired = asking(A, thief)
    assert desired.state.neighbors == {}
    assert "is also a's" in desired.problems[0].text


def test_an_external_peer_that_is_a_node_is_told() -> None:
    desired = asking(A, B, peer_router_ips=("10.0.0.2",), peer_router_asns=(65000,))
    assert desired.state.neighbors["10.0.0.2"].asn == 65000
    assert [problem.text for problem in desired.problems] == [
        "peer 10.0.0.2: is also node b; it is treated as an external peer"
    ]


def test_as_trans_and_zero_are_no_as_numbers() -> None:
    for text in ("0", "23456", "0x5ba0", "4294967296"):
        own = node("a", ["10.0.0.1"], ["10.244.1.0/24"], {"node.asn": text})
        desired = asking(own, nodes_full_mesh=False, enable_ipv6=False)
        assert desired.state.speaker is None, text
        assert "MissingASN" in [problem.reason for problem in desired.problems]


def test_graceful_restart_reaches_every_peer_and_nobody_waits_long() -> None:
    flags = {"bgp_graceful_restart": True, "bgp_long_lived_graceful_restart_time": 3600.0, **PEER}
    state = asking(A, B, **flags).state
    wanted = GracefulRestart(90, 1, 3600)
    assert [item.graceful_restart for item in state.neighbors.values()] == [wanted, wanted]
    assert {item.graceful_restart.deferral_seconds for item in state.neighbors.values() if item.graceful_restart} == {1}
    server = node("a", ["10.0.0.1"], ["10.244.1.0/24"], {"rr.server": "1"})
    (reflecting,) = asking(server, B, bgp_graceful_restart=True).state.neighbors.values()
    assert reflecting.graceful_restart is not None
    assert reflecting.graceful_restart.deferral_seconds == 30


def test_becoming_a_reflector_touches_no_session_for_the_sake_of_a_timer() -> None:
    flags = {"bgp_graceful_restart": True}
    other = node("b", ["10.0.0.2", "2001:db8::2"], B.pod_cidrs, {"rr.server": "1"})
    before = asking(A, other, **flags).state
    server = node("a", ["10.0.0.1", "2001:db8::1"], A.pod_cidrs, {"rr.server": "1"})
    steps = diff(before, asking(server, other, **flags).state).steps
    assert not any(isinstance(step, AddNeighbor | ReplaceNeighbor | UpdateNeighbor) for step in steps)


def test_hold_time_limit_and_bfd_change_without_a_new_session_and_the_rest_with_one() -> None:
    before = asking(A, B, **PEER).state
    after = asking(A, B, bgp_holdtime=30.0, bgp_max_prefixes=7, enable_bfd=True, **PEER).state
    steps = diff(before, after).steps
    assert [type(step) for step in steps] == [UpdateNeighbor, UpdateNeighbor]
    assert str(steps[0]) == "update peer 10.0.0.2: most_prefixes 50000 -> 7"
    assert str(steps[1]) == (
        "update peer 10.0.1.1: hold_seconds 90 -> 30; bfd None -> BFD port 3784, 1000/1000 ms, x3; "
        "most_prefixes 50000 -> 7"
    )
    graceful = diff(before, asking(A, B, bgp_graceful_restart=True, **PEER).state).steps
    assert [type(step) for step in graceful] == [ReplaceNeighbor, ReplaceNeighbor]
    assert "graceful_restart None -> graceful restart 90s" in str(graceful[0])
    (replaced,) = diff(before, asking(A, B, passwords=("x1",), **PEER).state).steps
    assert isinstance(replaced, ReplaceNeighbor) and "x1" not in str(replaced)


def test_a_peer_after_a_restart_says_so_in_the_plan() -> None:
    (neighbor,) = asking(A, B).state.neighbors.values()
    assert str(AddNeighbor(neighbor, restarting=True)).endswith(", after a restart")


def test_an_address_that_nobody_can_listen_on_is_left_out() -> None:
    own = node("a", ["10.0.0.1", "2001:db8::1"], [], {"bgp-local-addresses": "10.0.0.1,192.0.2.9"})
    desired = asking(own, unbindable=("192.0.2.9",))
    assert desired.state.speaker is not None
    assert desired.state.speaker.listen_addresses == {"10.0.0.1"}
    assert "192.0.2.9 cannot be listened on" in desired.problems[-1].text
