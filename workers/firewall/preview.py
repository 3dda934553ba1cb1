"""What the firewall would change in the kernel now: the worker's own core and backend, on a replica of its own.

Touches sockets and the kernel, both for reading. It takes the same snapshot from the watcher as the worker does and
asks a backend without memory for its plan, which is the plan that a sync carries out; so on a healthy node it is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kube_router.ipc.once import NoCluster, take_cluster
from kube_router.workers.firewall.backend import BackendError
from kube_router.workers.firewall.controller import FirewallController
from kube_router.workers.firewall.engine import Engine
from kube_router.workers.firewall.frame import FrameMaker, NodePorts
from kube_router.workers.firewall.reach import reach
from kube_router.workers.kernel.ipset import SetError
from kube_router.workers.kernel.iptables import IptablesError
from kube_router.workers.kernel.netlink import Overflow
from kube_router.workers.kernel.nftsocket import NftError
from kube_router.workers.settings import Settings

NAME = "plan-firewall"


class PlanError(Exception):
    """No plan can be made: the watcher gives no state, or the kernel cannot be read; one line."""


@dataclass(frozen=True, slots=True)
class Preview:
    """``changes``: a printable line each. ``stale``: the state is not confirmed, so the worker removes nothing now."""

    backend: str
    stale: bool
    changes: tuple[str, ...]


def preview(settings: Settings, ipc: Path, seconds: float) -> Preview:
    """What the worker of these settings would change; ``ipc`` is the agent's socket directory.

    Raises `PlanError`.
    """
    try:
        cluster = take_cluster(NAME, FirewallController.kinds, ipc, seconds)
    except NoCluster as error:
        raise PlanError(str(error)) from None
    engine, ports = Engine(settings.node_name, settings.families), NodePorts()
    engine.update(cluster, None)
    ports.replace(cluster.services)
    frame = FrameMaker(settings).make(cluster.nodes.get(settings.node_name), ports.all).frame
    try:
        kernel = reach(settings)
        try:
            changes = kernel.backend.plan(engine.ruleset, frame)
        finally:
            kernel.close()
    except (BackendError, IptablesError, NftError, SetError, Overflow, OSError) as error:
        raise PlanError(f"the kernel cannot be read: {error}") from error
    return Preview(kernel.backend.name, not cluster.state.in_sync, changes)
