"""The router worker's part of the loop: BGP and the dataplane, two halves that fail independently.

Touches nothing itself. watch → snapshot → **desired → observe → diff → apply**, once for gobgpd (`Bgp`), once for the
kernel (`Dataplane`). What joins them is the table of learned routes: a route that a peer announces or withdraws takes
the short way from gobgpd's event to one netlink message, without a look at the cluster or at the daemon's state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

from kube_router.ipc.messages import Component, Key, Kind, Node, Notice
from kube_router.ipc.replica import Cluster
from kube_router.workers.model import Failure, Outcome
from kube_router.workers.nodefacts import NodeFacts, node_facts
from kube_router.workers.router.aws import SourceDestCheck
from kube_router.workers.router.bgp import Bgp
from kube_router.workers.router.dataplane import Dataplane
from kube_router.workers.router.vips import Vips, VipTable
from kube_router.workers.runtime import Clock, SystemClock, Trigger
from kube_router.workers.settings import Secrets, Settings

log = logging.getLogger(__name__)

KEEP_RETRY_SECONDS = 1.0


class RouterController:
    """Implements `workers.runtime.Controller`."""

    name = "router"
    kinds: tuple[Kind, ...] = ("nodes", "services", "endpointslices")

    def __init__(
        self, settings: Settings, secrets: Secrets, *, bgp: Bgp | None = None, clock: Clock | None = None
    ) -> None:
        """Acts on the network namespace of the calling thread."""
        self.period = settings.routes_sync_period
        self._settings = settings
        self._clock = clock or SystemClock()
        self._bgp = bgp or Bgp(settings, secrets, self._clock)
        self._dataplane = Dataplane(settings)
        self._facts: dict[Key, tuple[Node, NodeFacts]] = {}
        self._nodes: tuple[NodeFacts, ...] = ()
        self._seen: Mapping[Key, Node] | None = None
        self._aws = SourceDestCheck(settings)
        self._vips = VipTable(settings)
        self._vips_followed = False
        self._announced: Vips | None = None
        self._dataplane_woken = False
        self._dataplane_failed = True
        self._held = (True, True)
        self._full_at = self._bgp_full_at = 0.0
        self._routes_synced: float | None = None

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """gobgpd's events, and foreign changes in the kernel; only the latter make the kernel be read again."""
        kernel = {descriptor: self._noting(drain) for descriptor, drain in self._dataplane.wakers().items()}
        return {**self._bgp.wakers(), **kernel}

    def close(self) -> None:
        """Let go of gobgpd and the kernel's sockets; both keep everything."""
        self._bgp.close()
        self._dataplane.close()
        self._aws.close()

    def _noting(self, drain: Callable[[], bool]) -> Callable[[], bool]:
        def noted() -> bool:
            woken = drain()
            self._dataplane_woken = self._dataplane_woken or woken
            return woken

        return noted

    def reconcile(self, cluster: Cluster, trigger: Trigger) -> Outcome:
        """Bring gobgpd and the kernel to what the cluster and the peers say."""
        self._look_at(cluster)
        own_node = cluster.nodes.get(self._settings.node_name)
        if own_node is None:
            text = f"node {self._settings.node_name}: is not in the cluster; routes and BGP stay as they are"
            return Outcome(failures=(Failure("node", text),))
        own = self._facts[own_node.key][1]
        keep = not cluster.state.in_sync
        bgp = _guarded("BGP", lambda: self._sync_bgp(own_node, own, cluster, trigger, keep))
        dataplane = _guarded("dataplane", lambda: self._sync_dataplane(own, trigger, keep))
        aws = _guarded("AWS", lambda: self._aws.look(own_node, self._clock.monotonic()))
        return self._joined(own_node, own, bgp, dataplane, aws, keep)

    def _look_at(self, cluster: Cluster) -> None:
        """Derive facts of new and changed Nodes; those of the others stay the same objects."""
        nodes = cluster.nodes
        if self._seen is nodes:
            return
        facts = {}
        for key in sorted(nodes):
            known = self._facts.get(key)
            node = nodes[key]
            unchanged = known is not None and known[0] is node
            facts[key] = known if unchanged and known else (node, node_facts(node, self._settings.families))
        self._facts, self._seen = facts, nodes
        self._nodes = tuple(item[1] for item in facts.values())

    def _sync_bgp(self, own_node: Node, own: NodeFacts, cluster: Cluster, trigger: Trigger, keep: bool) -> Outcome:
        vips = self._follow_services(own, cluster, trigger)
        # Services and slices change all the time; what counts is whether that changed an address to announce.
        changed = (
            trigger.start or trigger.confirmed or bool(trigger.changes.get("nodes")) or vips is not self._announced
        )
        # The loop's own period begins anew at each call, and calls for the sake of routes come more often than that.
        observe = self._clock.monotonic() >= self._bgp_full_at
        outcome = self._bgp.reconcile(
            own_node, own, self._nodes, vips, compare=changed, observe=observe, retry=trigger.retry, keep=keep
        )
        if not outcome.failures:
            self._announced = vips
        if observe:
            self._bgp_full_at = self._clock.monotonic() + self.period
        return outcome

    def _follow_services(self, own: NodeFacts, cluster: Cluster, trigger: Trigger) -> Vips:
        """Let the table of VIPs take the changes, or all of the cluster the first time, or after an error."""
        followed, self._vips_followed = self._vips_followed, False
        changes = trigger.changes if followed else None
        vips = self._vips.update(own, cluster.services, cluster.endpointslices, changes)
        self._vips_followed = True
        return vips

    def _sync_dataplane(self, own: NodeFacts, trigger: Trigger, keep: bool) -> Outcome:
        self._bgp.listen()
        now = self._clock.monotonic()
        learning = self._bgp.hold_deletions
        due = now >= self._full_at
        changed: frozenset[str] | None = self._bgp.take_changed()
        if due or trigger.start or self._dataplane_failed or (keep, learning) != self._held:
            changed = None
        own_trigger = Trigger(
            start=trigger.start,
            period=due,
            woken=self._dataplane_woken,
            retry=self._dataplane_failed and not trigger.start,
            confirmed=trigger.confirmed,
            changes=trigger.changes,
        )
        self._dataplane_failed = True
        outcome = self._dataplane.reconcile(own, self._nodes, self._bgp.learned, changed, own_trigger, keep, learning)
        self._dataplane_failed = bool(outcome.failures)
        self._dataplane_woken, self._held = False, (keep, learning)
        if not outcome.failures:
            self._routes_synced = self._clock.time()
        if due:
            self._full_at = self._clock.monotonic() + self._settings.injected_routes_sync_period
        return outcome

    def _joined(
        self, node: Node, own: NodeFacts, bgp: Outcome, dataplane: Outcome, aws: Outcome, keep: bool
    ) -> Outcome:
        problems = () if self._settings.enable_cni else own.problems  # the cni worker tells them otherwise
        notices = tuple(
            Notice(worker=self.name, kind="Node", name=own.name, uid=node.uid, reason=item.reason, text=item.text)
            for item in problems
        )
        retries = [item for item in (bgp.retry_after, dataplane.retry_after, aws.retry_after) if item is not None]
        retries.append(max(0.05, self._full_at - self._clock.monotonic()))
        if keep:
            retries.append(KEEP_RETRY_SECONDS)
        routes = Component(
            name="RouteSyncController",
            period=self._settings.injected_routes_sync_period,
            last_success=self._routes_synced,
        )
        return Outcome(
            writes=bgp.writes + dataplane.writes,
            failures=(*bgp.failures, *dataplane.failures, *aws.failures),
            warnings=tuple(
                dict.fromkeys(
                    (
                        *(item.text for item in problems),
                        *bgp.warnings,
                        *self._vips.lines,
                        *dataplane.warnings,
                        *aws.warnings,
                    )
                )
            ),
            notices=(*notices, *bgp.notices, *self._service_notices(own), *dataplane.notices),
            counts={**bgp.counts, **dataplane.counts},
            counters={**bgp.counters, **dataplane.counters},
            observations={**bgp.observations, **dataplane.observations},
            components=(*bgp.components, routes, *dataplane.components),
            sessions=bgp.sessions,
            retry_after=min(retries),
        )

    def _service_notices(self, own: NodeFacts) -> Iterator[Notice]:
        """Events on Services. Every node finds the same faults, so one of them tells: the first by name."""
        if self._nodes[0].name != own.name:
            return
        for item in self._vips.problems:
            namespace, _, name = item.key.partition("/")
            reason, text = item.problem.reason, item.problem.text
            yield Notice(
                worker=self.name, kind="Service", namespace=namespace, name=name, uid=item.uid, reason=reason, text=text
            )


def _guarded(half: str, work: Callable[[], Outcome]) -> Outcome:
    """The outcome of one half; an unexpected exception is its failure and not the other half's."""
    try:
        return work()
    except Exception as error:  # the other half must go on
        log.exception("%s failed with an unexpected error", half)
        return Outcome(failures=(Failure("internal", f"{half}: {type(error).__name__}: {error}"),))
