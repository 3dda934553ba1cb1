"""Blocks: the union of networks with holes, as networks without holes.

Pure: `disjoint` and what it needs. No kernel set can say what a NetworkPolicy means by ``except``: in one set with all
blocks of a rule, the hole of one block also hides what its neighbour allows (S4). So the holes are taken out here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from kube_router.workers.model import IPNetwork

_Span = tuple[int, int]
"""Addresses from the first to the last, both in it."""


def disjoint(blocks: Iterable[tuple[IPNetwork, Iterable[IPNetwork]]], most: int | None = None) -> tuple[IPNetwork, ...]:
    """The addresses that any block holds without its own excepts: as few networks as there can be, disjoint and sorted.

    An except reaches as far as its block; outside it hides nothing. /0 stays one network. Raises ValueError for two
    families in one call, and as soon as there would be more than ``most`` networks.
    """
    spans: list[_Span] = []
    version = 0
    for block, excepted in blocks:
        holes = tuple(excepted)
        if any(network.version != (version or block.version) for network in (block, *holes)):
            raise ValueError(f"{block} is with networks of the other family")
        version = block.version
        spans.extend(_without(_span(block), sorted(map(_span, holes))))
    found: list[IPNetwork] = []
    for span in _merged(sorted(spans)):
        for network in _networks(span, version):
            if most is not None and len(found) == most:
                raise ValueError(f"more than {most} networks")
            found.append(network)
    return tuple(found)


def _span(network: IPNetwork) -> _Span:
    first = int(network.network_address)
    return first, first + (1 << (network.max_prefixlen - network.prefixlen)) - 1


def _without(span: _Span, holes: Iterable[_Span]) -> Iterator[_Span]:
    """What is left of a span between sorted holes, which may overlap."""
    first, last = span
    for hole_first, hole_last in holes:
        if hole_first > last:
            break
        if hole_first > first:
            yield first, hole_first - 1
        first = max(first, hole_last + 1)
    if first <= last:
        yield first, last


def _merged(spans: Iterable[_Span]) -> Iterator[_Span]:
    """Sorted spans, those that touch or overlap as one."""
    held: _Span | None = None
    for first, last in spans:
        if held is not None and first <= held[1] + 1:
            held = held[0], max(held[1], last)
            continue
        if held is not None:
            yield held
        held = first, last
    if held is not None:
        yield held


def _networks(span: _Span, version: int) -> Iterator[IPNetwork]:
    """The networks that make up a span: each as large as its start and the end allow."""
    first, last = span
    bits, network = (32, ipaddress.IPv4Network) if version == 4 else (128, ipaddress.IPv6Network)
    while first <= last:
        aligned = (first & -first).bit_length() - 1 if first else bits
        host_bits = min(aligned, (last - first + 1).bit_length() - 1)
        yield network((first, bits - host_bits))
        first += 1 << host_bits
