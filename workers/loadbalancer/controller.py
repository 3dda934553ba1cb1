"""The allocator's part of the loop: an address for every Service of type LoadBalancer that is ours.

Touches the API server, through `Services` and `LeaseKeeper`. Only the holder of the Lease writes; the others follow the
cluster and wait. An address that was chosen stays reserved until it is seen in its Service, whatever became of the
write; and a new holder first lists the Services itself, because its watch may lag behind what the last one wrote. So no
address is ever given out twice.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from kube_router.ipc.messages import Component, Key, Kind, Notice, Service
from kube_router.ipc.replica import Cluster
from kube_router.workers.kubeapi.apiserver import ApiError, ApiServer
from kube_router.workers.loadbalancer.desired import (
    Decision,
    Ledger,
    decide,
    held_addresses,
    is_served,
    problem,
)
from kube_router.workers.loadbalancer.lease import LeaseKeeper
from kube_router.workers.loadbalancer.pool import Pool, pools
from kube_router.workers.loadbalancer.services import Behind, Condition, Services
from kube_router.workers.model import Failure, Family, IPAddress, Outcome, parse_network
from kube_router.workers.nodefacts import node_facts
from kube_router.workers.runtime import Clock, SystemClock, Trigger
from kube_router.workers.settings import Settings

log = logging.getLogger(__name__)

MOST_WRITES = 50
"""In one call, so that the loop beats and hears of changes in between."""
BEHIND_SECONDS = 0.2
RESERVED_SECONDS = 60.0
"""A reservation for a Service that the cluster does not have is forgotten after so long."""


@dataclass(slots=True)
class _Reservation:
    uid: str
    addresses: tuple[IPAddress, ...]
    since: float


@dataclass(slots=True)
class _Work:
    """What one call has come to."""

    writes: int = 0
    waiting: int = 0
    failures: list[Failure] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    retry: float | None = None

    def again(self, seconds: float) -> None:
        self.retry = seconds if self.retry is None else min(self.retry, seconds)


class LoadBalancerController:
    """Implements `workers.runtime.Controller`."""

    name = "loadbalancer"
    kinds: tuple[Kind, ...] = ("nodes", "services")

    def __init__(self, settings: Settings, server: ApiServer, clock: Clock | None = None) -> None:
        self.period = settings.loadbalancer_sync_period
        self._settings, self._clock = settings, clock or SystemClock()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lease = LeaseKeeper(server, settings.pod_namespace, settings.pod_name, self._clock, self._eventfd)
        self._services = Services(server, self._lease.leads)
        self._pools: dict[Family, Pool] = pools(
            tuple(map(parse_network, settings.loadbalancer_ip_range)), settings.families
        )
        self._ledger = Ledger()
        self._reserved: dict[Key, _Reservation] = {}
        self._known: dict[Key, Service] = {}
        self._dirty: dict[Key, None] = {}
        self._starved: set[Key] = set()
        self._texts: dict[Key, str] = {}
        self._conditions: dict[Key, tuple[str, Condition]] = {}
        self._term = 0
        self._since = self._clock.monotonic()
        self._lease.start()

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """The lease's thread, when the lead is won or lost."""
        return {self._eventfd: self._drain}

    def close(self) -> None:
        """Give the Lease back; addresses stay with their Services."""
        self._lease.stop()
        os.close(self._eventfd)

    def _drain(self) -> bool:
        try:
            os.eventfd_read(self._eventfd)
        except BlockingIOError:
            return False
        return True

    def reconcile(self, cluster: Cluster, trigger: Trigger) -> Outcome:
        """Take in what changed; with the Lease, write what Services lack."""
        work = _Work()
        self._look_at(cluster, trigger)
        self._tell_trouble(work)
        if not cluster.state.in_sync:
            work.again(1.0)
        elif self._lease.leads():
            try:
                self._lead(work)
            except ApiError as error:
                work.failures.append(Failure("loadbalancer-list", f"Services cannot be listed: {error}"))
        return self._outcome(work)

    def _look_at(self, cluster: Cluster, trigger: Trigger) -> None:
        whole = trigger.start or trigger.retry or trigger.period or trigger.confirmed
        if whole or trigger.changes.get("nodes"):
            facts = [node_facts(node, self._settings.families) for node in cluster.nodes.values()]
            self._ledger.close(address for node in facts for address in node.addresses)
        changed = trigger.changes.get("services", {})
        keys = self._known.keys() | self._reserved.keys() | cluster.services.keys() if whole else changed.keys()
        for key in sorted(keys):
            before, after = self._known.get(key), cluster.services.get(key)
            if before is after and not whole:
                continue
            self._take(key, after)
        if self._ledger.take_freed() or whole:
            self._dirty.update(dict.fromkeys(sorted(self._starved)))

    def _take(self, key: Key, service: Service | None) -> None:
        """The cluster now has ``service`` at ``key``."""
        now = self._clock.monotonic()
        reservation = self._reserved.get(key)
        if service is None:
            self._known.pop(key, None)
            for memory in (self._texts, self._conditions, self._dirty):
                memory.pop(key, None)
            self._starved.discard(key)
            # A reservation may be for a Service that this agent's watch has yet to tell of.
            if reservation is not None and now >= reservation.since + RESERVED_SECONDS:
                self._reserved.pop(key, None)
        else:
            self._known[key] = service
            self._dirty[key] = None
            seen = set(held_addresses(service))
            if reservation is not None and (
                service.uid != reservation.uid
                or seen.issuperset(reservation.addresses)
                or (not is_served(service, self._settings.loadbalancer_default_class))
            ):
                self._reserved.pop(key, None)
        self._record(key)

    def _record(self, key: Key) -> None:
        service, reservation = self._known.get(key), self._reserved.get(key)
        held = held_addresses(service) if service is not None else ()
        self._ledger.record(key, (*held, *(reservation.addresses if reservation is not None else ())))

    def _lead(self, work: _Work) -> None:
        if self._term != self._lease.terms:
            self._begin_term()
        keys = list(self._dirty)
        for number, key in enumerate(keys):
            if number >= 4 * MOST_WRITES or work.writes >= MOST_WRITES or not self._lease.leads():
                work.again(0.01)
                break
            self._dirty.pop(key, None)
            service = self._known.get(key)
            if service is not None:
                self._serve(service, work)
        work.waiting = len(self._dirty)

    def _begin_term(self) -> None:
        """Know what the last holder gave out, also where the watch has not told it yet."""
        term, now = self._lease.terms, self._clock.monotonic()
        for holding in self._services.holdings():
            known = self._known.get(holding.key)
            if holding.condition is not None:
                self._conditions[holding.key] = (holding.uid, holding.condition)
            behind = known is None or set(held_addresses(known)) != set(holding.addresses)
            if behind and holding.addresses:
                self._reserved[holding.key] = _Reservation(holding.uid, holding.addresses, now)
                self._record(holding.key)
        self._dirty.update(dict.fromkeys(sorted(self._known)))
        self._term = term

    def _serve(self, service: Service, work: _Work) -> None:
        key = service.key
        reservation = self._reserved.get(key)
        reserved = reservation.addresses if reservation is not None and reservation.uid == service.uid else ()
        decision = decide(
            service,
            self._pools,
            self._ledger,
            reserved,
            default_class=self._settings.loadbalancer_default_class,
        )
        if not decision.served:
            return
        self._tell(service, decision, work)
        (self._starved.discard if decision.ok else self._starved.add)(key)
        condition = Condition(decision.ok, decision.reason, decision.text)
        if not decision.changed and not self._is_news(service, decision, condition):
            return
        if decision.changed:
            self._reserved[key] = _Reservation(service.uid, decision.addresses, self._clock.monotonic())
            self._record(key)
        self._write(service, decision, condition, work)

    def _is_news(self, service: Service, decision: Decision, condition: Condition) -> bool:
        """Whether the condition has to be written: it changed, or tells of a trouble that this process never told."""
        told = self._conditions.get(service.key)
        if told is None or told[0] != service.uid:
            return not decision.ok
        return told[1] != condition

    def _write(self, service: Service, decision: Decision, condition: Condition, work: _Work) -> None:
        key = service.key
        try:
            self._services.write(
                service, decision.addresses if decision.changed else None, condition, self._clock.time()
            )
        except Behind:
            self._dirty[key] = None
            work.again(BEHIND_SECONDS)
        except ApiError as error:
            self._dirty[key] = None
            if error.status is not None and 400 <= error.status < 500 and error.status != 429:
                self._reserved.pop(key, None)  # refused for sure: nothing was written
                self._record(key)
            work.failures.append(Failure("loadbalancer-write", f"service {key}: its status cannot be written: {error}"))
        else:
            self._conditions[key] = (service.uid, condition)
            work.writes += 1
            if decision.changed:
                log.info("service %s: gets %s", key, ", ".join(map(str, decision.addresses)) or "no address")

    def _tell(self, service: Service, decision: Decision, work: _Work) -> None:
        found = problem(decision)
        if found is None:
            self._texts.pop(service.key, None)
            return
        if self._texts.get(service.key) != found.text:
            self._texts[service.key] = found.text
            log.warning("%s", found.text)
        work.notices.append(
            Notice(
                worker=self.name,
                kind="Service",
                namespace=service.namespace,
                name=service.name,
                uid=service.uid,
                reason=found.reason,
                text=found.text,
            )
        )

    def _tell_trouble(self, work: _Work) -> None:
        if not self._settings.loadbalancer_ip_range:
            work.warnings.append("--loadbalancer-ip-range is empty: there is no address to give out")
        if self._lease.trouble:
            work.warnings.append(self._lease.trouble)

    def _outcome(self, work: _Work) -> Outcome:
        leads = self._lease.leads()
        component = Component(name="LoadBalancerController", period=self.period, last_success=self._clock.time())
        free = {
            f'loadbalancer_addresses{{family="{family}"}}': float(pool.size) for family, pool in self._pools.items()
        }
        return Outcome(
            writes=work.writes,
            failures=tuple(work.failures),
            warnings=tuple(dict.fromkeys((*work.warnings, *self._shown()))),
            notices=tuple(work.notices),
            counts={
                "loadbalancer_leader": float(leads),
                "loadbalancer_services_waiting": float(len(self._starved) + work.waiting) if leads else 0.0,
                "loadbalancer_reservations": float(len(self._reserved)),
                **free,
            },
            components=(component,),
            retry_after=work.retry,
        )

    def _shown(self) -> Iterable[str]:
        return (self._texts[key] for key in sorted(self._texts)) if self._lease.leads() else ()
