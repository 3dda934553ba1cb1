"""What the router would change in gobgpd and in the kernel now, and what it has found there.

Touches the watcher's sockets, gobgpd and the kernel, all for reading. It takes the same snapshot as the worker does and
goes the worker's way without the worker's memory: so on a healthy node there is nothing to change.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kube_router.ipc.once import NoCluster, take_cluster
from kube_router.ipc.replica import Cluster
from kube_router.workers.nodefacts import NodeFacts, node_facts
from kube_router.workers.router import names
from kube_router.workers.router.bgpstate import BgpState
from kube_router.workers.router.controller import RouterController
from kube_router.workers.router.dataplane import Dataplane
from kube_router.workers.router.gobgp.client import Client, GobgpError, connect
from kube_router.workers.router.gobgp.watch import Watch
from kube_router.workers.router.plan import Plan, diff
from kube_router.workers.router.rehearsal import Script
from kube_router.workers.router.rib import Rib
from kube_router.workers.router.routes import Decision
from kube_router.workers.router.vips import VipTable
from kube_router.workers.router.wish import wished
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Secrets, Settings

NAME = "plan-router"
TABLE_SECONDS = 5.0
"""How long the table of a daemon that runs is waited for."""


class PlanError(Exception):
    """No plan can be made: no state from the watcher, or gobgpd or the kernel cannot be read; one line."""


@dataclass(frozen=True, slots=True)
class Preview:
    """``changes``: a printable step each, gobgpd's first. ``stale``: the state is not confirmed, so the worker
    removes nothing now. ``daemon``: which gobgpd answers.
    """

    daemon: str
    stale: bool
    changes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class View:
    """What was found, and what would be done about it.

    ``learned``: next hop by prefix. ``decisions``: what becomes of each of them. ``kernel``: steps as text.
    ``failures``: what could not be read.
    """

    generation: int
    actual: BgpState
    learned: Mapping[str, str]
    decisions: Mapping[str, Decision]
    plan: Plan
    kernel: tuple[str, ...]
    failures: tuple[str, ...]
    stale: bool


def preview(settings: Settings, secrets: Secrets, ipc: Path, seconds: float) -> Preview:
    """What the worker of these settings would change; ``ipc`` is the agent's socket directory.

    Raises `PlanError`.
    """
    view = look(settings, secrets, ipc, seconds)
    if view.failures:
        raise PlanError(f"the kernel cannot be read: {view.failures[0]}")
    changes = (*(f"gobgpd: {step}" for step in view.plan.steps), *(f"kernel: {line}" for line in view.kernel))
    return Preview(f"gobgpd {view.generation}", view.stale, changes)


def look(settings: Settings, secrets: Secrets, ipc: Path, seconds: float) -> View:
    """`rehearse` with what the watcher says; ``ipc`` is the agent's socket directory. Raises `PlanError`."""
    try:
        cluster = take_cluster(NAME, RouterController.kinds, ipc, seconds)
    except NoCluster as error:
        raise PlanError(str(error)) from None
    return rehearse(settings, secrets, cluster)


def rehearse(settings: Settings, secrets: Secrets, cluster: Cluster) -> View:
    """Go through one reconciliation of the calling thread's namespace without any write. Raises `PlanError`."""
    node = cluster.nodes.get(settings.node_name)
    if node is None:
        raise PlanError(f"node {settings.node_name}: is not in the cluster")
    facts = tuple(node_facts(cluster.nodes[key], settings.families) for key in sorted(cluster.nodes))
    own = next(item for item in facts if item.name == node.name)
    vips = VipTable(settings).update(own, cluster.services, cluster.endpointslices, None)
    keep = not cluster.state.in_sync
    try:
        client = connect(Path(settings.run_dir) / names.SOCKET)
        try:
            rib = _table(client)
            actual = client.observe(dict(rib.local))
            wanted = wished(client.generation, node, own, facts, settings, secrets, actual, vips).state
            plan = diff(actual, wanted, keep=keep, learned=rib.routes)
            learning = _is_learning(client, settings, wanted)
        finally:
            client.close()
    except GobgpError as error:
        raise PlanError(f"gobgpd: {error}") from None
    kernel, decisions, failures = _kernel(settings, own, facts, rib.routes, keep, learning)
    return View(client.generation, actual, dict(rib.routes), decisions, plan, kernel, failures, keep)


def _table(client: Client) -> Rib:
    """The best paths, learned and own, as the daemon's event stream begins with them."""
    rib = Rib()
    if client.speaker() is None:
        return rib
    eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    watch = Watch(client, eventfd)
    try:
        end = time.monotonic() + TABLE_SECONDS
        while (left := end - time.monotonic()) > 0:
            select.select([eventfd], [], [], left)
            taken = watch.take()
            rib.apply(taken.routes.values())
            if taken.broken is not None:
                raise GobgpError(taken.broken, gone=True)
            if taken.table:
                return rib
    finally:
        watch.close()
        os.close(eventfd)
    raise GobgpError(f"its table did not come within {TABLE_SECONDS:g} s")


def _is_learning(client: Client, settings: Settings, wanted: BgpState) -> bool:
    """Whether the worker still waits for peers of a young daemon, and removes no route meanwhile."""
    if client.daemon_age() >= settings.bgp_graceful_restart_time:
        return False
    up = [report.status for report in client.peers() if report.status.established]
    return len(up) < len(wanted.neighbors) or any(status.waited_for for status in up)


def _kernel(
    settings: Settings,
    own: NodeFacts,
    nodes: tuple[NodeFacts, ...],
    learned: Mapping[str, str],
    keep: bool,
    learning: bool,
) -> tuple[tuple[str, ...], Mapping[str, Decision], tuple[str, ...]]:
    """(steps, decisions, failures) of a sync of the dataplane that writes nothing."""
    script = Script()
    dataplane = Dataplane(settings, drivers=script.drivers())
    try:
        outcome = dataplane.reconcile(own, nodes, learned, None, Trigger(start=True), keep, learning)
        return tuple(script.lines), dict(dataplane.decisions), tuple(map(str, outcome.failures))
    finally:
        dataplane.close()
