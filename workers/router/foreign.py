"""Foreign changes: which parts of the router's kernel state somebody else may have altered.

Touches the kernel, by listening only. Every event is judged by what it names, so that the churn of other programs'
routes, rules and pods costs a look at the event and nothing else. What cannot be judged (lost messages) makes every
part suspect.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

from kube_router.workers.kernel.links import AddressEvent, LinkEvent
from kube_router.workers.kernel.monitor import (
    Lost,
    NftAddition,
    NftListener,
    NftRemoval,
    RouteEvent,
    RouteListener,
    RouteListenerEvent,
    Tick,
)
from kube_router.workers.kernel.routes import MAIN_TABLE, KernelRoute
from kube_router.workers.linkfacts import Link
from kube_router.workers.model import IPAddress
from kube_router.workers.router.egress import FORWARD, POSTROUTING


@dataclass(slots=True)
class Suspects:
    """The parts that must be read again before they are compared."""

    links: bool = False
    routes: bool = False
    sets: bool = False
    rules: bool = False

    def all(self) -> None:
        """Trust nothing."""
        self.links = self.routes = self.sets = self.rules = True

    def __bool__(self) -> bool:
        return self.links or self.routes or self.sets or self.rules


class ForeignChanges:
    """Listeners, and the suspicion that they gathered since it was last taken.

    ``route_concerns`` judges a route (and whether it went); ``sets_differ`` and ``rules_differ`` are the cheap checks
    of what has no events, called once a second.
    """

    def __init__(
        self,
        own_sockets: Container[int],
        route_concerns: Callable[[KernelRoute, bool], bool],
        sets_differ: Callable[[], bool],
        rules_differ: Callable[[], bool],
    ) -> None:
        self._route_concerns = route_concerns
        self._sets_differ, self._rules_differ = sets_differ, rules_differ
        self._suspects = Suspects(True, True, True, True)
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
        for event in self._routes.events():
            if isinstance(event, Lost):
                self._suspects.links = self._suspects.routes = True
            elif isinstance(event, RouteEvent):
                if self._route_matters(event):
                    self._suspects.routes = True
            elif self._link_matters(event):
                self._suspects.links = True
        return bool(self._suspects)

    def _route_matters(self, event: RouteEvent) -> bool:
        route = event.route
        return route.table == MAIN_TABLE and not route.cloned and self._route_concerns(route, event.gone)

    def _link_matters(self, event: RouteListenerEvent) -> bool:
        if isinstance(event, AddressEvent):
            return event.address.ip in self._addresses or event.index in self._links
        if not isinstance(event, LinkEvent):
            return False
        known = self._links.get(event.link.index)
        if known is None:
            return False
        return event.gone or (known.name, known.up) != (event.link.name, event.link.up)

    def _on_nft(self) -> bool:
        for event in self._nft.events():
            if isinstance(event, Lost) or _of_our_chains(event):
                self._suspects.rules = True
        return bool(self._suspects)

    def _on_tick(self) -> bool:
        if self._tick.elapsed():
            self._suspects.sets = self._suspects.sets or self._sets_differ()
            self._suspects.rules = self._suspects.rules or self._rules_differ()
        return bool(self._suspects)


def _of_our_chains(removal: NftRemoval | NftAddition) -> bool:
    return removal.family is not None and any(
        removal.table == table and removal.chain in ("", chain) for table, chain in (FORWARD, POSTROUTING)
    )
