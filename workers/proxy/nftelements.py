"""A frontend as elements of the table's maps and sets.

Pure: a forwarding and its endpoints in, elements out. What an element says hangs on its own frontend alone, so what a
change comes to is the difference between what a frontend was and what it is.
"""

from __future__ import annotations

import functools
import ipaddress
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kube_router.workers.model import Family
from kube_router.workers.nfttypes import Element
from kube_router.workers.proxy import maglev
from kube_router.workers.proxy import nftlayout as layout
from kube_router.workers.proxy.model import Endpoint, Forwarding, Frontend, Scheduler
from kube_router.workers.proxy.nftlayout import Made, Pick, Remember

_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}
_BY_PORT = 2
"""Scheduler flag: the client's port counts as well."""

Pack = Callable[[str], bytes]
"""An address as the kernel holds it."""
Placed = tuple[str, bytes, bytes | str]
"""An element with the name of its set."""


@dataclass(frozen=True, slots=True)
class Programmed:
    """A frontend with the endpoints that it has, for who is inside and for all others."""

    forwarding: Forwarding
    inside: tuple[Endpoint, ...]
    outside: tuple[Endpoint, ...]


class Picked(NamedTuple):
    """A chain that picks, and the endpoint for each number that it can come to."""

    pick: Pick
    endpoints: tuple[Endpoint, ...]


def picked(frontend: Frontend, endpoints: tuple[Endpoint, ...], forwarding: Forwarding, *, inside: bool) -> Picked:
    """How one of ``endpoints``, at least one, is chosen."""
    balancing = forwarding.balancing
    sticky, node_port = balancing.affinity > 0, frontend.is_node_port
    scheduler = balancing.scheduler
    if scheduler is Scheduler.DESTINATION_HASH:
        endpoints = (maglev.choice(endpoints, frontend.address),)
    if len(endpoints) > 1 and scheduler in (Scheduler.SOURCE_HASH, Scheduler.MAGLEV_HASH):
        buckets = tuple(endpoints[index] for index in maglev.table(endpoints))
        by = "source-port" if _BY_PORT in balancing.flags else "source"
        return Picked(Pick(by, len(buckets), 0, sticky, inside, node_port), buckets)
    count = len(endpoints)
    lane = 0 if count == 1 else _lane(frontend)
    return Picked(Pick("turn", count, lane, sticky, inside, node_port), endpoints)


def _lane(frontend: Frontend) -> int:
    """Which of the chains of one count; the same after every restart. Neighbours have different ones."""
    return sum(frontend.address.encode(), frontend.port) % layout.LANES


def chains(frontend: Frontend, what: Programmed) -> Iterator[Made]:
    """The chains that a frontend's elements lead to."""
    if what.outside:
        yield picked(frontend, what.outside, what.forwarding, inside=False).pick
    if what.inside and what.inside != what.outside:
        yield picked(frontend, what.inside, what.forwarding, inside=True).pick
    if what.forwarding.balancing.affinity and (what.inside or what.outside):
        yield Remember(what.forwarding.balancing.affinity)


def service_key(frontend: Frontend, pack: Pack) -> bytes:
    """What packets for a frontend are looked up by; of a node port without the address."""
    port = struct.pack("!BxxxHxx", _NUMBERS[frontend.protocol], frontend.port)
    return port if frontend.is_node_port else pack(frontend.address) + port


def target(endpoint: Endpoint, pack: Pack) -> bytes:
    """Where packets are sent."""
    return pack(endpoint.address) + _port(endpoint.port)


def elements(frontend: Frontend, what: Programmed, pack: Pack) -> Iterator[Placed]:
    """What is of this frontend alone."""
    key = service_key(frontend, pack)
    if frontend.is_node_port:
        outside, inside, targets = layout.NODE_PORTS, layout.NODE_PORTS_INSIDE, layout.NODE_PORT_ENDPOINTS
        sticky, closed = layout.STICKY_NODE_PORTS, layout.CLOSED_NODE_PORTS
    else:
        outside, inside, targets = layout.SERVICES, layout.SERVICES_INSIDE, layout.ENDPOINTS
        sticky, closed = layout.STICKY, layout.CLOSED
    forwarding = what.forwarding
    if what.outside:
        yield from _targets(picked(frontend, what.outside, forwarding, inside=False), key, outside, targets, pack)
    if what.inside and what.inside != what.outside:
        yield from _targets(picked(frontend, what.inside, forwarding, inside=True), key, inside, targets, pack)
    if not what.outside or not what.inside:
        yield closed, key, b""
    if forwarding.balancing.affinity and (what.inside or what.outside):
        yield sticky, key, Remember(forwarding.balancing.affinity).chain
    if forwarding.sources is not None and not frontend.is_node_port:
        yield layout.RESTRICTED, key, b""
        for source in forwarding.sources:
            network = ipaddress.ip_network(source)
            yield layout.SOURCES, key + network[0].packed, key + network[-1].packed


def _targets(found: Picked, key: bytes, dispatch: str, targets: str, pack: Pack) -> Iterator[Placed]:
    pick, endpoints = found
    number = layout.INSIDE_OFFSET if pick.inside else 0
    for endpoint in endpoints:
        yield targets, key + _number(number), target(endpoint, pack)
        number += 1
    yield dispatch, key, _chain_name(pick)


def shared(frontend: Frontend, what: Programmed, pack: Pack, nodes: frozenset[str]) -> Iterator[Placed]:
    """What others may have as well; ``nodes``: addresses of nodes, which are never a Service's as a whole."""
    if frontend.is_node_port or frontend.address in nodes:
        port = struct.pack("!BxxxHxx", _NUMBERS[frontend.protocol], frontend.port)
        yield layout.SERVICE_PORTS, port, b""
    if not frontend.is_node_port:
        address = pack(frontend.address)
        yield layout.VIPS, address, b""
        if frontend.address not in nodes:
            yield layout.OWN_VIPS, address, b""
    for endpoint in {*what.inside, *what.outside}:
        if endpoint.local:
            address = pack(endpoint.address)
            yield layout.HAIRPIN, address + address, b""


def unable(forwarding: Forwarding) -> Iterator[str]:
    """What a forwarding asks for that cannot be said here, and what it gets."""
    if forwarding.balancing.scheduler is Scheduler.LEAST_CONNECTIONS:
        yield "scheduler lc needs IPVS; connections go to its endpoints by turns"
    if forwarding.dsr:
        yield "direct server return needs IPVS; its addresses are translated like all others"


def networks(family: Family, prefixes: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]) -> list[Element]:
    """Networks of a family as elements of an interval set, none within another."""
    of_family = [item for item in prefixes if item.version == family]
    return [(item[0].packed, item[-1].packed) for item in ipaddress.collapse_addresses(of_family)]  # type: ignore[type-var]


@functools.lru_cache(1024)
def _number(number: int) -> bytes:
    return struct.pack("=I", number)


@functools.lru_cache(1024)
def _port(port: int) -> bytes:
    return struct.pack("!Hxx", port)


@functools.lru_cache(1024)
def _chain_name(pick: Pick) -> str:
    return pick.chain
