"""The injected routes: decides what is learned, and keeps the main table to it.

Drives a route driver (a parameter); reads neither clock nor cluster itself. One changed prefix costs one decision and
one netlink message; the table is listed only when asked to `observe`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from kube_router.workers.kernel.routes import AppliedRoutes, KernelRoute, describe
from kube_router.workers.model import Failure
from kube_router.workers.routefacts import Route
from kube_router.workers.router.repairs import Repairs
from kube_router.workers.router.routes import Decider, Decision, Surroundings, refusals
from kube_router.workers.router.routetable import Routes, RouteTable
from kube_router.workers.router.tunnels import overlay_host


class Tunnels(Protocol):
    """Who gives tunnels their names: `claim` one that a route needs, `release` it when the last such route is gone."""

    def claim(self, remote: str) -> str: ...

    def release(self, remote: str) -> None: ...


@dataclass(frozen=True, slots=True)
class SyncedRoutes:
    """What one call came to."""

    added: int = 0
    removed: int = 0
    synced: int = 0
    not_injected: int = 0
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()


class RouteSync:
    """The routes of one node: `decide`, and then `apply`, so that tunnels can be made in between."""

    def __init__(self, driver: Routes, tunnels: Tunnels | None = None, repairs: Repairs | None = None) -> None:
        self._tunnels = tunnels
        self._users: Counter[str] = Counter()
        """Routes by the tunnel that they need, told by its far end."""
        self._decider = Decider(Surroundings())
        self._next_hops: dict[str, str] = {}
        self._decisions: dict[str, Decision] = {}
        self._table = RouteTable(driver, repairs)

    def sync(
        self,
        learned: Mapping[str, str],
        changed: Iterable[str] | None,
        around: Surroundings,
        *,
        observe: bool = False,
        hold_deletions: bool = False,
    ) -> SyncedRoutes:
        """`decide` and `apply` at once."""
        self.decide(learned, changed, around)
        return self.apply(observe=observe, hold_deletions=hold_deletions)

    def decide(
        self,
        learned: Mapping[str, str],
        changed: Iterable[str] | None,
        around: Surroundings,
        others: frozenset[str] = frozenset(),
    ) -> None:
        """Want ``learned`` (prefix → next hop); ``changed``: the prefixes that differ from the last call, None: all.

        ``others``: the addresses of all other nodes.
        """
        if around != self._decider.around:
            self._decider = Decider(around, others)
            self._next_hops.clear()
            changed = None
        elif others != self._decider.others:
            moved = self._decider.follow(others)
            concerned = {prefix for prefix, hop in self._next_hops.items() if hop in moved}
            concerned |= {str(overlay_host(address)) for address in moved} & self._next_hops.keys()
            for prefix in concerned:
                del self._next_hops[prefix]
            changed = None if changed is None else concerned.union(changed)
        self._decide(learned, changed)

    def apply(
        self, *, observe: bool = False, hold_deletions: bool = False, without: Container[str] = ()
    ) -> SyncedRoutes:
        """Bring the kernel to what was decided. ``without``: devices that are missing; their routes wait as they are.

        Raises OSError or `Overflow` when the kernel's table cannot be read; a refused route is a failure of its own.
        """
        return self._report(self._table.sync(observe=observe, hold_deletions=hold_deletions, without=without))

    @property
    def decisions(self) -> Mapping[str, Decision]:
        """What became of each learned prefix; a live, read-only view."""
        return MappingProxyType(self._decisions)

    def devices(self) -> frozenset[str]:
        """The devices that routes of ours lead through: see `RouteTable.devices`."""
        return self._table.devices()

    def concerns(self, route: KernelRoute, gone: bool) -> bool:
        """Judge a foreign change of the main table: see `RouteTable.concerns`."""
        return self._table.concerns(route, gone)

    def _decide(self, learned: Mapping[str, str], changed: Iterable[str] | None) -> None:
        """Decide what differs from the last call; ``changed`` None: find that out, by comparing all."""
        if changed is None:
            before = self._next_hops.keys() | self._decisions.keys()
            changed = {prefix for prefix in learned if self._next_hops.get(prefix) != learned[prefix]}
            changed |= before - learned.keys()
        changed = tuple(changed)
        left = set[str]()
        for prefix in changed:
            self._next_hops.pop(prefix, None)
            old = self._decisions.pop(prefix, None)
            if old is not None:
                self._table.want(old.prefix, None)
                if old.remote:
                    self._users[old.remote] -= 1
                    left.add(old.remote)
        for prefix in changed:
            if prefix in learned:
                self._next_hops[prefix] = learned[prefix]
                decision = self._decisions[prefix] = self._decider.decide(prefix, learned[prefix])
                if decision.route is not None:
                    self._table.want(decision.prefix, self._through(decision.remote, decision.route))
        for remote in left:
            if self._users[remote] <= 0:
                del self._users[remote]
                if self._tunnels is not None:
                    self._tunnels.release(remote)

    def _through(self, remote: str, route: Route) -> Route:
        if not remote or self._tunnels is None:
            return route
        self._users[remote] += 1
        return route._replace(device=self._tunnels.claim(remote))

    def _report(self, applied: AppliedRoutes) -> SyncedRoutes:
        desired, yielded = self._table.desired, self._table.yielded
        warnings = refusals(self._decisions.values()) if len(desired) != len(self._decisions) else []
        if yielded:
            what = f"route {yielded[0]}" if len(yielded) == 1 else f"{len(yielded)} routes, first {yielded[0]}"
            warnings.append(f"{what}: not injected: the main table has another route in its place")
        return SyncedRoutes(
            added=applied.added,
            removed=applied.removed,
            synced=len(desired.keys() & self._table.actual.keys()),
            not_injected=len(self._decisions) - len(desired) + len(yielded),
            failures=tuple(Failure("routes", line) for line in describe(applied.failures)),
            warnings=tuple(warnings),
        )
