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

_NEVER = tuple(
    map(
        ipaddress.ip_network,
        ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/127", "fe80::/10", "ff00::/8"),
    )
)


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


def decide(prefix: str, next_hop: str, around: Surroundings) -> Decision:
    """Decide one learned route; bad text of a prefix or next hop is a reason, never an exception."""
    try:
        network = ipaddress.ip_network(prefix, strict=False)
        gateway = ipaddress.ip_address(next_hop)
    except ValueError as error:
        return Decision(Injection.NONE, Prefix(prefix), None, f"not understood: {error}")
    canonical = Prefix(str(network))
    reason = _refusal(network, gateway, around)
    if reason:
        return Decision(Injection.NONE, canonical, None, reason)
    if on_own_subnet(gateway, around):
        return Decision(Injection.DIRECT, canonical, Route(str(gateway)))
    # Injection.TUNNEL belongs here, by --enable-overlay and --overlay-type.
    return Decision(
        Injection.NONE,
        canonical,
        None,
        f"next hop {gateway} is on no subnet of this node's addresses, and tunnels are not built yet",
    )


def on_own_subnet(gateway: IPAddress, around: Surroundings) -> bool:
    """Whether a next hop can be reached without a router; an own address is no next hop."""
    return any(gateway in subnet and gateway != address for address, subnet in around.subnets)


def _refusal(network: IPNetwork, gateway: IPAddress, around: Surroundings) -> str:
    if network.version != gateway.version:
        return f"next hop {gateway} is of another family"
    if network.version not in around.families:
        return f"{Family(network.version)} is not enabled"
    if network.prefixlen == 0:
        return "a default route is never injected"
    if any(_within(network, never) for never in _NEVER):
        return "not a range for unicast routes"
    for cidr in around.pod_cidrs:
        if _within(network, cidr):
            return f"it is inside this node's own pod CIDR {cidr}"
    for address, subnet in around.subnets:
        if address in network and _within(network, subnet):
            return f"it would take this node's own address {address} away"
    return ""


def _within(network: IPNetwork, other: IPNetwork) -> bool:
    return network.version == other.version and network.subnet_of(other)  # type: ignore[arg-type]


def desired_routes(learned: Mapping[str, str], around: Surroundings) -> dict[str, Decision]:
    """The decision of every learned route, by the prefix as it was learned."""
    return {prefix: decide(prefix, next_hop, around) for prefix, next_hop in learned.items()}


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
