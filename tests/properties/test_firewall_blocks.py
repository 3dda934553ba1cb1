"""Blocks with excepts against the algebra of sets, over addresses where it can differ, in both families."""

from __future__ import annotations

import ipaddress
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kube_router.workers.firewall.blocks import disjoint
from kube_router.workers.model import Family, IPNetwork


def network_of(family: Family, value: int, length: int) -> IPNetwork:
    shift = family.bits - length
    network = ipaddress.IPv4Network if family is Family.IPV4 else ipaddress.IPv6Network
    return network((value >> shift << shift, length))


def networks(family: Family) -> st.SearchStrategy[IPNetwork]:
    """Networks that meet often: few different bits, at the top and at the bottom of the address space."""
    values = st.one_of(
        st.integers(0, 255).map(lambda byte: byte << (family.bits - 8)),
        st.integers(0, 255),
        st.integers(0, 255).map(lambda byte: (1 << family.bits) - 1 - byte),
        st.integers(0, (1 << family.bits) - 1),
    )
    lengths = st.one_of(st.integers(0, 9), st.integers(family.bits - 9, family.bits), st.integers(0, family.bits))
    return st.builds(network_of, st.just(family), values, lengths)


def block_lists(family: Family) -> st.SearchStrategy[list[tuple[IPNetwork, list[IPNetwork]]]]:
    return st.lists(st.tuples(networks(family), st.lists(networks(family), max_size=5)), max_size=6)


def edges(network: IPNetwork) -> set[int]:
    """Addresses where membership can change, on both sides."""
    first, last = int(network.network_address), int(network.broadcast_address)
    return {value for value in (first - 1, first, last, last + 1) if 0 <= value < 1 << network.max_prefixlen}


def holds(network: IPNetwork, value: int) -> bool:
    return int(network.network_address) <= value <= int(network.broadcast_address)


@pytest.mark.parametrize("family", list(Family), ids=str)
@given(data=st.data())
def test_union_of_blocks_without_their_own_excepts(family: Family, data: st.DataObject) -> None:
    blocks = data.draw(block_lists(family))
    samples = {0, (1 << family.bits) - 1}
    for block, excepted in blocks:
        samples |= edges(block).union(*map(edges, excepted))
    samples |= set(data.draw(st.lists(st.integers(0, (1 << family.bits) - 1), max_size=5)))
    result = disjoint(blocks)
    for value in samples:
        meant = any(holds(block, value) and not any(holds(hole, value) for hole in holes) for block, holes in blocks)
        assert any(holds(network, value) for network in result) is meant, ipaddress.ip_address(value)


@pytest.mark.parametrize("family", list(Family), ids=str)
@given(data=st.data())
def test_result_is_disjoint_sorted_and_collapsed(family: Family, data: st.DataObject) -> None:
    result = disjoint(data.draw(block_lists(family)))
    assert all(network.version == family for network in result)
    assert all(int(left.broadcast_address) < int(right.network_address) for left, right in pairwise(result))
    assert list(result) == list(ipaddress.collapse_addresses(result))  # type: ignore[type-var]


@pytest.mark.parametrize("family", list(Family), ids=str)
@given(data=st.data())
@settings(max_examples=50)
def test_order_of_blocks_and_excepts_means_nothing(family: Family, data: st.DataObject) -> None:
    blocks = data.draw(block_lists(family))
    shuffled = data.draw(st.permutations(blocks))
    turned = [(block, list(reversed(excepted))) for block, excepted in shuffled]
    assert disjoint(turned) == disjoint(blocks)
