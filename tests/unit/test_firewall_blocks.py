"""Unions of networks with holes: the cases that NetworkPolicy writes, and what they cost."""

from __future__ import annotations

import ipaddress
import random
import time

import pytest

from kube_router.workers.firewall.blocks import disjoint
from kube_router.workers.model import Family, IPNetwork


def union(*blocks: str, most: int | None = None) -> list[str]:
    """Each block as ``10.0.0.0/8 - 10.1.0.0/16 10.2.0.0/16``."""
    parsed = []
    for block in blocks:
        cidr, _, excepted = block.partition(" - ")
        parsed.append((ipaddress.ip_network(cidr), [ipaddress.ip_network(text) for text in excepted.split()]))
    return [str(network) for network in disjoint(parsed, most)]


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([], []),
        (["10.0.0.1/32"], ["10.0.0.1/32"]),
        (["10.0.0.0/8", "10.1.0.0/16"], ["10.0.0.0/8"]),
        (["10.0.1.0/24", "10.0.0.0/24"], ["10.0.0.0/23"]),  # neighbours become one
        (["10.0.2.0/24", "10.0.1.0/24"], ["10.0.1.0/24", "10.0.2.0/24"]),  # these two are none
        (["10.0.0.0/30 - 10.0.0.1/32"], ["10.0.0.0/32", "10.0.0.2/31"]),
        (["10.0.0.0/30 - 10.0.0.0/31 10.0.0.1/32"], ["10.0.0.2/31"]),  # holes overlap
        (["10.0.0.0/31 - 10.0.0.0/32 10.0.0.1/32"], []),
        (["10.0.0.0/24 - 10.0.0.0/8"], []),
        (["10.0.0.0/24 - 192.168.0.0/16"], ["10.0.0.0/24"]),
        (["10.0.0.0/30 - 10.0.0.1/32", "10.0.0.0/31"], ["10.0.0.0/30"]),  # a hole is its own block's only
        (["0.0.0.0/0"], ["0.0.0.0/0"]),
        (["0.0.0.0/1", "128.0.0.0/1"], ["0.0.0.0/0"]),
        (["0.0.0.0/0 - 0.0.0.0/1"], ["128.0.0.0/1"]),
        (["255.255.255.254/31 - 255.255.255.255/32"], ["255.255.255.254/32"]),
        (["::/0"], ["::/0"]),
        (["::/0 - 8000::/1"], ["::/1"]),
        (["fd00::/126 - fd00::1/128", "fd00::3/128"], ["fd00::/128", "fd00::2/127"]),
        (["ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe/127"], ["ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe/127"]),
    ],
)
def test_union(blocks: list[str], expected: list[str]) -> None:
    assert union(*blocks) == expected


@pytest.mark.parametrize("blocks", [["10.0.0.0/8", "fd00::/8"], ["10.0.0.0/8 - fd00::/8"], ["fd00::/8 - 10.0.0.0/8"]])
def test_families_do_not_mix(blocks: list[str]) -> None:
    with pytest.raises(ValueError, match="is with networks of the other family"):
        union(*blocks)


def test_an_answer_that_is_too_long_is_refused_before_it_is_built() -> None:
    assert len(union("10.0.0.0/8 - 10.0.0.0/32", most=24)) == 24
    with pytest.raises(ValueError, match=r"^more than 23 networks$"):
        union("10.0.0.0/8 - 10.0.0.0/32", most=23)


@pytest.mark.parametrize("family", list(Family), ids=str)
def test_five_thousand_blocks_take_half_a_second_at_most(family: Family) -> None:
    choice = random.Random(4)
    network = ipaddress.IPv4Network if family is Family.IPV4 else ipaddress.IPv6Network
    blocks: list[tuple[IPNetwork, list[IPNetwork]]] = []
    for _ in range(5000):
        shift = choice.randrange(4, 16)
        base = choice.getrandbits(family.bits - shift) << shift
        hole: IPNetwork = network((base, family.bits))
        blocks.append((network((base, family.bits - shift)), [hole]))
    start = time.process_time()
    result = disjoint(blocks)
    assert time.process_time() - start < 0.5
    assert len(result) > 5000
