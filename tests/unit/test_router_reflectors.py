"""Route reflectors: who pairs up with whom, who reflects for whom, and what a bad cluster id spoils."""

from __future__ import annotations

import itertools

import pytest
from support.bgp import asking, node

from kube_router.ipc.messages import Node
from kube_router.workers.nodefacts import node_facts, parse_cluster_id
from kube_router.workers.router.reflectors import Reflectors

ROLES = {"server": {"rr.server": "42"}, "client": {"rr.client": "42"}, "plain": {}}


def member(number: int, annotations: dict[str, str]) -> Node:
    return node(f"n{number}", [f"10.0.0.{number}"], [f"10.244.{number}.0/24"], annotations)


def peers_of(own: Node, *others: Node) -> dict[str, str]:
    """Cluster id by the last number of the peers' addresses."""
    state = asking(own, *others, enable_ipv6=False).state
    return {address.rpartition(".")[2]: item.cluster_id for address, item in state.neighbors.items()}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("42", "0.0.0.42"),
        ("0x2a", "0.0.0.42"),
        ("052", "0.0.0.42"),
        ("10.0.0.1", "10.0.0.1"),
        ("4294967295", "255.255.255.255"),
    ],
)
def test_a_cluster_id_becomes_a_dotted_quad(text: str, wanted: str) -> None:
    assert parse_cluster_id(text) == wanted


@pytest.mark.parametrize("text", ["", "0", "0.0.0.0", "4294967296", "-1", "one", "::1", "10.0.0.1/32"])
def test_what_is_no_cluster_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no cluster id"):
        parse_cluster_id(text)


def test_a_server_peers_with_all_and_reflects_for_its_clients() -> None:
    server, client, plain, second = (
        member(n, ROLES[role]) for n, role in enumerate(("server", "client", "plain", "server"), 1)
    )
    assert peers_of(server, client, plain, second) == {"2": "0.0.0.42", "3": "0.0.0.42", "4": ""}
    assert peers_of(client, server, plain, second) == {"1": "", "4": ""}
    assert peers_of(plain, server, client, second) == {"1": "", "4": ""}


def test_the_role_of_a_server_goes_before_that_of_a_client() -> None:
    assert peers_of(member(1, {"rr.server": "7", "rr.client": "8"}), member(2, {"rr.client": "7"})) == {"2": "0.0.0.7"}


def test_a_client_has_the_servers_of_its_own_cluster_or_else_all() -> None:
    one, two = member(1, {"rr.server": "1"}), member(2, {"rr.server": "0x2"})
    assert peers_of(member(3, {"rr.client": "0.0.0.2"}), one, two).keys() == {"2"}
    assert peers_of(member(3, {"rr.client": "9"}), one, two).keys() == {"1", "2"}
    assert peers_of(member(3, {"rr.client": "nine"}), one, two).keys() == {"1", "2"}


def test_both_ends_of_a_pair_agree() -> None:
    texts = (
        {},
        {"rr.server": "1"},
        {"rr.server": "2"},
        {"rr.client": "1"},
        {"rr.client": "3"},
        {"rr.client": "x"},
        {"rr.server": "x"},
    )
    facts = [node_facts(member(number, text), (4,)) for number, text in enumerate((*texts, *texts), 1)]  # type: ignore[arg-type]
    reflectors = Reflectors(facts)
    for one, other in itertools.combinations(facts, 2):
        assert reflectors.paired(one, other) == reflectors.paired(other, one), (one, other)


def test_everybody_reaches_everybody_over_servers() -> None:
    """Whatever the roles, as long as a server is there: two nodes have a session, or one with a server each."""
    texts = ({}, {"rr.server": "1"}, {"rr.server": "2"}, {"rr.client": "1"}, {"rr.client": "3"}, {"rr.client": "x"})
    facts = [node_facts(member(number, text), (4,)) for number, text in enumerate(texts, 1)]  # type: ignore[arg-type]
    reflectors = Reflectors(facts)
    servers = [item for item in facts if item.reflection is not None and item.reflection.server]
    for one in facts:
        assert one in servers or any(reflectors.paired(one, server) for server in servers)
    for one, other in itertools.combinations(servers, 2):
        assert reflectors.paired(one, other)


def test_a_bad_cluster_id_leaves_the_last_good_one_and_is_told() -> None:
    client = member(2, {"rr.client": "42"})
    running = asking(member(1, {"rr.server": "42"}), client, enable_ipv6=False).state
    desired = asking(member(1, {"rr.server": "forty-two"}), client, enable_ipv6=False, actual=running)
    assert desired.state == running
    (problem,) = desired.problems
    assert problem.reason == "InvalidClusterID"
    assert "node n1: annotation kube-router.io/rr.server" in problem.text


def test_a_bad_cluster_id_from_the_start_is_the_router_id() -> None:
    assert peers_of(member(1, {"rr.server": "forty-two"}), member(2, {"rr.client": "1"})) == {"2": "10.0.0.1"}


def test_without_full_mesh_reflectors_need_the_same_asn() -> None:
    own = member(1, {"rr.server": "42", "node.asn": "64600"})
    same, other = (
        member(2, {"rr.client": "42", "node.asn": "64600"}),
        member(3, {"rr.client": "42", "node.asn": "64601"}),
    )
    state = asking(own, same, other, enable_ipv6=False, nodes_full_mesh=False).state
    assert {address: (item.asn, item.cluster_id) for address, item in state.neighbors.items()} == {
        "10.0.0.2": (64600, "0.0.0.42")
    }


def test_a_node_that_becomes_a_client_changes_nothing_for_its_servers() -> None:
    server, plain, client = member(1, {"rr.server": "42"}), member(2, {}), member(2, {"rr.client": "42"})
    assert peers_of(server, plain, member(3, {})) == peers_of(server, client, member(3, {}))
    assert peers_of(plain, server).keys() == peers_of(client, server).keys()


def test_a_client_without_any_server_is_told_that_it_is_alone() -> None:
    desired = asking(member(1, {"rr.client": "42"}), member(2, {}), enable_ipv6=False)
    assert desired.state.neighbors == {}
    assert [problem.reason for problem in desired.problems] == ["NoRouteReflector"]
