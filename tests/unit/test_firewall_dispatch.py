"""The dispatch tree: it leads every address to its own chain, in few rules, and no other address anywhere."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.iptables_walk import IptablesWalk
from support.walk import WirePacket, depths

from kube_router.workers.firewall.dispatch import DEEPEST, SHORT, dispatch_chains
from kube_router.workers.firewall.names import dispatch_chain
from kube_router.workers.firewall.rules import Direction
from kube_router.workers.model import Family

POD_CHAIN = "KUBE-POD-FW-{:016d}"
FIRST = {Family.IPV4: "10.244.7.0", Family.IPV6: "fd00:10:244:7::"}


def tree(family: Family, direction: Direction, addresses: list[str]) -> IptablesWalk:
    """The chains, entered from FORWARD; every pod chain refuses, so that a packet tells by its verdict who took it."""
    chains = dispatch_chains(family, direction, {address: POD_CHAIN.format(n) for n, address in enumerate(addresses)})
    assert next(iter(chains)) == dispatch_chain(direction)
    pods = [POD_CHAIN.format(n) for n in range(len(addresses))]
    lines = ["*filter", ":FORWARD ACCEPT", *(f":{chain} -" for chain in (*chains, *pods))]
    lines.append(f"-A FORWARD -j {dispatch_chain(direction)}")
    lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
    lines += [f'-A {chain} -m comment --comment "{chain}" -j DROP' for chain in pods]
    return IptablesWalk(family, "\n".join([*lines, "COMMIT"]))


def ask(walk: IptablesWalk, direction: Direction, address: str) -> tuple[str, int]:
    """The pod chain that a packet of the address comes to, empty for none; and the number of rules on the way."""
    other = "192.0.2.1" if walk.family is Family.IPV4 else "2001:db8::1"
    ends = (address, other) if direction is Direction.EGRESS else (other, address)
    walked = walk.walk(WirePacket("FORWARD", *ends, "tcp", 80))
    return ("" if walked.allowed else walked.path[-1].split()[1]), walked.looked


def numbered(family: Family, count: int, step: int = 1) -> list[str]:
    first = int(ipaddress.ip_address(FIRST[family]))
    return [str(ipaddress.ip_address(first + step * number)) for number in range(1, count + 1)]


@st.composite
def address_sets(draw: st.DrawFn) -> tuple[Family, list[str]]:
    """Addresses near each other, far from each other, and such as make the tree as deep as can be."""
    family = draw(st.sampled_from(list(Family)))
    near = st.integers(0, 4095).map(lambda number: int(ipaddress.ip_address(FIRST[family])) + number)
    far = st.integers(0, 2**family.bits - 1)
    powers = st.integers(0, family.bits // 4 - 1).map(lambda power: 16**power)
    values = draw(st.lists(st.one_of(near, far, powers), unique=True, max_size=80))
    made = ipaddress.IPv4Address if family is Family.IPV4 else ipaddress.IPv6Address
    return family, [str(made(value)) for value in values]


@given(address_sets(), st.sampled_from(list(Direction)), st.data())
def test_every_address_comes_to_its_own_chain_and_others_to_none(
    case: tuple[Family, list[str]], direction: Direction, data: st.DataObject
) -> None:
    family, addresses = case
    walk = tree(family, direction, addresses)
    for number, address in enumerate(addresses):
        assert ask(walk, direction, address)[0] == POD_CHAIN.format(number)
        back = Direction.INGRESS if direction is Direction.EGRESS else Direction.EGRESS
        assert ask(walk, back, address)[0] == ""
    stranger = str(ipaddress.ip_address(FIRST[family]) + data.draw(st.integers(5000, 6000)))
    if stranger not in addresses:
        assert ask(walk, direction, stranger)[0] == ""


@pytest.mark.parametrize("family", list(Family), ids=str)
@pytest.mark.parametrize(("count", "most"), [(1, 2), (16, 17), (17, 20), (110, 34), (254, 34), (4000, 51)])
def test_a_new_connection_looks_at_few_rules_of_many_pods(family: Family, count: int, most: int) -> None:
    addresses = numbered(family, count)
    walk = tree(family, Direction.INGRESS, addresses)
    looked = [ask(walk, Direction.INGRESS, address)[1] - 1 for address in addresses]  # without the verdict itself
    assert max(looked) <= most
    assert count < 32 or max(looked) < count


@pytest.mark.parametrize("family", list(Family), ids=str)
def test_the_deepest_tree_is_shallow_enough_for_nftables(family: Family) -> None:
    """Powers of sixteen, each with seventeen neighbours: every step of four bits splits few from many."""
    values = sorted({16**power + near for power in range(1, family.bits // 4) for near in range(17)})
    made = ipaddress.IPv4Address if family is Family.IPV4 else ipaddress.IPv6Address
    addresses = [str(made(value)) for value in values]
    walk = tree(family, Direction.INGRESS, addresses)
    for number, address in enumerate(addresses):
        assert ask(walk, Direction.INGRESS, address)[0] == POD_CHAIN.format(number)
    jumps = {chain: {rule.target for rule in rules if rule.target} for chain, rules in walk.chains.items()}
    assert depths(jumps)[dispatch_chain(Direction.INGRESS)] <= DEEPEST + 1


@pytest.mark.parametrize("family", list(Family), ids=str)
def test_a_pod_more_changes_the_chains_on_its_way_only(family: Family) -> None:
    addresses = numbered(family, 200)
    chains = {address: POD_CHAIN.format(n) for n, address in enumerate(addresses)}
    before = dispatch_chains(family, Direction.EGRESS, chains)
    after = dispatch_chains(family, Direction.EGRESS, {**chains, numbered(family, 201)[-1]: "KUBE-POD-FW-NEW"})
    assert before.keys() == after.keys()
    assert sum(before[chain] != after[chain] for chain in before) == 1
    assert dispatch_chains(family, Direction.EGRESS, dict(reversed(chains.items()))) == before


def test_without_pods_the_root_is_there_and_directions_share_no_chain() -> None:
    assert dispatch_chains(Family.IPV4, Direction.INGRESS, {}) == {dispatch_chain(Direction.INGRESS): ()}
    addresses = dict.fromkeys(numbered(Family.IPV4, SHORT * 5), "KUBE-POD-FW-X")
    one, other = (dispatch_chains(Family.IPV4, direction, addresses) for direction in Direction)
    assert len(one) == len(other) > 5
    assert not one.keys() & other.keys()


def test_addresses_are_written_as_iptables_prints_them() -> None:
    chains = dispatch_chains(
        Family.IPV6, Direction.EGRESS, {"::ffff:10.0.0.1": "A", "fd00:0:0:0:0:0:0:1": "B", "::1.2.3.4": "C"}
    )
    assert chains[dispatch_chain(Direction.EGRESS)] == (
        "-s ::1.2.3.4/128 -g C",
        "-s ::ffff:10.0.0.1/128 -g A",
        "-s fd00::1/128 -g B",
    )
