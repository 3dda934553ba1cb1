"""What nobody may announce to us, beside Service addresses and the operator's own list: the ranges that are ours.

Pure: node facts and service ranges in, `Refused` out.

Protected are the own pod CIDRs, the own node addresses and the cluster's service ranges. A route to one of them or to a
part of one would take traffic away that belongs here: it is refused, whoever announces it. A route to a shorter prefix
that contains one of them (*covering*) takes nothing where the kernel has a narrower route, but everything where it has
none, as for services. So it is refused too, unless ``--bgp-accept-covering-prefixes`` allows it.

What stays possible: the pod CIDRs and the subnets of other nodes, wherever they lie. A service range that shares
addresses with any node's pod CIDR or address is no range of its own (``--service-external-ip-range 10.0.0.0/8`` is
meant as "anything"): it is not protected as a whole, which is told. The Service addresses that are announced still are.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kube_router.workers.model import IPNetwork
from kube_router.workers.nodefacts import NodeFacts, Problem
from kube_router.workers.router.bgpstate import PrefixRange

OVERLAPPING_RANGE = "OverlappingServiceRange"


@dataclass(frozen=True, slots=True)
class Refused:
    """What no peer may announce. ``custom``: the operator's list. ``protected``: ranges that are ours.

    ``covering``: whether prefixes that contain a protected range are refused as well.
    """

    custom: tuple[IPNetwork, ...] = ()
    protected: tuple[IPNetwork, ...] = ()
    covering: bool = True


def protected_ranges(
    own: NodeFacts, nodes: Iterable[NodeFacts], service_ranges: Sequence[tuple[str, str]], problems: list[Problem]
) -> tuple[IPNetwork, ...]:
    """The ranges that are ours; ``service_ranges``: (flag, CIDR). Those that cannot be protected are ``problems``."""
    taken = list(_spans(nodes)) if service_ranges else []
    found: dict[IPNetwork, None] = dict.fromkeys((*own.pod_cidrs, *map(ipaddress.ip_network, own.addresses)))
    for flag, text in service_ranges:
        network = ipaddress.ip_network(text)
        version, first, last = network.version, int(network.network_address), int(network.broadcast_address)
        node = next((name for v, low, high, name in taken if v == version and low <= last and first <= high), None)
        if node is None:
            found[network] = None
            continue
        rule = f"flag --{flag}: {network} shares addresses with node {node}; routes into it are accepted"
        problems.append(Problem(OVERLAPPING_RANGE, rule))
    return tuple(found)


def _spans(nodes: Iterable[NodeFacts]) -> Iterator[tuple[int, int, int, str]]:
    """(version, first, last, node) of all node addresses and pod CIDRs: numbers, for a thousand nodes."""
    for node in nodes:
        for address in node.addresses:
            yield address.version, int(address), int(address), node.name
        for cidr in node.pod_cidrs:
            first = int(cidr.network_address)
            yield cidr.version, first, first + (1 << cidr.max_prefixlen - cidr.prefixlen) - 1, node.name


def inside(network: IPNetwork) -> PrefixRange:
    """``network`` and every part of it."""
    return PrefixRange(str(network), network.prefixlen, network.max_prefixlen)


def around(networks: Iterable[IPNetwork]) -> Iterator[PrefixRange]:
    """Every shorter prefix that contains one of ``networks``, by itself; not the default route.

    One by one, and not as "0.0.0.0/0 up to that length", which would hold foreign ranges too: 127 at most for one
    network. They need a set of their own: of the members that contain a prefix gobgpd 3.x asks only the longest.
    """
    seen: set[tuple[int, int, int]] = set()
    for network in networks:
        value = int(network.network_address)
        for length in range(network.prefixlen - 1, 0, -1):
            shift = network.max_prefixlen - length
            key = (network.version, length, value >> shift)
            if key in seen:
                break
            seen.add(key)
            yield PrefixRange(str(network.supernet(new_prefix=length)), length, length)
