"""The cni worker's part of the loop: own Node and links in; bridge, sysctls and CNI file brought in line.

Touches the kernel through `Host`. watch → snapshot → **desired → observe → diff → apply**; a plan that is empty touches
nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from kube_router.ipc.messages import Kind, Node, Notice
from kube_router.ipc.replica import Cluster
from kube_router.workers.cni.desired import DesiredCni, OwnNode, desired_state, own_node
from kube_router.workers.cni.host import Applied, Host
from kube_router.workers.cni.names import BRIDGE, PHASE_BRIDGE
from kube_router.workers.cni.plan import (
    CreateBridge,
    Plan,
    SetBridgeMtu,
    SetBridgeUp,
    WriteConf,
    WriteSysctl,
    diff,
)
from kube_router.workers.kernel.filewatch import FileWatch
from kube_router.workers.kernel.links import LinkMonitor
from kube_router.workers.linkfacts import Links
from kube_router.workers.model import Failure, Outcome
from kube_router.workers.nodefacts import Problem, node_facts, overlapping_pod_cidrs
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings

log = logging.getLogger(__name__)

_KINDS: Mapping[type, str] = {
    CreateBridge: "bridge",
    SetBridgeUp: "bridge",
    SetBridgeMtu: "bridge",
    WriteSysctl: "sysctl",
    WriteConf: "cni-file",
}
"""What a repair is counted as; one of a kind in each reconciliation."""
PERIOD_SECONDS = 60.0
"""Of the background check; foreign changes of the bridge and of the file are heard of at once."""


class CniController:
    """Implements `workers.runtime.Controller`."""

    name = "cni"
    kinds: tuple[Kind, ...] = ("nodes",)
    period = PERIOD_SECONDS

    def __init__(self, settings: Settings) -> None:
        """Opens the sockets in the network namespace of the calling thread; raises OSError."""
        self._settings = settings
        self._host = Host(settings.cni_conf_file, settings.state_dir)
        self._links = LinkMonitor()
        self._file = _watch_file(settings.cni_conf_file)
        self._overlaps: tuple[Problem, ...] = ()
        self._module_refused: str | None = None
        self._done: DesiredCni | None = None
        """What the host was last brought to without a failure."""

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """Links and addresses that matter here, and the configuration file."""
        wakers = {self._links.fileno(): self._links.drain}
        if self._file is not None:
            wakers[self._file.fileno()] = self._file.drain
        return wakers

    def close(self) -> None:
        """Close the sockets."""
        self._host.close()
        self._links.close()
        if self._file is not None:
            self._file.close()

    @property
    def link_writes(self) -> int:
        """Netlink requests sent so far that change something."""
        return self._host.link_writes

    def reconcile(self, cluster: Cluster, trigger: Trigger) -> Outcome:
        """Compare and mend everything; it is little, so no case is left out however it was triggered."""
        settings = self._settings
        node = cluster.nodes.get(settings.node_name)
        own = own_node(
            settings.node_name, node, settings.families, confirmed=cluster.state.in_sync and not cluster.state.stale
        )
        if trigger.start or "nodes" in trigger.changes:
            self._overlaps = self._overlaps_with_own(cluster)
        if self._file is not None:
            self._file.follow()
        try:
            links = self._host.observe_links()
        except OSError as error:
            return Outcome(failures=(Failure(PHASE_BRIDGE, f"links cannot be listed: {error.strerror}"),))
        desired = desired_state(own, links, self._settings)
        plan, applied = self._mend(own, desired, links, load_modules=trigger.start or trigger.period)
        failures = (*plan.failures, *applied.failures)
        repairs = _repairs(plan) if desired == self._done and not failures else {}
        self._done = None if failures else desired
        # As seen *before* the steps: what changed since then, by whomever, wakes the next reconciliation.
        self._follow(own, links)
        problems = (*(own.facts.problems if own.facts else ()), *self._overlaps)
        warnings = [*(problem.text for problem in problems), *plan.warnings]
        warnings += [text for text in (applied.mtu_refused, self._module_refused) if text is not None]
        return Outcome(
            writes=applied.writes,
            failures=failures,
            warnings=tuple(warnings),
            counters={f'controller_repairs{{what="{what}"}}': float(count) for what, count in repairs.items()},
            notices=tuple(_notice(node, problem) for problem in problems) if node is not None else (),
        )

    def _mend(self, own: OwnNode, desired: DesiredCni, links: Links, load_modules: bool) -> tuple[Plan, Applied]:
        """Plan and apply; a second time, on what the kernel allows, when it refused the MTU or a module."""
        plan = self._plan(desired, links, load_modules)
        applied = self._apply(plan)
        if load_modules:
            self._module_refused = applied.module_refused
        if applied.mtu_refused is None and applied.module_refused is None:
            return plan, applied
        links = self._host.observe_links()
        desired = desired_state(own, links, self._settings, mtu_refused=applied.mtu_refused is not None)
        plan = self._plan(desired, links, load_modules=False)
        again = self._apply(plan)
        return plan, Applied(
            applied.writes + again.writes,
            applied.failures + again.failures,
            applied.mtu_refused,
            applied.module_refused,
        )

    def _plan(self, desired: DesiredCni, links: Links, load_modules: bool) -> Plan:
        actual = self._host.observe(links, (*desired.sysctls, *desired.forwarding))
        return diff(actual, desired, load_modules=load_modules)

    def _apply(self, plan: Plan) -> Applied:
        for step in plan.steps:
            log.info("%s", step)
        return self._host.apply(plan)

    def _follow(self, own: OwnNode, links: Links) -> None:
        """Be woken by changes of the bridge, and of the link and address that the MTU comes from."""
        primary = own.facts.primary if own.facts is not None else None
        uplink = links.link_of(primary) if primary is not None else None
        known = [link for link in (uplink, links.named(BRIDGE)) if link is not None]
        self._links.follow(known, (BRIDGE,), () if primary is None else (primary,))

    def _overlaps_with_own(self, cluster: Cluster) -> tuple[Problem, ...]:
        facts = [node_facts(node, self._settings.families) for node in cluster.nodes.values()]
        overlaps = overlapping_pod_cidrs(facts)
        return tuple(overlap.problem for overlap in overlaps if overlap.involves(self._settings.node_name))


def _repairs(plan: Plan) -> Mapping[str, int]:
    """What somebody else changed and this plan puts back, by kind; told in one line."""
    kinds = [_KINDS[type(step)] for step in plan.steps if type(step) in _KINDS]
    if kinds:
        log.warning("put back what somebody else took or changed: %s", "; ".join(map(str, plan.steps)))
    return dict.fromkeys(kinds, 1)


def _watch_file(path: str) -> FileWatch | None:
    try:
        return FileWatch(path)
    except OSError as error:
        text = "%s: cannot be watched (%s), changes by others are seen within %g s"
        log.warning(text, path, error.strerror, PERIOD_SECONDS)
        return None


def _notice(node: Node, problem: Problem) -> Notice:
    return Notice(worker="cni", kind="Node", name=node.name, uid=node.uid, reason=problem.reason, text=problem.text)
