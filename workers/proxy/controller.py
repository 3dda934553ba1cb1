"""The proxy worker's part of the loop: cluster in, `Engine` → `ServiceTable` → backend → kernel.

Touches the kernel through its backend. watch → snapshot → **desired → diff → apply**: the engine tells what a change
comes to, the backend compares it with what it last applied, or, to find drift, with what the kernel holds. What a sync
could not do is owed: all of it is compared anew when the loop tries again.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from kube_router.ipc.messages import Component, EndpointSlice, Key, Kind, Notice, Service
from kube_router.ipc.replica import Cluster
from kube_router.workers.logs import tell_repairs
from kube_router.workers.model import Failure, Outcome
from kube_router.workers.proxy.backend import Backend, BackendError, Synced
from kube_router.workers.proxy.engine import Engine
from kube_router.workers.proxy.frame import FrameMaker
from kube_router.workers.proxy.healthports import HealthPorts
from kube_router.workers.proxy.model import Changed
from kube_router.workers.runtime import Clock, SystemClock, Trigger
from kube_router.workers.settings import Settings

log = logging.getLogger(__name__)

COMPONENT = "NetworkServicesController"
SYNC_TIME = "controller_ipvs_services_sync_time"
SERVICES = "controller_ipvs_services"
"""Upstream's names; they mean Services and frontends whatever the backend is."""
LATENCY = "kubeproxy_network_programming_duration_seconds"
"""kube-proxy's name: from the change of a pod or Service, of which a slice tells the time, to the kernel's word."""
REPAIRS = "service_drift_repairs"
UNABLE = "ServiceNotSupported"
"""Event reason: the backend cannot do what a Service asks for."""


class Leftovers(Protocol):
    """What another backend or another family left behind on this host."""

    def remove(self) -> tuple[Failure, ...]:
        """Remove it."""
        ...


class ProxyController:
    """Implements `workers.runtime.Controller`."""

    name = "proxy"
    kinds: tuple[Kind, ...] = ("nodes", "services", "endpointslices")

    def __init__(
        self,
        settings: Settings,
        reach: Callable[[], Backend],
        leftovers: Callable[[Backend], Leftovers],
        clock: Clock | None = None,
    ) -> None:
        """``reach`` is called at the first reconciliation, and called again as long as it raises `BackendError`."""
        self.period = settings.ipvs_sync_period
        self._settings, self._clock = settings, clock or SystemClock()
        self._reach, self._leftovers = reach, leftovers
        self._backend: Backend | None = None
        self._engine, self._frames = Engine(settings), FrameMaker(settings)
        self._health = HealthPorts()
        self._followed = False
        self._owed = False
        self._full_at = 0.0
        self._left_over = True
        self._succeeded: float | None = None

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """The backend's: foreign changes of what is ours."""
        return self._backend.wakers() if self._backend is not None else {}

    def close(self) -> None:
        """Let go of the kernel, which keeps everything."""
        self._health.close()
        if self._backend is not None:
            self._backend.close()

    def reconcile(self, cluster: Cluster, trigger: Trigger) -> Outcome:
        """Bring the kernel to what the cluster asks for."""
        began = self._clock.monotonic()
        changed = self._follow(cluster, trigger)
        try:
            backend = self._backend = self._backend or self._reach()
        except BackendError as error:
            self._owed = True
            return self._outcome(Synced(failures=(Failure("backend", str(error)),)), (), {})
        hold = not cluster.state.in_sync
        # The loop's period begins anew with every call, and calls for the sake of changes come more often than that.
        observe = trigger.observe or self._owed or began >= self._full_at
        if self._owed:
            changed = Changed(everything=True)
        self._owed = True  # should the backend raise
        synced = backend.sync(self._engine.table, changed, self._frames.make().frame, observe=observe, hold=hold)
        self._owed = bool(synced.failures)
        now = self._clock.monotonic()
        if observe:
            self._full_at = now + self.period
        more = self._health.serve(self._engine.table.health, healthy=not synced.failures)
        if self._left_over and not hold and not synced.failures:
            removed = self._leftovers(backend).remove()
            self._left_over, more = bool(removed), (*more, *removed)
        times: dict[str, tuple[float, ...]] = {SYNC_TIME: (now - began,)}
        if not synced.failures and not trigger.start and changed:
            times[LATENCY] = tuple(self._latencies(trigger))
        return self._outcome(synced, more, times)

    def _follow(self, cluster: Cluster, trigger: Trigger) -> Changed:
        """Let engine and frame take the changes, or all of the cluster the first time, or after an error."""
        followed, self._followed = self._followed, False
        changes = trigger.changes if followed else None
        self._engine.update(cluster, changes)
        self._frames.update(cluster.nodes, None if changes is None else changes.get("nodes", {}))
        self._followed = True
        return self._engine.take_changed()

    def _latencies(self, trigger: Trigger) -> Iterator[float]:
        """Seconds since the changes that the new slices tell of."""
        now = self._clock.time()
        for old, new in trigger.changes.get("endpointslices", {}).values():
            if isinstance(new, EndpointSlice) and new.last_change:
                if isinstance(old, EndpointSlice) and old.last_change == new.last_change:
                    continue
                seconds = _seconds_since(new.last_change, now)
                if seconds is not None:
                    yield seconds

    def _outcome(self, synced: Synced, more: tuple[Failure, ...], times: Mapping[str, tuple[float, ...]]) -> Outcome:
        failures = (*synced.failures, *more)
        if not synced.failures:
            self._succeeded = self._clock.time()
        tell_repairs(log, synced.repaired)
        unable = [f"service {key}: {line}" for key, lines in sorted(synced.unable.items()) for line in lines]
        problems = [*self._engine.problems()]
        table = self._engine.table
        return Outcome(
            writes=synced.writes,
            failures=failures,
            warnings=(
                *self._frames.make().warnings,
                *synced.warnings,
                *(problem.text for _, problem in problems),
                *unable,
            ),
            notices=tuple(self._notices(synced.unable)),
            counts={
                SERVICES: len(table.frontends),
                "service_ports": len({key.owner for key in table.pools}),
                "service_health_ports": len(table.health),
                **synced.counts,
            },
            counters={REPAIRS: float(len(synced.repaired))},
            observations=times,
            components=(Component(name=COMPONENT, period=self.period, last_success=self._succeeded),),
            retry_after=max(0.05, self._full_at - self._clock.monotonic()),
        )

    def _notices(self, unable: Mapping[Key, tuple[str, ...]]) -> Iterator[Notice]:
        for service, problem in self._engine.problems():
            yield _notice(service, problem.reason, problem.text)
        for key, lines in sorted(unable.items()):
            service_ = self._engine.service(key)
            for line in lines if service_ is not None else ():
                yield _notice(service_, UNABLE, f"service {key}: {line}")  # type: ignore[arg-type]


def _notice(service: Service, reason: str, text: str) -> Notice:
    return Notice(
        worker="proxy",
        kind="Service",
        namespace=service.namespace,
        name=service.name,
        uid=service.uid,
        reason=reason,
        text=text,
    )


def _seconds_since(stamp: str, now: float) -> float | None:
    """From an RFC 3339 time stamp to ``now``, Unix seconds; None for what is no time stamp."""
    try:
        then = datetime.datetime.fromisoformat(stamp)
    except ValueError:
        return None
    if then.tzinfo is None:
        return None
    return max(0.0, now - then.timestamp())
