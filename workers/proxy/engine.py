"""The engine: API objects in, the `ServiceTable` of this node out, kept up to date by what changes.

Pure. `Engine.update` always brings the engine to the cluster that it is given; changes only tell where to look. So the
same changes twice, changes that undo each other and changes of objects that were never seen are all the same to it, and
the end state depends on the cluster alone, not on the way there. What an event costs depends on the Service that it
touches: its ports, addresses and endpoints, never on how many other Services there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, TypeVar

from kube_router.ipc.messages import Key, Service
from kube_router.workers.nodefacts import Problem
from kube_router.workers.proxy import names
from kube_router.workers.proxy.endpoints import Place, select
from kube_router.workers.proxy.model import (
    Changed,
    Endpoint,
    Forwarding,
    Frontend,
    HealthCheck,
    PoolKey,
    ServiceTable,
)
from kube_router.workers.proxy.ownership import Claim, Owners
from kube_router.workers.proxy.services import ServicePlan, plan_service
from kube_router.workers.serviceips import ServiceIps
from kube_router.workers.settings import Settings

if TYPE_CHECKING:
    from kube_router.ipc.replica import Changes, Cluster

CONFLICT = "ServiceAddressConflict"
"""Event reason: another Service has the address and port."""


Thing = TypeVar("Thing")


class _Known:
    """A Service that is served, or was until now."""

    __slots__ = ("claim", "plan", "pools", "service", "slice_problems")

    def __init__(self, service: Service, plan: ServicePlan) -> None:
        self.service, self.plan = service, plan
        self.claim = Claim(plan.created, plan.key)
        self.pools: tuple[PoolKey, ...] = tuple(dict.fromkeys(_pools_of(plan.frontends)))
        self.slice_problems: tuple[Problem, ...] = ()


class Engine:
    """What Services come to on one node. `table` is live: the next `update` changes it."""

    def __init__(self, settings: Settings) -> None:
        self._ips = ServiceIps(settings)
        self._place = Place(settings.node_name)
        self._known: dict[Key, _Known] = {}
        self._slices: dict[Key, tuple[Key, ...]] = {}
        """By Service: the keys of its slices, sorted."""
        self._slice_owner: dict[Key, Key] = {}
        self._frontend_owners: Owners[Frontend] = Owners()
        self._health_owners: Owners[int] = Owners()
        self._conflicts: dict[Key, tuple[Problem, ...]] = {}
        self._compared = False
        self._everything = True
        self._frontends: dict[Frontend, Forwarding] = {}
        self._pools: dict[PoolKey, tuple[Endpoint, ...]] = {}
        self._health: dict[int, HealthCheck] = {}
        self._local: dict[Key, int] = {}
        """By Service with a health check port: its ready addresses on this node."""
        self._frontends_before: dict[Frontend, Forwarding | None] = {}
        self._pools_before: dict[PoolKey, tuple[Endpoint, ...] | None] = {}
        self._health_before: dict[int, HealthCheck | None] = {}
        """By key: what stood at the last `take_changed`, for keys that may have changed since."""
        self._troubled: dict[Key, None] = {}
        self.table = ServiceTable(self._frontends, self._pools, self._health)

    def problems(self) -> Iterator[tuple[Service, Problem]]:
        """What is wrong with Services and their slices, and which of them ask in vain for what others have."""
        for key in sorted(self._troubled):
            known = self._known[key]
            for problem in (*known.plan.problems, *known.slice_problems, *self._conflicts.get(key, ())):
                yield known.service, problem

    def service(self, key: Key) -> Service | None:
        """The Service of a key, as it was last seen, if it is served."""
        known = self._known.get(key)
        return None if known is None else known.service

    def update(self, cluster: Cluster, changes: Changes | None) -> None:
        """Bring the table to ``cluster``. ``changes``: where it may differ from the last one; None: anywhere.

        The first call looks everywhere. Of the changes only the keys count.
        """
        if changes is None or not self._compared:
            services = dict.fromkeys([*self._known, *cluster.services])
            slices = dict.fromkeys([*self._slice_owner, *cluster.endpointslices])
            self._compared = False
            self._apply(cluster, services, slices)
            self._compared = True
        else:
            self._apply(cluster, changes.get("services", ()), changes.get("endpointslices", ()))

    def take_changed(self) -> Changed:
        """How the table differs from that at the last call; the first call says ``everything`` as well."""
        changed = Changed(everything=self._everything)
        changed.frontends = {k for k, before in self._frontends_before.items() if self._frontends.get(k) != before}
        changed.pools = {key for key, before in self._pools_before.items() if self._pools.get(key) != before}
        changed.health = {port for port, before in self._health_before.items() if self._health.get(port) != before}
        changed.touched = changed.frontends | {*self._that_use(changed.pools)}
        self._everything = False
        self._frontends_before, self._pools_before, self._health_before = {}, {}, {}
        return changed

    def _that_use(self, pools: Iterable[PoolKey]) -> Iterator[Frontend]:
        """The frontends that stand and send to some of these pools."""
        changed = set(pools)
        for key in {pool.owner.service for pool in changed} & self._known.keys():
            for frontend, forwarding in self._known[key].plan.frontends.items():
                used = {forwarding.pool(frontend, inside=True), forwarding.pool(frontend, inside=False)}
                if used & changed and self._frontends.get(frontend) is forwarding:
                    yield frontend

    def _apply(self, cluster: Cluster, services: Iterable[Key], slices: Iterable[Key]) -> None:
        dirty: dict[Key, None] = {}
        for key in slices:
            dirty |= dict.fromkeys(self._on_slice(cluster, key))
        for key in services:
            self._on_service(key, cluster.services.get(key))
            dirty[key] = None
        if self._moved(cluster):
            dirty |= dict.fromkeys(self._known)
        for key in dirty:
            self._settle(cluster, key)

    def _moved(self, cluster: Cluster) -> bool:
        """Whether this node is in another zone than before. One that is gone from the cluster stays where it was."""
        node = cluster.nodes.get(self._place.node)
        if node is None or (zone := node.labels.get(names.ZONE_LABEL, "")) == self._place.zone:
            return False
        self._place = Place(self._place.node, zone)
        return True

    def _on_slice(self, cluster: Cluster, key: Key) -> Iterator[Key]:
        """Follow one slice; the Services that it belonged to and belongs to."""
        item = cluster.endpointslices.get(key)
        before = self._slice_owner.pop(key, None)
        if before is not None:
            yield before
            left = tuple(each for each in self._slices.pop(before) if each != key)
            if left:
                self._slices[before] = left
        if item is not None and item.service:
            owner = f"{item.namespace}/{item.service}"
            self._slice_owner[key] = owner
            self._slices[owner] = tuple(sorted((*self._slices.get(owner, ()), key)))
            yield owner

    def _on_service(self, key: Key, service: Service | None) -> None:
        old = self._known.get(key)
        if old is not None and old.service == service:
            return
        new = None
        if service is not None:
            plan = plan_service(service, self._ips)
            new = _Known(service, plan) if plan.frontends or plan.problems else None
        if new is None:
            self._known.pop(key, None)
            self._troubled.pop(key, None)
        else:
            self._known[key] = new
        touched = {*self._own_frontends(old, new), *self._own_health(old, new), key}
        for pool in old.pools if old is not None else ():
            if new is None or pool not in new.pools:
                self._set_pool(pool, None)
        for each in touched:
            self._find_conflicts(each)

    def _own_frontends(self, old: _Known | None, new: _Known | None) -> set[Key]:
        """Hand frontends over; the Services that compete for one of them."""
        before: Mapping[Frontend, Forwarding] = old.plan.frontends if old is not None else {}
        after: Mapping[Frontend, Forwarding] = new.plan.frontends if new is not None else {}
        rivals = _hand_over(self._frontend_owners, old, new, before.keys(), after.keys())
        for frontend in before.keys() | after.keys():
            self._set_frontend(frontend)
        return rivals

    def _own_health(self, old: _Known | None, new: _Known | None) -> set[Key]:
        before, after = ({known.plan.health_port} - {0} if known is not None else set() for known in (old, new))
        rivals = _hand_over(self._health_owners, old, new, before, after)
        for port in before | after:
            self._set_health(port)
        return rivals

    def _find_conflicts(self, key: Key) -> None:
        known = self._known.get(key)
        if known is None:
            self._conflicts.pop(key, None)
            return
        lines = []
        for frontend in known.plan.frontends:
            owner = self._frontend_owners.owner(frontend)
            if owner != key:
                lines.append(f"service {key}: {frontend} is not served: it belongs to the older service {owner}")
        port = known.plan.health_port
        if port and (owner := self._health_owners.owner(port)) != key:
            text = f"service {key}: spec.healthCheckNodePort: {port} is not served: it belongs to the older service"
            lines.append(f"{text} {owner}")
        self._conflicts.pop(key, None)
        if lines:
            self._conflicts[key] = tuple(Problem(CONFLICT, line) for line in lines)
        self._note_trouble(key)

    def _note_trouble(self, key: Key) -> None:
        known = self._known[key]
        if known.plan.problems or known.slice_problems or key in self._conflicts:
            self._troubled[key] = None
        else:
            self._troubled.pop(key, None)

    def _settle(self, cluster: Cluster, key: Key) -> None:
        """Bring the pools of a Service to what its slices say."""
        known = self._known.get(key)
        if known is None:
            self._local.pop(key, None)
            return
        slices = [cluster.endpointslices[item] for item in self._slices.get(key, ())]
        selected = select(slices, known.pools, self._place, always=known.plan.publish_not_ready)
        for pool, endpoints in selected.pools.items():
            self._set_pool(pool, endpoints)
        if known.slice_problems != selected.problems:
            known.slice_problems = selected.problems
            self._note_trouble(key)
        if known.plan.health_port:
            self._local[key] = selected.local
            self._set_health(known.plan.health_port)

    # What stands, and what stood

    def _set_frontend(self, frontend: Frontend) -> None:
        owner = self._frontend_owners.owner(frontend)
        new = None if owner is None else self._known[owner].plan.frontends[frontend]
        old = self._frontends.get(frontend)
        if old == new:
            return
        if not self._everything:
            self._frontends_before.setdefault(frontend, old)
        if new is None:
            del self._frontends[frontend]
        else:
            self._frontends[frontend] = new

    def _set_pool(self, key: PoolKey, new: tuple[Endpoint, ...] | None) -> None:
        old = self._pools.get(key)
        if old == new:
            return
        if not self._everything:
            self._pools_before.setdefault(key, old)
        if new is None:
            del self._pools[key]
        else:
            self._pools[key] = new

    def _set_health(self, port: int) -> None:
        owner = self._health_owners.owner(port)
        new = None if owner is None else HealthCheck(owner, self._local.get(owner, 0))
        old = self._health.get(port)
        if old == new:
            return
        if not self._everything:
            self._health_before.setdefault(port, old)
        if new is None:
            del self._health[port]
        else:
            self._health[port] = new


def _pools_of(frontends: Mapping[Frontend, Forwarding]) -> Iterator[PoolKey]:
    for frontend, forwarding in frontends.items():
        yield forwarding.pool(frontend, inside=True)
        if forwarding.outside is not forwarding.inside:
            yield forwarding.pool(frontend, inside=False)


def _hand_over(
    owners: Owners[Thing], old: _Known | None, new: _Known | None, before: AbstractSet[Thing], after: AbstractSet[Thing]
) -> set[Key]:
    """What a Service asked for, and asks for now; the Services that compete for one of these, then or now."""
    rivals = {key for thing in before for key in owners.rivals(thing)}
    if old is not None:
        owners.release(old.claim, before if new is None or new.claim != old.claim else before - after)
    if new is not None:
        owners.claim(new.claim, after)
    return rivals.union(*(owners.rivals(thing) for thing in after))
