"""Which learned routes go into the kernel, and how: the decision of one prefix, and the plan for all of them.

Pure: learned routes, link facts and node facts in, decisions and plans out.

A route is injected directly when its next hop is on a subnet of one of the node's own Node addresses, as configured on
a link. For every other next hop the place of tunnels is kept (`Injection.TUNNEL`); until they are built, such a route
is not injected and its next hop reported once.

Never injected, whoever announces it: the default route, ranges that no unicast route may have, what would take own pods
or the own subnet away (the own pod CIDR or a part of it; a range that holds an own address and is as narrow as the
subnet around it or narrower). Wider aggregates stay allowed: the kernel prefers the narrower own route.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kube_router.workers.linkfacts import LOOPBACK, Links
from kube_router.workers.model import Family, IPAddress, IPNetwork
from kube_router.workers.nodefacts import NodeFacts
from kube_router.workers.routefacts import ActualRoutes, Prefix, Route, RoutePlan


class Injection(enum.Enum):
    """How a learned route reaches the kernel."""

    NONE = "none"
    DIRECT = "direct"
    TUNNEL = "tunnel"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What decisions depend on besides the route itself; when it changes, every route is decided again.

    ``subnets``: (own Node address, subnet around it on its link), without host-length ones and those on loopback.
    """

    subnets: tuple[tuple[IPAddress, IPNetwork], ...] = ()
    pod_cidrs: tuple[IPNetwork, ...] = ()
    families: tuple[Family, ...] = ()


class Decision(NamedTuple):
    """What happens to one learned route. ``reason`` says why it is not injected; ``route`` is None then."""

    injection: Injection
    prefix: Prefix
    route: Route | None
    reason: str = ""


def surroundings(own: NodeFacts, links: Links, families: tuple[Family, ...]) -> Surroundings:
    """Own subnets from the links that carry the Node's addresses, and own pod CIDRs."""
    subnets: list[tuple[IPAddress, IPNetwork]] = []
    for address in own.addresses:
        link = links.link_of(address)
        if link is None or link.kind == LOOPBACK:
            continue
        for interface in link.addresses:
            network = interface.network
            if interface.ip == address and network.prefixlen < network.max_prefixlen:
                subnets.append((address, network))
    return Surroundings(tuple(subnets), own.pod_cidrs, families)


class Decider:
    """Decides routes in one set of surroundings; next hops, of which there are few, are judged once each."""

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self._next_hops: dict[str, _NextHop] = {}
        self._pod_cidrs = tuple(map(_range, around.pod_cidrs))
        self._subnets = tuple((int(address), _range(subnet)) for address, subnet in around.subnets)

    def decide(self, prefix: str, next_hop: str) -> Decision:
        """Decide one learned route; bad text of a prefix or next hop is a reason, never an exception."""
        hop = self._next_hops.get(next_hop)
        if hop is None:
            hop = self._next_hops[next_hop] = self._judge(next_hop)
        try:
            network = ipaddress.ip_network(prefix, strict=False)
        except ValueError as error:
            return Decision(Injection.NONE, Prefix(prefix), None, f"not understood: {error}")
        canonical = Prefix(str(network))
        reason = self._refusal(network, hop) or hop.reason
        # Injection.TUNNEL belongs here, by --enable-overlay and --overlay-type.
        if reason or hop.route is None:
            return Decision(Injection.NONE, canonical, None, reason)
        return Decision(Injection.DIRECT, canonical, hop.route)

    def _judge(self, next_hop: str) -> _NextHop:
        try:
            gateway = ipaddress.ip_address(next_hop)
        except ValueError as error:
            return _NextHop(0, None, f"not understood: {error}")
        if any(gateway in subnet and gateway != address for address, subnet in self.around.subnets):
            return _NextHop(gateway.version, Route(str(gateway)))
        reason = f"next hop {gateway} is on no subnet of this node's addresses, and tunnels are not built yet"
        return _NextHop(gateway.version, None, reason)

    def _refusal(self, network: IPNetwork, hop: _NextHop) -> str:
        version, prefix_length = network.version, network.prefixlen
        if hop.version == 0:
            return hop.reason
        if version != hop.version:
            return "its next hop is of another family"
        if version not in self.around.families:
            return f"{Family(version)} is not enabled"
        if prefix_length == 0:
            return "a default route is never injected"
        first = int(network.network_address)
        if any(each.holds(version, first, prefix_length) for each in _NEVER):
            return "not a range for unicast routes"
        if any(each.holds(version, first, prefix_length) for each in self._pod_cidrs):
            return "it is inside this node's own pod CIDR"
        size = 1 << (network.max_prefixlen - prefix_length)
        for address, subnet in self._subnets:
            if first <= address < first + size and subnet.holds(version, first, prefix_length):
                return "it would take this node's own address away"
        return ""


class _NextHop(NamedTuple):
    """What is known of a next hop: ``version`` 0 if it is no address; ``route`` None if it cannot be reached."""

    version: int
    route: Route | None
    reason: str = ""


class _Range(NamedTuple):
    """A network as numbers: comparing thousands of prefixes with `ipaddress` objects takes most of a second."""

    version: int
    prefix_length: int
    shift: int
    value: int

    def holds(self, version: int, first: int, prefix_length: int) -> bool:
        """Whether the prefix that begins at ``first`` is this range or a part of it."""
        return version == self.version and prefix_length >= self.prefix_length and first >> self.shift == self.value


def _range(network: IPNetwork) -> _Range:
    shift = network.max_prefixlen - network.prefixlen
    return _Range(network.version, network.prefixlen, shift, int(network.network_address) >> shift)


_NEVER = tuple(
    _range(ipaddress.ip_network(text))
    for text in ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/127", "fe80::/10", "ff00::/8")
)


def decide(prefix: str, next_hop: str, around: Surroundings) -> Decision:
    """One decision by itself: see `Decider.decide`."""
    return Decider(around).decide(prefix, next_hop)


def plan_routes(
    actual: ActualRoutes, updates: Mapping[Prefix, Route], deletes: Iterable[Prefix], *, hold: bool = False
) -> RoutePlan:
    """Steps for what waits: routes to write and prefixes to remove (`DeltaTracker`); ``hold``: nothing is removed.

    Where somebody else has a route for the same destination, ours yields: none is written, ours is removed.
    """
    writes = [(prefix, route) for prefix, route in updates.items() if prefix not in actual.foreign]
    yielding = sorted(actual.foreign & actual.ours.keys())
    return RoutePlan(
        add=tuple(step for step in writes if step[0] not in actual.ours),
        replace=tuple(step for step in writes if step[0] in actual.ours),
        delete=() if hold else tuple(dict.fromkeys([*yielding, *deletes])),
        strays=() if hold else actual.strays,
    )


def refusals(decisions: Iterable[Decision]) -> list[str]:
    """One line a reason, with the number of routes and the first of them."""
    grouped: dict[str, list[Prefix]] = {}
    for decision in decisions:
        if decision.route is None:
            grouped.setdefault(decision.reason, []).append(decision.prefix)
    return [_refusal_line(reason, sorted(prefixes)) for reason, prefixes in sorted(grouped.items())]


def _refusal_line(reason: str, prefixes: list[Prefix]) -> str:
    what = f"route {prefixes[0]}" if len(prefixes) == 1 else f"{len(prefixes)} routes, first {prefixes[0]}"
    return f"{what}: not injected: {reason}"
