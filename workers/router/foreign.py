"""Foreign changes: which parts of the router's kernel state somebody else may have altered.

Touches the kernel, by listening only. Every event is judged by what it names, so that the churn of other programs'
routes, rules and pods costs a look at the event and nothing else. What cannot be judged (lost messages) makes every
part suspect.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Protocol

from kube_router.workers.kernel.links import AddressEvent, LinkEvent
from kube_router.workers.kernel.monitor import (
    Lost,
    NftAddition,
    NftListener,
    NftRemoval,
    RouteEvent,
    RouteListener,
    RouteListenerEvent,
    RuleEvent,
    Tick,
)
from kube_router.workers.kernel.routes import MAIN_TABLE, KernelRoute
from kube_router.workers.kernel.tunnels import TunnelEvent
from kube_router.workers.linkfacts import Link
from kube_router.workers.model import IPAddress
from kube_router.workers.router.egress import FORWARD, POSTROUTING
from kube_router.workers.tunnelfacts import OVERLAY_TABLE


@dataclass(slots=True)
class Suspects:
    """The parts that must be read again before they are compared."""

    links: bool = False
    routes: bool = False
    sets: bool = False
    rules: bool = False
    overlay: bool = False

    def all(self) -> None:
        """Trust nothing."""
        self.links = self.routes = self.sets = self.rules = self.overlay = True

    def __bool__(self) -> bool:
        return self.links or self.routes or self.sets or self.rules or self.overlay


class OverlayConcerns(Protocol):
    """Who judges what happens to the overlay; `ports_differ` is a check that is called once a second."""

    def tunnel_matters(self, event: TunnelEvent) -> bool: ...

    def host_matters(self, route: KernelRoute, gone: bool) -> bool: ...

    def rule_matters(self, event: RuleEvent) -> bool: ...

    def ports_differ(self) -> bool: ...


class ForeignChanges:
    """Listeners, and the suspicion that they gathered since it was last taken.

    ``route_concerns`` judges a route (and whether it went); ``sets_differ`` and ``rules_differ`` are the cheap checks
    of what has no events, called once a second.
    """

    def __init__(
        self,
        own_sockets: Container[int],
        route_concerns: Callable[[KernelRoute, bool], bool],
        overlay: OverlayConcerns,
        sets_differ: Callable[[], bool],
        rules_differ: Callable[[], bool],
    ) -> None:
        self._route_concerns, self._overlay = route_concerns, overlay
        self._sets_differ, self._rules_differ = sets_differ, rules_differ
        self._suspects = Suspects(True, True, True, True, True)
        self._links: dict[int, Link] = {}
        self._addresses: frozenset[IPAddress] = frozenset()
        self._routes, self._nft, self._tick = RouteListener(own_sockets), NftListener(), Tick()

    def close(self) -> None:
        """Stop listening."""
        for listener in (self._routes, self._nft, self._tick):
            listener.close()

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """Descriptors to wait on, each with the function that reads it and says whether something is suspect."""
        return {
            self._routes.fileno(): self._on_routes,
            self._nft.fileno(): self._on_nft,
            self._tick.fileno(): self._on_tick,
        }

    def follow(self, links: Mapping[int, Link], addresses: frozenset[IPAddress]) -> None:
        """Care for these links, as last seen, and for these addresses on any link."""
        self._links, self._addresses = dict(links), addresses

    def suspect_all(self) -> None:
        """Trust nothing from here on."""
        self._suspects.all()

    def take(self) -> Suspects:
        """The suspicion so far; starts anew."""
        taken, self._suspects = self._suspects, Suspects()
        return taken

    def _on_routes(self) -> bool:
        tunnels: dict[str, TunnelEvent] = {}
        for event in self._routes.events():
            if isinstance(event, Lost):
                self._suspects.links = self._suspects.routes = self._suspects.overlay = True
            elif isinstance(event, RouteEvent):
                self._on_route(event)
            elif isinstance(event, TunnelEvent):
                tunnels[event.name] = event  # the last word counts: our own writes pass through states in between
            elif isinstance(event, RuleEvent):
                self._suspects.overlay = self._suspects.overlay or self._overlay.rule_matters(event)
            elif self._link_matters(event):
                self._suspects.links = True
        for tunnel in tunnels.values():
            if self._overlay.tunnel_matters(tunnel):
                # IPv4 routes vanish with their device, or its going down, without an event of their own.
                self._suspects.overlay = self._suspects.routes = True
        return bool(self._suspects)

    def _on_route(self, event: RouteEvent) -> None:
        route = event.route
        if route.cloned:
            return
        if route.table == MAIN_TABLE and self._route_concerns(route, event.gone):
            self._suspects.routes = True
        elif route.table == OVERLAY_TABLE and self._overlay.host_matters(route, event.gone):
            self._suspects.overlay = True

    def _link_matters(self, event: RouteListenerEvent) -> bool:
        if isinstance(event, AddressEvent):
            return event.address.ip in self._addresses or event.index in self._links
        if not isinstance(event, LinkEvent):
            return False
        known = self._links.get(event.link.index)
        if known is None:
            return False
        link = event.link
        return event.gone or (known.name, known.up, known.mtu) != (link.name, link.up, link.mtu)

    def _on_nft(self) -> bool:
        for event in self._nft.events():
            if isinstance(event, Lost) or _of_our_chains(event):
                self._suspects.rules = True
        return bool(self._suspects)

    def _on_tick(self) -> bool:
        if self._tick.elapsed():
            self._suspects.sets = self._suspects.sets or self._sets_differ()
            self._suspects.rules = self._suspects.rules or self._rules_differ()
            self._suspects.overlay = self._suspects.overlay or self._overlay.ports_differ()
        return bool(self._suspects)


def _of_our_chains(removal: NftRemoval | NftAddition) -> bool:
    return removal.family is not None and any(
        removal.table == table and removal.chain in ("", chain) for table, chain in (FORWARD, POSTROUTING)
    )
