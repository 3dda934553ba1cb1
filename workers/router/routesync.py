"""The injected routes: decides, compares and applies, remembering what the kernel was last told.

Drives `RouteDriver` (a parameter); reads neither clock nor cluster itself. One changed prefix costs one decision and
one netlink message; the table is listed only when asked to `observe`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from kube_router.workers.delta import DeltaTracker
from kube_router.workers.kernel.routes import PROTOCOL, AppliedRoutes, KernelRoute, RouteFailure, describe
from kube_router.workers.model import Failure
from kube_router.workers.routefacts import ActualRoutes, Prefix, Route, RoutePlan, Stray
from kube_router.workers.router.routes import (
    Decider,
    Decision,
    Surroundings,
    plan_routes,
    refusals,
)

_TRIES = 2
"""Plan, apply, and once more after reading again when the kernel showed a route that was not known."""
_DOUBTFUL_MOST = 10_000
"""More places than this are not remembered one by one: the next sync reads the table."""


class Routes(Protocol):
    """What this module asks of a route driver."""

    def observe(self) -> ActualRoutes: ...

    def apply(self, plan: RoutePlan) -> AppliedRoutes: ...


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
    """The routes of one node."""

    def __init__(self, driver: Routes) -> None:
        self._driver = driver
        self._decider = Decider(Surroundings())
        self._next_hops: dict[str, str] = {}
        self._decisions: dict[str, Decision] = {}
        self._routes: DeltaTracker[Prefix, Route] = DeltaTracker()
        self._observed = False
        self._strays: tuple[Stray, ...] = ()
        self._foreign: frozenset[Prefix] = frozenset()
        self._doubtful: set[Prefix] = set()
        """Where somebody else's routes came or went since the last observation."""

    def sync(
        self,
        learned: Mapping[str, str],
        changed: Iterable[str] | None,
        around: Surroundings,
        *,
        observe: bool = False,
        hold_deletions: bool = False,
    ) -> SyncedRoutes:
        """Bring the kernel to ``learned``; ``changed`` names the prefixes that differ from the last call, None: all.

        Raises OSError or `Overflow` when the kernel's table cannot be read; a refused route is a failure of its own.
        """
        self._decide(learned, changed, around)
        if observe or not self._doubtful.isdisjoint(self._routes.pending_updates()):
            self._observed = False
        added = removed = 0
        failures: tuple[RouteFailure, ...] = ()
        for _ in range(_TRIES):
            if not self._observed:
                self._observe()
            applied = self._apply(self.plan(hold_deletions))
            added, removed, failures = added + applied.added, removed + applied.removed, applied.failures
            if not any(failure.error.errno == errno.EEXIST for failure in failures):
                break
            self._observed = False  # somebody has a route there that was not known
        return self._report(added, removed, failures)

    def plan(self, hold_deletions: bool = False) -> RoutePlan:
        """What waits to be done, by what is known."""
        actual = ActualRoutes(self._routes.actual, self._strays, self._foreign)
        updates, deletes = self._routes.pending_updates(), self._routes.pending_deletes()
        return plan_routes(actual, updates, deletes, hold=hold_deletions)

    def concerns(self, route: KernelRoute, gone: bool) -> bool:
        """Whether a foreign change of the main table asks for a new look: at our routes, or in their place.

        Other places are remembered, for the day when a route of ours is to go there.
        """
        if route.protocol == PROTOCOL:
            return not gone or route.prefix in self._routes.actual
        if len(self._doubtful) >= _DOUBTFUL_MOST:
            self._observed = False
        else:
            self._doubtful.add(route.prefix)
        return route.prefix in self._routes.desired

    def _decide(self, learned: Mapping[str, str], changed: Iterable[str] | None, around: Surroundings) -> None:
        """Decide what differs from the last call; ``changed`` None: find that out, by comparing all."""
        if around != self._decider.around:
            self._decider = Decider(around)
            self._next_hops.clear()
            changed = None
        if changed is None:
            before = self._next_hops.keys() | self._decisions.keys()
            changed = {prefix for prefix in learned if self._next_hops.get(prefix) != learned[prefix]}
            changed |= before - learned.keys()
        changed = tuple(changed)
        for prefix in changed:
            self._next_hops.pop(prefix, None)
            old = self._decisions.pop(prefix, None)
            if old is not None:
                self._routes.delete_desired(old.prefix)
        for prefix in changed:
            if prefix in learned:
                self._next_hops[prefix] = learned[prefix]
                decision = self._decisions[prefix] = self._decider.decide(prefix, learned[prefix])
                if decision.route is not None:
                    self._routes.set_desired(decision.prefix, decision.route)

    def _observe(self) -> None:
        self._doubtful.clear()
        actual = self._driver.observe()
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
        if plan.strays:
            self._strays = tuple(stray for stray in plan.strays if stray.prefix in refused)
        return applied

    def _report(self, added: int, removed: int, failures: tuple[RouteFailure, ...]) -> SyncedRoutes:
        desired = self._routes.desired
        yielded = sorted(self._foreign & desired.keys())
        warnings = refusals(self._decisions.values()) if len(desired) != len(self._decisions) else []
        if yielded:
            what = f"route {yielded[0]}" if len(yielded) == 1 else f"{len(yielded)} routes, first {yielded[0]}"
            warnings.append(f"{what}: not injected: the main table has another route in its place")
        return SyncedRoutes(
            added=added,
            removed=removed,
            synced=len(desired.keys() & self._routes.actual.keys()),
            not_injected=len(self._decisions) - len(desired) + len(yielded),
            failures=tuple(Failure("routes", line) for line in describe(failures)),
            warnings=tuple(warnings),
        )
