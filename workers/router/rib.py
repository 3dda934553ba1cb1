"""The routes learned from peers: best paths by prefix, and which of them changed since someone last asked.

Pure: events in, a mapping out. There is no private truth here: a new watch begins with the whole table
(`Rib.restart`), and what it does not confirm is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple


class RouteEvent(NamedTuple):
    """The best path of ``prefix`` changed. ``next_hop`` None: there is none. ``local``: it is (or was) our own."""

    prefix: str
    next_hop: str | None
    local: bool


class Rib:
    """Learned best paths, next hop by prefix, with coalesced changes."""

    def __init__(self) -> None:
        self._routes: dict[str, str] = {}
        self._local: dict[str, str] = {}
        self._changed: set[str] = set()
        self._unconfirmed: set[str] | None = None

    @property
    def routes(self) -> Mapping[str, str]:
        """A live, read-only view: next hop by prefix."""
        return MappingProxyType(self._routes)

    @property
    def local(self) -> Mapping[str, str]:
        """The paths that originate here, next hop by prefix, as far as they are best; a live, read-only view."""
        return MappingProxyType(self._local)

    def restart(self) -> None:
        """A new watch begins: all that is held stays until `confirmed`, and goes then unless the watch brought it."""
        self._unconfirmed = set(self._routes)
        self._local.clear()

    def confirmed(self) -> None:
        """The watch has delivered the whole table."""
        for prefix in self._unconfirmed or ():
            del self._routes[prefix]
            self._changed.add(prefix)
        self._unconfirmed = None

    def apply(self, events: Iterable[RouteEvent]) -> int:
        """Take best-path events in order; returns how many there were. An event that changes nothing marks nothing."""
        count = 0
        routes, unconfirmed = self._routes, self._unconfirmed
        for prefix, next_hop, local in events:
            count += 1
            if unconfirmed is not None:
                unconfirmed.discard(prefix)
            if local and next_hop is not None:
                self._local[prefix] = next_hop
            else:
                self._local.pop(prefix, None)
            if next_hop is None or local:
                if routes.pop(prefix, None) is not None:
                    self._changed.add(prefix)
            elif routes.get(prefix) != next_hop:
                routes[prefix] = next_hop
                self._changed.add(prefix)
        return count

    def take(self) -> frozenset[str]:
        """The prefixes that changed since the last call."""
        changed = frozenset(self._changed)
        self._changed.clear()
        return changed
