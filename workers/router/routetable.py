"""The routes of one table: wanted, believed to be there, and brought together with few messages.

Drives a route driver (a parameter). The table is listed only when asked to, or when something is doubtful; otherwise
one changed prefix costs one netlink message.
"""

from __future__ import annotations

import errno
from collections.abc import Container, Mapping
from typing import Protocol

from kube_router.workers.delta import DeltaTracker
from kube_router.workers.kernel.routes import PROTOCOL, AppliedRoutes, KernelRoute, RouteFailure
from kube_router.workers.routefacts import ActualRoutes, Prefix, Route, RoutePlan, Stray
from kube_router.workers.router.repairs import Repairs
from kube_router.workers.router.routes import plan_routes

_TRIES = 2
"""Plan, apply, and once more after reading again when the kernel showed a route that was not known."""
_DOUBTFUL_MOST = 10_000
"""More places than this are not remembered one by one: the next sync reads the table."""


class Routes(Protocol):
    """What this module asks of a route driver."""

    def observe(self) -> ActualRoutes: ...

    def apply(self, plan: RoutePlan) -> AppliedRoutes: ...


class RouteTable:
    """The routes of ours in one table."""

    def __init__(self, driver: Routes, repairs: Repairs | None = None) -> None:
        self._driver, self._repairs = driver, repairs or Repairs()
        self._routes: DeltaTracker[Prefix, Route] = DeltaTracker()
        self._observed = False
        self._strays: tuple[Stray, ...] = ()
        self._foreign: frozenset[Prefix] = frozenset()
        self._doubtful: set[Prefix] = set()
        """Where somebody else's routes came or went since the last observation."""
        self._lost: set[Prefix] = set()
        """Wanted routes that were there and were not any more."""

    @property
    def desired(self) -> Mapping[Prefix, Route]:
        """What is wanted: a live view."""
        return self._routes.desired

    @property
    def actual(self) -> Mapping[Prefix, Route]:
        """What is believed to be there: a live view."""
        return self._routes.actual

    @property
    def yielded(self) -> list[Prefix]:
        """Where ours gives way to somebody else's route, in order."""
        return sorted(self._foreign & self._routes.desired.keys())

    def want(self, prefix: Prefix, route: Route | None) -> None:
        """Want this route, or none."""
        if route is None:
            self._routes.delete_desired(prefix)
        else:
            self._routes.set_desired(prefix, route)

    def devices(self) -> frozenset[str]:
        """The devices that routes of ours lead through, by what is known of the kernel. O(routes)."""
        return frozenset(route.device for route in self._routes.actual.values() if route.device)

    def sync(
        self, *, observe: bool = False, hold_deletions: bool = False, without: Container[str] = ()
    ) -> AppliedRoutes:
        """Bring the kernel to what is wanted. ``without``: devices that are missing; their routes wait as they are.

        Raises OSError or `Overflow` when the table cannot be read; a refused route is a failure of its own.
        """
        if observe or not self._doubtful.isdisjoint(self._routes.pending_updates()):
            self._observed = False
        added = removed = 0
        failures: tuple[RouteFailure, ...] = ()
        for _ in range(_TRIES):
            if not self._observed:
                self._observe()
            applied = self._apply(self.plan(hold_deletions, without))
            added, removed, failures = added + applied.added, removed + applied.removed, applied.failures
            if not any(failure.error.errno == errno.EEXIST for failure in failures):
                break
            self._observed = False  # somebody has a route there that was not known
        self._lost &= self._routes.desired.keys()
        return AppliedRoutes(added, removed, failures)

    def plan(self, hold_deletions: bool = False, without: Container[str] = ()) -> RoutePlan:
        """What waits to be done, by what is known."""
        actual = ActualRoutes(self._routes.actual, self._strays, self._foreign)
        updates, deletes = self._routes.pending_updates(), self._routes.pending_deletes()
        if without:
            updates = {prefix: route for prefix, route in updates.items() if route.device not in without}
        return plan_routes(actual, updates, deletes, hold=hold_deletions)

    def concerns(self, route: KernelRoute, gone: bool) -> bool:
        """Whether a foreign change of the table asks for a new look: at our routes, or in their place.

        Other places are remembered, for the day when a route of ours is to go there.
        """
        if route.protocol == PROTOCOL:
            return not gone or route.prefix in self._routes.actual
        if len(self._doubtful) >= _DOUBTFUL_MOST:
            self._observed = False
        else:
            self._doubtful.add(route.prefix)
        return route.prefix in self._routes.desired

    def _observe(self) -> None:
        self._doubtful.clear()
        actual = self._driver.observe()
        known, desired = self._routes.actual, self._routes.desired
        self._lost.update(
            prefix
            for prefix, route in known.items()
            if actual.ours.get(prefix) != route and desired.get(prefix) == route
        )
        self._routes.replace_actual(actual.ours)
        self._strays, self._foreign = actual.strays, actual.foreign
        self._observed = True

    def _apply(self, plan: RoutePlan) -> AppliedRoutes:
        if not plan:
            return AppliedRoutes()
        self._observed = False  # until it is known what got through
        applied = self._driver.apply(plan)
        self._observed = True
        refused = {failure.prefix for failure in applied.failures}
        for prefix in (*(prefix for prefix, _ in (*plan.add, *plan.replace)), *plan.delete):
            if prefix in refused:
                self._routes.failed(prefix)
            elif prefix in self._foreign:
                self._routes.delete_actual(prefix)
            else:
                self._routes.applied(prefix)
                if prefix in self._lost:
                    self._lost.discard(prefix)
                    self._repairs.add("route", f"{prefix} {self._routes.actual[prefix]}")
        if plan.strays:
            self._strays = tuple(stray for stray in plan.strays if stray.prefix in refused)
        return applied
