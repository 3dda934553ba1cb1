"""The pool of load-balancer addresses: what is usable, what comes next, and when it is empty."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from kube_router.workers.loadbalancer.pool import Pool, pools
from kube_router.workers.model import Family


def pool(*ranges: str) -> Pool:
    return Pool(map(ip_network, ranges))


@pytest.mark.parametrize(
    ("text", "first", "size"),
    [
        ("192.0.2.0/29", "192.0.2.1", 6),  # neither .0 nor .7
        ("192.0.2.0/30", "192.0.2.1", 2),
        ("192.0.2.0/31", "192.0.2.0", 2),
        ("192.0.2.9/32", "192.0.2.9", 1),
        ("2001:db8::/125", "2001:db8::1", 7),  # not the routers' anycast address; IPv6 has no broadcast
        ("2001:db8::/127", "2001:db8::", 2),
        ("2001:db8::7/128", "2001:db8::7", 1),
    ],
)
def test_usable_addresses_of_a_range(text: str, first: str, size: int) -> None:
    one = pool(text)
    assert one.size == size
    assert one.next_free(frozenset(), 0) == ip_address(first)
    for address in ip_network(text):
        assert (address in one) == (
            size >= ip_network(text).num_addresses
            or (address != ip_network(text)[0] and (address.version == 6 or address != ip_network(text)[-1]))
        )


def test_every_address_comes_once_and_then_none() -> None:
    one = pool("192.0.2.0/29", "198.51.100.4/31")
    taken: set[object] = set()
    while (address := one.next_free(taken, len(taken))) is not None:
        assert address not in taken
        taken.add(address)
    assert sorted(map(str, taken)) == [f"192.0.2.{n}" for n in range(1, 7)] + ["198.51.100.4", "198.51.100.5"]


def test_a_released_address_rests_while_others_are_free() -> None:
    one = pool("192.0.2.0/29")
    taken = {one.next_free(frozenset(), 0)}
    taken.clear()
    assert one.next_free(taken, 0) == ip_address("192.0.2.2")


def test_overlapping_ranges_hide_no_free_address() -> None:
    one = pool("192.0.2.0/29", "192.0.2.0/28")
    taken: set[object] = set()
    while (address := one.next_free(taken, len(taken))) is not None:
        taken.add(address)
    assert len(taken) == 14


def test_a_search_in_a_large_empty_range_ends_at_once() -> None:
    huge = pool("2001:db8::/32")
    held = {ip_address("2001:db8::1"), ip_address("192.0.2.1")}
    assert huge.next_free(held, len(held)) == ip_address("2001:db8::2")


def test_one_pool_a_family() -> None:
    found = pools([ip_network("192.0.2.0/29"), ip_network("2001:db8::/64")], Family)
    assert ip_address("192.0.2.1") in found[Family.IPV4]
    assert ip_address("2001:db8::1") not in found[Family.IPV4]
    assert not pools([ip_network("192.0.2.0/29")], Family)[Family.IPV6]
    assert pools([ip_network("192.0.2.0/29")], Family)[Family.IPV6].next_free(frozenset(), 0) is None
