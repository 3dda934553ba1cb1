"""Which learned routes go into the kernel, and how: the decision of one prefix, and the plan for all of them.

Pure: learned routes, link facts and node facts in, decisions and plans out.

A route leads through a tunnel when its next hop is an address of another node, and the overlay is for all nodes
(``full``) or the next hop on no subnet of one of this node's own addresses, as configured on a link. It is injected
directly when its next hop is on such a subnet. Every other next hop is out of reach and reported once.

Never injected, whoever announces it: the default route, ranges that no unicast route may have, what would take own pods
or the own subnet away (the own pod CIDR or a part of it; a range that holds an own address and is as narrow as the
subnet around it or narrower). Wider aggregates stay allowed: the kernel prefers the narrower own route. And not through
a tunnel: a range that holds the tunnel's own far end, or the one address of another node; what the tunnels send would
enter a tunnel.
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
from kube_router.workers.router.tunnels import Overlay, overlay
from kube_router.workers.settings import Settings


class Injection(enum.Enum):
    """How a learned route reaches the kernel."""

    NONE = "none"
    DIRECT = "direct"
    TUNNEL = "tunnel"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What decisions depend on besides the route itself; when it changes, every route is decided again.

    ``subnets``: (own Node address, subnet around it on its link), without host-length ones and those on loopback.
    ``overlay``: how this node tunnels, None for not at all.
    """

    subnets: tuple[tuple[IPAddress, IPNetwork], ...] = ()
    pod_cidrs: tuple[IPNetwork, ...] = ()
    families: tuple[Family, ...] = ()
    overlay: Overlay | None = None


class Decision(NamedTuple):
    """What happens to one learned route. ``reason`` says why it is not injected; ``route`` is None then.

    ``remote``: the far end of the tunnel that the route needs; the name of the device is still missing in ``route``.
    """

    injection: Injection
    prefix: Prefix
    route: Route | None
    reason: str = ""
    remote: str = ""


def surroundings(own: NodeFacts, links: Links, settings: Settings) -> Surroundings:
    """Own subnets from the links that carry the Node's addresses, own pod CIDRs, and the overlay."""
    subnets: list[tuple[IPAddress, IPNetwork]] = []
    for address in own.addresses:
        link = links.link_of(address)
        if link is None or link.kind == LOOPBACK:
            continue
        for interface in link.addresses:
            network = interface.network
            if interface.ip == address and network.prefixlen < network.max_prefixlen:
                subnets.append((address, network))
    return Surroundings(tuple(subnets), own.pod_cidrs, settings.families, overlay(own, links, settings))


class Decider:
    """Decides routes in one set of surroundings; next hops, of which there are few, are judged once each.

    ``others``: the addresses of all other nodes, in canonical text.
    """

    def __init__(self, around: Surroundings, others: frozenset[str] = frozenset()) -> None:
        self.around, self.others = around, others
        self._next_hops: dict[str, _NextHop] = {}
        self._pod_cidrs = tuple(map(_range, around.pod_cidrs))
        self._subnets = tuple((int(address), _range(subnet)) for address, subnet in around.subnets)

    def follow(self, others: frozenset[str]) -> frozenset[str]:
        """Take other addresses of other nodes; those that came or went, by which routes must be decided again."""
        moved = self.others ^ others
        self.others = others
        for address in moved:
            self._next_hops.pop(address, None)
        return moved

    def decide(self, prefix: str, next_hop: str) -> Decision:
        """Decide one learned route; bad text of a prefix or next hop is a reason, never an exception."""
        hop = self._next_hops.get(next_hop)
        if hop is None:
            hop = self._next_hops[next_hop] = self._judge(next_hop)
        try:
            network = ipaddress.ip_network(prefix, strict=False)
        except ValueError as error:
            return Decision(Injection.NONE, Prefix(prefix), None, f"not understood: {error}")
        text = str(network)
        canonical = Prefix(prefix if text == prefix else text)  # the same object: there are thousands of them
        reason = self._refusal(network, hop) or hop.reason or self._loop(network, hop)
        if reason or hop.route is None:
            return Decision(Injection.NONE, canonical, None, reason)
        return Decision(Injection.TUNNEL if hop.remote else Injection.DIRECT, canonical, hop.route, "", hop.remote)

    def _judge(self, next_hop: str) -> _NextHop:
        try:
            gateway = ipaddress.ip_address(next_hop)
        except ValueError as error:
            return _NextHop(0, None, f"not understood: {error}")
        text, around = str(gateway), self.around.overlay
        near = any(gateway in subnet and gateway != address for address, subnet in self.around.subnets)
        if around is not None and text in self.others and (around.full or not near):
            route = around.route(text)
            if route is not None:
                return _NextHop(gateway.version, route, remote=text)
            family = Family(gateway.version)
            return _NextHop(gateway.version, None, f"it needs a tunnel, and this node's {family} address is on no link")
        if near:
            return _NextHop(gateway.version, Route(text))
        why = "the overlay is off" if around is None else "it is no address of another node"
        return _NextHop(gateway.version, None, f"next hop {text} is on no subnet of this node's addresses, and {why}")

    def _loop(self, network: IPNetwork, hop: _NextHop) -> str:
        """Why a route may not lead through a tunnel: what tunnels send would follow it."""
        if not hop.remote:
            return ""
        if ipaddress.ip_address(hop.remote) in network:
            return "it holds its own next hop, so its tunnel would lead into itself"
        if network.prefixlen == network.max_prefixlen and str(network.network_address) in self.others:
            return "it is the address of another node, so tunnels to that node would lead into this one"
        return ""

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
    """What is known of a next hop: ``version`` 0 if it is no address; ``route`` None if it cannot be reached.

    ``remote``: the next hop itself, if it is reached through a tunnel.
    """

    version: int
    route: Route | None
    reason: str = ""
    remote: str = ""


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
