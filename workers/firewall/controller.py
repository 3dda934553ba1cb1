"""The firewall worker's part of the loop: cluster in, `Engine` → `Ruleset` → backend → kernel.

Touches the kernel through its backend. watch → snapshot → **desired → diff → apply**: the engine tells what a change
comes to, the backend compares it with what it last applied, or, to find drift, with what the kernel holds. What a sync
could not do is owed: it is joined with the next change, and the whole is compared anew when the loop tries again.

A policy that the kernel does not take fails alone: its pods are closed in what it would have allowed, the policy gets
an Event, and the worker stays healthy, as no restart would mend it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from kube_router.ipc.messages import Component, Key, Kind, Notice
from kube_router.ipc.replica import Changes, Cluster
from kube_router.workers.firewall.backend import Backend, BackendError, Synced
from kube_router.workers.firewall.cleanup import Removed
from kube_router.workers.firewall.engine import Engine
from kube_router.workers.firewall.frame import Framed, FrameMaker, NodePorts
from kube_router.workers.firewall.owed import joined
from kube_router.workers.firewall.rules import Changed, Frame, Ruleset
from kube_router.workers.firewall.unresolved import Unresolved
from kube_router.workers.logs import tell_repairs
from kube_router.workers.model import Failure, Outcome
from kube_router.workers.runtime import Clock, SystemClock, Trigger
from kube_router.workers.settings import Settings

log = logging.getLogger(__name__)

COMPONENT = "NetworkPolicyController"
LATENCY = "policy_enforcement_latency_seconds"
SYNC_TIME = "controller_iptables_sync_time"
REPAIRS = "policy_drift_repairs"
INVALID, REFUSED = "InvalidNetworkPolicy", "NetworkPolicyNotProgrammed"
"""Event reasons: a policy that cannot be understood in full, and one that the kernel did not take in full."""
UNRESOLVED = "UnresolvedNamedPort"
"""Event reason: a policy asks for a port by a name that no pod has."""


class Leftovers(Protocol):
    """What another backend, another kind of iptables or another family left behind on this host."""

    def remove(self) -> Removed:
        """Remove it."""
        ...


class Recheck(Protocol):
    """Cuts open connections that a change has forbidden."""

    def note(self, ruleset: Ruleset, changed: Changed) -> None:
        """Remember what a change concerns."""
        ...

    def cut(self, ruleset: Ruleset, frame: Frame) -> Outcome:
        """Cut what is forbidden of all that was noted."""
        ...

    def close(self) -> None:
        """Release sockets."""
        ...


@dataclass(frozen=True, slots=True)
class Kernel:
    """What the controller acts through; made together, as only who chose the backend knows what it leaves over."""

    backend: Backend
    leftovers: Leftovers
    recheck: Recheck | None = None

    def close(self) -> None:
        """Release all sockets; the kernel keeps everything."""
        self.backend.close()
        if self.recheck is not None:
            self.recheck.close()


class FirewallController:
    """Implements `workers.runtime.Controller`."""

    name = "firewall"
    kinds: tuple[Kind, ...] = ("nodes", "pods", "services", "networkpolicies", "namespaces")

    def __init__(self, settings: Settings, reach: Callable[[], Kernel], clock: Clock | None = None) -> None:
        """``reach`` is called at the first reconciliation, and called again as long as it raises `BackendError`."""
        self.period = settings.iptables_sync_period
        self._settings, self._clock = settings, clock or SystemClock()
        self._reach = reach
        self._kernel: Kernel | None = None
        self._engine = Engine(settings.node_name, settings.families)
        self._ports, self._frames = NodePorts(), FrameMaker(settings)
        self._unresolved = Unresolved()
        self._followed = False
        self._owed = Changed(everything=True)
        self._full_at = 0.0
        self._suspicious = self._left_over = True
        self._kept: tuple[str, ...] = ()
        self._succeeded: float | None = None

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """The backend's: foreign changes of what is ours."""
        return self._kernel.backend.wakers() if self._kernel is not None else {}

    def close(self) -> None:
        """Let go of the kernel, which keeps everything."""
        if self._kernel is not None:
            self._kernel.close()

    def reconcile(self, cluster: Cluster, trigger: Trigger) -> Outcome:
        """Bring the kernel to what the cluster asks for."""
        began = self._clock.monotonic()
        self._follow(cluster, trigger.changes)
        framed = self._frames.make(cluster.nodes.get(self._settings.node_name), self._ports.all)
        try:
            kernel = self._kernel = self._kernel or self._reach()
        except BackendError as error:
            return self._outcome(Synced(failures=(Failure("backend", str(error)),)), framed)
        hold = not cluster.state.in_sync
        # The loop's period begins anew with every call, and calls for the sake of changes come more often than that.
        observe = trigger.observe or self._suspicious or began >= self._full_at
        changed = self._owed
        self._owed, self._suspicious = Changed(everything=True), True  # should the backend raise
        synced = kernel.backend.sync(self._engine.ruleset, changed, framed.frame, observe=observe, hold=hold)
        self._owed, self._suspicious = still_owed(changed, synced), False
        now = self._clock.monotonic()
        if observe:
            self._full_at = now + self.period
        outcome = self._outcome(synced, framed, self._times(trigger, changed, synced, began, now))
        if kernel.recheck is not None:
            kernel.recheck.note(self._engine.ruleset, changed)
        if hold or synced.failures:
            return outcome
        return joined_outcomes(outcome, *self._afterwards(kernel, framed.frame, alone=bool(synced.failed)))

    def _afterwards(self, kernel: Kernel, frame: Frame, *, alone: bool) -> Iterator[Outcome]:
        """What may only be done once all of ours stands, but for policies that failed ``alone``."""
        if self._left_over and not alone:
            removed = kernel.leftovers.remove()
            self._left_over, self._kept = bool(removed.failures), removed.kept
            yield Outcome(failures=removed.failures, warnings=removed.kept)
        if kernel.recheck is not None:
            yield kernel.recheck.cut(self._engine.ruleset, frame)

    def _follow(self, cluster: Cluster, changes: Changes) -> None:
        """Let engine and node ports take the changes, or all of the cluster the first time, or after an error."""
        followed, self._followed = self._followed, False
        self._engine.update(cluster, changes if followed else None)
        if followed:
            self._ports.update(changes.get("services", {}))
        else:
            self._ports.replace(cluster.services)
        changed = self._engine.take_changed()
        self._unresolved.update(self._engine.ruleset, changed)
        self._owed = joined(self._owed, changed)
        self._followed = True

    def _times(
        self, trigger: Trigger, changed: Changed, synced: Synced, began: float, now: float
    ) -> dict[str, tuple[float, ...]]:
        times = {SYNC_TIME: (now - began,), **synced.observations}
        if trigger.seen is not None and changed and not trigger.start and not synced.failures and not synced.failed:
            times[LATENCY] = (now - trigger.seen,)
        return times

    def _outcome(self, synced: Synced, framed: Framed, times: Mapping[str, tuple[float, ...]] | None = None) -> Outcome:
        if not synced.failures:
            self._succeeded = self._clock.time()
        tell_repairs(log, synced.repaired)
        refused = tuple(Failure("policy", f"{key}: {why}") for key, why in sorted(synced.failed.items()))
        told = (self._engine.problems, self._unresolved.lines)
        problems = (line for by_key in told for key in sorted(by_key) for line in by_key[key])
        return Outcome(
            writes=synced.writes,
            failures=(*synced.failures, *refused),
            warnings=(*framed.warnings, *synced.warnings, *self._kept, *problems),
            notices=tuple(self._notices(synced)),
            counts={**self._counts(synced), **synced.counts},
            counters={REPAIRS: float(len(synced.repaired))},
            observations=times or {},
            components=(Component(name=COMPONENT, period=self.period, last_success=self._succeeded),),
            retry_after=max(0.05, self._full_at - self._clock.monotonic()),
        )

    def _counts(self, synced: Synced) -> dict[str, float]:
        ruleset = self._engine.ruleset
        isolated = sum(pod.ingress is not None or pod.egress is not None for pod in ruleset.pods.values())
        return {
            "policy_enforced": len(ruleset.policies),
            "policy_failed": len(synced.failed),
            "policy_local_pods": len(ruleset.pods),
            "policy_isolated_pods": isolated,
            "policy_sets": len(ruleset.members),
        }

    def _notices(self, synced: Synced) -> Iterator[Notice]:
        """Events on policies: from the nodes where they count, else every node would tell every fault."""
        policies = self._engine.ruleset.policies
        for reason, by_key in ((INVALID, self._engine.problems), (UNRESOLVED, self._unresolved.lines)):
            for key in sorted(by_key.keys() & policies.keys()):
                for line in by_key[key]:
                    yield _notice(key, policies[key].uid, reason, line)
        for key in sorted(synced.failed):
            uid = policies[key].uid if key in policies else ""
            yield _notice(key, uid, REFUSED, f"node {self._settings.node_name}: {synced.failed[key]}")


def still_owed(changed: Changed, synced: Synced) -> Changed:
    """What of ``changed`` must be handed over again; policies that failed alone are all of it."""
    return changed if synced.failures else Changed(policies=set(synced.failed))


def _notice(key: Key, uid: str, reason: str, text: str) -> Notice:
    namespace, _, name = key.partition("/")
    return Notice(
        worker="firewall", kind="NetworkPolicy", namespace=namespace, name=name, uid=uid, reason=reason, text=text
    )


def joined_outcomes(first: Outcome, *others: Outcome) -> Outcome:
    """The outcome of a sync with those of what was done after it."""
    counters = dict(first.counters)
    for other in others:
        counters |= other.counters
    return replace(
        first,
        writes=first.writes + sum(other.writes for other in others),
        failures=(*first.failures, *(failure for other in others for failure in other.failures)),
        warnings=tuple(dict.fromkeys((*first.warnings, *(line for other in others for line in other.warnings)))),
        counters=counters,
    )
